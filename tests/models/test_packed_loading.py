"""Models whose matrices stay in blocks: a GGUF's own, or rounded; and what is refused, when."""

import json
import re
import struct

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from checkpoints import FFN_WIDTH, LAYERS, VOCABULARY, WIDTH, write_folder, write_gguf
from dart_llm.errors import ConfigError, DartError, LoadError
from dart_llm.files import file_sha256
from dart_llm.models import packed_loading
from dart_llm.models.cached import converted_folder
from dart_llm.models.checkpoint import checkpoint_facts, fingerprint
from dart_llm.models.gguf_file import StoredTensor, read_gguf
from dart_llm.models.loading import load
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import random_packed
from dart_llm.native import build
from lm_cases import call

pytestmark = pytest.mark.usefixtures("native")

READING = "reading the tokenizer of tiny.gguf, once (a few seconds)"
UP, DOWN = "blk.1.ffn_up.weight", "blk.0.ffn_down.weight"
NORM = "blk.1.attn_norm.weight"
MIXED = {
    "blk.0.ffn_gate.weight": (FFN_WIDTH, WIDTH, Kind.Q8_0),
    "blk.0.ffn_up.weight": (FFN_WIDTH, WIDTH, Kind.Q5_0),
    DOWN: (WIDTH, FFN_WIDTH, Kind.Q5_1),
    UP: (FFN_WIDTH, WIDTH, Kind.F16),
    "blk.0.attn_v.weight": (WIDTH, WIDTH, Kind.BF16),
}


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


def kinds(model):
    """Types of blocks by the parameters' names; "" for dense ones."""
    return {
        name: one.matrix.type() if isinstance(one, PackedTensor) else ""
        for name, one in model.named_parameters()
    }


def sentence(call, error=LoadError):
    with pytest.raises(error, match=r"\A.*\Z") as caught:  # on one line
        call()
    return str(caught.value)


# the reader


def test_tensors_are_those_that_gguf_reads(gguf):
    file = read_gguf(gguf)
    found = file.tensors
    assert file.architecture == "llama" and len(found) == 9 * LAYERS + 2
    for one in GGUFReader(gguf).tensors:
        ours = found[one.name]
        assert ours.kind == one.tensor_type.name.lower()
        assert list(ours.shape) == one.shape[::-1].tolist()
        assert ours.bytes().numpy().tobytes() == one.data.tobytes()


def test_a_file_that_is_cut_off_anywhere(gguf, nothing_made):
    whole = gguf.read_bytes()
    start = int(GGUFReader(gguf).data_offset)
    for size in (
        *range(4, start, 97),
        start,
        start + 1,
        len(whole) // 2,
        len(whole) - 40,
    ):
        gguf.write_bytes(whole[:size])
        text = sentence(lambda: read_gguf(gguf))
        known = (
            r"tiny.gguf is cut off: tensor [\w.]+ takes \d+ bytes, and the file holds \d+ of them; "
        )
        if size < start:
            known = r"tiny.gguf is not a complete GGUF file; "
        assert re.match(known, text), size
        assert text.endswith("; fetch it again and compare its size")
        if size % 5 == 0 or size >= start:
            assert sentence(lambda: load(gguf)) == text
    for size in (0, 3):
        gguf.write_bytes(whole[:size])
        assert sentence(lambda: load(gguf)) == (
            f"{gguf} is not a GGUF file; give a folder, or a file that is one"
        )


def _entry(data, name):
    """Where the number of dimensions of tensor ``name`` stands."""
    return data.index(name.encode(), data.index(b"token_embd.weight")) + len(name)


def _put(data, at, form, value):
    struct.pack_into(f"<{form}", data, at, value)


