"""Rows of a comparison: methods by sparsity and task, each paired with dense and with GRIFFIN.

A row comes from one line of ``results.jsonl``.  Rows are comparable when model,
dtype, task and protocol agree; dense and GRIFFIN are those of the same seed where there are any,
else of another seed.  Differences are paired by item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dart_llm.evaluation.tasks import short
from dart_llm.experiments import stats
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.stats import Interval, Sample, Value
from dart_llm.experiments.store import number
from dart_llm.pruning.accounting import TokenTraffic
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import mostly_dense, percent, quantity, times

DENSE, GRIFFIN = "dense", "griffin"

TOO_FEW = "few differ"

TOLERANCE = 0.01
"""Achieved sparsities, or byte shares, this close count as equal: one point."""

ACCOUNTING = {
    "achieved": "achieved_sparsity",
    "while_pruned": "sparsity_while_pruned",
    "dense_share": "dense_token_share",
    "remasks": "remasks",
    "decoded": "decoded_tokens",
    "executor": "executor",
    "bytes_executed": "ffn_bytes_share",
    "bytes_if_compact": "ffn_bytes_share_if_compact",
    "token_bytes_share": "token_bytes_share",
    "mean_context": "mean_context",
}
"""Fields of a row, and what they are called in the accounting of a measurement."""


# The items of a measurement, paired by id.


@dataclass(frozen=True)
class Scores:
    """``sample``: items by id; ``exponential``: the metric is exp of their mean (a perplexity)."""

    sample: Sample
    exponential: bool

    @property
    def _kind(self) -> stats.Mean:
        return "exp_mean" if self.exponential else "mean"

    @property
    def mean(self) -> float | None:
        return stats.mean(self.sample, self._kind)

    def interval(self) -> Interval | None:
        """Of the metric itself."""
        return stats.interval(self.sample, self._kind)

    def against(self, other: Scores) -> Interval | None:
        """Paired: a difference, or a ratio of perplexities."""
        kind: stats.Kind = "ratio_of_exp_mean" if self.exponential else "difference"
        return stats.paired_interval(self.sample, other.sample, kind)


def is_perplexity(metric: str) -> bool:
    """Whether a metric is the exponential of a mean loss."""
    return "perplexity" in metric.lower() or metric.lower() == "ppl"


def scores(measurement: Mapping[str, Any]) -> Scores:
    """The items that have the headline metric; the sample is empty where none does.

    An item has the metric under its name, as a number or as lm-eval's pair of log-likelihood and
    weight; one of a perplexity has ``mean_loss`` (nats per token) and ``tokens`` instead.
    """
    metric = str(measurement.get("metric") or "")
    exponential = is_perplexity(metric)
    read = _loss if exponential else _plain
    sample: dict[str, Value] = {}
    for place, item in enumerate(measurement.get("items") or ()):
        value = read(item, metric)
        if value is not None:
            sample[str(item.get("id", place))] = value
    return Scores(sample, exponential)


def _plain(item: Mapping[str, Any], metric: str) -> Value | None:
    value = _of_metric(item, metric)
    pair = _pair(value)
    if pair is not None:  # bits per byte: a log-likelihood in nats over bytes
        return -pair[0] / pair[1] / math.log(2), pair[1]
    known = float(value) if isinstance(value, bool) else number(value)
    return known if known is not None and math.isfinite(known) else None


def _loss(item: Mapping[str, Any], metric: str) -> Value | None:
    loss = number(item.get("mean_loss"))
    if loss is not None:
        return loss, number(item.get("tokens")) or 1.0
    value = _of_metric(item, metric)
    pair, alone = _pair(value), number(value)
    if pair is not None:
        return -pair[0] / pair[1], pair[1]
    return (math.log(alone), 1.0) if alone is not None and alone > 0 else None


def _of_metric(item: Mapping[str, Any], metric: str) -> Any:
    """lm-eval names a metric with its filter, "acc,none"; items may lack the filter."""
    return item.get(metric, item.get(metric.partition(",")[0]))


def _pair(value: Any) -> tuple[float, float] | None:
    """lm-eval's (log-likelihood, weight)."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    first, second = number(value[0]), number(value[1])
    return (first, second) if first is not None and second else None


# Rows.


@dataclass(frozen=True)
class Equal:
    """GRIFFIN where it was measured at a row's own achieved sparsity, or FFN bytes: ``at``."""

    value: float | None
    interval: Interval | None
    """The row against it: a difference, or a ratio of perplexities."""
    at: float


