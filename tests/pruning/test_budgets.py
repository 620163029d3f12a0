"""Layer budgets: golden values of docs/reference.md, and what must hold for every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import DartError
from dart_llm.pruning.budgets import LayerView, depth_profile, depth_sparsities, round_counts
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import BUDGETS
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import LayerStatistics, Sum
from synthetic import make_layers

S = (14, 1, 1.2, 0.9, 1.1, 1.3, 1, 0.8)
GOLDEN = {
    0.5: (0.1, 0.4042, 0.6321, 0.6709, 0.6606, 0.6504, 0.6452, 0.2366),
    0.7: (0.1, 0.6308, 0.9, 0.9, 0.9, 0.9, 0.9, 0.3692),
}
"""Sensitivities of eight layers, and the sparsities of the published budget."""


def depths(count):
    return [layer / max(1, count - 1) for layer in range(count)]


def views(scores, sensitivity=None):
    each = zip(depths(len(scores)), scores, sensitivity or [None] * len(scores), strict=True)
    return [LayerView(len(score), depth, score.double(), change) for depth, score, change in each]


def test_depth_by_hand():
    for rho, wanted in GOLDEN.items():
        result = depth_sparsities(S, depths(8), rho)
        assert result == pytest.approx(wanted, abs=5e-5)
        assert sum(result) / 8 == pytest.approx(rho, abs=1e-12)
    profile = {0: 0.25, 0.15: 0.625, 0.3: 1, 0.5: 1, 0.85: 1, 0.925: 0.675, 1: 0.35}
    assert {y: pytest.approx(depth_profile(y)) for y in profile} == profile
    # L = 3: y = 0, 1/2, 1; D = .25, 1, .35; R = 1, 1/2, 0 (to 1e-6); P = .25, .5, 0;
    # scaled: .4, .8, 0 -> .4, .8, .1; residue -.1 over layers 0 and 1 as 1 : 2
    result = depth_sparsities((1, 2, 3), depths(3), 0.4)
    assert result == pytest.approx([0.4 - 0.1 / 3, 0.8 - 0.2 / 3, 0.1], abs=1e-5)
    # R = P = .05, 1, .4, .4, 0, scaled by 2.5 / 1.85: layers 0 and 4 are clipped to .1 and layer 1
    # to .9; layers 2 and 3 alone take what is missing of 2.5
    result = depth_sparsities((0.95, 0.0, 0.6, 0.6, 1.0), [0.5] * 5, 0.5)
    assert result == pytest.approx([0.1, 0.9, 0.7, 0.7, 0.1], abs=1e-5)
    # the bounds give way where nothing else can
    assert depth_sparsities((0.0, 1.0), (0.5, 0.5), 0.6) == pytest.approx([0.9, 0.3])


def test_whole_counts_by_hand():
    """The largest remainders are rounded up, the smallest down; ties go to the lower layer."""
    assert round_counts([1.2, 2.7, 3.6], [8, 8, 8], 7) == [1, 3, 3]
    assert round_counts([1.5, 1.5, 2.0], [8, 8, 8], 5) == [2, 1, 2]
    assert round_counts([3.0, 3.0, 3.0], [8, 8, 8], 7) == [2, 2, 3]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.floats(0.001, 0.999))
def test_depth_meets_total_and_bounds(sensitivity, rho):
    result = depth_sparsities(sensitivity, depths(len(sensitivity)), rho)
    assert sum(result) / len(result) == pytest.approx(rho, abs=1e-9)
    assert min(result) >= min(0.1, rho) - 1e-9 and max(result) <= max(0.9, rho) + 1e-9


RISING = torch.arange(1.0, 21)
TWO = [torch.tensor([2.0, 9, 1, 5, 2]), torch.tensor([0.0, 7, 8, 6, 0])]
# shares of energy in order: .5 .25 .25 0, and .4 .3 .2 .1
ENERGIES = [torch.tensor([0.0, 5, 10, 5]).sqrt(), torch.tensor([1.0, 4, 3, 2]).sqrt()]


@pytest.mark.parametrize(
    ("name", "scores", "counts"),
    [
        ("energy", ENERGIES, {2: [1, 1], 3: [1, 2], 4: [2, 2], 5: [2, 3], 6: [3, 3], 7: [3, 4]}),
        ("energy", [torch.ones(20)] * 3, {31: [11, 10, 10], 32: [11, 11, 10]}),
        ("energy", [torch.zeros(20), RISING], {20: [2, 18]}),  # a silent layer has its floor
        ("ranked", TWO, {2: [1, 1], 4: [1, 3], 6: [3, 3], 8: [5, 3], 9: [5, 4], 10: [5, 5]}),
        ("ranked", [RISING, 1e6 * RISING], {20: [2, 18]}),  # scores compare as they are
        ("ranked", [RISING, 1e6 * torch.arange(40.0)], {6: [2, 4], 3: [1, 2]}),  # below the floors
        ("standardized", [RISING, 1e6 * RISING], {20: [10, 10], 21: [11, 10]}),
        ("uniform", [torch.ones(10)] * 3, {15: [5] * 3, 16: [6, 5, 5], 30: [10] * 3}),
    ],
)
def test_budgets_by_hand(name, scores, counts):
    assert {keep: BUDGETS.get(name)(views(scores), keep) for keep in counts} == counts


@st.composite
def allocations(draw):
    """Random layers of unequal widths, with silent neurons and ties, and a number to keep."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    kind = draw(st.sampled_from(["smooth", "ties", "silent", "spiky"]))
    kinds = {
        "smooth": lambda score: score,
        "ties": lambda score: (3 * score).round(),
        "silent": lambda score: score * (score < 0.5),
        "spiky": lambda score: score**12,
    }
    scores = [kinds[kind](torch.rand(size, generator=generator)) for size in sizes]
    sensitivity = (torch.rand(len(sizes), generator=generator) * 10).tolist()
    keep = round((1 - draw(st.sampled_from([0, 0.5, 0.999]) | st.floats(0, 0.999))) * sum(sizes))
    return views(scores, sensitivity), keep


