"""benchmarks/items.py: what is kept of a run's items."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from published import ROOT


@pytest.fixture(scope="module")
def items() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import items as found

        yield found
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_of_slices_the_losses_by_name_are_kept(items: Any) -> None:
    own = {"model": "m", "cell": "continuation", "variant": "dart", "sparsity": 0.5}
    lines = [
        {**own, "slice": "w/0", "source": "w", "loss": 3.5, "tokens": 256, "accounting": {}},
        {**own, "sparsity": 0.7, "slice": "w/0", "loss": 4.0},
        {**own, "slice": "w/1", "loss": 2.5},
    ]
    assert items.quality(lines) == [
        {**own, "losses": {"w/0": 3.5, "w/1": 2.5}},
        {**own, "sparsity": 0.7, "losses": {"w/0": 4.0}},
    ]


def test_of_cells_the_losses_and_the_moments_of_masks_are_kept(items: Any) -> None:
    topic = {"topic": 0, "tokens": 4, "mean_loss": 3.0, "first": [1.0, 2.0], "later": None}
    row = {"status": "done", "label": "dart@0.5", "decoded_tokens": 9, "metrics": None}
    row |= {"cell": {"source": "p", "seed": 1}, "topics": [{"name": "bees"}]}
    row |= {"remasks": [{"step": 0, "kept": [3]}, {"step": 7, "kept": [2]}]}
    row |= {"loss": {"topics": [topic], "recovery": None}}
    failed = {"status": "failed", "label": "x"}
    assert items.drift([row, failed]) == [
        {
            "label": "dart@0.5",
            "source": "p",
            "seed": 1,
            "decoded_tokens": 9,
            "remasks": [0, 7],
            "loss": {
                "topics": [{"topic": 0, "tokens": 4, "mean_loss": 3.0, "later": None}],
                "recovery": None,
            },
            "metrics": None,
        }
    ]


def test_of_passages_the_triggers_are_kept(items: Any) -> None:
    fired = [{"signal": "hidden", "rule": "dart", "triggers": [746]}]
    passage = {"id": "p", "topics": ["a", "b"], "changes": [667]}
    rows = [{"status": "done", "passage": passage, "rules": fired}, {"status": "failed"}]
    assert items.detection(rows) == [{"passage": "p", "changes": [667], "rules": fired}]