@dataclass(frozen=True)
class Row:
    """One method at one sparsity on one task; what is not known is None."""

    model: str
    dtype: str | None
    method: str
    label: str
    task: str
    protocol: str | None
    seed: int | None
    requested: float | None
    layers: str | None = None
    """The layer or layers that were pruned, where not all; ``keep``: the share kept there."""
    keep: float | None = None
    base_keep: float | None = None
    """What the other layers keep; None: everything."""
    status: str = "done"
    error: str | None = None
    metric: str = ""
    higher_is_better: bool = True
    value: float | None = None
    interval: Interval | None = None
    items: int = 0
    achieved: float | None = None
    while_pruned: float | None = None
    dense_share: float | None = None
    remasks: int | None = None
    decoded: int | None = None
    executor: str | None = None
    bytes_executed: float | None = None
    bytes_if_compact: float | None = None
    bytes_share: float | None = None
    """The one of the two above that the comparison at equal bytes uses."""
    token_bytes_share: float | None = None
    """Bytes that a decoded token reads over those of the dense model at bfloat16."""
    mean_context: float | None = None
    weight_bytes: float | None = None
    to_dense: Interval | None = None
    to_griffin: Interval | None = None
    """At the same requested sparsity, whatever was achieved."""
    gap: float | None = None
    """Achieved sparsity minus GRIFFIN's at the same requested sparsity."""
    equal_sparsity: Equal | None = None
    equal_bytes: Equal | None = None
    notes: tuple[str, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    traffic: TokenTraffic | None = field(default=None, repr=False, compare=False)
    """What a token reads of a model that was not pruned."""
    scores: Scores = field(default=Scores({}, False), repr=False, compare=False)

    @property
    def group(self) -> tuple[str, str | None, str, str | None]:
        """What comparable rows share."""
        return self.model, self.dtype, self.task, self.protocol

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def pruned(self) -> bool:
        """Whether the method prunes."""
        return not self.method.startswith(DENSE)

    @property
    def perplexity(self) -> bool:
        """Whether differences are ratios, and the metric has a log axis."""
        return is_perplexity(self.metric)

    @property
    def unequal(self) -> bool:
        """Whether GRIFFIN at the same requested sparsity removed more, or less, by over a point."""
        return self.gap is not None and abs(self.gap) > TOLERANCE + 1e-9

    @property
    def leaks(self) -> bool:
        """Whether the masks have seen the answers."""
        return self.protocol == "published" and self.pruned

    @property
    def quantity(self) -> str:
        """The metric's value in words."""
        return quantity(self.value, self.perplexity)

    @property
    def mostly_dense(self) -> str:
        """Follows the row's name where most of its tokens ran dense, else ""."""
        return mostly_dense({"dense_token_share": self.dense_share}) if self.pruned else ""

    def change(self, interval: Interval | None) -> str | None:
        """A difference or a ratio with its interval and its verdict; None where there is none."""
        if interval is None:
            return None
        return f"{amount(interval, self.perplexity)} {self.verdict(interval)}".rstrip()

    def verdict(self, interval: Interval | None) -> str:
        """``better``, ``worse``, ``few differ`` where the interval excludes "no difference" but
        rests on too few unequal items, or nothing."""
        if interval is not None and interval.few:
            return TOO_FEW
        sign = 0 if interval is None else interval.sign
        return "" if not sign else "better" if (sign > 0) == self.higher_is_better else "worse"


def amount(interval: Interval, perplexity: bool) -> str:
    """A difference or a ratio with its interval: "-0.040 (-0.080 to -0.010)", "8 of 8 alike"."""
    if interval.alike:
        return f"{interval.n} of {interval.n} alike"
    digits = 3 if abs(interval.estimate) < 10 else 1

    def write(value: float) -> str:
        if perplexity:
            return f"{value:.2f}" if value < 10 else times(value)
        return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"

    sign = "x " if perplexity else ""
    return f"{sign}{write(interval.estimate)} ({interval.words(write)})"


def read_row(line: Mapping[str, Any]) -> Row:
    """The row of one line of ``results.jsonl``, not compared with anything yet."""
    cell, facts = line.get("cell") or {}, line.get("facts") or {}
    measured, checkpoint = line.get("measurement") or {}, line.get("checkpoint") or {}
    method, label = cell.get("method"), str(line.get("label") or "")
    if cell.get("name") or method in (None, DENSE):  # the label has the weight format too
        method = label.partition("@")[0] or method
    method, metric = str(method or "unknown"), str(measured.get("metric") or "")
    value = number((measured.get("metrics") or {}).get(metric))
    failed = line.get("status") == "failed" or value is None
    missing = f"{metric} is not a finite number" if measured else "no measurement was written"
    accounting = measured.get("accounting") or {}
    if not accounting and method.startswith(DENSE) and not failed:
        # not pruned; rounded weights have fewer bytes all the same
        share = 1.0 if method == DENSE else facts.get("ffn_bytes_share")
        shares = {"ffn_bytes_share": share, "ffn_bytes_share_if_compact": share}
        accounting = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0, **shares}
    layers = cell.get("layers") or None
    requested = cell.get("sparsity")
    if requested is None and layers is None:
        requested = accounting.get("requested_sparsity")
    known = scores(measured)
    return Row(
        model=short_name(checkpoint.get("name") or cell.get("model")),
        dtype=checkpoint.get("dtype") or cell.get("dtype"),
        method=method,
        label=label or (method if requested is None else f"{method}@{requested:g}"),
        task=measured.get("task") or cell.get("task") or "unknown task",
        protocol=measured.get("protocol") or cell.get("protocol"),
        seed=cell.get("seed"),
        requested=0.0 if method.startswith(DENSE) else requested,
        layers=layers,
        keep=None if layers is None else cell.get("keep"),
        base_keep=cell.get("base_keep"),
        status="failed" if failed else "done",
        error=(line.get("error") or missing) if failed else None,
        metric=metric,
        higher_is_better=bool(measured.get("higher_is_better", True)),
        value=None if failed else value,
        items=len(known.sample),
        weight_bytes=facts.get("weight_bytes"),
        notes=tuple(measured.get("notes") or ()),
        checkpoint=checkpoint,
        scores=known,
        traffic=read_traffic(facts),
        **{field: accounting.get(key) for field, key in ACCOUNTING.items()},
    )


