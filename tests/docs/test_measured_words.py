"""docs/measurements.md: the sentences between its tables are true to the files behind them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from published import ROOT


def drift(name: str) -> dict[str, Any]:
    path = ROOT / f"benchmarks/results/drift-{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def after(name: str) -> dict[str, float]:
    """Mean loss after the changes by method, without its sparsity."""
    rows = drift(name)["rows"]
    return {row["label"].split("@")[0]: row["loss"]["after"]["mean"] for row in rows}


@pytest.mark.parametrize("name", ["forced-smollm2", "forced-qwen"])
def test_fresh_evidence_from_one_token_is_worst_and_decayed_from_32_best(name: str) -> None:
    losses = after(name)
    known = {label: loss for label, loss in losses.items() if label[:5] in ("fresh", "decay")}
    assert min(known, key=known.__getitem__) == "decay:32"
    assert max(known, key=known.__getitem__) == "fresh:1"
    assert losses["published"] > losses["never"]


def test_one_fresh_token_harms_the_first_default_alone() -> None:
    assert after("forced-qwen")["fresh:1"] > after("forced-qwen")["never"] + 0.5
    assert after("forced-smollm2")["fresh:1"] < after("forced-smollm2")["never"]


def test_live_rules_gain_at_equal_sparsity() -> None:
    found = drift("equal-smollm2")
    pairs = {pair["label"]: pair["after"] for pair in found["pairs"]}
    assert set(pairs) == {"dart@0.5", "interval:64@0.5", "paper@0.5", "decay:32@0.5"}
    assert all(pair["significant"] and pair["high"] < 0 for pair in pairs.values())
    assert pairs["dart@0.5"]["mean"] - pairs["decay:32@0.5"]["mean"] < 0.03
    dense = {row["label"]: row["dense_token_share"] for row in found["rows"]}
    assert dense["dart@0.5"] < dense["paper@0.5"] < dense["interval:64@0.5"]
