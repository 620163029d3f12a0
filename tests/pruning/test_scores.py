"""Scores against numbers by hand, what is chosen by name; masks keep exactly the best neurons."""

import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning import registry, statistics, weights
from dart_llm.pruning.compensation import compensation
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask, auto_count, overlap, top_ids, user_masks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.registry import ALL, SCORES, Registry
from dart_llm.pruning.scores import proxy, score, squared
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import LayerStatistics, SelfStats, Statistics, Sum
from dart_llm.pruning.weights import FfnWeights
from synthetic import make_layers, top

TOKENS = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 2.0], [1.0, -2.0, -2.0]])
"""Norms 5, sqrt 5 and 3."""

LAYER = FfnWeights(
    index=2,
    depth=1.0,
    stored_up=torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]]),  # norms 1, 5, 2
    gate=torch.tensor([[2.0, 0.0], [0.0, 3.0], [-6.0, 8.0]]),  # norms 2, 3, 10
    down=torch.tensor([[3.0, 1.0, 0.0], [-4.0, 0.0, 2.0]]),  # norms 5, 1, 2
    embedding=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    self_stats=SelfStats(LayerStatistics(), torch.tensor([0.5, 3.0, 0.75])),
)
# columns times rows: (3, -4, 7), (1, 0, 1), (0, 2, -2)
MAX, MEAN = torch.tensor([7.0, 1, 2]), torch.tensor([14 / 3, 2 / 3, 4 / 3])
MAGNITUDE = torch.tensor([10.0, 21, 8]).sqrt()
GOLDEN = {
    "magnitude": MAGNITUDE,
    "normalized": torch.tensor([0.36 + 0 + 1 / 9, 0.64 + 0.2 + 4 / 9, 0 + 0.8 + 4 / 9]).sqrt(),
    "contribution": MAGNITUDE * torch.tensor([5, 1, 2]),
    "wanda": MAGNITUDE * torch.tensor([7, 1, 2]),  # L1 norms
    "fisher": torch.tensor([5 / 3, 21, 2]),  # mean squares 10/3, 7, 8/3
    # variances 10/3 - (4/3)^2, 21/3 - (1/3)^2, 8/3
    "flap": torch.tensor([25 * 14 / 9, 1 * 62 / 9, 4 * 8 / 3]),
    "max": MAGNITUDE * MAX,
    "mean": MAGNITUDE * MEAN,
    "combined": MAGNITUDE * (MAX + MEAN),
    "product": MAGNITUDE**2 * MAX * MEAN,
    "weight": torch.tensor([5.0 * 1 * 2, 1 * 5 * 3, 2 * 2 * 10]),
}


def scored(name, chunks, weights=None, layer=LAYER):
    """The score of [B, T, I] ``chunks`` that arrive one after the other."""
    rule = SCORES.get(name)
    sums = Statistics(rule.per_token, frozenset(), rule.spread, rule.average)
    evidence = LayerStatistics()
    for index, chunk in enumerate(chunks):
        w = None if weights is None else weights[index]
        sums.add([evidence], LayerObservation(chunk[None]), w)
    return rule(sums.score_input(evidence, layer.width, layer.device), layer)


def same(result, wanted, rel=1e-6):
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(wanted.tolist(), rel=rel, abs=rel)


@pytest.mark.parametrize("name", [name for name in SCORES.names() if name != "random"])
@pytest.mark.parametrize("cuts", [[3], [1, 2]])
def test_golden(name, cuts, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 3 * len(cuts))  # tokens are summed in chunks
    same(scored(name, TOKENS[None].split(cuts, 1)), GOLDEN[name])


def test_rows_of_a_batch_are_summed():
    """A finished or padded row does not enter the sum."""
    other = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [4.0, 4.0, 4.0]])
    both, weights = torch.stack([TOKENS, other]), torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    squares = TOKENS.square().sum(0)
    same(scored("magnitude", [both]), (squares + other.square().sum(0)).sqrt())
    same(scored("magnitude", [both], [weights]), (squares + other[1].square()).sqrt())


