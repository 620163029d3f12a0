"""What is summed over the observed tokens, how it waits, ages, and is pooled with a prior."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.pruning import observations, statistics
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.observations import LIMIT, LayerObservation, Observations, ObservedForward
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import (
    LayerStatistics,
    SelfStats,
    Statistics,
    Sum,
    TokenSelection,
    from_tensors,
    pooled,
    pruned_indicator,
    squared,
    squared_share,
    to_tensors,
)
from synthetic import make_layers

ALL = frozenset({"signed", "sensitivity"})
U = torch.tensor([[[1.0, -2.0, 0.5], [3.0, 2.0, -0.5], [-1.0, 4.0, 0.0]]])
X = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]])
Z = torch.tensor([[[4.0, 3.0], [2.0, 0.0], [-3.0, 0.0]]])
GOLDEN = {  # per token
    "cosine": (24 / 25, 0.0, -1.0),  # of x and z
    "change": (math.sqrt(2) / 5, math.sqrt(2), 4.0),  # ||z - x|| / ||x||
}
WORTH = torch.tensor([1.0, 1.0, 5.0])
# abs(u) * worth of the rows of U: 1, 2, 2.5; 3, 2, 2.5; 1, 4, 0


def summed(cuts=(3,), weights=None, dtype=torch.float32, needs=ALL, keep=0, ema_decay=None):
    """The sums over the three tokens, in pieces of ``cuts``."""
    evidence = LayerStatistics()
    rule = Statistics(squared if needs is ALL else None, needs, ema_decay=ema_decay)
    for part in torch.arange(3).split(list(cuts)):
        u, z, x = (t[None, :, part].to(dtype) for t in (U, Z, X))
        w = None if weights is None else weights[:, part]
        chosen = TokenSelection(WORTH[None], (keep,))
        rule.add([evidence], LayerObservation(u, None, z, x), w, None, chosen)
    return evidence


@pytest.mark.parametrize(
    ("cuts", "dtype"), [((3,), torch.float16), ((1, 2), torch.float32), ((1, 1, 1), torch.bfloat16)]
)
def test_golden_sums(cuts, dtype):
    sums = summed(cuts, None, dtype).sums
    assert set(sums) == {"score", "signed", *GOLDEN}
    assert sums["score"].total.tolist() == [11, 24, 0.5]
    assert sums["signed"].total.tolist() == [3, 4, 0]
    assert sums["signed"].mean.tolist() == pytest.approx([1, 4 / 3, 0])
    for name, values in GOLDEN.items():
        assert float(sums[name].total) == pytest.approx(sum(values), rel=1e-6)
    assert {(one.weight, one.total.dtype) for one in sums.values()} == {(3, torch.float32)}
    # a padded token enters no sum
    sums = summed(cuts, torch.tensor([[1.0, 0.0, 1.0]]), dtype).sums
    assert sums["score"].total.tolist() == [2, 20, 0.25]
    assert sums["signed"].mean.tolist() == [0, 1, 0.25]
    for name, values in GOLDEN.items():
        assert float(sums[name].mean) == pytest.approx((values[0] + values[2]) / 2, rel=1e-6)
    assert all(float(entry.weight) == 2 for entry in sums.values())


def test_nothing_is_no_division_by_zero():
    sums = summed(weights=torch.zeros(1, 3)).sums
    assert sums["signed"].mean.tolist() == [0, 0, 0] and float(sums["cosine"].mean) == 0
    evidence, zero = LayerStatistics(), torch.zeros(1, 1, 2, 2)
    silent = Statistics(squared_share, ALL)
    silent.add([evidence], LayerObservation(torch.zeros(1, 1, 2, 3), None, zero, zero), None)
    assert all(bool(entry.total.isfinite().all()) for entry in evidence.sums.values())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kernels", ["", "the kernels are off"])
@pytest.mark.parametrize("cuts", [(3,), (1, 2), (1, 1, 1)])
def test_losers_by_hand(cuts, kernels, monkeypatch):
    """Only the tokens that leave a neuron out count; a neuron that none leaves out stands at 0."""
    monkeypatch.setattr(statistics, "why_not", lambda: kernels)
    third = [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    two_thirds = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for keep, losers in ((1 / 3, third), (0.0, third), (2 / 3, two_thirds), (1.0, [[0] * 3] * 3)):
        assert pruned_indicator(U[0], WORTH, keep).tolist() == losers
    idle = torch.tensor([[0.0, 0.0, 0.0, -2.0], [1.0, 0.0, 3.0, 2.0]])
    # neurons that do nothing are all left out, however few a token must leave out
    assert pruned_indicator(idle, torch.ones(4), 0.5).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    sums = TokenSelection(torch.ones(1, 4), (0.5,)).sums(idle[None], torch.tensor([1.0, 2.0]))
    assert sums[:, 0].tolist() == [[2, 0, 18, 12], [2, 0, 6, 2], [2, 0, 0, 0], [3, 3, 1, 0]]
    both = TokenSelection(WORTH.expand(2, -1), (1 / 3, 2 / 3))
    assert both.losers(U.expand(2, -1, -1)).tolist() == [third, two_thirds]
    needs = frozenset({"lost"})
    result = summed(cuts, needs=needs, keep=1 / 3)
    assert set(result.sums) == {"signed", "lost", "losses"}
    assert result.sums["lost"].total.tolist() == [0, 0, -0.5]  # 1 - 1, -2 + 2, -0.5 + 0
    assert result.sums["losses"].total.tolist() == [2, 2, 2]
    for keep, weights, mean in (
        (1 / 3, None, [0, 0, -0.25]),
        (2 / 3, None, [1, 2, 0]),
        (1.0, None, [0, 0, 0]),
        (1 / 3, torch.tensor([[1.0, 1.0, 0.0]]), [1, 0, -0.5]),
        (1 / 3, torch.zeros(1, 3), [0, 0, 0]),
    ):
        assert summed(cuts, weights, needs=needs, keep=keep).mean_when_lost().tolist() == mean


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layers", [1, 3, 20])
def test_sums_of_many_tokens(layers, monkeypatch):
    """The kernel sums tokens in groups and layers in parts; every sum is that of the formulas."""
    drawn = torch.Generator().manual_seed(layers)
    u = torch.randn(layers, 1, 27, 37, generator=drawn)
    weights = torch.rand(1, 27, generator=drawn)
    selection = TokenSelection(torch.rand(layers, 37, generator=drawn) + 0.1, (0.4,) * layers)
    lost = selection.losers(u[:, 0])
    wanted = {"score": u[:, 0].square(), "signed": u[:, 0], "lost": u[:, 0] * lost, "losses": lost}
    for reason in ("", "the kernels are off"):
        monkeypatch.setattr(statistics, "why_not", lambda reason=reason: reason)
        evidence = [LayerStatistics() for _ in range(layers)]
        rule = Statistics(squared, frozenset({"lost"}))
        rule.add(evidence, LayerObservation(u), weights, None, selection)
        for name, values in wanted.items():
            totals = torch.stack([layer.sums[name].total for layer in evidence])
            torch.testing.assert_close(totals, torch.einsum("t,lti->li", weights[0], values))
            assert float(evidence[-1].sums[name].weight) == pytest.approx(float(weights.sum()))


@settings(deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 5), st.booleans())
def test_decay(decay, seen, rows, as_tensor):
    """All sums by g min(1, 256 / n); n counts tokens per row: a batch ages as its rows would."""
    weight = torch.tensor(float(seen * rows)) if as_tensor else float(seen * rows)
    evidence = LayerStatistics({name: Sum(torch.full((3,), 6.0), weight) for name in "ab"})
    mean, factor = evidence.sums["a"].mean.tolist(), decay * min(1.0, 256 / seen)
    evidence.decay(decay, rows)
    for entry in evidence.sums.values():
        assert entry.total.tolist() == pytest.approx([6 * factor] * 3, rel=1e-5)
        assert float(entry.weight) == pytest.approx(seen * rows * factor, rel=1e-5)
        assert entry.mean.tolist() == pytest.approx(mean, rel=1e-5)


def test_an_average_favours_recent_tokens():
    """By hand: the newest token counts 1, the one before it 1/2; padding ages nothing."""
    padded, skipped = torch.tensor([[1.0, 0.0, 1.0]]), [1, 10 / 3, 1 / 6]
    for weights, mean in ((None, [2.75 / 1.75, 5.5 / 1.75, 0.375 / 1.75]), (padded, skipped)):
        for cuts in ((3,), (1, 2)):
            score = summed(cuts, weights, ema_decay=0.5).sums["score"]
            assert score.mean.tolist() == pytest.approx(mean)


def token(value, tokens=1):
    u = {i: torch.full((1, 2, w), value + 100 * i) for i, w in enumerate((4, 6, 4))}
    return ObservedForward({i: LayerObservation(t, t) for i, t in u.items()}, 1, tokens)


def test_decode_tokens_wait_and_layers_of_one_shape_are_added_together(monkeypatch):
    queue = Observations([True])
    queue.forwards = [token(1.0), token(2.0, 2)._replace(weights=torch.zeros(1, 2))]
    assert (
        queue.accepts([True], 1) and not queue.accepts([False], 1) and not queue.accepts([True], 2)
    )
    (ids, seen, weights), (alone, other, _) = queue.drain()
    assert (ids, alone, seen.h.shape, other.u.shape) == ((0, 2), (1,), (2, 1, 3, 4), (1, 1, 3, 6))
    assert seen.u[:, 0, :, 0].tolist() == [[1, 2, 2], [201, 202, 202]]
    assert weights.tolist() == [[1, 0, 0]]
    assert list(queue.drain()) == [] and queue.accepts([False], 2)
    queue.forwards = [token(1.0)] * LIMIT
    assert queue.full and not Observations([], queue.forwards[1:]).full
    monkeypatch.setattr(observations, "MAX_BYTES", 3 * token(1.0).nbytes())
    assert [Observations([], [token(1.0)] * count).full for count in (2, 3)] == [False, True]


def sums(**known):
    return LayerStatistics({name: Sum(torch.tensor(t), n) for name, (t, n) in known.items()})


def test_tensors_and_back():
    layers = [sums(score=([1.0, 2.0], 3.0)), sums(signed=([4.0], torch.tensor(0.1)))]
    for one, other in zip(layers, from_tensors(to_tensors(layers), 2), strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name, known in one.sums.items():
            assert torch.equal(known.total, other.sums[name].total)
            assert float(known.weight) == other.sums[name].weight


def test_means_are_pooled_by_tokens():
    """10 observed tokens of mean (2, 3), and a prior of mean (5, 1) that counts as 30."""
    seen = sums(score=([20.0, 30.0], 10.0), stream=([6.0], 3.0))
    for size in (1.0, 1e4):  # the size of the prior's own text does not matter
        score, signed = [5 * size, size], [8 * size, -8 * size]
        prior = SelfStats(sums(score=(score, size), signed=(signed, size)))
        result = pooled(seen, prior, 30).sums
        assert set(result) == {"score", "stream", "signed"}  # names of one side alone too
        assert result["score"].total.tolist() == [170, 60] and result["score"].weight == 40
        assert result["signed"].mean.tolist() == [8, -8] and result["signed"].weight == 30
        result["score"].total += 100  # neither side is changed
        assert seen.sums["score"].total.tolist() == [20, 30] and seen.sums["score"].weight == 10
        assert prior.evidence.sums["score"].total.tolist() == [5 * size, size]
        for nothing in (sums(score=([0.0, 0.0], torch.tensor(0.0))), LayerStatistics()):
            alone = pooled(nothing, prior, 128).sums["score"]  # the prior decides
            assert alone.mean.tolist() == [5, 1] and float(alone.weight) == 128
    assert pooled(seen, None, 128) is pooled(seen, prior, 0) is pooled(seen, prior, -1) is seen


def test_a_score_that_learns_wants_its_prior():
    for sparsity in (0.5, 0.0):
        with pytest.raises(
            ConfigError, match=r'^score "fisher" needs learned statistics: give self_stats='
        ):
            MaskSelector(PruneConfig(sparsity=sparsity, score="fisher"), make_layers())
    for score, why in (("flap", "weighs all tokens alike, as a variance"), ("weight", "reads no")):
        config = PruneConfig(sparsity=0.5, score={"name": score, "ema_decay": 0.5})
        with pytest.raises(ConfigError, match=f'score "{score}" {why}.*: drop the ema_decay'):
            MaskSelector(config, make_layers())
