"""Masks: the kept neurons are exactly the best ones, and compensation is what they lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.pruning.compensation import compensation
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask, auto_count, overlap, top_ids, user_masks
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import LayerStatistics, Sum
from synthetic import make_layers, top

TWO = (*make_layers(1, width=4), *make_layers(1, width=5))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.data())
def test_the_kept_neurons_are_the_best_ones(values, data):
    """Ties go to the lower neuron."""
    keep = data.draw(st.integers(1, len(values)))
    score = torch.tensor(values, dtype=torch.float32)
    assert top_ids(score, keep).tolist() == top(score, keep)


def test_auto_keeps_what_reaches_the_mean_and_at_least_a_tenth():
    values = ([1, 2, 3, 4], [1, 1, 1, 1], [0, 0, 0, 12], [0] * 39 + [40], [0] * 34 + [35], [5])
    result = [auto_count(torch.tensor(one, dtype=torch.float64)) for one in values]
    assert result == [2, 4, 1, 4, 4, 1]


def test_masks_by_hand():
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
    for score, computed, mask in zip(drawn, chosen.scores, chosen.masks, strict=True):
        torch.testing.assert_close(computed, score)
        assert mask.ids.tolist() == top(score, 13)
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
