"""Losses around a change, recomputed by hand, and what is said of them: like against like."""

import pytest

from dart_llm.studies.drift import record as drift_losses
from dart_llm.studies.drift.summary import comparable, sentence


def test_means_per_topic_and_bins_from_each_change_on():
    losses = [None, *(float(k) for k in range(1, 70))]
    first, second, third = drift_losses.topics(losses, [0, 30, 65], 20)
    assert (first["tokens"], first["mean_loss"]) == (29, 15.0)  # the first token has no loss
    assert first["first"] == [sum(range(1, 16)) / 15]
    assert (second["start"], second["tokens"], second["mean_loss"]) == (30, 35, 47.0)
    assert second["first"] == [37.5, 53.5]  # 30 to 45 and 46 to 61; 62 to 64 are no whole bin
    assert second["later"] == {"from": 20, "tokens": 15, "mean_loss": 57.0}
    assert (third["topic"], third["start"], third["tokens"]) == (2, 65, 5)
    assert (third["mean_loss"], third["first"], third["later"]) == (67.0, [], None)


def test_recovery_of_degenerate_losses():
    flat = [None, *[2.0] * 99]
    assert drift_losses.recovery(flat, flat, [0, 50])[0]["tokens"] == 0  # dense itself
    late = [2.0 if loss is None else loss + (50 <= k < 70) for k, loss in enumerate(flat)]
    found = drift_losses.recovery(late, flat, [0, 50])  # 3 of 32 tokens, not 4, are within 0.1
    assert found == [{"topic": 1, "tokens": 17, "within": 50}]
    higher = [2.0 if loss is None else loss + 0.11 * (k >= 50) for k, loss in enumerate(flat)]
    assert drift_losses.recovery(higher, flat, [0, 50])[0]["tokens"] is None
    short = drift_losses.recovery(flat[:80], flat[:80], [0, 50])
    assert short == [{"topic": 1, "tokens": None, "within": 30}]  # no window of 32 fits
    assert drift_losses.recovery(flat, flat, [0]) == []


def line(label, achieved, after, metric, sure=True):
    def value(mean):
        return {"mean": mean, "significant": sure}

    method = label.partition("@")[0]
    gap = None if method == "dense" else value(after - 4.0)
    loss = {"after": value(after), "after_minus_never": gap} if metric == 0 else None
    metrics = {"document_similarity": value(metric)} if metric else None
    own = {"label": label, "method": method, "achieved_sparsity": achieved, "cells": 3}
    return {**own, "loss": loss, "metrics": metrics}


@pytest.mark.parametrize("sure", [True, False])
def test_a_method_that_removed_much_less_does_not_win(sure):
    def summary(mode, *metrics):
        given = [("dense", 0.0, 3.0), ("never@0.5", 0.5, 4.0), ("dart@0.5", 0.46, 3.8)]
        given += [("interval:8@0.5", 0.2, 3.2)]
        rows = [line(*one, metric, sure) for one, metric in zip(given, metrics, strict=True)]
        return {"mode": mode, "sources": 3, "rows": rows}

    forced, free = summary("forced", 0, 0, 0, 0), summary("free", 1.0, 0.6, 0.7, 0.9)
    assert [row["label"] for row in comparable(forced["rows"])] == ["never@0.5", "dart@0.5"]
    noise = "" if sure else " (within noise)"
    assert sentence(forced) == (
        "Of 2 methods that removed about as much, over 3 passages, dart@0.5 had the least loss "
        "after the changes: 3.800 nats per token, at 46.0% achieved sparsity, -0.200 against never "
        f"re-masking{noise}."
    )
    assert sentence(free) == (
        "Of 2 methods that removed about as much, over 3 prompts, dart@0.5 wrote closest to dense: "
        "document similarity 0.700, at 46.0% achieved sparsity."
    )
    alone = {**forced, "rows": forced["rows"][:2]}
    assert "against never" not in sentence(alone)
    assert sentence({**forced, "rows": forced["rows"][:1]}) == ""
