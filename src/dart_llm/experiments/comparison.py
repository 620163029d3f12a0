"""Rows of a comparison: one per method, sparsity and task, compared with dense and with GRIFFIN.

A row comes from a line of ``results.jsonl``.  Rows are comparable if model, dtype, task and
protocol agree.  A row is compared with the dense row and the GRIFFIN rows of the same seed or, if
there are none, with the smallest seed.  Differences are taken between items with the same ID.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dart_llm.evaluation.tasks import short
from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval, Sample, Value
from dart_llm.experiments.store import ResultLine, number
from dart_llm.pruning.accounting import TokenTraffic
from dart_llm.reporting.page import short_name
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import mostly_dense, quantity, times

DENSE, GRIFFIN = "dense", "griffin"

TOO_FEW = "few differ"

TOLERANCE = 0.01
"""Two achieved sparsities, or two shares of bytes, are equal up to this difference (1 point)."""

UNTOUCHED: dict[str, Any] = {
    "method": DENSE,
    "requested_sparsity": 0.0,
    "achieved_sparsity": 0.0,
    "sparsity_while_pruned": 0.0,
    "dense_token_share": 1.0,
    "remasks": 0,
    "ffn_bytes_share": 1.0,
}
"""The accounting of an untouched model."""

ACCOUNTING = {
    "achieved": "achieved_sparsity",
    "while_pruned": "sparsity_while_pruned",
    "dense_share": "dense_token_share",
    "remasks": "remasks",
    "decoded": "decoded_tokens",
    "executor": "executor",
    "token_bytes_share": "token_bytes_share",
    "mean_context": "mean_context",
}
"""Maps a field of ``Row`` to the key of the same number in a measurement's accounting."""


# The items of a measurement, paired by id.


@dataclass(frozen=True)
class Scores:
    """A metric's values by item ID; if ``exponential``, the metric is exp of the mean value."""

    sample: Sample
    exponential: bool

    @property
    def _kind(self) -> stats.Mean:
        return "exp_mean" if self.exponential else "mean"

    @property
    def mean(self) -> float | None:
        """The metric, computed from its items."""
        return stats.mean(self.sample, self._kind)

    def interval(self) -> Interval | None:
        """The confidence interval of the metric itself."""
        return stats.interval(self.sample, self._kind)

    def against(self, other: Scores) -> Interval | None:
        """Interval of the paired difference, self minus ``other``; of the ratio if exponential."""
        kind: stats.Kind = "ratio_of_exp_mean" if self.exponential else "difference"
        return stats.paired_interval(self.sample, other.sample, kind)


def is_perplexity(metric: str) -> bool:
    """Whether a metric's name says that it is a perplexity, the exponential of a mean loss."""
    return "perplexity" in metric.lower() or metric.lower() == "ppl"


def scores(measurement: Mapping[str, Any]) -> Scores:
    """The values of a measurement's headline metric; items without the metric are omitted.

    An item has the value under the metric's name, as a number or as lm-eval's pair of
    log-likelihood and weight.  If the metric is a perplexity, the item may have ``mean_loss`` (nats
    per token) and ``tokens`` instead.
    """
    metric = measurement["metric"]
    exponential = is_perplexity(metric)
    values = {str(item["id"]): _value(item, metric, exponential) for item in measurement["items"]}
    return Scores({name: v for name, v in values.items() if v is not None}, exponential)


def _value(item: Mapping[str, Any], metric: str, exponential: bool) -> Value | None:
    """An item's value (for a perplexity its loss, nats) or (value, weight); None if not finite."""
    if exponential and item.get("mean_loss") is not None:
        return item["mean_loss"], item.get("tokens") or 1.0
    # lm-eval's metric names include the filter ("acc,none"); items may omit it
    value = item.get(metric, item.get(metric.partition(",")[0]))
    if isinstance(value, list | tuple):
        loss, weight = -value[0] / value[1], float(value[1])
        return (loss, weight) if exponential else (loss / math.log(2), weight)  # bits per byte
    plain = float(value) if isinstance(value, bool) else number(value)
    if plain is None or not math.isfinite(plain):
        return None
    return (math.log(plain), 1.0) if exponential else plain


# Rows.


@dataclass(frozen=True)
class Equal:
    """Comparison of a row with a GRIFFIN row of equal achieved sparsity, or of equal FFN bytes.

    ``value``: GRIFFIN's metric.  ``interval``: the row's difference to GRIFFIN.  ``at``: GRIFFIN's
    achieved sparsity, or GRIFFIN's share of bytes.
    """

    value: float | None
    interval: Interval | None
    at: float


