"""Layer budgets: golden values of docs/method.md, and what must hold for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from budget_cases import GOLDEN, S, depths, views
from dart_llm.pruning.budgets import (
    LayerView,
    align_counts,
    blend_counts,
    depth_profile,
    depth_sparsities,
    round_counts,
)
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import floor_count
from dart_llm.pruning.registry import BUDGETS
from dart_llm.pruning.selection import check_fits
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import Sum
from synthetic import make_layers

# the published budget


@pytest.mark.parametrize("rho", GOLDEN)
def test_depth_golden(rho: float) -> None:
    found = depth_sparsities(S, depths(8), rho)
    assert found == pytest.approx(GOLDEN[rho], abs=5e-5)
    assert sum(found) / 8 == pytest.approx(rho, abs=1e-12)


def test_depth_by_hand() -> None:
    """L = 3: y = 0, 1/2, 1; D = .25, 1, .35; R = 1, 1/2, 0 (to 1e-6); P = .25, .5, 0."""
    found = depth_sparsities((1, 2, 3), depths(3), 0.4)
    # scaled: .4, .8, 0 -> .4, .8, .1; residue -.1 over layers 0 and 1 as 1 : 2
    assert found == pytest.approx([0.4 - 0.1 / 3, 0.8 - 0.2 / 3, 0.1], abs=1e-5)


@pytest.mark.parametrize(
    ("y", "d"),
    [(0, 0.25), (0.15, 0.625), (0.3, 1), (0.5, 1), (0.85, 1), (0.925, 0.675), (1, 0.35)],
)
def test_depth_profile(y: float, d: float) -> None:
    assert depth_profile(y) == pytest.approx(d)


def test_depth_is_uniform_for_one_layer_and_for_nothing() -> None:
    assert depth_sparsities([3.0], [0.0], 0.7) == [0.7]
    assert depth_sparsities(S, depths(8), 0) == [0] * 8
    assert depth_sparsities([2.0] * 4, [0.5] * 4, 0.3) == pytest.approx([0.3] * 4)


def test_the_residue_passes_by_layers_at_a_bound() -> None:
    """R = P = .05, 1, .4, .4, 0, scaled by 2.5 / 1.85: layers 0 and 4 are clipped to .1 and layer 1
    to .9; layers 2 and 3 alone take what is missing of 2.5."""
    found = depth_sparsities((0.95, 0.0, 0.6, 0.6, 1.0), [0.5] * 5, 0.5)
    assert found == pytest.approx([0.1, 0.9, 0.7, 0.7, 0.1], abs=1e-5)


def test_the_bounds_give_way_where_nothing_else_can() -> None:
    assert depth_sparsities((0.0, 1.0), (0.5, 0.5), 0.6) == pytest.approx([0.9, 0.3])


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=40),
    st.floats(0.001, 0.999),
)
def test_depth_meets_total_and_bounds(sensitivity: list[float], rho: float) -> None:
    found = depth_sparsities(sensitivity, depths(len(sensitivity)), rho)
    assert sum(found) / len(found) == pytest.approx(rho, abs=1e-9)
    assert min(found) >= min(0.1, rho) - 1e-9
    assert max(found) <= max(0.9, rho) + 1e-9


# energy and global


def test_energy_by_hand() -> None:
    """Shares of energy in order: .5 .25 .25 0, and .4 .3 .2 .1: each neuron is needed from the
    share that those before it hold: 0 .5 .75 1, and 0 .4 .7 .9."""
    first = torch.tensor([0.0, 5.0, 10.0, 5.0]) ** 0.5
    second = torch.tensor([1.0, 4.0, 3.0, 2.0]) ** 0.5
    energy = BUDGETS.get("energy")
    found = [energy(views([first, second]), keep) for keep in range(2, 9)]
    assert found == [[1, 1], [1, 2], [2, 2], [2, 3], [3, 3], [3, 4], [4, 4]]


def test_energy_ties_go_to_the_lower_layer() -> None:
    flat = [torch.ones(20)] * 3
    assert BUDGETS.get("energy")(views(flat), 31) == [11, 10, 10]
    assert BUDGETS.get("energy")(views(flat), 32) == [11, 11, 10]


def test_energy_of_a_silent_layer_is_its_floor() -> None:
    layers = views([torch.zeros(20), torch.arange(1.0, 21)])
    assert BUDGETS.get("energy")(layers, 20) == [2, 18]
    assert BUDGETS.get("energy")(views([torch.zeros(20), torch.zeros(20)]), 20) == [18, 2]


def test_global_by_hand() -> None:
    impacts = [torch.tensor([9.0, 1, 5, 2, 2]), torch.tensor([8.0, 7, 6, 0, 0])]
    layers = views([torch.ones(5)] * 2, impacts=impacts)
    found = [BUDGETS.get("global")(layers, keep) for keep in range(2, 9)]
    assert found == [[1, 1], [1, 2], [1, 3], [2, 3], [3, 3], [4, 3], [5, 3]]


def test_global_ranks_output_energy_against_the_stream() -> None:
    """(sum u^2) ||w||^2 (mean ||r||^2 / ||z||^2) / sum ||x||^2, from the evidence."""
    layers = make_layers(2, width=4)
    config = PruneConfig(sparsity=0.5, budget="global")
    selector = check_fits(config, layers)
    squares = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])]
    evidence = [
        LayerEvidence(
            {
                "score": Sum(square.clone(), 5.0),
                "squares": Sum(square, 5.0),
                "gain": Sum(torch.tensor(10.0 * (layer + 1)), 5.0),
                "stream": Sum(torch.tensor(50.0), 5.0),
            }
        )
        for layer, square in enumerate(squares)
    ]
    for layer, square in enumerate(squares):
        impact = selector._view(layer, square, evidence[layer]).impact
        norm = layers[layer].down.square().sum(0)
        want = square * norm * (2.0 * (layer + 1)) / 50
        assert impact is not None
        assert impact.tolist() == pytest.approx(want.tolist(), rel=1e-5)


def test_ranked_by_hand() -> None:
    """One order over both layers: 9 8 7 6 5 2 2 1 0 0, the lower layer first among equals."""
    scores = [torch.tensor([2.0, 9, 1, 5, 2]), torch.tensor([0.0, 7, 8, 6, 0])]
    found = [BUDGETS.get("ranked")(views(scores), keep) for keep in range(2, 11)]
    wanted = [[1, 1], [1, 2], [1, 3], [2, 3], [3, 3], [4, 3], [5, 3], [5, 4], [5, 5]]
    assert found == wanted


def test_ranked_compares_the_scores_as_they_are() -> None:
    """No layer is brought to the scale of another: the loud one gets all but the floor."""
    scores = [torch.arange(1.0, 21), 1e6 * torch.arange(1.0, 21)]
    assert BUDGETS.get("ranked")(views(scores), 20) == [2, 18]
    assert BUDGETS.get("ranked")(views(scores[::-1]), 24) == [20, 4]
    assert BUDGETS.get("ranked")(views([torch.zeros(20)] * 2), 20) == [18, 2]
    assert BUDGETS.get("ranked")(views([-torch.ones(20), torch.zeros(20)]), 20) == [2, 18]
    assert BUDGETS.get("ranked").needs == frozenset()


def test_ranked_below_the_floors_is_even() -> None:
    scores = [torch.arange(1.0, 21), 1e6 * torch.arange(1.0, 41)]
    assert BUDGETS.get("ranked")(views(scores), 6) == [2, 4]
    assert BUDGETS.get("ranked")(views(scores), 3) == [1, 2]


@st.composite
def allocations(draw: st.DrawFn) -> tuple[list[LayerView], int]:
    """Random layers of unequal widths, with silent neurons and ties, and a number to keep."""
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    kind = draw(st.sampled_from(["smooth", "ties", "silent", "spiky"]))
    scores, impacts = [], []
    for size in sizes:
        score = torch.rand(size, generator=generator)
        if kind == "ties":
            score = (3 * score).round()
        if kind == "silent":
            score = score * (torch.rand(size, generator=generator) < 0.5)
        if kind == "spiky":
            score = score**12
        scores.append(score)
        impacts.append(score.square() * torch.rand(1, generator=generator))
    sensitivity = (torch.rand(len(sizes), generator=generator) * 10).tolist()
    rho = draw(st.floats(0, 0.999))
    keep = round((1 - rho) * sum(sizes))
    return views(scores, sensitivity, sensitivity[::-1], impacts), keep


@pytest.mark.contract("allocation sums to the budget")
@settings(deadline=None, max_examples=150)
@given(allocations(), st.sampled_from(BUDGETS.names()))
def test_totals_and_bounds(case: tuple[list[LayerView], int], name: str) -> None:
    layers, keep = case
    found = BUDGETS.get(name)(layers, keep)
    assert sum(found) == max(keep, len(layers))
    assert all(1 <= count <= layer.width for count, layer in zip(found, layers, strict=True))
    if (
        name in ("energy", "global", "ranked", "standardized")
        and sum(floor_count(layer.width) for layer in layers) <= keep
    ):
        assert all(
            count >= math.ceil(layer.width / 10) for count, layer in zip(found, layers, strict=True)
        )


@settings(deadline=None, max_examples=200)
@given(allocations())
def test_energy_is_one_level(case: tuple[list[LayerView], int]) -> None:
    """There is a share e such that every layer keeps the fewest neurons that hold e."""
    layers, keep = case
    assume(sum(floor_count(layer.width) for layer in layers) <= keep)
    held, missing = [], []
    for count, layer in zip(BUDGETS.get("energy")(layers, keep), layers, strict=True):
        squares = layer.score.square().sort(descending=True).values
        if float(squares.sum()) == 0:
            continue
        share = squares.cumsum(0) / squares.sum()
        if count > floor_count(layer.width):  # the last neuron kept is needed to reach e
            held.append(float(share[count - 2]) if count > 1 else 0.0)
        if count < layer.width:  # those kept reach e
            missing.append(float(share[count - 1]))
    if held and missing:
        assert max(held) <= min(missing) + 1e-12


@settings(deadline=None, max_examples=200)
@given(allocations())
def test_global_keeps_the_best_of_all_layers(case: tuple[list[LayerView], int]) -> None:
    layers, keep = case
    assume(sum(floor_count(layer.width) for layer in layers) <= keep)
    kept, lost = [], []
    for count, layer in zip(BUDGETS.get("global")(layers, keep), layers, strict=True):
        assert layer.impact is not None
        order = layer.impact.sort(descending=True).values.tolist()
        if count > floor_count(layer.width):
            kept.append(order[count - 1])
        if count < layer.width:
            lost.append(order[count])
    if kept and lost:
        assert min(kept) >= max(lost)


@settings(deadline=None, max_examples=200)
@given(allocations())
def test_ranked_keeps_the_best_of_all_layers(case: tuple[list[LayerView], int]) -> None:
    layers, keep = case
    assume(sum(floor_count(layer.width) for layer in layers) <= keep)
    kept, lost = [], []
    for count, layer in zip(BUDGETS.get("ranked")(layers, keep), layers, strict=True):
        order = layer.score.sort(descending=True).values.tolist()
        kept += order[floor_count(layer.width) : count]
        lost += order[count:]
    if kept and lost:
        assert min(kept) >= max(lost)


def test_uniform() -> None:
    uniform = BUDGETS.get("uniform")
    assert uniform(views([torch.ones(10)] * 3), 15) == [5, 5, 5]
    assert uniform(views([torch.ones(10)] * 3), 16) == [6, 5, 5]
    assert uniform(views([torch.ones(10), torch.ones(30)]), 20) == [5, 15]
    assert uniform(views([torch.ones(10)] * 3), 30) == [10, 10, 10]


# whole numbers


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=20),
)
def test_rounding_moves_no_count_by_more_than_one(pairs: list[tuple[int, float]]) -> None:
    sizes = [size for size, _ in pairs]
    wanted = [max(1.0, size * share) for size, share in pairs]
    keep = round(sum(wanted))
    found = round_counts(wanted, sizes, keep)
    assert sum(found) == keep
    assert all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))


def test_rounding_by_largest_remainder() -> None:
    assert round_counts([1.2, 1.7, 1.6, 2.5], [9] * 4, 7) == [1, 2, 2, 2]
    assert round_counts([1.5, 1.5, 1.5, 1.5], [9] * 4, 6) == [2, 2, 1, 1]
    assert round_counts([3.0, 3.0], [3, 9], 8) == [3, 5]
    assert round_counts([5.0, 5.0], [9, 9], 0) == [1, 1]
    assert round_counts([5.0, 5.0], [9, 9], 99) == [9, 9]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 1)), min_size=1, max_size=12),
    st.integers(1, 64),
)
def test_alignment(pairs: list[tuple[int, float]], multiple: int) -> None:
    sizes = [size for size, _ in pairs]
    counts = [max(1, int(size * share)) for size, share in pairs]
    found = align_counts(counts, sizes, multiple)
    for count, size in zip(found, sizes, strict=True):
        assert count == size or (count % multiple == 0 and 0 < count < size)
    assert abs(sum(found) - sum(counts)) <= multiple * len(sizes)


def test_alignment_by_hand() -> None:
    assert align_counts([700, 800, 900], [1536] * 3, 32) == [704, 800, 896]
    assert align_counts([47, 48], [48, 48], 32) == [48, 48]
    assert align_counts([33, 20], [48, 48], 32) == [32, 32]
    assert align_counts([5, 7], [8, 8], 1) == [5, 7]


def test_blend_is_the_mean() -> None:
    assert blend_counts([4, 8, 6], [8, 4, 6], [10] * 3) == [6, 6, 6]
    assert blend_counts([5, 8, 5], [8, 4, 6], [10] * 3) == [7, 6, 5]