def test_odd_tokens_and_weights(monkeypatch):
    tokens = torch.cat([torch.zeros(1, 2, 3), TOKENS[None]], 1)
    same(scored("normalized", [tokens]), GOLDEN["normalized"])
    plain = FfnWeights(0, 0.0, LAYER.up, None, LAYER.down)
    assert SCORES.get("weight")(torch.zeros(3), plain).tolist() == [5 * 1, 1 * 5, 2 * 2]
    monkeypatch.setattr(weights, "REACH_CHUNK", 2)  # three rows: a chunk of two and one of one
    layer = replace(LAYER)
    high, mean = proxy(layer)
    same(high, MAX)
    same(mean, MEAN)
    assert proxy(layer)[0] is high
    for rows in (None, torch.zeros(4, 5)):
        with pytest.raises(ConfigError, match="an embedding as wide as the FFN's output"):
            SCORES.get("max")(torch.ones(3), replace(plain, embedding=rows))


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.kind)
def test_names(table, snapshot):
    assert table.names() == snapshot
    for name in table.names():
        result = table.get(name)
        assert name in table and table.check(name) == name and table.get(name) is result
        assert result.__doc__
        if table.kind in ("score", "budget"):
            assert result.function.__doc__ and result.source
    near, own = table.names()[0], r" \(add your own with --plugin FILE\)"
    with pytest.raises(UnknownName, match=f"^unknown {table.kind} '{near}x'; did you mean {near}"):
        table.get(f"{near}x")
    with pytest.raises(UnknownName, match=f"known: {', '.join(table.names())}{own}$"):
        table.get("%%%")


def test_a_newcomer_registers_and_leaves():
    @score(squared, "a test")
    def backwards(a: Tensor, weights: FfnWeights) -> Tensor:
        """Keeps the weakest neurons."""
        return -a

    SCORES.register("backwards", backwards)
    try:
        assert "backwards" in SCORES.names()
        assert PruneConfig(score="backwards").score.name == "backwards"
        for name in ("backwards", "magnitude"):
            with pytest.raises(ConfigError, match=f"'{name}' is already registered"):
                SCORES.register(name, backwards)
    finally:
        SCORES.unregister("backwards")
    with pytest.raises(UnknownName):
        PruneConfig(score="backwards")
    SCORES.unregister("magnitude")
    assert "magnitude" in SCORES, "a built-in stays"


def test_entry_points_are_found_but_never_replace_a_built_in(monkeypatch):
    values = {"mine": "math:pi", "yours": "math:e"}
    points = [EntryPoint(name, value, "tests.numbers") for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: {"tests.numbers": points}[group])
    table = Registry("number", "tests.numbers", {"yours": "math:tau"})
    assert table.names() == ("mine", "yours")
    assert (table.get("mine"), table.get("yours")) == (math.pi, math.tau)


TWO = (*make_layers(1, width=4), *make_layers(1, width=5))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.data())
def test_the_kept_neurons_are_the_best_ones(values, data):
    """Ties go to the lower neuron."""
    keep = data.draw(st.integers(1, len(values)))
    score = torch.tensor(values, dtype=torch.float32)
    assert top_ids(score, keep).tolist() == top(score, keep)


def test_masks_and_auto_counts_by_hand():
    values = ([1, 2, 3, 4], [1, 1, 1, 1], [0, 0, 0, 12], [0] * 39 + [40], [0] * 34 + [35], [5])
    result = [auto_count(torch.tensor(one, dtype=torch.float64)) for one in values]
    assert result == [2, 4, 1, 4, 4, 1]
    nan, inf = torch.nan, torch.inf
    for values, count, places in (  # what is no number counts as infinite
        ([1.0, nan, 3.0, 2.0], 2, [1, 2]),
        ([nan, 1.0, inf, nan], 2, [0, 2]),
    ):
        assert top_ids(torch.tensor(values), count).tolist() == places
    mask = LayerMask(torch.tensor([1, 4]), 6, torch.zeros(3))
    assert mask.nbytes() == 2 * 8 + 3 * 4 and mask.removed().tolist() == [0, 2, 3, 5]
    assert mask.dense(torch.float16).tolist() == [0, 1, 0, 0, 1, 0]
    a, b = (LayerMask(torch.tensor(ids), 6) for ids in ([0, 1, 2, 3], [2, 3, 4]))
    assert overlap((a,), (b,)) == pytest.approx(2 / 3)  # the share that was kept before
    assert overlap((b,), (a,)) == pytest.approx(2 / 4)
    assert overlap((a, None, b), (b, a, b)) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("keep", "remove", "message"),
    [
        ({2: [0]}, None, "layer 2 is out of range: this model has 2 layers"),
        ({0: [4]}, None, "layer 0 has neurons 0-3; got id 4"),
        ({0: []}, None, "layer 0 would keep no neuron"),
        ({0: torch.ones(4, dtype=torch.bool)}, None, "layer 0 was given bool values: give neuron"),
        ({0: [0.5, 1.5]}, None, "layer 0 was given float32 values: give neuron ids"),
        *(([1, 2], None, "layer numbers to neuron ids"), ({"x": [1]}, None, "neuron ids")),
        *(({1.5: [1]}, None, "neuron ids"), ({True: [1]}, None, "neuron ids")),
        *(({0: bad}, None, "give a list of neuron ids") for bad in (None, "abc", [2**70])),
        ({0: [1]}, {0: [1]}, "give either masks= (neurons to keep) or remove=, not both"),
    ],
)
def test_user_masks_that_do_not_fit(keep, remove, message):
    with pytest.raises(ConfigError) as caught:
        user_masks(TWO, keep, remove)
    assert message in str(caught.value)