@dataclass(frozen=True)
class Row:
    """A method at one sparsity on one task; unknown values are None.

    ``layers``: the pruned layers; None means all.  ``keep``: the share of neurons kept in the
    pruned layers.  ``base_keep``: the share kept in the other layers; None means all.
    ``interval``: the confidence interval of ``value``.  ``to_dense``: the difference to the dense
    row.  ``to_griffin``: the difference to the GRIFFIN row with the same requested sparsity; the
    achieved sparsities may differ.  ``gap``: the row's achieved sparsity minus that of this GRIFFIN
    row.  ``bytes_share``: FFN bytes read, divided by the FFN bytes that the dense model reads.  The
    masked executor skips no work; for it, the bytes are counted as the compact executor would read
    them.  ``token_bytes_share``: bytes that a decoded token reads, divided by the bytes that a
    token of the dense bfloat16 model reads.
    """

    model: str
    dtype: str | None
    method: str
    label: str
    task: str
    protocol: str | None
    seed: int | None
    requested: float | None
    layers: str | None = None
    keep: float | None = None
    base_keep: float | None = None
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
    bytes_share: float | None = None
    token_bytes_share: float | None = None
    mean_context: float | None = None
    weight_bytes: float | None = None
    to_dense: Interval | None = None
    to_griffin: Interval | None = None
    gap: float | None = None
    equal_sparsity: Equal | None = None
    equal_bytes: Equal | None = None
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    measurement: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """``Measurement.to_dict()``; empty if the measurement failed."""
    traffic: TokenTraffic | None = field(default=None, repr=False, compare=False)
    """The bytes that a token reads if the model is not pruned."""
    scores: Scores = field(default=Scores({}, False), repr=False, compare=False)

    @property
    def group(self) -> tuple[str, str | None, str, str | None]:
        """The key that comparable rows share."""
        return self.model, self.dtype, self.task, self.protocol

    @property
    def done(self) -> bool:
        """Whether the measurement succeeded."""
        return self.error is None

    @property
    def pruned(self) -> bool:
        """Whether the method prunes."""
        return not self.method.startswith(DENSE)

    @property
    def perplexity(self) -> bool:
        """Whether the metric is a perplexity; then differences are ratios and axes logarithmic."""
        return is_perplexity(self.metric)

    @property
    def unequal(self) -> bool:
        """Whether ``gap`` exceeds 1 point in either direction, so that ``to_griffin`` is unfair."""
        return self.gap is not None and abs(self.gap) > TOLERANCE + 1e-9

    @property
    def leaks(self) -> bool:
        """Whether the masks were selected from texts that include the answers."""
        return self.protocol == "published" and self.pruned

    @property
    def quantity(self) -> str:
        """The metric's value as text."""
        return quantity(self.value, self.perplexity)

    @property
    def mostly_dense(self) -> str:
        """A suffix for the row's name if most of its tokens ran dense, else ""."""
        return mostly_dense({"dense_token_share": self.dense_share}) if self.pruned else ""

    def change(self, interval: Interval | None) -> str | None:
        """The difference or ratio as text, with its verdict; None if ``interval`` is None."""
        if interval is None:
            return None
        return f"{amount(interval, self.perplexity)} {self.verdict(interval)}".rstrip()

    def verdict(self, interval: Interval) -> str:
        """Return ``better``, ``worse``, ``few differ``, or "" without a significant difference.

        ``few differ``: the interval excludes "no difference", but too few items differ.
        """
        if interval.few or not interval.sign:
            return TOO_FEW if interval.few else ""
        return "better" if (interval.sign > 0) == self.higher_is_better else "worse"


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
    """Read a line of ``results.jsonl`` as a row that is not yet compared with other rows."""
    cell, facts, checkpoint = line["cell"], line["facts"] or {}, line["checkpoint"] or {}
    measured = line["measurement"] or {}
    method, label = cell["method"], line["label"]
    if cell.get("name") or method == DENSE:  # only the label has the weight format
        method = label.partition("@")[0]
    metric = measured.get("metric", "")
    value = number(measured.get("metrics", {}).get(metric))
    error = line["error"]
    if value is None and error is None:
        error = f"{metric} is not a finite number"
    accounting = measured.get("accounting") or {}
    if not accounting and method.startswith(DENSE) and error is None:
        # not pruned, but quantised weights have fewer bytes
        share = 1.0 if method == DENSE else facts.get("ffn_bytes_share")
        accounting = {**UNTOUCHED, "ffn_bytes_share": share}
    masked = accounting.get("executor") == "masked"
    layers = cell.get("layers") or None
    requested = cell["sparsity"]
    if requested is None and layers is None:
        requested = accounting.get("requested_sparsity")
    items = scores(measured) if measured else Scores({}, False)
    return Row(
        model=short_name(checkpoint.get("name") or cell["model"]),
        dtype=checkpoint.get("dtype") or cell.get("dtype"),
        method=method,
        label=label,
        task=measured.get("task", cell["task"]),
        protocol=measured.get("protocol", cell["options"]["protocol"]),
        seed=cell["seed"],
        requested=0.0 if method.startswith(DENSE) else requested,
        layers=layers,
        keep=cell.get("keep") if layers else None,
        base_keep=cell.get("base_keep"),
        error=error,
        metric=metric,
        higher_is_better=measured.get("higher_is_better", True),
        value=None if error else value,
        items=len(items.sample),
        bytes_share=accounting.get("ffn_bytes_share_if_compact" if masked else "ffn_bytes_share"),
        weight_bytes=facts.get("weight_bytes"),
        checkpoint=checkpoint,
        measurement=measured,
        traffic=read_traffic(facts),
        scores=items,
        **{name: accounting.get(key) for name, key in ACCOUNTING.items()},
    )