def short_name(model: Any) -> str:
    """The last part of a model's name or path."""
    return str(model or "unknown model").rstrip("/").rsplit("/", 1)[-1]


def result_line(row: Row) -> ResultLine:
    """A row for ``rows.jsonl``."""
    low, high = (row.interval.ends if row.interval else None) or (None, None)
    return ResultLine(
        label=f"{row.label}, layers {row.layers}" if row.layers else row.label,
        method=row.method,
        model=row.model,
        task=row.task,
        metric=row.metric,
        value=row.value,
        higher_is_better=row.higher_is_better,
        requested=row.requested,
        achieved=row.achieved,
        low=low,
        high=high,
        dense_share=row.dense_share,
        remasks=row.remasks,
        seed=row.seed,
        dtype=row.dtype,
        weights=row.checkpoint.get("weights"),
        error=row.error,
    )


# Rows beside dense and GRIFFIN.


def rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per line, in a fixed order: model, protocol and task as they first appear, dense
    first, then each method by sparsity.  The same lines give the same numbers.  Missing fields are
    None; failed cells keep their sentence.
    """
    known = _named(_ordered([read_row(line) for line in _with_checkpoints(lines)]))
    groups = {
        key: _with_bytes(members) for key, members in grouped(known, lambda row: row.group).items()
    }
    waiting = {key: iter(members) for key, members in groups.items()}
    return [_compared(next(waiting[row.group]), groups[row.group]) for row in known]


def _with_checkpoints(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A cell that failed before its model was loaded gets the checkpoint of another cell."""

    def model(line: Mapping[str, Any]) -> tuple[Any, ...]:
        cell = line.get("cell") or {}
        return tuple(cell.get(key) for key in ("model", "revision", "dtype"))

    every = list(lines)
    known = {model(line): line["checkpoint"] for line in every if line.get("checkpoint")}
    return [
        {**line, "checkpoint": line.get("checkpoint") or known.get(model(line))} for line in every
    ]


def _named(every: list[Row]) -> list[Row]:
    """Tasks over files lose their folders, unless two of them would then be the same."""
    tasks = {row.task for row in every}
    if len({short(task) for task in tasks}) < len(tasks):
        return every
    return [replace(row, task=short(row.task)) for row in every]


def _ordered(every: Sequence[Row]) -> list[Row]:
    def places(key: Callable[[Row], Any]) -> Callable[[Row], int]:
        """The place at which a row's ``key`` first appears."""
        known = {name: place for place, name in enumerate(dict.fromkeys(map(key, every)))}
        return lambda row: known[key(row)]

    model, protocol = places(lambda row: (row.model, row.dtype)), places(lambda row: row.protocol)
    task, method = places(lambda row: row.task), places(lambda row: row.method)

    def order(row: Row) -> tuple[Any, ...]:
        first = (row.layers is not None, row.pruned, method(row))
        return model(row), protocol(row), task(row), *first, row.requested or 0.0, row.seed or 0

    return sorted(every, key=order)


