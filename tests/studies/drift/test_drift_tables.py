"""What is said of a drift study in one sentence: like is compared with like."""

from __future__ import annotations

from typing import Any

from dart_llm.studies.drift import summary as drift_tables


def value(mean: float, significant: bool = True) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "significant": significant, "n": 3}


def line(label: str, achieved: float, after: float, metric: float = 0.5) -> dict[str, Any]:
    method = label.partition("@")[0]
    gap = None if method == "dense" else value(after - 4.0)
    return {
        "label": label,
        "method": method,
        "cells": 3,
        "achieved_sparsity": achieved,
        "dense_token_share": 1 - achieved / 0.5,
        "loss": {"after": value(after), "after_minus_never": gap},
        "metrics": {"document_similarity": value(metric)},
    }


def summary(mode: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"mode": mode, "sources": 3, "rows": [line("dense", 0.0, 3.0), *rows]}


FEW = [line("never@0.5", 0.5, 4.0, 0.6), line("dart@0.5", 0.46, 3.8, 0.7)]
DENSER = line("interval:8@0.5", 0.2, 3.2, 0.9)


def test_a_method_that_removed_much_less_does_not_win() -> None:
    rows = [*FEW, DENSER]
    assert [row["label"] for row in drift_tables.comparable(rows)] == ["never@0.5", "dart@0.5"]
    assert drift_tables.sentence(summary("forced", *rows)) == (
        "After the changes of 3 passages the mean loss was 3.000 nats dense and, of the methods "
        "within 5 points of the most removed, least with dart@0.5, 3.800 at 46.0% achieved "
        "sparsity, -0.200 against never re-masking; interval:8@0.5 had 3.200, and removed 20.0%."
    )
    assert drift_tables.sentence(summary("free", *rows)) == (
        "Over 3 prompts, of the methods within 5 points of the most removed, dart@0.5 wrote "
        "closest to the dense text (document similarity 0.700, at 46.0% achieved sparsity, 8.0% of "
        "the decoded tokens dense), before never@0.5 with 0.600; interval:8@0.5 had 0.900, and "
        "removed 20.0%."
    )


def test_alone_among_its_like_it_is_simply_the_least() -> None:
    assert drift_tables.sentence(summary("forced", *FEW)) == (
        "After the changes of 3 passages the mean loss was 3.000 nats dense and least with "
        "dart@0.5, 3.800 at 46.0% achieved sparsity, -0.200 against never re-masking."
    )
    assert drift_tables.sentence(summary("free", *FEW)) == (
        "Over 3 prompts dart@0.5 wrote closest to the dense text (document similarity 0.700, at "
        "46.0% achieved sparsity, 8.0% of the decoded tokens dense), before never@0.5 with 0.600."
    )
