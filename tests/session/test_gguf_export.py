"""Masks as GGUF files: read back, they are the masked model; what none can hold is refused."""

import re

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from checkpoints import FFN_WIDTH, LAYERS, write_gguf
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.describe import describe
from dart_llm.models.gguf_file import ARCHITECTURES, read_gguf
from dart_llm.models.gguf_write import ABOUT
from dart_llm.models.loading import load
from dart_llm.session.export import source_file
from dart_llm.session.gguf_export import export_gguf
from dart_llm.session.run import prune
from lm_cases import call
from steps import apart
from tiny import tiny, tokens
from token_cases import before_down

IDS = tokens(1, 20)
TEXTS = ("the quick brown fox", "jumps over the lazy dog and runs")
PLAIN = {"ffn": Kind.F32, "attention": Kind.F32}
KEPT = torch.arange(0, FFN_WIDTH, 3)
"""Every third neuron: 32 of the 96."""
MOST = torch.tensor([*range(28), *range(64, 68), *range(32, 62), 68, 69])
"""Nearly all of two blocks, and 6 of the third where there is room."""


def loaded(file, folder):
    """The model in float32, dequantised."""
    return load(file, cache_dir=folder, dtype="float32", weights="dense")


def masked(model, masks):
    """Logits with the masks at all positions."""

    def keep(layer, _, u):
        kept = torch.as_tensor(masks.get(layer, range(u.shape[-1])))
        return u * torch.zeros(u.shape[-1]).index_fill(0, kept, 1)

    with before_down(model, None, keep), torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def exported(tmp_path):
    def export(masks=None, texts=(), settings=None, **file):
        source = write_gguf(tmp_path / "tiny.gguf", **file)
        model, tokenizer = loaded(source, tmp_path)
        arguments = {"masks": masks, "source": source, **(settings or {})}
        result = export_gguf(model, tokenizer, tmp_path / "narrow.gguf", texts, **arguments)
        return model, read_gguf(source), result

    return export


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_read_back_it_is_the_masked_model(architecture, exported, tmp_path):
    """Its own architecture and a smaller width; fused projections lose rows of both halves."""
    masks = dict.fromkeys(range(LAYERS), KEPT)
    model, source, result = exported(masks, architecture=architecture, **PLAIN)
    assert result.architecture == architecture and result.written == (32,) * LAYERS
    wide = source.tensors["blk.0.ffn_down.weight"].shape[1]
    assert result.achieved_sparsity == pytest.approx(1 - 32 / wide)
    narrow, _ = loaded(result.path, tmp_path)
    assert {block.down_width for block in describe(narrow).blocks} == {32}
    with torch.no_grad():
        assert apart(narrow(IDS).logits, masked(model, masks)) < 1e-5
    message = GGUFReader(result.path).fields
    assert f'"kept": {32 * LAYERS}' in message[ABOUT].contents()
    before = GGUFReader(source.path).fields
    changed = {name for name in before if message[name].contents() != before[name].contents()}
    counts = {"GGUF.kv_count", f"{architecture}.feed_forward_length"}
    assert changed == counts and set(message) == {*before, ABOUT}


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q8_0", "Q5_0", "Q5_1", "F16", "BF16"])
def test_rows_keep_their_bytes_and_most_columns_their_block(kind, exported, tmp_path):
    """The other columns are rounded, or all of a block where that comes nearer."""
    masks, stays = dict.fromkeys(range(LAYERS), MOST), torch.arange(64) == MOST
    model, source, result = exported(masks, ffn=Kind[kind])
    plain = "F16" in kind
    old, new = source.tensors, read_gguf(result.path).tensors
    assert list(new) == list(old) and result.kinds == {kind: kind}
    assert result.rounded == (0 if plain else 6 / 64)
    for name, tensor in new.items():
        stored = old[name].bytes()
        if ".ffn_" not in name or "norm" in name:
            assert torch.equal(tensor.bytes(), stored), name
        elif "down" not in name:
            rows = stored.reshape(FFN_WIDTH, -1)[MOST]
            assert torch.equal(tensor.bytes(), rows.flatten()), name
        else:
            lost = tensor.values().float() - old[name].values().float()[:, MOST]
            assert float((lost[:, stays].abs() < 1e-6).float().mean()) > 0.75, name
            plainly = old[name].values().float()[:, MOST.sort().values].contiguous().numpy()
            again = dequantize(quantize(plainly, Kind[kind]), Kind[kind])
            assert float(lost.square().sum()) <= 0.7 * ((again - plainly) ** 2).sum(), name
    with torch.no_grad():
        differ = apart(loaded(result.path, tmp_path)[0](IDS).logits, masked(model, masks))
    assert differ < (1e-5 if plain else 0.15 if "Q4" in kind else 0.05)
    assert result.bytes < result.bytes_before == source.path.stat().st_size


def test_fixed_masks_are_filled_up_without_effect(exported):
    """Rows of zeros in gate and up: whatever down holds for them, nothing comes of it."""
    masks = {0: KEPT[:20], 1: range(40)}
    _, source, result = exported(masks, ffn=Kind.Q4_1, down=Kind.Q8_0)
    assert (result.requested, result.written, result.block) == ((20, 40), (32, 64), 32)
    new, old = read_gguf(result.path).tensors, source.tensors
    for layer, width, ids in ((0, 32, KEPT[:20]), (1, 64, torch.arange(40))):
        assert new[f"blk.{layer}.ffn_down.weight"].shape[1] == width
        for part in ("gate", "up"):
            name = f"blk.{layer}.ffn_{part}.weight"
            rows, stored = new[name].values(), old[name].values()
            assert len(rows) == width, name
            assert sorted(rows[rows.any(1)].tolist()) == sorted(stored[ids].tolist()), name


