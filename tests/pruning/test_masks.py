"""Masks: the kept neurons are exactly the best ones, and compensation is what they lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.compensation import compensation
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import LayerMask, auto_count, overlap, top_ids
from dart_llm.pruning.masks import user_masks as given_masks
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.scores import score, squared
from dart_llm.pruning.selection import MaskSelector as Selector
from dart_llm.pruning.selection import check_fits
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import Sum
from dart_llm.pruning.weights import FfnWeights
from synthetic import make_layers


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.data())
def test_the_kept_neurons_are_the_best_ones(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(values)))
    ids = top_ids(torch.tensor(values, dtype=torch.float32), keep).tolist()
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    assert ids == sorted(best)


def test_ties_go_to_the_lower_neuron() -> None:
    assert top_ids(torch.tensor([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]
    assert top_ids(torch.zeros(1000), 5).tolist() == [0, 1, 2, 3, 4]


def test_a_mask_and_its_complement() -> None:
    mask = LayerMask(torch.tensor([1, 4]), 6, torch.zeros(3))
    assert mask.kept == 2
    assert mask.dense(torch.float16).tolist() == [0, 1, 0, 0, 1, 0]
    assert mask.dense(torch.float16).dtype == torch.float16
    assert mask.removed().tolist() == [0, 2, 3, 5]
    assert mask.nbytes() == 2 * 8 + 3 * 4


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([1, 2, 3, 4], 2),  # mean 2.5
        ([1, 1, 1, 1], 4),  # the mean itself is kept
        ([0, 0, 0, 12], 1),
        ([0] * 39 + [40], 4),  # at least 10 %
        ([0] * 34 + [35], 4),  # of 35: 3.5, so 4
        ([5], 1),
    ],
)
def test_auto_keeps_what_reaches_the_mean(values: list[float], count: int) -> None:
    assert auto_count(torch.tensor(values, dtype=torch.float64)) == count


def test_overlap_is_the_share_that_was_kept_before() -> None:
    a, b = torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4])
    assert overlap([a], [b]) == pytest.approx(2 / 3)
    assert overlap([b], [a]) == pytest.approx(2 / 4)
    assert overlap([a, None, b], [b, a, b]) == pytest.approx(5 / 6)
    assert overlap([None], [a]) == 1.0


# a user's own masks


def lists(found: list[Tensor | None]) -> list[list[int] | None]:
    return [None if ids is None else ids.tolist() for ids in found]


def test_given_masks() -> None:
    assert lists(given_masks([4, 5], {1: [3, 0, 3]}, None)) == [None, [0, 3]]
    assert lists(given_masks([4, 5], {0: torch.tensor([2])}, None)) == [[2], None]
    assert lists(given_masks([4, 5], None, {0: [1], 1: []})) == [[0, 2, 3], [0, 1, 2, 3, 4]]
    assert lists(given_masks([4], {0: range(4)}, None)) == [[0, 1, 2, 3]]
    assert lists(given_masks([4], {0: (2, 1)}, None)) == [[1, 2]]


@pytest.mark.parametrize(
    ("keep", "remove", "parts"),
    [
        ({2: [0]}, None, ["layer 2 is out of range", "2 layers"]),
        ({-1: [0]}, None, ["layer -1 is out of range"]),
        ({0: [4]}, None, ["layer 0", "neurons 0-3", "got id 4"]),
        ({0: [-1, 3]}, None, ["layer 0", "neurons 0-3", "got id -1"]),
        (None, {1: [9]}, ["layer 1", "neurons 0-4", "got id 9"]),
        ({0: []}, None, ["layer 0 would keep no neuron"]),
        (None, {0: range(4)}, ["layer 0 would keep no neuron"]),
        ({0: torch.ones(4, dtype=torch.bool)}, None, ["layer 0", "bool", "neuron ids"]),
        ({0: [0.5, 1.5]}, None, ["layer 0", "float32", "neuron ids"]),
        ([1, 2], None, ["neuron ids"]),
        ({"x": [1]}, None, ["neuron ids"]),
        ({1.5: [1]}, None, ["neuron ids"]),
        ({True: [1]}, None, ["neuron ids"]),
        ({0: None}, None, ["neuron ids"]),
        ({0: "abc"}, None, ["neuron ids"]),
        ({0: [2**70]}, None, ["neuron ids"]),
        ({0: [1]}, {0: [1]}, ["masks=", "remove=", "not both"]),
    ],
)
def test_given_masks_that_do_not_fit(keep: Any, remove: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        given_masks([4, 5], keep, remove)
    for part in parts:
        assert part in str(caught.value)


# through the selector


def selector(count: int = 3, width: int = 20, **settings: Any) -> Selector:
    return check_fits(PruneConfig.from_mapping(settings), make_layers(count, width))


def evidence(scores: list[Tensor], signed: list[Tensor] | None = None) -> list[LayerEvidence]:
    found = []
    for layer, value in enumerate(scores):
        sums = {"score": Sum(value.square(), 1.0)}
        if signed is not None:
            sums["signed"] = Sum(4 * signed[layer], 4.0)
        found.append(LayerEvidence(sums))
    return found


def test_a_recording_score_is_obeyed_exactly() -> None:
    """Contract: whatever a score says, the kept neurons are its top k, layer by layer."""
    said: dict[int, Tensor] = {}

    @score(squared, "a test")
    def recording(a: Tensor, weights: FfnWeights) -> Tensor:
        """Random, and remembered."""
        generator = torch.Generator().manual_seed(weights.index)
        said[weights.index] = torch.rand(len(a), generator=generator)
        return said[weights.index]

    SCORES.register("recording", recording)
    try:
        chosen = selector(score="recording", sparsity=0.35).select(evidence([torch.ones(20)] * 3))
    finally:
        SCORES.unregister("recording")
    assert chosen.counts == (13, 13, 13)
    for layer, mask in enumerate(chosen.masks):
        assert mask is not None
        order = sorted(range(20), key=lambda i: -float(said[layer][i]))
        assert mask.ids.tolist() == sorted(order[:13])
        assert torch.equal(chosen.scores[layer], said[layer])


def test_counts_given_are_counts_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    found = evidence([torch.rand(20, generator=generator) for _ in range(3)])
    chosen = selector(sparsity=0.5, score="magnitude").select(found, (4, 20, 7))
    assert chosen.counts == (4, 20, 7)
    assert [None if m is None else m.kept for m in chosen.masks] == [4, None, 7]


def test_strategy_auto_sets_the_counts_itself() -> None:
    scores = [torch.arange(20.0), torch.ones(20), torch.cat([torch.zeros(19), torch.ones(1)])]
    chosen = selector(score={"name": "magnitude", "strategy": "auto"}).select(evidence(scores))
    assert chosen.counts == (10, 20, 2)
    assert chosen.masks[0] is not None
    assert chosen.masks[0].ids.tolist() == list(range(10, 20))
    assert chosen.masks[1] is None
    assert not selector(score={"strategy": "auto"}).removes_nothing


def test_compensation_by_hand() -> None:
    down = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0]])
    mean = torch.tensor([10.0, 0.5, -2.0])
    assert compensation(down, mean, torch.tensor([1, 2])).tolist() == [1 - 6, -0.5 - 10]
    assert compensation(down, mean, torch.tensor([], dtype=torch.int64)).tolist() == [0, 0]
    half = compensation(down.half(), mean, torch.tensor([0]))
    assert half.dtype == torch.float32
    assert half.tolist() == [10, 0]


def test_compensation_restores_the_mean_output() -> None:
    """Mean output of the masked FFN plus its constant is the mean output of the dense one."""
    generator = torch.Generator().manual_seed(3)
    signed = [torch.randn(20, generator=generator) for _ in range(3)]
    scores = [torch.rand(20, generator=generator) for _ in range(3)]
    chosen = selector(sparsity=0.5, score="magnitude", compensation=True).select(
        evidence(scores, signed)
    )
    for layer, mask in zip(make_layers(), chosen.masks, strict=True):
        assert mask is not None
        assert mask.bias is not None
        mean = signed[layer.index]
        masked = layer.down @ (mean * mask.dense(torch.float32)) + mask.bias
        assert masked.tolist() == pytest.approx((layer.down @ mean).tolist(), rel=1e-4, abs=1e-5)
    plain = selector(sparsity=0.5, score="magnitude").select(evidence(scores))
    assert all(mask is not None and mask.bias is None for mask in plain.masks)


def test_values_that_are_no_numbers_count_as_infinite_and_ties_go_to_the_lower() -> None:
    nan, inf = torch.nan, torch.inf
    cases = (
        ([1.0, nan, 3.0, 2.0], 2, [1, 2]),
        ([nan, 1.0, inf, nan], 2, [0, 2]),
        ([0.0, -0.0, -1.0, 0.0], 2, [0, 1]),
        ([-inf, -inf, -inf, 1.0], 2, [0, 3]),
    )
    for values, count, places in cases:
        assert top_ids(torch.tensor(values), count).tolist() == places