def _with_bytes(members: Sequence[Row]) -> list[Row]:
    """Bytes as executed where all skip work, else what compact would have read, for all alike.

    Of a token of an unpruned model: at the context that the tokens of pruned ones saw on average.
    """
    executed = all(row.executor != "masked" for row in members)
    context = common_context(row.mean_context for row in members)

    def of_token(row: Row) -> float | None:
        if row.traffic is None or row.token_bytes_share is not None or not row.done:
            return row.token_bytes_share
        return row.traffic.share(context)

    return [
        replace(
            row,
            bytes_share=row.bytes_executed if executed else row.bytes_if_compact,
            token_bytes_share=of_token(row),
        )
        for row in members
    ]


def common_context(contexts: Iterable[float | None]) -> float:
    """Positions of the cache that the tokens of pruned rows saw, on average; 0 without any."""
    known = [one for one in contexts if one is not None]
    return sum(known) / len(known) if known else 0.0


def read_traffic(facts: Mapping[str, Any]) -> TokenTraffic | None:
    """The bytes that a token reads, as ``weight_facts`` counted them; None where it did not."""
    known = facts.get("token_traffic")
    if not known:
        return None
    cache = tuple((each, most) for each, most in known.get("cache", ()))
    return TokenTraffic(**{**known, "cache": cache})


def _compared(row: Row, group: Sequence[Row]) -> Row:
    if not row.done:
        return row
    row = replace(row, interval=row.scores.interval())
    dense = next(iter(_seeded(row, [other for other in group if other.method == DENSE])), None)
    if dense is not None and row.method != DENSE:
        row = replace(row, to_dense=row.scores.against(dense.scores))
    if row.method in (DENSE, GRIFFIN) or row.layers is not None:
        return row
    curve = _seeded(row, [o for o in group if o.method == GRIFFIN and o.layers is None])
    griffin = None
    if row.requested is not None:
        same = (
            o for o in curve if o.requested is not None and abs(o.requested - row.requested) < 1e-9
        )
        griffin = next(same, None)
    if griffin is not None:
        gap = None
        if row.achieved is not None and griffin.achieved is not None:
            gap = row.achieved - griffin.achieved
        row = replace(row, to_griffin=row.scores.against(griffin.scores), gap=gap)
    return replace(
        row,
        equal_sparsity=_equal(row, curve, lambda other: other.achieved),
        equal_bytes=_equal(row, curve, lambda other: other.bytes_share),
    )


def _seeded(row: Row, candidates: Sequence[Row]) -> list[Row]:
    """The finished ones of the row's seed, or else of the smallest seed that there is."""
    done = [other for other in candidates if other.done]
    seeds = {other.seed for other in done}
    if not seeds:
        return []
    chosen = row.seed if row.seed in seeds else min(seeds, key=lambda s: (s is None, s or 0))
    return [other for other in done if other.seed == chosen]


def _equal(row: Row, curve: Sequence[Row], x: Callable[[Row], float | None]) -> Equal | None:
    """GRIFFIN measured within ``TOLERANCE`` of the row's ``x``; None where it was not."""
    at = x(row)
    points = [(here, other) for other in curve if (here := x(other)) is not None]
    if at is None or not points:
        return None
    here, griffin = min(points, key=lambda point: (abs(point[0] - at), point[0]))
    if abs(here - at) > TOLERANCE + 1e-9:
        return None
    return Equal(griffin.value, row.scores.against(griffin.scores), here)


# Sweeps over layers: the metric by the layer that was pruned, one curve per share kept.


@dataclass(frozen=True)
class LayerCurve:
    """One method on one task, pruned in one layer, or group of layers, at a time."""

    rows: tuple[Row, ...]
    dense: Row | None

    @property
    def name(self) -> str:
        """ "griffin, keep 50 %"; with what the other layers keep, where they are pruned too."""
        first = self.rows[0]
        kept = "" if first.keep is None else f", keep {percent(first.keep)}"
        base = "" if first.base_keep is None else f" (others {percent(first.base_keep)})"
        return f"{first.method}{kept}{base}"


def curves(rows: Sequence[Row]) -> list[LayerCurve]:
    """All layer curves, layers in the order of their numbers; failed cells leave a gap."""
    found = grouped(
        (row for row in rows if row.layers is not None and row.value is not None),
        lambda row: (row.group, row.method, row.keep, row.base_keep, row.seed),
    )
    dense = {row.group: row for row in reversed(rows) if row.method == DENSE and row.value}
    return [
        LayerCurve(
            tuple(sorted(members, key=lambda row: first_layer(row.layers))), dense.get(key[0])
        )
        for key, members in found.items()
    ]


def first_layer(layers: str | None) -> tuple[int, str]:
    """Sorts "2" before "10", and "0-3" before "4-7"."""
    text = str(layers)
    digits = text.partition("-")[0].partition(",")[0]
    return (int(digits) if digits.isdigit() else 10**9), text
