"""From the items of a measurement to what its headline metric averages, paired by id."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dart_llm import stats
from dart_llm.results_view import mapping, number
from dart_llm.stats import Sample, Value

WEIGHTS = ("tokens", "scored_tokens", "words", "bytes", "weight")
"""Names under which an item may say how much its mean loss weighs."""

LOSSES = ("loss", "mean_loss")
SUMS = ("loss_sum", "nll", "sum_loss")


@dataclass(frozen=True)
class Scores:
    """``sample``: items by id; ``exponential``: the metric is exp of their mean (a perplexity)."""

    sample: Sample
    exponential: bool

    @property
    def mean(self) -> float | None:
        return stats.mean(self.sample, "exp_mean" if self.exponential else "mean")

    def interval(self, seed: int) -> stats.Interval | None:
        """Of the metric itself."""
        return stats.interval(self.sample, "exp_mean" if self.exponential else "mean", seed)

    def against(self, other: Scores, seed: int) -> stats.Interval | None:
        """Paired: a difference, or a ratio of perplexities."""
        kind: stats.Kind = "ratio_of_exp_mean" if self.exponential else "difference"
        return stats.paired_interval(self.sample, other.sample, kind, seed)

    def mixed(self, other: Scores, share: float) -> Scores:
        """``(1 - share)`` of this and ``share`` of the other, item by item; losses are mixed in
        nats, so a perplexity is interpolated on its log axis."""
        return Scores(stats.mix(self.sample, other.sample, share), self.exponential)


def is_perplexity(metric: str) -> bool:
    """Whether a metric is the exponential of a mean loss."""
    return "perplexity" in metric.lower() or metric.lower() == "ppl"


def scores(measurement: Mapping[str, Any]) -> Scores:
    """The items that hold the headline metric; the sample is empty where none does.

    An item of an accuracy holds the metric under its name.  One of a perplexity holds ``losses``
    (nats per token), a mean loss or a summed one with its number of tokens, or lm-eval's pair of
    log-likelihood and weight.
    """
    metric = str(measurement.get("metric") or "")
    exponential = is_perplexity(metric)
    sample: dict[str, Value] = {}
    items = measurement.get("items")
    for place, item in enumerate(items if isinstance(items, list | tuple) else ()):
        item = mapping(item)
        value = _loss(item, metric) if exponential else _plain(item, metric)
        if value is not None:
            sample[str(item.get("id", place))] = value
    return Scores(sample, exponential)


def _plain(item: Mapping[str, Any], metric: str) -> Value | None:
    for name in (metric, metric.partition(",")[0]):
        value = item.get(name)
        if isinstance(value, bool):
            return float(value)
        found = number(value)
        if found is not None:
            return found if math.isfinite(found) else None
        pair = _pair(value)
        if pair is not None:  # bits per byte: a log-likelihood in nats over bytes
            return -pair[0] / pair[1] / math.log(2), pair[1]
    return None


def _loss(item: Mapping[str, Any], metric: str) -> Value | None:
    losses = item.get("losses")
    if isinstance(losses, list | tuple) and losses:
        known = [number(loss) for loss in losses]
        if any(loss is None for loss in known):
            return None
        return math.fsum(loss for loss in known if loss is not None) / len(known), float(len(known))
    weight = next((w for name in WEIGHTS if (w := number(item.get(name)))), None)
    for name in LOSSES:
        found = number(item.get(name))
        if found is not None:
            return found, weight or 1.0
    for name in SUMS:
        found = number(item.get(name))
        if found is not None and weight:
            return found / weight, weight
    for name in (metric, metric.partition(",")[0]):
        pair, alone = _pair(item.get(name)), number(item.get(name))
        if pair is not None:
            return -pair[0] / pair[1], pair[1]
        if alone is not None and alone > 0:
            return math.log(alone), weight or 1.0
    return None


def _pair(value: Any) -> tuple[float, float] | None:
    """lm-eval's (log-likelihood, weight)."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    first, second = number(value[0]), number(value[1])
    return (first, second) if first is not None and second else None
