"""What is said of a drift study in one sentence: like is compared with like."""

from __future__ import annotations

from typing import Any

from dart_llm.studies.drift.summary import comparable, sentence


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
    assert [row["label"] for row in comparable(rows)] == ["never@0.5", "dart@0.5"]
    assert sentence(summary("forced", *rows)) == (
        "Of 2 methods within 5 points of the most removed over 3 passages, dart@0.5 had the least "
        "loss after the changes: 3.800 nats per token, at 46.0% achieved sparsity, -0.200 against "
        "never re-masking."
    )
    assert sentence(summary("free", *rows)) == (
        "Of 2 methods within 5 points of the most removed over 3 prompts, dart@0.5 wrote closest "
        "to dense: document similarity 0.700, at 46.0% achieved sparsity."
    )


def test_a_sentence_says_when_a_difference_is_noise_and_nothing_of_nothing() -> None:
    dart = line("dart@0.5", 0.5, 3.8)
    dart["loss"]["after_minus_never"] = value(-0.2, significant=False)
    assert sentence(summary("forced", FEW[0], dart)) == (
        "Of 2 methods over 3 passages, dart@0.5 had the least loss after the changes: 3.800 nats "
        "per token, at 50.0% achieved sparsity, -0.200 against never re-masking (within noise)."
    )
    assert "against never" not in sentence(summary("forced", FEW[0]))
    assert sentence(summary("forced")) == sentence(summary("free")) == ""