def test_texts_are_read_one_by_one_and_added_up(exported):
    """GRIFFIN's score of both texts; the count is rounded up, and the next best fill it."""
    model, source, result = exported(texts=TEXTS, settings={"sparsity": 0.5}, ffn=Kind.Q8_0)
    assert (result.method, result.requested, result.written) == ("griffin@0.5", (48, 48), (64, 64))
    assert result.achieved_sparsity == pytest.approx(1 / 3)
    new = read_gguf(result.path).tensors
    _, tokenizer = loaded(source.path, source.path.parent)
    sums = torch.zeros(FFN_WIDTH)
    for text in TEXTS:
        seen = []
        block = describe(model).blocks[1]
        handle = block.down.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0][0]))
        with torch.no_grad():
            model(tokenizer(text, return_tensors="pt").input_ids)
        handle.remove()
        sums += (seen[0] / seen[0].norm(dim=-1, keepdim=True)).square().sum(0)
    wanted = sums.topk(64).indices.sort().values
    rows = source.tensors["blk.1.ffn_gate.weight"].values()[wanted]
    assert sorted(new["blk.1.ffn_gate.weight"].values().tolist()) == sorted(rows.tolist())


def test_compensation_is_the_bias_of_the_down_projection(exported, tmp_path):
    settings = {"sparsity": 0.5, "compensation": True}
    model, source, result = exported(texts=TEXTS[:1], settings=settings, ffn=Kind.F32)
    assert result.compensated
    _, tokenizer = loaded(source.path, tmp_path)
    with prune(model, "griffin", **settings) as run, torch.no_grad():
        model(tokenizer(TEXTS[0], return_tensors="pt").input_ids)
        masks = run.select()
    new = read_gguf(result.path).tensors
    for layer, mask in enumerate(masks):
        bias = new[f"blk.{layer}.ffn_down.bias"]
        assert bias.kind == "f32" and float(mask.bias.norm()) > 0
        torch.testing.assert_close(bias.values(), mask.bias, rtol=1e-4, atol=1e-6)
    with pytest.raises(LoadError, match=r"has no parameter for its bias blk.0.ffn_down.bias"):
        loaded(result.path, tmp_path)


REFUSED = [
    ({"architecture": "qwen2"}, {"masks": {1: KEPT}}, "has no equivalent of qwen2"),
    (
        {"architecture": "qwen3"},
        {"sparsity": 0.5, "compensation": True},
        "architecture qwen3, and llama.cpp does not read the bias",
    ),
    ({}, {"method": "dart-token"}, "selects neurons for each token, but a file has one mask"),
    ({}, {"method": "dense"}, "removes nothing"),
    ({}, {"sparsity": 0.5, "texts": ()}, "selects neurons from a prompt: give --prompt"),
    ({}, {"masks": {0: range(96), 1: range(96)}}, "removes nothing"),
    ({"down": Kind.Q8_0}, {"sparsity": 0.3}, "up to multiples of 32, every layer keeps all its"),
]


def test_what_no_file_can_hold_is_refused(tmp_path):
    for number, (file, settings, sentence) in enumerate(REFUSED):
        source = write_gguf(tmp_path / f"{number}.gguf", **PLAIN, **file)
        model, tokenizer = loaded(source, tmp_path)
        arguments = {"texts": TEXTS, "source": source, **settings}
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            export_gguf(model, tokenizer, tmp_path / "x.gguf", **arguments)
        assert not (tmp_path / "x.gguf").exists(), sentence
    with pytest.raises(ConfigError, match="LlamaForCausalLM was not loaded from a GGUF"):
        source_file(tiny())


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "a.jsonl").write_text('{"text": "the quick"}\n{"text": "brown fox"}\n', "utf-8")
    settings = ["export", "--model", str(source), "--cache-dir", str(tmp_path)]
    settings += ["--gguf", "new.gguf"]
    done = call(*settings, "--text", "a.jsonl", "--prompt", "jumps", "--sparsity", "0.5", "--json")
    assert done.code == 0, done.err
    assert done.json["requested"] == [48, 48] and done.json["written"] == [64, 64]
    assert done.json["kinds"] == {"Q4_1": "Q4_1"} and done.json["architecture"] == "llama"
    assert done.json["bytes"] == (tmp_path / "new.gguf").stat().st_size
    done = call(*settings, "--prompt", "jumps", "--sparsity", "0.3", "--method", "dart-prompt")
    assert "achieved sparsity 16.7%, down projections Q4_1, " in done.out
    for given, sentence in (
        ([], "ConfigError: method griffin selects neurons from a prompt: give --prompt or"),
        (["--gguf", "x.bin"], '--gguf x.bin must end in ".gguf"'),
        (["--masks", "m.safetensors", "--prompt", "x"], "drop --prompt and --text"),
    ):
        done = call(*settings, *given)
        assert (done.code, done.out) == (2, "") and sentence in done.err, done.err