@pytest.mark.contract("allocation sums to the budget")
@settings(deadline=None, max_examples=300)
@given(allocations(), st.sampled_from(BUDGETS.names()))
def test_totals_floors_and_bounds(case, name):
    layers, keep = case
    floors = [math.ceil(layer.width / 10) for layer in layers]
    counts = BUDGETS.get(name)(layers, keep)
    assert sum(counts) == max(keep, len(layers))
    assert all(1 <= count <= layer.width for count, layer in zip(counts, layers, strict=True))
    if name in ("energy", "ranked", "standardized") and keep >= sum(floors):
        assert all(map(int.__ge__, counts, floors))


def selector(count=8, width=100, **settings):
    layers = make_layers(count, width=width)
    return MaskSelector(PruneConfig.from_mapping({"sparsity": 0.5, **settings}), layers)


def evidence():
    generator = torch.Generator().manual_seed(0)

    def seen(layer):
        values = {"cosine": 0.0, "change": S[layer]}
        result = {name: Sum(torch.tensor(float(one)), 1.0) for name, one in values.items()}
        return {"score": Sum(torch.rand(100, generator=generator) ** 3, 1.0), **result}

    return [LayerStatistics(seen(layer)) for layer in range(8)]


def counts_of(budget):
    return selector(budget=budget).select(evidence()).counts


@pytest.mark.contract("defects of the published scripts stay fixed")
def test_blends_and_tables():
    """S = (1 - mean cosine) x mean change."""
    depth, energy, blended = map(counts_of, ("depth", "energy", "blend depth energy"))
    assert depth == pytest.approx([100 * (1 - p) for p in GOLDEN[0.5]], abs=1)
    mean = [(a + b) / 2 for a, b in zip(depth, energy, strict=True)]
    assert sum(blended) == 400 and blended == pytest.approx(mean, abs=1)
    table = {"name": "uniform", "table": "0:0.6,1:#7,3-7:auto"}
    assert counts_of(table) == (60, 7, 100, 50, 50, 50, 50, 50)
    selection = selector(sparsity=None, budget={"table": "0,1,2:0.5"}).select(evidence())
    assert selection.counts == (50, 50, 50, *[100] * 5)
    # the depth of a layer does not change when others are fixed
    counts = counts_of({"name": "depth", "table": "all:auto,0-1:1"})
    want = depth_sparsities(S[2:], depths(8)[2:], 0.5)
    assert counts == pytest.approx([100, 100, *(100 * (1 - p) for p in want)], abs=1)
    assert selector(sparsity=0.0).removes_nothing and not selector(sparsity=0.01).removes_nothing
    assert selector(sparsity=None, budget={"table": "all:1"}).removes_nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_said(bad):
    for budget, what, layer in (("uniform", "scores", 3), ("depth", "sensitivities", 2)):
        result = evidence()
        result[layer].sums["score" if layer == 3 else "change"].total.view(-1)[0] = bad
        with pytest.raises(DartError, match=rf"{what} of layer {layer} are not finite.*float32"):
            selector(budget=budget).select(result)
