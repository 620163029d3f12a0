"""Rounding to fewer bits: values and bytes by hand, and the original left alone."""

import pytest
import torch

from dart_llm.models.packed_loading import round_symmetric, round_weights_to
from steps import Same, decode
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny, tokens

BLOCK = 32
"""Weights that share a 16-bit scale."""

NORMS = 4 * (2 * LAYERS + 1) * HIDDEN
HEAD = VOCAB * HIDDEN
GATE_AND_UP = 2 * LAYERS * HIDDEN * WIDTH
DOWN = LAYERS * HIDDEN * WIDTH
"""Its rows of 48 weights are not a multiple of 32: it stays."""

ATTENTION = LAYERS * 3 * HIDDEN * HIDDEN


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_symmetric_groups(bits, monkeypatch):
    """What lies on a grid comes back; elsewhere no worse than the grid of the largest weight."""
    most = 2 ** (bits - 1)
    levels = torch.arange(32) % (2 * most) - most
    levels[0] = -most
    for row in (0.5 * levels[None], -0.25 * levels[None], torch.zeros(1, 32)):
        assert torch.equal(round_symmetric(row, bits), row)
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits))
    rounded = round_symmetric(rows, bits)
    groups = rows.reshape(-1, 32)
    step = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -most
    plain = (groups / step).round().clamp(-most, most - 1) * step
    error, usual = (float((t.reshape(-1, 32) - groups).square().sum()) for t in (rounded, plain))
    assert error <= usual * 1.0001 and len({*rounded.reshape(-1, 32)[0].tolist()}) <= 2 * most
    monkeypatch.setattr("dart_llm.models.packed_loading.CHUNK", 2 * 64)
    assert torch.equal(round_symmetric(rows, bits), rounded)


@pytest.mark.parametrize("ffn", [True, False])
def test_rounding_a_whole_model_or_its_ffns(ffn):
    model, ids = tiny(), tokens(1, 12)
    with Same(model):
        rounded = round_weights_to(model, 3, ffn)
    after = dict(rounded.model.named_parameters())
    for name, old in model.named_parameters():
        bits = 8 if name.startswith(("lm_head", "model.embed")) else 3
        changed = old.dim() == 2 and "down_proj" not in name and (not ffn or "mlp" in name)
        expected = round_symmetric(old.detach(), bits) if changed else old
        assert torch.equal(after[name], expected) and torch.equal(after[name], old) != changed, name
    assert float((decode(rounded.model, ids, 8) - decode(model, ids, 8)).abs().max()) > 0
    assert not rounded.model.training
    parameters = sum(p.numel() for p in model.parameters())
    ffn_bytes = GATE_AND_UP // BLOCK * 14
    ends = 4 * HEAD if ffn else HEAD // BLOCK * 34
    stored = ffn_bytes + 4 * DOWN + (4 * ATTENTION if ffn else ATTENTION // BLOCK * 14) + NORMS
    facts = rounded.facts
    assert (facts["weight_bytes"], facts["dtype_bytes"]) == (stored + 2 * ends, 4 * parameters)
    assert facts["bytes_per_token"] == stored + ends
    assert facts["mean_weight_bits"] == pytest.approx(8 * (stored + 2 * ends) / parameters)
    assert facts["ffn_bytes_share"] == (ffn_bytes + 4 * DOWN) / (4 * (GATE_AND_UP + DOWN))
    assert (facts["weight_bits"], facts["weight_format"]) == (3, "symmetric 3 bits")
    head = 2 * HEAD if ffn else HEAD // BLOCK * 34
    assert facts["token_traffic"] == {
        "dense": 2 * (parameters - HEAD),
        "ffn": ffn_bytes + 2 * DOWN,
        "attention": 2 * ATTENTION if ffn else ATTENTION // BLOCK * 14,
        "others": NORMS / 2 + head,
        "cache": [[2 * LAYERS * HIDDEN, None]],
        "head": head,
    }
    assert len(rounded.notes) == 2 and f"{LAYERS} matrices stay" in rounded.notes[1]


def test_transposed_and_shared_weights():
    """GPT-2: Conv1D stores [in, out], groups run along in; the head is the token embedding."""
    model = tiny("gpt2")
    rounded = round_weights_to(model, 4, ffn=False)
    old, new = (each.transformer.h[0].mlp.c_fc.weight for each in (model, rounded.model))
    assert torch.equal(new, round_symmetric(old.detach().t(), 4).t())
    assert rounded.model.lm_head.weight is rounded.model.transformer.wte.weight
