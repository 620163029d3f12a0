"""Losses around a change, recomputed by hand, and what is said of them: like against like."""

import pytest
import torch

from dart_llm.studies.drift import losses as drift_losses
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


def by_definition(own, dense, start, end):
    """The definition, with tensors: the smallest t whose window's mean excess is small enough."""
    excess = torch.tensor(own).double() - torch.tensor(dense).double()
    bound = excess[max(0, start - 64) : start].mean() + 0.1
    for t in range(end - start):
        window = excess[start + t : start + t + 32]
        if start + t + 32 <= end and window.mean() <= bound:
            return t
    return None


@pytest.mark.parametrize("seed", range(3))
def test_recovery_is_the_first_window_whose_excess_is_as_before(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn(400, generator=generator)
    dense = (3 + torch.randn(400, generator=generator)).tolist()
    decay = torch.zeros(400)
    decay[150:300] = 2 * torch.exp(-torch.arange(150) / 30.0)
    decay[300:] = 1.0  # the second change is never recovered from
    own = (torch.tensor(dense) + 0.5 + noise + decay).tolist()
    first, second = drift_losses.recovery([None, *own[1:]], [None, *dense[1:]], [0, 150, 300])
    assert first == {"topic": 1, "tokens": by_definition(own, dense, 150, 300), "within": 150}
    assert first["tokens"] is not None and 20 < first["tokens"] < 118
    assert second == {"topic": 2, "tokens": None, "within": 100}


def test_recovery_of_degenerate_losses():
    flat = [None, *[2.0] * 99]
    assert drift_losses.recovery(flat, flat, [0, 50])[0]["tokens"] == 0  # dense itself
    exact = [2.0 if loss is None else loss + 0.1 * (k >= 50) for k, loss in enumerate(flat)]
    higher = [2.0 if loss is None else loss + 0.11 * (k >= 50) for k, loss in enumerate(flat)]
    assert drift_losses.recovery(exact, flat, [0, 50])[0]["tokens"] in (0, None)  # on the edge
    assert drift_losses.recovery(higher, flat, [0, 50])[0]["tokens"] is None
    short = drift_losses.recovery(flat[:80], flat[:80], [0, 50])
    assert short == [{"topic": 1, "tokens": None, "within": 30}]  # no window of 32 fits
    assert drift_losses.recovery(flat, flat, [0]) == []
    assert drift_losses.mean([]) is None


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