def read_traffic(facts: Mapping[str, Any]) -> TokenTraffic | None:
    """The bytes that a token reads, from a line's ``facts``; None if they were not counted."""
    traffic = facts.get("token_traffic")
    if not traffic:
        return None
    cache = tuple((per_token, limit) for per_token, limit in traffic.get("cache", ()))
    return TokenTraffic(**{**traffic, "cache": cache})


def result_line(row: Row) -> ResultLine:
    """The row as a line of ``rows.jsonl``."""
    low, high = (row.interval.ends if row.interval else None) or (None, None)
    label = f"{row.label}, layers {row.layers}" if row.layers else row.label
    same = ResultLine.model_fields.keys() - {"label", "low", "high", "weights"}
    values = {name: getattr(row, name) for name in same}
    weights = row.checkpoint.get("weights")
    return ResultLine(label=label, low=low, high=high, weights=weights, **values)


# Rows compared with dense and GRIFFIN.


def rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Make one row per line, and compare the rows; the row of a failed cell has its ``error``.

    Comparable rows are adjacent, dense first.  The same lines always give the same numbers.
    """
    ordered = _ordered(_with_short_tasks([read_row(line) for line in _with_checkpoints(lines)]))
    groups = {
        key: _with_dense_bytes(members)
        for key, members in grouped(ordered, lambda row: row.group).items()
    }
    remaining = {key: iter(members) for key, members in groups.items()}
    return [_compared(next(remaining[row.group]), groups[row.group]) for row in ordered]


def _with_checkpoints(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines have no checkpoint if loading failed; copy it from other lines of the same model."""

    def model(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(line["cell"].get(key) for key in ("model", "revision", "dtype"))

    cells = list(lines)
    loaded = {model(line): line["checkpoint"] for line in cells if line["checkpoint"]}
    return [{**line, "checkpoint": line["checkpoint"] or loaded.get(model(line))} for line in cells]


def _with_short_tasks(rows: list[Row]) -> list[Row]:
    """Remove folders from the rows' task names, unless two tasks would then have the same name."""
    tasks = {row.task for row in rows}
    if len({short(task) for task in tasks}) < len(tasks):
        return rows
    return [replace(row, task=short(row.task)) for row in rows]


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Sort rows by group, in order of first appearance.

    Within a group, rows without a layer sweep come first; in both parts, dense rows come first.
    """
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda r: (groups.index(r.group), r.layers is not None, r.pruned))


def _with_dense_bytes(members: Sequence[Row]) -> list[Row]:
    """Set ``token_bytes_share`` of dense rows, computed at the rows' mean context length."""
    contexts = [row.mean_context for row in members if row.mean_context is not None]
    context = sum(contexts) / len(contexts) if contexts else 0.0
    return [
        replace(row, token_bytes_share=row.traffic.share(context))
        if row.traffic is not None and row.token_bytes_share is None and row.done
        else row
        for row in members
    ]


def _compared(row: Row, group: Sequence[Row]) -> Row:
    if not row.done:
        return row
    row = replace(row, interval=row.scores.interval())
    dense = _of_seed(row, [other for other in group if other.method == DENSE])
    if dense and row.method != DENSE:
        row = replace(row, to_dense=row.scores.against(dense[0].scores))
    if row.method in (DENSE, GRIFFIN) or row.layers is not None:
        return row
    curve = _of_seed(row, [o for o in group if o.method == GRIFFIN and o.layers is None])
    for griffin in curve:
        if row.requested is not None and griffin.requested == row.requested:
            known = row.achieved is not None and griffin.achieved is not None
            gap = (row.achieved or 0.0) - (griffin.achieved or 0.0) if known else None
            row = replace(row, to_griffin=row.scores.against(griffin.scores), gap=gap)
    return replace(
        row,
        equal_sparsity=_equal(row, curve, lambda other: other.achieved),
        equal_bytes=_equal(row, curve, lambda other: other.bytes_share),
    )


def _of_seed(row: Row, candidates: Sequence[Row]) -> list[Row]:
    """The successful candidates with the row's seed or, if there are none, the smallest seed."""
    done = [other for other in candidates if other.done]
    seeds = {other.seed for other in done}
    chosen = row.seed if row.seed in seeds else min(seeds, default=None, key=lambda s: s or 0)
    return [other for other in done if other.seed == chosen]


def _equal(row: Row, curve: Sequence[Row], cost: Callable[[Row], float | None]) -> Equal | None:
    """Compare with the GRIFFIN row of nearest ``cost``; None if none is within ``TOLERANCE``."""
    points = [(at, other) for other in curve if (at := cost(other)) is not None]
    target = cost(row)
    if target is None or not points:
        return None
    at, griffin = min(points, key=lambda point: (abs(point[0] - target), point[0]))
    if abs(at - target) > TOLERANCE + 1e-9:
        return None
    return Equal(griffin.value, row.scores.against(griffin.scores), at)
