"""Everything that is chosen by name: it exists, is documented, and names its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning import registry
from dart_llm.pruning.budgets import Budget
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import make_rule
from dart_llm.pruning.registry import ALL, BUDGETS, DRIFT_RULES, METHODS, SCORES, Registry
from dart_llm.pruning.scores import Score, score, squared
from dart_llm.pruning.weights import FfnWeights


def test_the_names() -> None:
    assert METHODS.names() == (
        "dart",
        "dart-prompt",
        "dart-token",
        "dense",
        "dense-4bit",
        "dense-8bit",
        "flap",
        "glass",
        "griffin",
        "griffin-refresh",
        "published",
        "random",
        "static",
        "wanda",
    )
    assert SCORES.names() == (
        "combined",
        "contribution",
        "fisher",
        "flap",
        "magnitude",
        "max",
        "mean",
        "normalized",
        "product",
        "random",
        "wanda",
        "weight",
    )
    assert BUDGETS.names() == (
        "depth",
        "depth-residual",
        "energy",
        "global",
        "ranked",
        "standardized",
        "uniform",
    )
    assert DRIFT_RULES.names() == ("dart", "interval", "never", "paper", "published")
    assert {table.kind for table in ALL} == {"method", "score", "budget", "drift rule"}


def test_everything_says_what_it_is() -> None:
    for table in (SCORES, BUDGETS):
        for name in table.names():
            found = table.get(name)
            assert isinstance(found, Score | Budget) and table.get(name) is found
            assert found.summary.endswith(".") and found.source
    for name in DRIFT_RULES.names():
        assert DRIFT_RULES.get(name).__doc__
        every = 7 if name == "interval" else 0
        assert make_rule(f"{name} 7" if every else name).interval == every


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.kind)
def test_unknown_names(table: Registry[Any]) -> None:
    for name in table.names():
        assert name in table
        assert table.check(name) == name
    near = table.names()[0]
    with pytest.raises(UnknownName) as caught:
        table.get(near + "x")
    assert str(caught.value).startswith(f"unknown {table.kind} '{near}x'; did you mean {near}")
    with pytest.raises(UnknownName) as caught:
        table.check("%%%")
    assert str(caught.value).endswith(f"known: {', '.join(table.names())}")
    assert "%%%" not in table


def test_a_newcomer_registers_and_leaves() -> None:
    @score(squared, "a test")
    def backwards(a: torch.Tensor, weights: FfnWeights) -> torch.Tensor:
        """Keeps the weakest neurons."""
        return -a

    SCORES.register("backwards", backwards)
    try:
        assert "backwards" in SCORES.names()
        assert PruneConfig(score="backwards").score.name == "backwards"
        with pytest.raises(ConfigError, match="'backwards' is already registered"):
            SCORES.register("backwards", backwards)
        with pytest.raises(ConfigError, match="'magnitude' is already registered"):
            SCORES.register("magnitude", backwards)
    finally:
        SCORES.unregister("backwards")
    assert "backwards" not in SCORES
    with pytest.raises(UnknownName):
        PruneConfig(score="backwards")
    SCORES.unregister("backwards")
    SCORES.unregister("magnitude")  # a built-in stays
    assert "magnitude" in SCORES


def test_entry_points_are_found_but_never_replace_a_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Point:
        name: str
        value: str

    groups = []

    def points(group: str) -> list[Point]:
        groups.append(group)
        return [Point("mine", "math:pi"), Point("yours", "math:e")]

    monkeypatch.setattr(registry, "entry_points", points)
    table: Registry[float] = Registry("number", "tests.numbers", {"yours": "math:tau"})
    assert table.names() == ("mine", "yours")
    assert table.get("mine") == pytest.approx(3.14159265)
    assert table.get("yours") == pytest.approx(6.2831853)
    assert groups == ["tests.numbers"]


def test_a_name_where_there_are_none() -> None:
    assert "there is none: leave it out" in str(UnknownName("variant for --oracle", "griffin", []))
