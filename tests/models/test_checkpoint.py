"""Provenance: what is known about a loaded checkpoint, and that nothing is left on the model."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import write_folder
from dart_llm.models import checkpoint
from dart_llm.models.checkpoint import checkpoint_facts, weights_sha256
from dart_llm.models.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny-llama"))


def test_the_facts_of_a_folder(folder: Path) -> None:
    weights = folder / "model.safetensors"
    model, _ = load(folder)
    before = set(vars(model))
    assert checkpoint_facts(model.float()) == {
        "name": folder.name,
        "source": "folder",
        "path": str(folder),
        "revision": None,
        "file_quantisation": "none",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dtype": "float32",
        "parameters": sum(tensor.numel() for tensor in load_file(weights).values()),
    }
    assert set(vars(model)) == before


def test_the_facts_of_a_model_from_elsewhere(folder: Path) -> None:
    facts = checkpoint_facts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16))
    assert facts["source"] == "not loaded by dart_llm"
    assert (facts["name"], facts["path"]) == (str(folder), str(folder))
    assert (facts["dtype"], facts["sha256"], facts["file_quantisation"]) == ("float16", None, None)


def test_facts_do_not_keep_a_model_alive(folder: Path) -> None:
    gc.collect()
    count = len(checkpoint._LOADED)
    model, _ = load(folder)
    assert len(checkpoint._LOADED) == count + 1
    del model
    gc.collect()
    assert len(checkpoint._LOADED) == count


def test_the_checksum_of_several_files_is_that_of_their_sha256sum_lines(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        save_file({"x": torch.full((3,), float(ord(name[0])))}, tmp_path / name)
    lines = "".join(
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.safetensors", "b.safetensors")
    )
    assert weights_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    assert weights_sha256(tmp_path / "nothing") is None
