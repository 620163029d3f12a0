"""GGUF files: read in their blocks or dequantised, cached, and refused in one sentence."""

import functools
import json
import os
import random
import struct

import gguf as gguf_package
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from checkpoints import FFN_WIDTH, LAYERS, VOCABULARY, WIDTH, facts, write_folder, write_gguf
from dart_llm import cache
from dart_llm.errors import ConfigError, DartError, LoadError
from dart_llm.files import file_sha256
from dart_llm.models import cached, packed_loading
from dart_llm.models.cached import converted_folder, is_intact, read_source
from dart_llm.models.checkpoint import checkpoint_facts, fingerprint
from dart_llm.models.gguf_file import (
    ARCHITECTURES,
    LONG,
    StoredTensor,
    left_out,
    quick_gguf,
    read_gguf,
)
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import load_gguf
from dart_llm.native import build
from lm_cases import call

pytestmark = pytest.mark.usefixtures("native")

READING = "reading the tokenizer of tiny.gguf, once (a few seconds)"
UP, NORM = "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def nothing_made(monkeypatch):
    """No weight may be read, copied or made."""

    def made(*_arguments, **_keywords):
        raise AssertionError("a weight was made")

    monkeypatch.setattr(packed_loading, "_weight", made)
    monkeypatch.setattr(StoredTensor, "bytes", made)


def folder_of(gguf, cache_dir):
    return converted_folder(cache_dir / "dart-llm", file_sha256(gguf))


def kinds(model):
    """Types of blocks by the parameters' names; "" for dense ones."""
    return {
        name: weight.matrix.type() if isinstance(weight, PackedTensor) else ""
        for name, weight in model.named_parameters()
    }


def sentence(call, error=LoadError):
    with pytest.raises(error, match=r"\A.*\Z") as caught:  # on one line
        call()
    return str(caught.value)


