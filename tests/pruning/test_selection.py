"""From scores and evidence to keep counts: budgets, blends, tables and alignment."""

from __future__ import annotations

import math

import pytest
import torch

from budget_cases import GOLDEN, S, depths, views
from dart_llm.errors import DartError
from dart_llm.pruning.budgets import depth_sparsities
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import BUDGETS
from dart_llm.pruning.selection import MaskSelector as Selector
from dart_llm.pruning.selection import check_fits
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.statistics import Sum
from synthetic import make_layers

# through the selector: scores and evidence in, counts out


def selector(count: int = 8, width: int = 100, **settings: object) -> Selector:
    layers = make_layers(count, width=width)
    return check_fits(PruneConfig.from_mapping({"sparsity": 0.5, **settings}), layers)


def evidence(seed: int = 0, count: int = 8, width: int = 100) -> list[LayerEvidence]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(count):
        sums = {
            "score": Sum(torch.rand(width, generator=generator) ** 3, 1.0),
            "cosine": Sum(torch.tensor(0.0), 1.0),
            "change": Sum(torch.tensor(float(S[layer % 8])), 1.0),
            "cosine-residual": Sum(torch.tensor(0.5), 1.0),
            "change-residual": Sum(torch.tensor(2.0 * S[7 - layer % 8]), 1.0),
        }
        found.append(LayerEvidence(sums))
    return found


def test_sensitivity_is_read_from_the_evidence() -> None:
    """S = (1 - mean cosine) x mean change, each budget its own."""
    found = selector()._view(1, torch.ones(100), evidence()[1])
    assert found.sensitivity == pytest.approx(S[1])
    assert found.residual_sensitivity == pytest.approx(S[6])


def test_selected_blend_is_the_mean_of_its_parts() -> None:
    parts = [selector(budget=name).select(evidence()).counts for name in ("depth", "energy")]
    blended = selector(budget="blend depth energy").select(evidence()).counts
    assert sum(blended) == 400
    assert all(abs(both - (a + b) / 2) <= 1 for both, a, b in zip(blended, *parts, strict=True))
    depth = selector(budget="depth").select(evidence()).counts
    assert depth == pytest.approx([100 * (1 - p) for p in GOLDEN[0.5]], abs=1)
    residual = selector(budget="depth-residual").select(evidence()).counts
    reverse = depth_sparsities(S[::-1], depths(8), 0.5)
    assert residual == pytest.approx([100 * (1 - p) for p in reverse], abs=1)
    both = selector(budget="blend depth depth-residual").select(evidence()).counts
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(depth, residual, strict=True)], abs=1)


def test_alignment_is_part_of_the_budget() -> None:
    counts = selector(budget={"name": "energy", "multiple": 8}).select(evidence()).counts
    assert all(count % 8 == 0 or count == 100 for count in counts)
    assert abs(sum(counts) - 400) <= 8 * 8


def test_tables_fix_layers_and_the_total_is_of_the_others() -> None:
    table = {"name": "uniform", "table": "0:0.6,1:#7,3-7:auto"}
    counts = selector(budget=table).select(evidence()).counts
    assert counts == (60, 7, 100, 50, 50, 50, 50, 50)
    masks = selector(budget=table).select(evidence()).masks
    assert [mask is None for mask in masks] == [False, False, True] + [False] * 5


def test_depth_of_a_layer_does_not_change_when_others_are_fixed() -> None:
    table = {"name": "depth", "table": "all:auto,0-1:1"}
    counts = selector(budget=table).select(evidence()).counts
    want = depth_sparsities(S[2:], depths(8)[2:], 0.5)
    assert counts[:2] == (100, 100)
    assert list(counts[2:]) == pytest.approx([100 * (1 - p) for p in want], abs=1)


def test_a_single_layer_and_zero_sparsity() -> None:
    for name in BUDGETS.names():
        single = views([torch.rand(10)], [1.0], [1.0], [torch.rand(10)])
        assert BUDGETS.get(name)(single, 6) == [6]
        many = views([torch.rand(10)] * 4, [1.0, 2, 3, 4], [1.0, 2, 3, 4], [torch.rand(10)] * 4)
        assert BUDGETS.get(name)(many, 40) == [10] * 4
    assert selector(sparsity=0.0).removes_nothing
    assert check_fits(PruneConfig(budget={"table": "all:1"}), make_layers()).removes_nothing
    assert not selector(sparsity=0.01).removes_nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_said(bad: float) -> None:
    found = evidence()
    found[3].sums["score"].total[5] = bad
    with pytest.raises(DartError, match=r"scores of layer 3 are not finite.*float32"):
        selector().select(found)
    found = evidence()
    found[2].sums["change"].total = torch.tensor(bad)
    with pytest.raises(DartError, match=r"sensitivities of layer 2 are not finite.*float32"):
        selector(budget="depth").select(found)
