"""GGUF files: exact dequantised weights, copies where they are needed, damage found and mended."""

import functools
import json
import os

import gguf as gguf_package
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from transformers import AutoConfig

from checkpoints import VOCABULARY, facts, write_gguf
from dart_llm import cache
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256
from dart_llm.models import loading
from dart_llm.models.cached import converted_folder, is_intact
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.gguf_file import (
    ARCHITECTURES,
    LONG,
    file_type_name,
    quantisation_name,
    quick_gguf,
    read_gguf,
)

load = functools.partial(loading.load, weights="dense")
READING = "reading the tokenizer of tiny.gguf, once (a few seconds)"
CONVERTING = "converting tiny.gguf to safetensors, once (about 5 seconds)"


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def unknown(monkeypatch):
    """As if Llama's files were not read in blocks."""
    monkeypatch.delitem(ARCHITECTURES, "llama")


def folder_of(gguf, cache_dir):
    return converted_folder(cache_dir / "dart-llm", file_sha256(gguf))


def test_dense_weights(gguf, tmp_path):
    """Read from the file, with no copy of them; exact as float32, bfloat16 unless asked."""
    said = []
    exact, tokenizer = load(gguf, dtype="float32", cache_dir=tmp_path, progress=said.append)
    model, _ = load(gguf, cache_dir=tmp_path, progress=said.append)
    sizes = "loading tiny: 0.4 MB in float32", "loading tiny: 0.2 MB in bfloat16"
    assert said == [READING, *sizes] and not exact.training
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    state, rounded = exact.state_dict(), model.state_dict()
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    for part in ("gate", "up", "down"):
        names[f"model.layers.1.mlp.{part}_proj.weight"] = f"blk.1.ffn_{part}.weight"
    for name, old in names.items():
        dense = quants.dequantize(stored[old].data, stored[old].tensor_type)
        assert torch.equal(state[name], torch.from_numpy(dense.copy()))
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in state.items())
    assert (len(tokenizer), tokenizer.model_max_length) == (VOCABULARY, 128)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi"
    known = {"name": "tiny", "source": "gguf file, dequantised", "path": str(gguf)}
    known |= {"file_quantisation": "Q4_1", "sha256": file_sha256(gguf), "parameters": 89_152}
    assert checkpoint_facts(model) == facts(**known)
    folder = converted_folder(tmp_path / "dart-llm", file_sha256(gguf), packed=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.usefixtures("unknown")
def test_the_dense_copy(gguf, tmp_path):
    """Of a file that transformers alone reads: made once, with a record."""
    said = []
    exact, _ = load(gguf, dtype="float32", cache_dir=tmp_path, progress=said.append)
    model, _ = load(gguf, cache_dir=tmp_path, progress=said.append)
    sizes = "loading tiny: 0.4 MB in float32", "loading tiny: 0.2 MB in bfloat16"
    assert said == [CONVERTING, *sizes]
    rounded = model.state_dict()
    assert all(
        torch.equal(rounded[name], one.bfloat16()) for name, one in exact.state_dict().items()
    )
    folder = folder_of(gguf, tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    record, weights = json.loads((folder / "source.json").read_text()), folder / "model.safetensors"
    assert record["tensor_types"] == {"Q8_0": 19_200, "Q4_1": 69_632, "F32": 320}
    found = {"size": weights.stat().st_size, "sha256": file_sha256(weights)}
    assert record["files"]["model.safetensors"] == found


def test_a_copy_is_what_is_read_without_one(gguf, tmp_path, request):
    """Transformers' reading of a whole file and ours, to the last bit, in dtypes and devices."""
    ours = [load(gguf, cache_dir=tmp_path, dtype=d)[0] for d in ("float32", "bfloat16")]
    placed, _ = load(gguf, cache_dir=tmp_path, dtype="float32", device_map={"": "cpu"})
    request.getfixturevalue("unknown")
    theirs = [load(gguf, cache_dir=tmp_path, dtype=d)[0] for d in ("float32", "bfloat16")]
    for one, other in zip([*ours, placed], [*theirs, theirs[0]], strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype
        assert one.generation_config.to_dict() == other.generation_config.to_dict()
        for (name, value), (same, wanted) in zip(
            one.state_dict().items(), other.state_dict().items(), strict=True
        ):
            assert name == same and torch.equal(value, wanted)
        assert one.lm_head.weight is one.model.embed_tokens.weight


def test_a_configuration_is_the_same_without_long_lists(gguf, tmp_path):
    """The vocabulary's size is its length where the file does not state it."""
    data = gguf.read_bytes()
    assert VOCABULARY > LONG and data.count(b"llama.vocab_size") == 1
    gguf.write_bytes(data.replace(b"llama.vocab_size", b"llama.other_size"))
    read = functools.partial(AutoConfig.from_pretrained, str(tmp_path), gguf_file=gguf.name)
    whole = read().to_dict()
    with quick_gguf():
        assert gguf_package.GGUFReader is not GGUFReader and read().to_dict() == whole
    assert gguf_package.GGUFReader is GGUFReader and whole["vocab_size"] == VOCABULARY


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_folder_is_made_again(packed, gguf, tmp_path, request):
    """Cut off, without its record, without a file; of the same size only where that is asked."""
    if not packed:
        request.getfixturevalue("unknown")
    load(gguf, cache_dir=tmp_path)
    folder = converted_folder(tmp_path / "dart-llm", file_sha256(gguf), packed=packed)
    damaged = folder / ("config.json" if packed else "model.safetensors")
    intact = damaged.read_bytes()
    damages = {
        "cut": lambda: os.truncate(damaged, 100),
        "record": lambda: (folder / "source.json").write_text('{"format": 1, "sha2'),
        "missing": (folder / "tokenizer.json").unlink,
        "one byte": lambda: damaged.write_bytes(b"X" + intact[1:]),
    }
    for damage, make in damages.items():
        make()
        assert is_intact(folder, file_sha256(gguf)) == (damage == "one byte")
        assert not is_intact(folder, file_sha256(gguf), full=True)
        said = []
        load(gguf, cache_dir=tmp_path, verify=damage == "one byte", progress=said.append)
        assert said[0] == (READING if packed else CONVERTING)
        assert damaged.read_bytes() == intact, damage
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("unknown")
def test_a_large_file_is_read_directly(gguf, tmp_path, monkeypatch):
    converted, _ = load(gguf, cache_dir=tmp_path / "a")
    monkeypatch.setattr(loading, "CONVERT_UP_TO", 1000)
    direct, tokenizer = load(gguf, cache_dir=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert direct.dtype == torch.bfloat16 and len(tokenizer) == VOCABULARY
    for name, value in converted.state_dict().items():
        assert torch.equal(direct.state_dict()[name], value)
    assert checkpoint_facts(direct) == checkpoint_facts(converted)


def test_files_and_folders_that_cannot_be_used(gguf, tmp_path, monkeypatch):
    other = tmp_path / "notes.gguf"
    other.write_text("hello")
    with pytest.raises(LoadError, match=r"notes\.gguf is not a GGUF file"):
        load(other)
    with pytest.raises(LoadError, match="cannot be written; choose another one with --cache-dir"):
        load(gguf, cache_dir=other)
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000)
    needs = r"{} tiny\.gguf needs {} MB on disk and only 0\.1 MB are free in .*/dart-llm;"
    with pytest.raises(LoadError, match=needs.format("what belongs to", 50)):
        load(gguf, cache_dir=tmp_path)
    with monkeypatch.context() as change:
        change.delitem(ARCHITECTURES, "llama")
        with pytest.raises(LoadError, match=needs.format("the converted copy of", r"0\.4")):
            load(gguf, cache_dir=tmp_path)


QUANTISATIONS = [
    ("Q4_1 Q8_0 F32", "Q4_1", "Q4_1"),
    ("Q5_0 Q4_K Q6_K Q8_0 F32", "Q4_K_M", "Q4_K, Q5_0, Q6_K, Q8_0 mix"),
    ("Q8_0 F32", "", "Q8_0"),
    ("Q4_0 F16", "Q4_K_M", "Q4_0"),
    ("F16", "F16", "F16"),
]


def test_names_of_quantisations(tmp_path):
    for types, named, expected in QUANTISATIONS:
        counts = {name: 10 + place for place, name in enumerate(types.split())}
        assert quantisation_name(counts, named) == expected
    assert [file_type_name(n) for n in (1, 3, 15, 9999)] == ["F16", "Q4_1", "Q4_K_M", ""]
    header = read_gguf(write_gguf(tmp_path / "mixed.gguf", ffn=GGMLQuantizationType.Q5_0))
    assert header.types == {"Q8_0": 19_200, "Q4_1": 32_768, "Q5_0": 36_864, "F32": 320}
    assert header.float32_bytes == 4 * 89_152
