"""Bytes per token over the dense model at bfloat16, by hand on the tiny models."""

import pytest
import torch

from dart_llm.experiments.comparison import read_traffic
from dart_llm.models.describe import describe
from dart_llm.models.packed_loading import round_weights
from dart_llm.pruning.accounting import TokenTraffic
from dart_llm.pruning.records import add_dense, merge_reports
from steps import pruned, shared_model
from tiny import HIDDEN, LAYERS, VOCAB, WIDTH, tiny, tokens

FFN = LAYERS * 3 * HIDDEN * WIDTH * 2
ATTENTION = LAYERS * 3 * HIDDEN * HIDDEN * 2
"""q and o of H x H, k and v of half as many rows; at two bytes a weight."""
CACHE = LAYERS * HIDDEN * 2
"""Of one position: keys and values of H / 2 each."""
CONTEXT = 12 + 3
"""5 tokens after 12: they see 13 to 17."""


def others(model):
    """Head, norms and biases; the token embedding is looked up."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    small = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in weights)
    return 2 * (small + VOCAB * HIDDEN)


def report(method, dtype=torch.float32, model=None, **settings):
    requested = {"method": method, "sparsity": 0.75, **settings}
    model = model or shared_model("llama-bias", dtype)
    return pruned(model, tokens(1, 17), 12, **requested)[0].report()


def share(ffn, attention=1.0):
    rest = others(shared_model("llama-bias")) + CACHE * CONTEXT
    return (ffn + attention * ATTENTION + rest) / (FFN + ATTENTION + rest)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("method", "ffn", "attention"),
    [
        ("teal", FFN / 4, 1),
        ("teal-attention", FFN / 4, 0.25),
        ("wina", FFN / 4 + LAYERS * 4 * (2 * HIDDEN + WIDTH), 1),
        ("cats", FFN / 3 + FFN * 2 / 3 / 4, 1),
        ("countdown", FFN / 3 + FFN * 2 / 3 / 4, 1),
        # 16 of 32 inputs in half a byte and a scale of two, of gate and up; 4 for norm(w)
        ("prox", FFN / 4 + LAYERS * WIDTH * (2 * (8 + 2) + 4), 1),
        ("random", FFN / 4 + LAYERS * 12 * 3 * HIDDEN * 2 * 2 / 5, 1),  # copied once in 5 tokens
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_token_by_hand(method, ffn, attention, dtype):
    """In whatever dtype the run is: two bytes a weight, copies and norms as they are."""
    result = report(method, dtype)
    assert result.mean_context == CONTEXT
    assert result.token_bytes_share == pytest.approx(share(ffn, attention))
    assert result.dense_token_bytes_share == 1


def test_merged_reports_weigh_tokens():
    one, two = report("teal").to_dict(), report("teal", sparsity=0.5).to_dict()
    merged = merge_reports([one, {**two, "decoded_tokens": 15}])
    mean = (5 * one["token_bytes_share"] + 15 * two["token_bytes_share"]) / 20
    assert merged["token_bytes_share"] == pytest.approx(mean)
    assert add_dense(merged, 20)["token_bytes_share"] == pytest.approx((mean + 1) / 2)
    old = {name: value for name, value in one.items() if name != "token_bytes_share"}
    assert merge_reports([one, old])["token_bytes_share"] is None  # of an older version


@pytest.mark.usefixtures("native")
def test_weights_in_blocks_count_as_stored():
    model = tiny("llama", hidden_size=64, intermediate_size=64)
    plain = describe(model).traffic
    assert round_weights(model, "q8_0") == []
    result = describe(model).traffic
    view = describe(model)
    ffn = [part.weight.nbytes for block in view.blocks for part in block.projections]
    heads = [part.weight.nbytes for layer in view.attention for part in layer]
    assert result.dense == plain.dense and result.ffn == sum(ffn) < 0.6 * plain.ffn
    assert result.attention == sum(heads) < 0.6 * plain.attention
    dense = report("griffin", model=model, sparsity=0.0)
    assert dense.token_bytes_share == dense.dense_token_bytes_share == result.share(CONTEXT) < 0.6
    half = report("teal", model=model, sparsity=0.5)
    assert half.token_bytes_share == pytest.approx(result.share(CONTEXT, result.ffn / 2))


def test_windows_bound_the_cache():
    traffic = TokenTraffic(1000, 500, 200, 300, ((10, None), (20, 8)))
    assert traffic.share(4) == 1
    assert traffic.share(100, ffn=0) == (500 + 1000 + 160) / (1000 + 1000 + 160)
    facts = {"token_traffic": traffic.to_dict()}
    assert read_traffic(facts) == traffic and read_traffic({}) is None
    assert {most for _, most in describe(shared_model("gemma2")).traffic.cache} == {None, WINDOW}


WINDOW = shared_model("gemma2").config.sliding_window