def test_damage_in_the_table_of_tensors(gguf, nothing_made):
    """A sentence that names the tensor; random changes are in test_gguf_damage."""
    whole = gguf.read_bytes()
    at = _entry(whole, UP)
    incomplete = "tiny.gguf is not a complete GGUF file; fetch it again and compare its size"
    cases = [
        (at + 20, "I", 99, f"tiny.gguf: tensor {UP} is of the unknown type 99"),
        (
            at + 4,
            "Q",
            48,
            f"tiny.gguf: tensor {UP} has rows of 48 weights, no multiple of the 32 of "
            "a block of Q4_1",
        ),
        (
            at + 12,
            "Q",
            1 << 40,
            f"tiny.gguf is cut off: tensor {UP} takes {(1 << 40) * 40} bytes, and the file holds ",
        ),
        (
            at + 24,
            "Q",
            1 << 62,
            f"tiny.gguf is cut off: tensor {UP} takes 3840 bytes, and the file "
            "holds 0 of them; fetch it again and compare its size",
        ),
        (at, "I", 0, incomplete),
        (at, "I", 1 << 31, incomplete),
        (at + 12, "Q", 0, incomplete),
        (4, "I", 7, "tiny.gguf is a GGUF file of version 7, not of 2 or 3"),
        (8, "Q", 0, incomplete),
        (8, "Q", 1 << 60, incomplete),
        (16, "Q", 1 << 60, incomplete),
    ]
    for place, form, value, text in cases:
        data = bytearray(whole)
        _put(data, place, form, value)
        gguf.write_bytes(data)
        assert sentence(lambda: read_gguf(gguf)).startswith(text)
        assert sentence(lambda: load(gguf)).startswith(text)


def wrong_files(folder):
    """Files that are not read, whatever weights are asked for, and what is said of them."""
    gguf = folder / "tiny.gguf"
    shape = {UP: (FFN_WIDTH, 2 * WIDTH, Kind.Q4_1)}
    target = "model.layers.1.mlp.up_proj.weight"
    yield (
        write_gguf(gguf, architecture="olmo2"),
        "is of architecture olmo2, whose GGUF files transformers does not read; give the model "
        "itself, a folder or hub id",
    )
    yield (
        write_gguf(gguf, change={UP: None}),
        f"is missing 1 of the model's weights, such as {target}",
    )
    yield (
        write_gguf(gguf, change=shape),
        f": tensor {UP} is [96, 128], and the model's {target} is [96, 64]",
    )
    data = bytearray(write_gguf(gguf).read_bytes())
    _put(data, _entry(data, NORM) + 12, "I", Kind.I32)
    gguf.write_bytes(data)
    yield (
        gguf,
        f": tensor {NORM} is of type I32, which cannot be read; give a file of another "
        "quantisation",
    )


def test_files_that_are_not_read(tmp_path, nothing_made):
    """By the function and by the command: one sentence, before anything is made, exit code 2."""
    for gguf, text in wrong_files(tmp_path):
        text = f"tiny.gguf{text if text.startswith(':') else ' ' + text}"
        for weights in ("file", "auto", "dense"):
            found = sentence(lambda w=weights, g=gguf: load(g, weights=w, cache_dir=tmp_path))
            assert found == text, weights
            where = ["--model", gguf, "--weights", weights, "--cache-dir", tmp_path]
            done = call("run", "--prompt", "x", "--results-dir", tmp_path / "results", *where)
            assert (done.code, done.out) == (2, ""), (weights, done.err)
            assert done.err.splitlines()[-1] == f"LoadError: {text}"
        assert not list(tmp_path.glob("dart-llm/gguf-*"))


# load


