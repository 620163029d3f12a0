"""Neuron scores against numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning import scores as proxies
from dart_llm.pruning import statistics as token_statistics
from dart_llm.pruning import weights
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.statistics import LayerPrior, Statistics
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.weights import FfnWeights
from synthetic import make_layers

TOKENS = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 2.0], [1.0, -2.0, -2.0]])
"""Norms 5, sqrt 5 and 3."""

LAYER = FfnWeights(
    index=2,
    depth=1.0,
    stored_up=torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]),  # norms 1, 5, 2
    gate=torch.tensor([[2.0, 0.0], [0.0, 3.0], [-6.0, 8.0]]),  # norms 2, 3, 10
    down=torch.tensor([[3.0, 1.0, 0.0], [-4.0, 0.0, 2.0]]),  # norms 5, 1, 2
    embedding=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    learnt=LayerPrior(LayerEvidence(), torch.tensor([0.5, 3.0, 0.75])),
)
# columns times rows: (3, -4, 7), (1, 0, 1), (0, 2, -2)
MAX, MEAN = (7.0, 1.0, 2.0), (14 / 3, 2 / 3, 4 / 3)
MAGNITUDE = (math.sqrt(10), math.sqrt(21), math.sqrt(8))
GOLDEN = {
    "magnitude": MAGNITUDE,
    "normalized": (
        math.sqrt(0.36 + 0 + 1 / 9),
        math.sqrt(0.64 + 0.2 + 4 / 9),
        math.sqrt(0 + 0.8 + 4 / 9),
    ),
    "contribution": tuple(m * w for m, w in zip(MAGNITUDE, (5, 1, 2), strict=True)),
    # L1 norms 7, 1, 2; variances 10/3 - (4/3)^2, 21/3 - (1/3)^2, 8/3
    "wanda": tuple(m * w for m, w in zip(MAGNITUDE, (7, 1, 2), strict=True)),
    # mean squares 10/3, 7, 8/3
    "fisher": (5 / 3, 21, 2),
    "flap": (25 * 14 / 9, 1 * 62 / 9, 4 * 8 / 3),
    "max": tuple(m * w for m, w in zip(MAGNITUDE, MAX, strict=True)),
    "mean": tuple(m * w for m, w in zip(MAGNITUDE, MEAN, strict=True)),
    "combined": tuple(m * (a + b) for m, a, b in zip(MAGNITUDE, MAX, MEAN, strict=True)),
    "product": tuple(m * a * m * b for m, a, b in zip(MAGNITUDE, MAX, MEAN, strict=True)),
    "weight": (5 * 1 * 2, 1 * 5 * 3, 2 * 2 * 10),
}
EMA_HALF = {
    # weights 1/4, 1/2, 1 over 7/4
    "magnitude": ((0.75 + 0 + 1) / 1.75, (1 + 0.5 + 2) / 1.75, (0 + 1 + 2) / 1.75),
    "normalized": (
        (0.6 / 4 + 0 + 1 / 3) / 1.75,
        (0.8 / 4 + 0.5 / math.sqrt(5) + 2 / 3) / 1.75,
        (0 + 1 / math.sqrt(5) + 2 / 3) / 1.75,
    ),
}


def scored(
    name: str,
    chunks: list[Tensor],
    decay: float | None = None,
    weights: list[Tensor] | None = None,
    layer: FfnWeights = LAYER,
) -> Tensor:
    """The score of [B, T, I] ``chunks`` that arrive one after the other."""
    rule = SCORES.get(name)
    statistics = Statistics(rule.per_token, decay, frozenset(), rule.spread, rule.average)
    evidence = LayerEvidence()
    for index, chunk in enumerate(chunks):
        z = chunk.float() @ layer.down.float().T
        w = None if weights is None else weights[index]
        statistics.update(evidence, chunk, z, None, None, w)
    return rule(statistics.score_input(evidence, layer.width, layer.device), layer)


def test_every_score_has_a_golden_vector() -> None:
    assert {*GOLDEN, "random"} == set(SCORES.names())


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 1, 1]])
def test_golden(name: str, cuts: list[int]) -> None:
    found = scored(name, list(TOKENS[None].split(cuts, 1)))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(GOLDEN[name], rel=1e-6)


@pytest.mark.parametrize("name", ["magnitude", "normalized", "contribution", "max", "mean"])
@pytest.mark.parametrize("cuts", [[3], [1, 2], [2, 1], [1, 1, 1]])
def test_golden_ema(name: str, cuts: list[int]) -> None:
    factor = {"contribution": (5, 1, 2), "max": MAX, "mean": MEAN}.get(name, (1, 1, 1))
    base = EMA_HALF["normalized" if name == "normalized" else "magnitude"]
    found = scored(name, list(TOKENS[None].split(cuts, 1)), decay=0.5)
    assert found.tolist() == pytest.approx(
        [a * b for a, b in zip(base, factor, strict=True)], rel=1e-6
    )


def test_plain_ffns_have_no_gate() -> None:
    plain = FfnWeights(0, 0.0, LAYER.up, None, LAYER.down)
    assert SCORES.get("weight")(torch.zeros(3), plain).tolist() == [5 * 1, 1 * 5, 2 * 2]


def test_random_depends_on_seed_and_layer_alone() -> None:
    rule = SCORES.get("random")
    assert rule.per_token is None
    layers = make_layers(width=4000)
    first = rule(torch.zeros(4000), layers[0])
    assert torch.equal(first, rule(torch.ones(4000), layers[0]))
    assert not torch.equal(first, rule(torch.zeros(4000), layers[1]))
    seeded = FfnWeights(0, 0.0, layers[0].up, None, layers[0].down, seed=1)
    assert not torch.equal(first, rule(torch.zeros(4000), seeded))
    assert 0.48 < float(first.mean()) < 0.52
    assert 0 <= float(first.min()) < 0.01
    assert 0.99 < float(first.max()) < 1


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("name", ["magnitude", "normalized"])
def test_padding_counts_for_nothing(name: str, decay: float | None) -> None:
    junk = torch.full((1, 3), 99.0)
    tokens = torch.cat([junk, TOKENS[:1], junk, TOKENS[1:], junk])[None]
    weights = torch.tensor([[0.0, 1, 0, 1, 1, 0]])
    want = (GOLDEN if decay is None else EMA_HALF)[name]
    assert scored(name, [tokens], decay, [weights]).tolist() == pytest.approx(want, rel=1e-6)
    cut = [tokens[:, :2], tokens[:, 2:3], tokens[:, 3:]]
    parts = [weights[:, :2], weights[:, 2:3], weights[:, 3:]]
    assert scored(name, cut, decay, parts).tolist() == pytest.approx(want, rel=1e-6)


def test_rows_of_a_batch_are_summed() -> None:
    """A finished or padded row enters neither the sum nor the average."""
    other = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [4.0, 4.0, 4.0]])
    both = torch.stack([TOKENS, other])
    squares = TOKENS.square().sum(0) + other.square().sum(0)
    assert scored("magnitude", [both]).tolist() == pytest.approx(squares.sqrt().tolist())
    weights = torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    squares = TOKENS.square().sum(0) + other[1].square()
    assert scored("magnitude", [both], None, [weights]).tolist() == pytest.approx(
        squares.sqrt().tolist()
    )
    # EMA: token t of every row weighs d^(T - 1 - t)
    total = 0.25 * TOKENS[0].abs() + 0.5 * (TOKENS[1].abs() + other[1]) + TOKENS[2].abs()
    assert scored("magnitude", [both], 0.5, [weights]).tolist() == pytest.approx(
        (total / 2.25).tolist()
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.floats(0.05, 0.99),
)
def test_ema_recursion_across_chunks(seed: int, cuts: list[int], decay: float) -> None:
    """``s <- d s + a`` token by token, whatever the chunks, and padding leaves it alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(cuts), 5, generator=generator)
    real = torch.rand(sum(cuts), generator=generator) < 0.8
    real[0] = True
    layer = make_layers(1, width=5)[0]
    total, weight = torch.zeros(5, dtype=torch.float64), 0.0
    for token, counts in zip(tokens.double(), real.tolist(), strict=True):
        if counts:
            total, weight = decay * total + token.abs(), decay * weight + 1
    chunks, weights = tokens[None].split(cuts, 1), real.float()[None].split(cuts, 1)
    found = scored("magnitude", list(chunks), decay, list(weights), layer)
    assert found.tolist() == pytest.approx((total / weight).tolist(), rel=1e-4, abs=1e-6)
    alone = scored("magnitude", [tokens[None][:, real]], decay, None, layer)
    assert found.tolist() == pytest.approx(alone.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_prompts_are_summed_in_chunks(
    monkeypatch: pytest.MonkeyPatch, decay: float | None, weighted: bool
) -> None:
    layer = make_layers(1, width=5)[0]
    tokens = torch.randn(2, 37, 5, generator=torch.Generator().manual_seed(1))
    weights = [(torch.arange(37) % 5 != 0).float().expand(2, -1)] if weighted else None
    whole = scored("normalized", [tokens], decay, weights, layer)
    monkeypatch.setattr(token_statistics, "CHUNK_ELEMENTS", 2 * 5 * 4)
    chunked = scored("normalized", [tokens], decay, weights, layer)
    assert chunked.tolist() == pytest.approx(whole.tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, weighted: bool) -> None:
    """300^2 is beyond float16, 1,024 of them by far; the mean sign is exact too."""
    tokens = torch.tensor([300.0, -2.0, 0.25]).to(dtype).expand(1, 1024, 3)
    weights = [torch.ones(1, 1024)] if weighted else None
    found = scored("magnitude", [tokens], None, weights)
    assert found.dtype == torch.float32
    assert found.tolist() == [300 * 32, 2 * 32, 0.25 * 32]
    share = scored("normalized", [tokens], None, weights)
    norm = math.sqrt(300**2 + 2**2 + 0.25**2)
    assert share.tolist() == pytest.approx([32 * a / norm for a in (300, 2, 0.25)], rel=1e-5)
    average = scored("magnitude", [tokens], 0.999, weights)
    assert average.tolist() == pytest.approx([300, 2, 0.25], rel=1e-5)


def test_half_precision_weights() -> None:
    half = FfnWeights(
        0, 0.0, LAYER.up.half(), LAYER.gate.half(), LAYER.down.half(), LAYER.embedding.half()
    )
    for name in ("weight", "contribution", "max", "product"):
        found = scored(name, [TOKENS[None]], layer=half)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(GOLDEN[name], rel=1e-5)
    big = FfnWeights(0, 0.0, LAYER.up, None, torch.full((2, 3), 300.0).half())
    assert big.down_norm.tolist() == pytest.approx([300 * math.sqrt(2)] * 3)


def test_tokens_of_zeros_are_no_division_by_zero() -> None:
    tokens = torch.cat([torch.zeros(1, 2, 3), TOKENS[None]], 1)
    assert scored("normalized", [tokens]).tolist() == pytest.approx(GOLDEN["normalized"])


def test_proxies_are_chunked_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "REACH_CHUNK", 2)  # three rows: a chunk of two and one of one
    layer = FfnWeights(0, 0.0, LAYER.up, None, LAYER.down.clone(), LAYER.embedding)
    high, mean = proxies.proxy(layer)
    assert high.tolist() == pytest.approx(MAX)
    assert mean.tolist() == pytest.approx(MEAN)
    assert proxies.proxy(layer)[0] is high
    known = replace(layer, known_reach=(mean, high))
    assert proxies.proxy(known)[0] is mean


@pytest.mark.parametrize("rows", [None, torch.zeros(4, 5)])
@pytest.mark.parametrize("name", ["max", "mean", "combined", "product"])
def test_proxies_need_an_embedding_that_fits(name: str, rows: Tensor | None) -> None:
    layer = FfnWeights(0, 0.0, LAYER.up, None, LAYER.down, rows)
    with pytest.raises(ConfigError, match="need an embedding as wide as the FFN's output"):
        SCORES.get(name)(torch.ones(3), layer)
