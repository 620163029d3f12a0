"""GGUF files: exact dequantised weights, one conversion, damage found and mended."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from checkpoints import VOCABULARY, write_gguf
from dart_llm import cache
from dart_llm.cache import sweep
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256
from dart_llm.models import gguf as gguf_cache
from dart_llm.models import loading as resolve
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.gguf import (
    converted_folder,
    file_type_name,
    is_intact,
    quantisation_name,
    read_header,
    read_source,
    scratch_folder,
)
from dart_llm.models.loading import load


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def folder_of(gguf: Path, cache_dir: Path) -> Path:
    return converted_folder(cache_dir / "dart-llm", file_sha256(gguf))


def test_float32_holds_the_exact_dequantised_weights(gguf: Path, tmp_path: Path) -> None:
    model, tokenizer = load(gguf, dtype="float32", cache_dir=tmp_path)
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}

    def expected(name: str) -> torch.Tensor:
        tensor = stored[name]
        return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())

    state = model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], expected("token_embd.weight"))
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        assert torch.equal(state[name], expected(f"blk.1.ffn_{part}.weight"))
    assert not model.training
    assert (len(tokenizer), tokenizer.model_max_length) == (VOCABULARY, 128)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )


def test_the_default_dtype_is_bfloat16_and_the_facts_name_the_file(
    gguf: Path, tmp_path: Path
) -> None:
    model, _ = load(gguf, cache_dir=tmp_path)
    exact, _ = load(gguf, dtype=torch.float32, cache_dir=tmp_path)
    for name, value in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(torch.bfloat16))
    assert checkpoint_facts(model) == {
        "name": "tiny",
        "source": "gguf file, dequantised",
        "path": str(gguf),
        "revision": None,
        "file_quantisation": "Q4_1",
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "dtype": "bfloat16",
        "parameters": 89_152,
    }


def test_the_conversion_happens_once_and_leaves_nothing_else(gguf: Path, tmp_path: Path) -> None:
    said: list[str] = []
    load(gguf, cache_dir=tmp_path, progress=said.append)
    load(gguf, cache_dir=tmp_path, progress=said.append)
    assert said == ["converting tiny.gguf to safetensors, once", "loading tiny", "loading tiny"]
    folder = folder_of(gguf, tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    record = json.loads((folder / "source.json").read_text())
    assert record["file"] == "tiny.gguf"
    assert record["tensor_types"] == {"Q8_0": 19_200, "Q4_1": 69_632, "F32": 320}
    weights = folder / "model.safetensors"
    assert record["files"]["model.safetensors"] == {
        "size": weights.stat().st_size,
        "sha256": file_sha256(weights),
    }
    assert weights.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("damage", ["cut", "record", "missing"])
def test_a_damaged_copy_is_made_again(gguf: Path, tmp_path: Path, damage: str) -> None:
    load(gguf, cache_dir=tmp_path)
    folder = folder_of(gguf, tmp_path)
    intact = file_sha256(folder / "model.safetensors")
    if damage == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "record":
        (folder / "source.json").write_text('{"format": 1, "sha2')
    else:
        (folder / "tokenizer.json").unlink()
    said: list[str] = []
    load(gguf, cache_dir=tmp_path, progress=said.append)
    assert said[0] == "converting tiny.gguf to safetensors, once"
    assert file_sha256(folder / "model.safetensors") == intact
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_verify_finds_damage_that_keeps_the_size(gguf: Path, tmp_path: Path) -> None:
    load(gguf, cache_dir=tmp_path)
    folder = folder_of(gguf, tmp_path)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    intact = bytes(content)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert is_intact(folder, file_sha256(gguf))
    assert not is_intact(folder, file_sha256(gguf), full=True)
    load(gguf, cache_dir=tmp_path, verify=True)
    assert weights.read_bytes() == intact


def test_of_two_processes_the_first_one_wins(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gguf_cache._write_dense
    folder = folder_of(gguf, tmp_path)

    def overtaken(source: Path, fresh: Path) -> None:
        monkeypatch.setattr(gguf_cache, "_write_dense", write)
        load(gguf, cache_dir=tmp_path)
        (folder / "first").touch()
        write(source, fresh)

    monkeypatch.setattr(gguf_cache, "_write_dense", overtaken)
    model, _ = load(gguf, cache_dir=tmp_path)
    assert (folder / "first").exists()
    assert model.config.name_or_path == str(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_large_file_is_read_directly(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, _ = load(gguf, cache_dir=tmp_path / "a")
    monkeypatch.setattr(resolve, "CONVERT_UP_TO", 1000)
    direct, tokenizer = load(gguf, cache_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert direct.dtype == torch.bfloat16
    assert len(tokenizer) == VOCABULARY
    for name, value in converted.state_dict().items():
        assert torch.equal(direct.state_dict()[name], value)
    assert checkpoint_facts(direct) == checkpoint_facts(converted)


def test_files_that_are_no_gguf_or_cut_off(gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.gguf"
    other.write_text("hello")
    with pytest.raises(LoadError, match=r"notes\.gguf is not a GGUF file"):
        load(other)
    os.truncate(gguf, gguf.stat().st_size // 2)
    with pytest.raises(LoadError) as caught:
        load(gguf, cache_dir=tmp_path)
    assert str(caught.value) == (
        "tiny.gguf is not a complete GGUF file; fetch it again and compare its size"
    )


def test_a_full_disk_and_an_unusable_cache(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadError, match="cannot be written; choose another one with --cache-dir"):
        load(gguf, cache_dir=tmp_path / "file")
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000)
    with pytest.raises(LoadError) as caught:
        load(gguf, cache_dir=tmp_path)
    assert str(caught.value) == (
        "the converted copy of tiny.gguf needs 0.4 MB on disk and only 0.1 MB are free in "
        f"{tmp_path / 'dart-llm'}; free some space or move the cache with --cache-dir or DART_CACHE"
    )


QUANTISATIONS = [
    ("Q4_1 Q8_0 F32", "Q4_1", "Q4_1"),
    ("Q5_0 Q4_K Q6_K Q8_0 F32", "Q4_K_M", "Q4_K, Q5_0, Q6_K, Q8_0 mix"),
    ("Q8_0 F32", "", "Q8_0"),
    ("Q4_0 F16", "Q4_K_M", "Q4_0"),
    ("F16", "F16", "F16"),
]


def test_names_of_quantisations() -> None:
    for types, named, expected in QUANTISATIONS:
        counts = {name: 10 + place for place, name in enumerate(types.split())}
        assert quantisation_name(counts, named) == expected
    assert [file_type_name(n) for n in (1, 3, 15, 9999)] == ["F16", "Q4_1", "Q4_K_M", ""]


def test_a_mixed_file_lists_its_types(tmp_path: Path) -> None:
    mixed = write_gguf(tmp_path / "mixed.gguf", ffn=GGMLQuantizationType.Q5_0)
    header = read_header(mixed)
    assert header.types == {"Q8_0": 19_200, "Q4_1": 32_768, "Q5_0": 36_864, "F32": 320}
    assert header.float32_bytes == 4 * 89_152
    assert np.sum(list(header.types.values())) == 89_152


def test_scratch_folders_of_killed_processes_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".tmp-old", tmp_path / ".tmp-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part").touch()
    os.utime(old, (0, 0))
    with scratch_folder(tmp_path) as scratch:
        sweep(tmp_path)
        assert scratch.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-new"]
    assert read_source(new) is None