@pytest.mark.usefixtures("dequantised_prompts")
def test_a_gguf_keeps_its_blocks(gguf, tmp_path):
    """On a CPU, where no dtype is asked for; what belongs to it is made once."""
    said = []
    model, tokenizer = load(gguf, cache_dir=tmp_path, progress=said.append)
    again, _ = load(gguf, cache_dir=tmp_path, device="cpu", progress=said.append)
    loading = "loading tiny: 0.1 MB in the file's blocks"
    assert said == [READING, loading, loading] and not model.training
    found = kinds(model)
    assert found == kinds(again) and fingerprint(model) == fingerprint(again)
    assert found.pop("model.embed_tokens.weight") == "q8_0"
    norms = {name for name in found if name.endswith("norm.weight")}
    assert {found[name] for name in norms} == {""} and len(norms) == 2 * LAYERS + 1
    assert {kind for name, kind in found.items() if name not in norms} == {"q4_1"}
    assert len(found) == 9 * LAYERS + 1 and model.dtype == torch.bfloat16
    dense, _ = load(gguf, cache_dir=tmp_path, dtype="float32")
    assert set(kinds(dense).values()) == {""}
    exact, _ = load(gguf, cache_dir=tmp_path, dtype="float32", weights="file")
    for name, one in dense.named_parameters():
        ours = exact.get_parameter(name)
        assert isinstance(ours, PackedTensor) == (name not in norms) and ours.dtype == one.dtype
        torch.testing.assert_close(ours + 0, one.detach(), rtol=1e-6, atol=1e-8)
    for one in (model, exact):
        assert one.lm_head.weight is one.model.embed_tokens.weight
    ids = tokenizer("the tide rises and falls twice a day", return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 16  # many: by dequantised rows
    with torch.no_grad():
        torch.testing.assert_close(exact(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert (len(tokenizer), tokenizer.model_max_length) == (VOCABULARY, 128)
    known = {"name": "tiny", "source": "gguf file, as it is", "path": str(gguf)}
    known |= {"file_quantisation": "Q4_1", "sha256": file_sha256(gguf), "dtype": "bfloat16"}
    assert checkpoint_facts(model).items() >= {**known, "parameters": 89_152}.items()


def test_the_folder_of_what_belongs_to_a_file(gguf, tmp_path):
    """Configuration, tokenizer and names."""
    load(gguf, cache_dir=tmp_path)
    folder = converted_folder(tmp_path / "dart-llm", file_sha256(gguf), packed=True)
    assert folder.name == f"gguf-{file_sha256(gguf)}-packed"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "source.json"} <= files
    assert not [name for name in files if name.endswith((".safetensors", ".gguf", ".bin"))]
    record = json.loads((folder / "source.json").read_text())
    assert record["tensors"][UP] == "model.layers.1.mlp.up_proj.weight"
    assert record["quantisation"] == "Q4_1" and files == {*record["files"], "source.json"}
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.usefixtures("dequantised_prompts")
def test_one_layer_may_hold_blocks_of_several_types(tmp_path):
    mixed = write_gguf(tmp_path / "mixed.gguf", change=MIXED)
    model, tokenizer = load(mixed, cache_dir=tmp_path)
    found, prefix = kinds(model), "model.layers.0.mlp"
    assert [found[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down")] == [
        "q8_0",
        "q5_0",
        "q5_1",
    ]
    assert found["model.layers.1.mlp.up_proj.weight"] == ""
    dense, _ = load(mixed, cache_dir=tmp_path, dtype="bfloat16")
    ids = tokenizer("the tide rises and falls twice a day", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (model(ids).logits - dense(ids).logits).float().abs().max()
    assert difference < 0.02 * dense(ids).logits.float().abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_weights_are_rounded_where_asked(kind, tied, tmp_path):
    """All matrices whose rows divide; a head that is the embedding stays it."""
    folder = write_folder(tmp_path / "copy", tie_word_embeddings=tied)
    dense, _ = load(folder)
    model, _ = load(folder, weights=kind.upper())
    found = kinds(model)
    assert ("lm_head.weight" in found) != tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, one in dense.named_parameters():
        stays = one.dim() == 1 or ".mlp." in name  # rows of 48, and what stands beside them
        assert found[name] == ("" if stays else kind)
        if stays:
            assert torch.equal(model.get_parameter(name), one)
        else:
            one = one.detach().float()
            assert (model.get_parameter(name) - one).abs().max() < 0.13 * one.abs().max()
    assert model.dtype == torch.bfloat16
    assert checkpoint_facts(model)["parameters"] == checkpoint_facts(dense)["parameters"]


def test_saving_is_refused_before_anything_is_written(gguf, tmp_path):
    folder, where = write_folder(tmp_path / "copy"), {"cache_dir": tmp_path / "cache"}
    for model, _ in (load(gguf, **where), load(folder, weights="q8_0")):
        with pytest.raises(DartError, match='load the model with weights="dense" for that'):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        before = fingerprint(model)  # by which is kept what a method learnt
        del model.save_pretrained
        assert fingerprint(model) == before
    load(gguf, weights="dense", **where)[0].save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_held_once(tied, tmp_path):
    config = AutoConfig.from_pretrained(write_folder(tmp_path / "copy", tie_word_embeddings=tied))
    config.intermediate_size = 64
    model = random_packed(config, "q4_0", torch.bfloat16)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert kinds(model)["model.layers.0.self_attn.q_proj.weight"] == "q4_0"


def test_when_auto_keeps_blocks(gguf, tmp_path, monkeypatch):
    where = {"cache_dir": tmp_path}
    other = write_gguf(tmp_path / "other.gguf", architecture="starcoder2")
    folder = write_folder(tmp_path / "copy")

    def is_packed(*arguments, **keywords):
        return any(kinds(load(*arguments, **where, **keywords)[0]).values())

    assert is_packed(gguf) and is_packed(gguf, weights="auto") and is_packed(gguf, weights=" FILE ")
    assert is_packed(gguf, dtype="float32", weights="file")
    for settings in ({"dtype": "float32"}, {"weights": "dense"}, {"device_map": "cpu"}):
        assert not is_packed(gguf, **settings), settings
    again = kinds(load(gguf, weights="q4_0", **where)[0])  # dequantised, and rounded anew
    assert set(again.values()) == {"", "q4_0"} and again["model.embed_tokens.weight"] == "q4_0"
    assert not is_packed(folder) and not is_packed(folder, weights="dense")
    text = sentence(lambda: load(other, weights="file", **where), ConfigError)
    assert text == (
        "weights 'file' cannot be used: files of architecture starcoder2 are only read dense; give "
        "weights dense, or q8_0, q4_0, q4_1 to round them again"
    )
    monkeypatch.setenv(build.SWITCH, "0")
    build.why_not.cache_clear()
    assert not is_packed(gguf)
    off = "DART_NATIVE=0 keeps the native kernels off; give weights dense"
    for kind in ("file", "q8_0"):
        text = sentence(lambda kind=kind: load(gguf, weights=kind, **where), ConfigError)
        assert text == f"weights '{kind}' cannot be used: {off}"
    monkeypatch.setenv(build.SWITCH, "1")
    build.why_not.cache_clear()


def test_refusals(gguf, tmp_path):
    folder = write_folder(tmp_path / "copy")
    on_cpu = "blocks need the CPU; give device cpu, or weights dense"
    cases = [
        (gguf, "int4", "unknown weights 'int4'; write auto, file, dense, q8_0, q4_0 or q4_1", {}),
        (gguf, "q4_k", "unknown weights 'q4_k'; write auto, file, dense, q8_0, q4_0 or q4_1", {}),
        (gguf, "file", f"weights 'file' cannot be used: {on_cpu}", {"device_map": "cpu"}),
        (
            folder,
            "q8_0",
            f"weights 'q8_0' cannot be used: {on_cpu}",
            {"device_map": "auto"},
        ),
        (
            folder,
            "file",
            f"weights 'file' cannot be used: {folder} is not a GGUF file; write q8_0, q4_0, "
            "q4_1 to round its weights",
            {},
        ),
        (
            "owner/name",
            "file",
            "weights 'file' cannot be used: owner/name is not a GGUF file; write q8_0, "
            "q4_0, q4_1 to round its weights",
            {},
        ),
    ]
    for model, kind, text, settings in cases:
        found = sentence(
            lambda m=model, k=kind, s=settings: load(m, weights=k, cache_dir=tmp_path, **s),
            ConfigError,
        )
        assert found == text
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][0, 3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert sentence(lambda: load(folder, weights="q8_0")) == (
        "copy could not be loaded: weights with inf or NaN cannot be rounded"
    )