def test_user_masks():
    for keep, remove, kept in (
        ({1: [3, 0, 3]}, None, [None, [0, 3]]),
        ({0: torch.tensor([2]), 1: (2, 1)}, None, [[2], [1, 2]]),
        (None, {0: [1], 1: []}, [[0, 2, 3], None]),
    ):
        result = user_masks(TWO, keep, remove)
        assert [None if mask is None else mask.ids.tolist() for mask in result] == kept


def selector(**settings):
    made = PruneConfig.from_mapping({"sparsity": 0.5, "score": "magnitude", **settings})
    return MaskSelector(made, make_layers())


def evidence(scores, signed=None):
    result = [LayerStatistics({"score": Sum(value.square(), 1.0)}) for value in scores]
    for one, mean in zip(result, signed or (), strict=False):
        one.sums["signed"] = Sum(4 * mean, 4.0)
    return result


def test_scores_are_obeyed_exactly():
    drawn = list(torch.rand(3, 20, generator=torch.Generator().manual_seed(0)))
    chosen = selector(sparsity=0.35).select(evidence(drawn))
    assert chosen.counts == (13, 13, 13)
    for wanted, computed, mask in zip(drawn, chosen.scores, chosen.masks, strict=True):
        torch.testing.assert_close(computed, wanted)
        assert mask.ids.tolist() == top(wanted, 13)
    chosen = selector().select(evidence(drawn), (4, 20, 7))  # counts of an earlier mask
    assert chosen.counts == (4, 20, 7)
    assert [None if m is None else m.kept for m in chosen.masks] == [4, None, 7]
    auto = selector(score={"name": "magnitude", "strategy": "auto"}, sparsity=None)
    scores = [torch.arange(20.0), torch.ones(20), torch.cat([torch.zeros(19), torch.ones(1)])]
    chosen = auto.select(evidence(scores))
    assert chosen.counts == (10, 20, 2) and not auto.removes_nothing
    assert chosen.masks[0].ids.tolist() == [*range(10, 20)] and chosen.masks[1] is None


def test_compensation():
    """Mean output of the masked FFN plus its constant is the mean output of the dense one."""
    down = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]])
    mean = torch.tensor([10.0, 0.5, -2.0])
    assert compensation(down, mean, torch.tensor([1, 2])).tolist() == [1 - 6, -0.5 - 10]
    assert compensation(down, mean).tolist() == [10 + 1 - 6, -0.5 - 10]
    assert compensation(down.half(), mean).tolist() == [10 + 1 - 6, -0.5 - 10]
    half = compensation(down.half(), mean, torch.tensor([0]))
    assert half.dtype == torch.float32 and half.tolist() == [10, 0]
    drawn = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(3))
    known = evidence(list(drawn[0]), list(drawn[1]))
    chosen, plain = selector(compensation=True).select(known), selector().select(known)
    for with_bias, without in zip(chosen.masks, plain.masks, strict=True):  # it changes no choice
        assert torch.equal(with_bias.ids, without.ids) and without.bias is None
    for layer, mask, mean in zip(make_layers(), chosen.masks, drawn[1], strict=True):
        masked = layer.down @ (mean * mask.dense(torch.float32)) + mask.bias
        assert masked.tolist() == pytest.approx((layer.down @ mean).tolist(), rel=1e-4, abs=1e-5)
