"""Dense with quantised weights: values and bytes by hand, and the original left alone."""

import math

import pytest
import torch

from dart_llm.data import texts
from dart_llm.evaluation.perplexity import score, slices
from dart_llm.models.quantised import quantise, round_weights_to, symmetric_codec, through
from steps import Same, decode
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny, tokens

BLOCK, Q8, Q4 = 32, 34, 20
"""Weights of a block; its bytes: 32 of 8 bits and a 16-bit scale, 32 of 4 bits and two of those."""

NORMS = 4 * (2 * LAYERS + 1) * HIDDEN
ENDS = 2 * VOCAB * HIDDEN // BLOCK * Q8
"""Token embedding and head."""

ROUNDED = LAYERS * HIDDEN * (HIDDEN + HIDDEN // 2 + HIDDEN // 2 + HIDDEN + 2 * WIDTH)
"""q, k, v, o, gate, up of all layers; the down projections' rows of 48 are no multiple of 32."""

DOWN = LAYERS * HIDDEN * WIDTH


def test_values_by_hand(monkeypatch):
    row = torch.tensor([[127.0, -3.4, 0.6, 0.4, -127.0, *[5.3] * 27]])  # so the scale is 1
    assert through(row, "Q8_0").tolist() == [[127, -3, 1, 0, -127, *[5] * 27]]
    assert through(row / 4, "Q8_0").tolist() == [[31.75, -0.75, 0.25, 0, -31.75, *[1.25] * 27]]
    row = torch.tensor([[-2.0, 28.0, -1.1, -0.9, 3.2, 8.9, *[0.0] * 26]])  # in 15 steps of 2
    assert through(row, "Q4_1").tolist() == [[-2, 28, -2, 0, 4, 8, *[0] * 26]]
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    rows[:, 32:] *= 100
    whole = through(rows, "Q8_0")
    for start in (0, 32):  # each block of each row has a scale of its own
        part = rows[:, start : start + 32]
        step = part.abs().amax(1, keepdim=True) / 127  # itself rounded to float16
        assert bool(((whole[:, start : start + 32] - part).abs() <= 0.57 * step).all())
    monkeypatch.setattr("dart_llm.models.quantised.CHUNK", 2 * 64)
    assert torch.equal(through(rows, "Q8_0"), whole)


@pytest.mark.parametrize(
    ("bits", "kind", "block", "most"), [(8, "Q8_0", Q8, 0.2), (4, "Q4_1", Q4, 3)]
)
def test_values_and_bytes_of_a_model(bits, kind, block, most):
    model, ids = tiny(), tokens(1, 12)
    with Same(model):
        found = quantise(model, bits)
    after = dict(found.model.named_parameters())
    for name, old in model.named_parameters():
        ends = name.startswith(("lm_head", "model.embed"))
        rounded = old.dim() == 2 and "down_proj" not in name
        want = through(old.detach(), "Q8_0" if ends else kind) if rounded else old
        assert torch.equal(after[name], want) and torch.equal(after[name], old) != rounded, name
    gap = (decode(found.model, ids, 8) - decode(model, ids, 8)).abs().max()
    assert 0 < float(gap) < most and not found.model.training
    parameters = sum(p.numel() for p in model.parameters())
    stored = ROUNDED // BLOCK * block + 4 * DOWN + NORMS + ENDS
    ffn = 2 * LAYERS * WIDTH * HIDDEN
    assert found.facts == {
        "weight_bytes": stored,
        "dtype_bytes": 4 * parameters,
        "bytes_per_token": stored - VOCAB * HIDDEN // BLOCK * Q8,
        "ffn_bytes_share": (ffn // BLOCK * block + 4 * DOWN) / (4 * (ffn + DOWN)),
        "ffn_share_of_bfloat16": (ffn // BLOCK * block + 2 * DOWN) / (2 * (ffn + DOWN)),
        "token_traffic": {
            "dense": 2 * (parameters - VOCAB * HIDDEN),
            "ffn": ffn // BLOCK * block + 2 * DOWN,
            "attention": LAYERS * 3 * HIDDEN * HIDDEN // BLOCK * block,
            "others": VOCAB * HIDDEN // BLOCK * Q8 + NORMS / 2,
            "cache": [[2 * LAYERS * HIDDEN, None]],
            "head": VOCAB * HIDDEN // BLOCK * Q8,
        },
        "weight_bits": bits,
        "mean_weight_bits": pytest.approx(8 * stored / parameters),
        "weight_format": kind,
    }
    first, second = found.notes
    assert first.startswith(f"weights rounded through {kind}")
    assert f"{LAYERS} matrices stay" in second and "layers.0.mlp.down_proj (32 x 48)" in second


def test_transposed_and_shared_weights():
    """GPT-2: Conv1D holds [in, out], blocks run along in; the head is the token embedding."""
    model = tiny("gpt2")
    found = quantise(model, 4)
    old, new = model.transformer.h[0].mlp.c_fc.weight, found.model.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(new, through(old.detach().t(), "Q4_1").t())
    assert found.model.lm_head.weight is found.model.transformer.wte.weight
    per_layer = HIDDEN * (3 * HIDDEN + HIDDEN + WIDTH) // BLOCK * Q4 + 4 * WIDTH * HIDDEN
    biases = 4 * (3 * HIDDEN + HIDDEN + WIDTH + HIDDEN) + 4 * 4 * HIDDEN
    stored = LAYERS * (per_layer + biases) + VOCAB * HIDDEN // BLOCK * Q8
    stored += 4 * (512 * HIDDEN + 2 * HIDDEN)  # positions and the last norm
    assert found.facts["weight_bytes"] == found.facts["bytes_per_token"] == stored


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_groups(bits):
    """What lies on a grid comes back; elsewhere no worse than the grid of the largest weight."""
    codec, most = symmetric_codec(bits), 2 ** (bits - 1)
    assert (codec.block, codec.bytes) == (32, 4 * bits + 2)
    levels = torch.arange(32) % (2 * most) - most
    levels[0] = -most
    for scale in (0.5, -0.25):
        row = (scale * levels)[None]
        assert torch.equal(codec.through(row), row)
    assert codec.through(torch.zeros(1, 32)).tolist() == [[0.0] * 32]
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits))
    found = codec.through(rows)
    groups = rows.reshape(-1, 32)
    step = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -most
    plain = (groups / step).round().clamp(-most, most - 1) * step
    assert len({*found.reshape(-1, 32)[0].tolist()}) <= 2 * most
    error, usual = (float((t.reshape(-1, 32) - groups).square().sum()) for t in (found, plain))
    assert error <= usual * 1.0001


def test_three_bits_by_hand():
    """-4 to 3 steps: 3 goes to the grid of 1, on which 0.4 is 0 and the rest whole."""
    row = torch.tensor([[-4.0, 3, 2, 1, 0.1, -3, *[0.0] * 26]])
    assert symmetric_codec(3).through(row)[0, :6].tolist() == pytest.approx(
        [-4, 3, 2, 1, 0, -3], abs=0.02
    )


@pytest.mark.parametrize("ffn", [True, False])
def test_rounding_all_or_what_methods_leave_out_of(ffn):
    model = tiny()
    with Same(model):
        found = round_weights_to(model, 3, ffn)
    after = dict(found.model.named_parameters())
    three, eight = symmetric_codec(3), symmetric_codec(8)
    for name, old in model.named_parameters():
        ends = name.startswith(("lm_head", "model.embed"))
        own = old.dim() == 2 and "down_proj" not in name and (not ffn or "mlp" in name)
        want = (eight if ends else three).through(old.detach()) if own else old
        assert torch.equal(after[name], want), name
    traffic = found.facts["token_traffic"]
    assert traffic["ffn"] == 2 * LAYERS * HIDDEN * WIDTH // BLOCK * 14 + 2 * DOWN
    attention = LAYERS * 3 * HIDDEN * HIDDEN
    assert traffic["attention"] == (2 * attention if ffn else attention // BLOCK * 14)
    head = VOCAB * HIDDEN
    assert traffic["others"] == NORMS / 2 + (2 * head if ffn else head // BLOCK * 34)
    assert found.notes[0].startswith(
        f"weights rounded through symmetric 3 bits ({'FFNs alone' if ffn else 'token'}"
    )


@pytest.mark.smollm2
def test_eight_bits_on_the_default_model(smollm2):
    """8 bits cost next to nothing; 4 bits nothing at all, for the file was Q4_1 to begin with."""
    model, tokenizer = smollm2
    ids = tokenizer(texts.all_text(), return_tensors="pt").input_ids[0]
    windows = slices(ids, 1, 128, 128)
    dense = score(model, None, windows, 128).perplexity
    found = quantise(model, 8)
    assert score(found.model, None, windows, 128).perplexity == pytest.approx(dense, rel=0.02)
    assert "rounded before (Q4_1)" in found.notes[-1]
    # all but the norms' 61 vectors of 576
    assert found.facts["weight_bytes"] == 134_479_872 // BLOCK * Q8 + 4 * 61 * 576
    assert found.facts["dtype_bytes"] == 4 * 134_515_008
    assert math.isclose(found.facts["ffn_bytes_share"], Q8 / (4 * BLOCK))