def test_dense_weights(gguf, tmp_path):
    """With no copy on disk; test_packed_architectures.py compares the values."""
    said, where = [], {"cache_dir": tmp_path, "weights": "dense"}
    exact, tokenizer = load(gguf, dtype="float32", progress=said.append, **where)
    model, _ = load(gguf, progress=said.append, **where)
    sizes = "loading tiny: 0.4 MB in float32", "loading tiny: 0.2 MB in bfloat16"
    assert said == [READING, *sizes] and not exact.training
    state = model.state_dict()
    assert all(torch.equal(state[k], value.bfloat16()) for k, value in exact.state_dict().items())
    folder = folder_of(gguf, tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(folder.glob("*.safetensors"))
    assert (len(tokenizer), tokenizer.model_max_length) == (VOCABULARY, 128)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi"
    stated = {"name": "tiny", "source": "gguf file, dequantised", "path": str(gguf)}
    stated |= {"file_quantisation": "Q4_1", "sha256": file_sha256(gguf), "parameters": 89_152}
    assert checkpoint_facts(model) == facts(**stated)


def test_a_gguf_keeps_its_blocks(gguf, tmp_path):
    """On a CPU, where no dtype is asked for; what belongs to it is made once."""
    said = []
    model, _ = load(gguf, cache_dir=tmp_path, progress=said.append)
    again, _ = load(gguf, cache_dir=tmp_path, device="cpu", progress=said.append)
    loading = "loading tiny: 0.1 MB in the file's quantisation"
    assert said == [READING, loading, loading] and not model.training
    stored = kinds(model)
    assert stored == kinds(again) and fingerprint(model) == fingerprint(again)
    assert stored.pop("model.embed_tokens.weight") == "q8_0"
    norms = {name for name in stored if name.endswith("norm.weight")}
    assert {stored[name] for name in norms} == {""} and len(norms) == 2 * LAYERS + 1
    assert {kind for name, kind in stored.items() if name not in norms} == {"q4_1"}
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(DartError, match='load the model with weights="dense" for that'):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    stated = {"source": "gguf file, as it is", "file_quantisation": "Q4_1", "dtype": "bfloat16"}
    assert checkpoint_facts(model).items() >= stated.items()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_weights_are_rounded_where_asked(kind, tied, tmp_path):
    """All matrices whose rows divide; a head that is the embedding stays it."""
    folder = write_folder(tmp_path / "copy", tie_word_embeddings=tied)
    dense, _ = load(folder)
    model, _ = load(folder, weights=kind.upper())
    stored = kinds(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, weight in dense.named_parameters():
        stays = weight.dim() == 1 or ".mlp." in name  # rows of 48, and what stands beside them
        assert stored[name] == ("" if stays else kind)
        if stays:
            assert torch.equal(model.get_parameter(name), weight)
        else:
            weight = weight.detach().float()
            assert (model.get_parameter(name) - weight).abs().max() < 0.13 * weight.abs().max()
    assert model.dtype == torch.bfloat16
    assert checkpoint_facts(model)["parameters"] == checkpoint_facts(dense)["parameters"]


def test_when_auto_keeps_blocks(gguf, tmp_path, monkeypatch):
    where = {"cache_dir": tmp_path}
    other = write_gguf(tmp_path / "other.gguf", architecture="starcoder2")
    folder = write_folder(tmp_path / "copy")

    def is_packed(*arguments, **keywords):
        return any(kinds(load(*arguments, **where, **keywords)[0]).values())

    assert is_packed(gguf, weights="auto") and is_packed(gguf, dtype="float32", weights=" FILE ")
    for settings in ({"dtype": "float32"}, {"weights": "dense"}, {"device_map": "cpu"}):
        assert not is_packed(gguf, **settings), settings
    again = kinds(load(gguf, weights="q4_0", **where)[0])  # dequantised, and rounded anew
    assert set(again.values()) == {"", "q4_0"} and not is_packed(folder)
    text = sentence(lambda: load(other, weights="file", **where), ConfigError)
    assert "files with architecture starcoder2 can only be read dense; give weights dense" in text
    text = sentence(lambda: load(other, **where))  # the file has Llama's tensors alone
    assert text.startswith("other is missing ") and "of the model's weights" in text
    with monkeypatch.context() as off:
        off.setenv(build.SWITCH, "0")
        build.why_not.cache_clear()
        assert not is_packed(gguf)
        for kind in ("file", "q8_0"):
            text = sentence(lambda kind=kind: load(gguf, weights=kind, **where), ConfigError)
            assert "DART_NATIVE=0 keeps the native kernels off; give weights dense" in text
    build.why_not.cache_clear()


def test_formats_that_cannot_be_used(gguf, tmp_path):
    folder = write_folder(tmp_path / "copy")
    on_cpu = "quantised weights need the CPU; give device cpu"
    no_file = "is not a GGUF file; write q8_0, q4_0, q4_1 to round its weights"
    for model, kind, text, settings in (
        (gguf, "q4_k", "unknown weights 'q4_k'; write auto, file, dense, q8_0, q4_0 or q4_1", {}),
        (gguf, "file", on_cpu, {"device_map": "cpu"}),
        (folder, "q8_0", on_cpu, {"device_map": "auto"}),
        (folder, "file", no_file, {}),
        ("owner/name", "file", no_file, {}),
    ):
        use = functools.partial(load, model, weights=kind, cache_dir=tmp_path, **settings)
        assert text in sentence(use, ConfigError)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][0, 3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    text = sentence(lambda: load(folder, weights="q8_0"))
    assert text == "copy could not be loaded: weights with inf or NaN cannot be rounded"


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


def test_a_damaged_folder_is_made_again(gguf, tmp_path):
    """Cut off, without its record or a file, or of a version that left settings out."""
    load(gguf, cache_dir=tmp_path)
    folder = folder_of(gguf, tmp_path)
    config, record = folder / "config.json", folder / "source.json"
    intact, about = config.read_bytes(), json.loads(record.read_text())
    older = {**about, "settings": {"sliding_window": 8}}
    for damage in (
        lambda: os.truncate(config, 100),
        lambda: record.write_text('{"format": 1, "sha2'),
        (folder / "tokenizer.json").unlink,
        lambda: record.write_text(json.dumps(older)),
    ):
        damage()
        assert not is_intact(folder, file_sha256(gguf), full=True, settings={})
        said = []
        load(gguf, cache_dir=tmp_path, progress=said.append)
        assert said[0] == READING and config.read_bytes() == intact
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    config.write_bytes(b"X" + intact[1:])
    assert [is_intact(folder, file_sha256(gguf), full=full) for full in (False, True)] == [1, 0]


def test_folders_that_cannot_be_used(gguf, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match="cannot be written; choose another one with --cache-dir"):
        load(gguf, cache_dir=gguf)
    monkeypatch.setattr(cache, "free_bytes", lambda _folder: 100_000)
    with pytest.raises(LoadError, match=r"needs 50 MB on disk and only 0\.1 MB are free in "):
        load(gguf, cache_dir=tmp_path)


def _entry(data, name):
    """Where the number of dimensions of tensor ``name`` stands."""
    return data.index(name.encode(), data.index(b"token_embd.weight")) + len(name)


# types, rows that blocks do not divide, places, numbers of dimensions
TABLE = [(20, "I", 99), (4, "Q", 48), (12, "Q", 1 << 40), (24, "Q", 1 << 62), (24, "Q", 0)]
TABLE += [(0, "I", 0), (0, "I", 1 << 31), (12, "Q", 0)]
HEADER = [(4, "I", 7), (8, "Q", 0), (8, "Q", 1 << 60), (16, "Q", 1 << 60)]


def test_files_that_are_cut_off_or_have_another_header(gguf, nothing_made):
    whole = gguf.read_bytes()
    start, at = int(GGUFReader(gguf).data_offset), _entry(whole, UP)
    sizes = (*range(4, start, 97), start, start + 1, len(whole) // 2, len(whole) - 40)
    files = [whole[:size] for size in sizes]
    for place, form, value in [*((at + place, *rest) for place, *rest in TABLE), *HEADER]:
        files.append(bytearray(whole))
        struct.pack_into(f"<{form}", files[-1], place, value)
    gguf.write_bytes(whole[:3])
    assert "is not a GGUF file; give a folder" in sentence(lambda: load(gguf))
    for data in files:
        gguf.write_bytes(data)
        text = sentence(lambda: read_gguf(gguf))
        assert text.startswith("tiny.gguf is not a complete GGUF file (")
        assert text.endswith("); download it again and compare its size")
    assert sentence(lambda: load(gguf)) == text


def wrong_files(folder):
    """Files that are not read, whatever weights are asked for, and what is said of them."""
    gguf, target = folder / "tiny.gguf", "model.layers.1.mlp.up_proj.weight"
    shape = {UP: (FFN_WIDTH, 2 * WIDTH, Kind.Q4_1)}
    yield write_gguf(gguf, architecture="olmo2"), "has architecture olmo2, whose GGUF files"
    missing = f"is missing 1 of the model's weights, such as {target}"
    yield write_gguf(gguf, change={UP: None}), missing
    yield (
        write_gguf(gguf, change=shape),
        f"tensor {UP} has shape [96, 128], but the model's {target}",
    )
    data = bytearray(write_gguf(gguf).read_bytes())
    struct.pack_into("<I", data, _entry(data, NORM) + 12, Kind.I32)
    gguf.write_bytes(data)
    yield gguf, f"tensor {NORM} has type I32, which cannot be read"


def test_files_that_are_not_read(tmp_path, nothing_made):
    """By the function and by the command: one sentence, before anything is made, exit code 2."""
    for gguf, text in wrong_files(tmp_path):
        read = functools.partial(load, gguf, cache_dir=tmp_path)
        said = sentence(read)
        assert text in said
        for weights in ("file", "dense"):
            assert sentence(functools.partial(read, weights=weights)) == said
        assert not list(tmp_path.glob("dart-llm/gguf-*"))
    where = ("--model", gguf, "--cache-dir", tmp_path, "--results-dir", tmp_path / "results")
    done = call("run", "--prompt", "x", *where)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == f"LoadError: {said}"


TIMES = 60
NUMBERS = (0, 1, 7, 8, 9, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
FACTS = {
    "llama": {"tensors": {"rope_freqs.weight": [2.0] * 16}},
    "qwen2": {"facts": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}},
    "phi3": {"facts": {"attention.sliding_window": 24, "rope.dimension_count": 24}},
}
"""So that there is something to damage."""


def damaged(whole, start, draw):
    """One to four changes, mostly before the weights, which begin at ``start``; or a cut."""
    data = bytearray(whole)
    if draw.random() < 0.05:
        return data[: draw.randrange(len(data))]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(start if draw.random() < 0.85 else len(whole))
        size, number = draw.choice((4, 8)), draw.choice((*NUMBERS, draw.randrange(256)))
        change = draw.randrange(3)
        if change == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            del data[at : at + size]
        else:
            data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    return data


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_changes_anywhere(architecture, tmp_path):
    """A model or one of our sentences, of the header's reader and that of the weights."""
    settings = {"architecture": architecture, **FACTS.get(architecture, {})}
    file = write_gguf(tmp_path / "tiny.gguf", **settings)
    whole, start = file.read_bytes(), int(GGUFReader(file).data_offset)
    load(file, cache_dir=tmp_path, weights="file")
    folder = folder_of(file, tmp_path)
    names, config = read_source(folder)["tensors"], AutoConfig.from_pretrained(folder)
    draw, loaded, said = random.Random(architecture), 0, []
    for _ in range(TIMES):
        file.write_bytes(damaged(whole, start, draw))
        try:
            header = read_gguf(file)
            left_out(header)
            if header.architecture == architecture:
                load_gguf(file, config, names, dtype=torch.float32, packed=True)
            loaded += 1
        except LoadError as error:
            said.append(str(error))
    assert min(loaded, len(said)) > TIMES // 10
    assert not [text for text in said if "\n" in text]


STATED = [
    ("llama", "block_count", 1),  # fewer layers than there are
    ("llama", "block_count", 1 << 24),
    ("llama", "embedding_length", (1 << 32) - 1),
    ("gemma3", "vocab_size", 1 << 24),
    ("gpt2", "context_length", 1 << 24),
    ("qwen2", "feed_forward_length", 1 << 24),
    ("llama", "rope.dimension_count", 1 << 24),
    ("gemma2", "attention.key_length", 1 << 24),
    ("phi3", "attention.head_count_kv", (1 << 32) - 1),
]


@pytest.mark.parametrize(("architecture", "fact", "stated"), STATED)
def test_facts_that_the_tensors_do_not_bear_out(architecture, fact, stated, tmp_path, monkeypatch):
    """A model of these is not even made without weights, which takes memory too."""
    monkeypatch.setattr(cached, "_config", lambda _gguf: pytest.fail("a configuration was made"))
    facts = {"rope.dimension_count": 32}
    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, facts=facts)
    whole, key = file.read_bytes(), f"{architecture}.{fact}".encode()
    at = whole.index(key) + len(key) + 4  # behind its type
    file.write_bytes(whole[:at] + stated.to_bytes(4, "little") + whole[at + 4 :])
    for weights in ("file", "dense"):
        text = sentence(lambda w=weights: load(file, cache_dir=tmp_path, weights=w))
        assert text.startswith(f"tiny.gguf is damaged: it states {fact} {stated}, but its ")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_norms_that_are_no_numbers(value, gguf, tmp_path):
    place = read_gguf(gguf).tensors["output_norm.weight"].begin
    whole = bytearray(gguf.read_bytes())
    whole[place : place + 4] = struct.pack("<f", float(value))
    gguf.write_bytes(whole)
    for weights in ("file", "dense"):
        text = sentence(lambda w=weights: load(gguf, cache_dir=tmp_path, weights=w))
        assert "weights of output_norm.weight are not finite; download it again" in text
