"""What is summed over the observed tokens, and how it ages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.pruning.budgets import budget
from dart_llm.pruning.registry import BUDGETS
from dart_llm.pruning.scores import squared, squared_share
from dart_llm.pruning.selection import needed
from dart_llm.pruning.statistics import Choice, Statistics, Sum
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import pruned_indicator as losers

ALL = frozenset({"signed", "squares", "sensitivity", "sensitivity-residual"})
U = torch.tensor([[[1.0, -2.0, 0.5], [3.0, 2.0, -0.5], [-1.0, 4.0, 0.0]]])
X = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]])
Z = torch.tensor([[[4.0, 3.0], [2.0, 0.0], [-3.0, 0.0]]])
R = torch.tensor([[[0.0, -4.0], [2.0, 0.0], [1.0, 0.0]]])
# cos(x, z): 24/25, 0, -1; ||z - x|| / ||x||: sqrt 2 / 5, sqrt 8 / 2, 4
# x + r: (3, 0), (2, 2), (2, 0); cos(x, x + r): 3/5, 1/sqrt 2, 1; ||r|| / ||x||: 4/5, 1, 1
# ||r||^2 / ||z||^2: 16/25, 1, 1/9; ||x||^2: 25, 4, 1
GOLDEN = {
    "cosine": (24 / 25, 0.0, -1.0),
    "change": (math.sqrt(2) / 5, math.sqrt(2), 4.0),
    "cosine-residual": (0.6, math.sqrt(0.5), 1.0),
    "change-residual": (0.8, 1.0, 1.0),
    "gain": (16 / 25, 1.0, 1 / 9),
    "stream": (25.0, 4.0, 1.0),
}


def summed(
    weights: Tensor | None = None, cuts: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32
) -> LayerEvidence:
    evidence = LayerEvidence()
    statistics = Statistics(squared, None, ALL)
    start = 0
    for size in cuts:
        part = slice(start, start + size)
        u, z, x, r = (t[:, part].to(dtype) for t in (U, Z, X, R))
        statistics.update(evidence, u, z, x, r, None if weights is None else weights[:, part])
        start += size
    return evidence


@pytest.mark.parametrize("cuts", [(3,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_golden_sums(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    sums = summed(None, cuts, dtype).sums
    assert set(sums) == {"score", "signed", "squares", *GOLDEN}
    assert sums["score"].total.tolist() == [11, 24, 0.5]
    assert sums["squares"].total.tolist() == [11, 24, 0.5]
    assert sums["signed"].total.tolist() == [3, 4, 0]
    assert sums["signed"].mean.tolist() == pytest.approx([1, 4 / 3, 0])
    for name, values in GOLDEN.items():
        assert float(sums[name].total) == pytest.approx(sum(values), rel=1e-6)
        assert float(sums[name].mean) == pytest.approx(sum(values) / 3, rel=1e-6)
    assert all(known.weight == 3 for known in sums.values())
    assert all(known.total.dtype == torch.float32 for known in sums.values())


@pytest.mark.parametrize("cuts", [(3,), (2, 1)])
def test_a_padded_token_enters_no_sum(cuts: tuple[int, ...]) -> None:
    sums = summed(torch.tensor([[1.0, 0.0, 1.0]]), cuts).sums
    assert sums["score"].total.tolist() == [2, 20, 0.25]
    assert sums["signed"].mean.tolist() == [0, 1, 0.25]
    for name, values in GOLDEN.items():
        assert float(sums[name].mean) == pytest.approx((values[0] + values[2]) / 2, rel=1e-6)
    assert all(float(known.weight) == 2 for known in sums.values())


def test_weighted_and_unweighted_parts_add_up() -> None:
    evidence = LayerEvidence()
    evidence.add("a", torch.tensor([1.0, 2.0]), None)
    evidence.add("a", torch.tensor([5.0, 7.0]), torch.tensor([0.0, 1.0]))
    evidence.add("a", torch.tensor([4.0]), None)
    assert float(evidence.sums["a"].total) == 14
    assert float(evidence.sums["a"].weight) == 4
    assert float(evidence.sums["a"].mean) == 3.5


def test_nothing_observed_is_no_division_by_zero() -> None:
    sums = summed(torch.zeros(1, 3)).sums
    assert sums["signed"].mean.tolist() == [0, 0, 0]
    assert float(sums["cosine"].mean) == 0
    assert Sum(torch.zeros(2)).mean.tolist() == [0, 0]


def test_silent_tokens_are_no_division_by_zero() -> None:
    evidence = LayerEvidence()
    zero = torch.zeros(1, 2, 2)
    Statistics(squared_share, None, ALL).update(
        evidence, torch.zeros(1, 2, 3), zero, zero, zero, None
    )
    assert all(bool(known.total.isfinite().all()) for known in evidence.sums.values())


def test_the_stream_must_be_there_where_it_is_needed() -> None:
    with pytest.raises(RuntimeError, match="x and r were not captured"):
        Statistics(squared, None, ALL).update(LayerEvidence(), U, Z, None, None, None)
    evidence = LayerEvidence()
    Statistics(squared, None, frozenset({"signed"})).update(evidence, U, Z, None, None, None)
    assert set(evidence.sums) == {"score", "signed"}


# who loses where tokens choose

WORTH = torch.tensor([1.0, 1.0, 5.0])
# abs(u) * worth of the rows of U: 1, 2, 2.5; 3, 2, 2.5; 1, 4, 0


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (1 / 3, [[1, 1, 0], [0, 1, 1], [1, 0, 1]]),
        (2 / 3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (1.0, [[0, 0, 0]] * 3),
        (0.0, [[1, 1, 0], [0, 1, 1], [1, 0, 1]]),  # one neuron always stays
    ],
)
def test_losers_by_hand(keep: float, wanted: list[list[int]]) -> None:
    found = losers(U[0], WORTH, keep)
    assert found.tolist() == wanted and found.dtype == torch.float32


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1))
def test_a_loser_is_worth_no_more_than_any_winner(
    seed: int, width: int, count: int, keep: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, worth = torch.randn(count, width, generator=generator), torch.rand(width)
    for values, lost in zip(u.abs() * worth, losers(u, worth, keep).bool(), strict=True):
        assert int(lost.sum()) == width - max(1, round(keep * width))
        assert not bool(lost.any()) or values[lost].max() <= values[~lost].min()


def test_every_layer_has_losers_of_its_own() -> None:
    """Two layers that saw the same and keep one and two of three neurons."""
    both = Choice(WORTH.expand(2, -1), (1 / 3, 2 / 3))
    found = both.losers(U.expand(2, -1, -1))
    assert torch.equal(found[0], losers(U[0], WORTH, 1 / 3))
    assert torch.equal(found[1], losers(U[0], WORTH, 2 / 3))
    assert torch.equal(both.of(slice(1, 2)).losers(U), found[1:])


def lost(keep: float, weights: Tensor | None, cuts: tuple[int, ...]) -> LayerEvidence:
    evidence, start = LayerEvidence(), 0
    for size in cuts:
        part = slice(start, start + size)
        w = None if weights is None else weights[:, part]
        statistics = Statistics(None, None, frozenset({"lost"}))
        choice = Choice(WORTH[None], (keep,))
        statistics.update(evidence, U[:, part], Z[:, part], None, None, w, None, choice)
        start += size
    return evidence


@pytest.mark.parametrize("cuts", [(3,), (1, 2), (1, 1, 1)])
def test_mean_when_lost_by_hand(cuts: tuple[int, ...]) -> None:
    """Only the tokens that leave a neuron out count; a neuron that none leaves out stands at 0."""
    found = lost(1 / 3, None, cuts)
    assert set(found.sums) == {"lost", "losses"}
    assert found.sums["lost"].total.tolist() == [0, 0, -0.5]  # 1 - 1, -2 + 2, -0.5 + 0
    assert found.sums["losses"].total.tolist() == [2, 2, 2]
    assert found.mean_when_lost().tolist() == [0, 0, -0.25]
    assert lost(2 / 3, None, cuts).mean_when_lost().tolist() == [1, 2, 0]
    assert lost(1.0, None, cuts).mean_when_lost().tolist() == [0, 0, 0]


@pytest.mark.parametrize("cuts", [(3,), (2, 1)])
def test_a_padded_token_loses_nothing(cuts: tuple[int, ...]) -> None:
    found = lost(1 / 3, torch.tensor([[1.0, 1.0, 0.0]]), cuts)
    assert found.sums["losses"].total.tolist() == [1, 2, 1]
    assert found.mean_when_lost().tolist() == [1, 0, -0.5]
    assert lost(1 / 3, torch.zeros(1, 3), cuts).mean_when_lost().tolist() == [0, 0, 0]


def factor(decay: float, seen: float) -> float:
    """``g * min(1, 256 / n_old)``."""
    return decay * min(1.0, 256 / seen)


@settings(deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 5), st.booleans())
def test_fading(decay: float, seen: int, rows: int, as_tensor: bool) -> None:
    """All sums alike; n counts tokens per row, so a batch fades as each of its rows would."""
    evidence = LayerEvidence()
    for name, size in (("score", 3), ("signed", 3), ("cosine", 1), ("change", 1)):
        weight: Tensor | float = float(seen * rows)
        evidence.sums[name] = Sum(
            torch.full((size,), 6.0), torch.tensor(weight) if as_tensor else weight
        )
    means = {name: known.mean.clone() for name, known in evidence.sums.items()}
    evidence.decay(decay, rows)
    for name, known in evidence.sums.items():
        assert known.total.tolist() == pytest.approx(
            [6 * factor(decay, seen)] * len(known.total), rel=1e-5
        )
        assert float(known.weight) == pytest.approx(seen * rows * factor(decay, seen), rel=1e-5)
        assert known.mean.tolist() == pytest.approx(means[name].tolist(), rel=1e-5)


@pytest.mark.parametrize("cuts", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_averages_age_by_the_positions_of_the_batch(cuts: tuple[int, ...]) -> None:
    """Weights of a row that is padded on the left, and of one that is padded on the right."""
    weights = torch.tensor([[0.0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    evidence, start = LayerEvidence(), 0
    for size in cuts:
        part = weights[:, start : start + size]
        evidence.add_ema(torch.ones(2, size, 1), 0.5, part)
        start += size
    assert float(evidence.sums["score"].weight) == (1 + 1 / 2 + 1 / 4) + (1 + 1 / 2 + 1 / 4) / 4


def test_faded_averages_go_on_as_averages() -> None:
    """EMA: sum and weight fade alike, so only the balance of old and new changes."""
    statistics = Statistics(squared, 0.5, frozenset())
    evidence = LayerEvidence()

    def see(value: float, tokens: int) -> float:
        u = torch.full((1, tokens, 1), value)
        statistics.update(evidence, u, torch.zeros_like(u), None, None, None)
        return float(statistics.score_input(evidence, 1, u.device))

    assert see(4.0, 40) == pytest.approx(4)
    evidence.decay(0.1, 1)
    assert float(evidence.sums["score"].mean) == pytest.approx(4)
    # the old weight 2 x 0.1, decayed by 0.5, beside the new token's 1
    assert see(2.0, 1) == pytest.approx((4 * 0.1 + 2) / (0.1 + 1))


def test_only_what_a_configuration_needs_is_summed() -> None:
    def get(name: str) -> frozenset[str]:
        return BUDGETS.get(name).needs

    assert needed(("uniform",), (), get) == needed(("ranked",), (), get) == frozenset()
    assert needed(("energy",), ("signed",), get) == {"signed"}
    assert needed(("energy", "depth"), (), get) == {"sensitivity"}
    assert needed(("depth-residual", "global"), ("signed", "features"), get) == {
        "sensitivity-residual",
        "squares",
        "signed",
        "features",
    }
    assert needed((), (), get) == frozenset()
    assert budget("a test", needs=["squares"])(lambda layers, keep: []).needs == {"squares"}
