"""Paired rows against dense and GRIFFIN; equal sparsity, equal bytes; layer curves.

A row of a comparison, and how it is read from a cell of ``results.jsonl``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any

from dart_llm.evaluation.task_names import short
from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval, Sample, Value
from dart_llm.experiments.store import mapping, number
from dart_llm.reporting.words import percent, quantity, times

# Numbers of a comparison as text.


def amount(interval: Interval | None, perplexity: bool) -> str:
    """A difference or a ratio with its interval: "-0.040 (-0.080 to -0.010)"."""
    if interval is None:
        return ""
    ends = (interval.low, interval.high)
    if perplexity:
        return f"x {_ratio(interval.estimate)} ({' to '.join(map(_ratio, ends))})"
    digits = 3 if abs(interval.estimate) < 10 else 1
    low, high = (_signed(end, digits) for end in ends)
    return f"{_signed(interval.estimate, digits)} ({low} to {high})"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else times(value)


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


# From the items of a measurement to what its headline metric averages, paired by id.


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


DENSE, GRIFFIN = "dense", "griffin"

TOO_FEW = "few differ"

TOLERANCE = 0.01
"""Achieved sparsities, or byte shares, this close count as equal: one point."""


@dataclass(frozen=True)
class Equal:
    """GRIFFIN at a row's own achieved sparsity, or at its own FFN bytes.

    ``between``: what was interpolated between; one entry where GRIFFIN was measured there.
    """

    value: float | None
    interval: Interval | None
    """The row against it: a difference, or a ratio of perplexities."""
    between: tuple[float, ...]


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
    asked: float | None
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
    weight_bytes: float | None = None
    to_dense: Interval | None = None
    to_griffin: Interval | None = None
    """At the same asked sparsity, whatever was achieved."""
    gap: float | None = None
    """Achieved sparsity minus GRIFFIN's at the same asked sparsity."""
    equal_sparsity: Equal | None = None
    equal_bytes: Equal | None = None
    notes: tuple[str, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores = field(default=Scores({}, False), repr=False, compare=False)

    @property
    def group(self) -> tuple[str, str | None, str, str | None]:
        """What comparable rows share."""
        return self.model, self.dtype, self.task, self.protocol

    @property
    def perplexity(self) -> bool:
        """Whether differences are ratios, and the metric has a log axis."""
        return is_perplexity(self.metric)

    @property
    def unequal(self) -> bool:
        """Whether GRIFFIN at the same asked sparsity removed more, or less, by over a point."""
        return self.gap is not None and abs(self.gap) > TOLERANCE + 1e-9

    @property
    def leaks(self) -> bool:
        """Whether the masks have seen the answers."""
        return self.protocol == "published" and not self.method.startswith(DENSE)

    def verdict(self, interval: Interval | None) -> str:
        """``better``, ``worse``, ``few differ`` where the interval excludes "no difference" but
        rests on too few unequal items, or nothing."""
        if interval is not None and interval.few:
            return TOO_FEW
        sign = 0 if interval is None else interval.sign
        return "" if not sign else "better" if (sign > 0) == self.higher_is_better else "worse"


def read_row(cell: Mapping[str, Any]) -> Row:
    """The row of one cell, not compared with anything yet; what is missing is None."""
    asked, known = mapping(cell.get("cell")), mapping(cell.get("checkpoint"))
    measured, facts = mapping(cell.get("measurement")), mapping(cell.get("facts"))
    options = mapping(asked.get("options"))
    method = _method(asked.get("method"), str(cell.get("label") or ""))
    metric = str(measured.get("metric") or "")
    value = number(mapping(measured.get("metrics")).get(metric))
    failed = cell.get("status") == "failed" or not measured or value is None
    counted = mapping(measured.get("accounting"))
    untouched = not counted and method.startswith(DENSE) and not failed
    sample = scores(measured)
    layers, keep = _layers(asked)
    sparsity = number(asked.get("sparsity"))
    if sparsity is None and layers is None:
        sparsity = number(counted.get("requested_sparsity"))
    numbers = _of_untouched(method, facts) if untouched else _of_pruned(counted)
    return Row(
        model=_short(known.get("name") or asked.get("model")),
        dtype=_text(known.get("dtype") or asked.get("dtype")),
        method=method,
        label=str(cell.get("label") or (method if sparsity is None else f"{method}@{sparsity:g}")),
        task=str(measured.get("task") or asked.get("task") or "unknown task"),
        protocol=_text(
            measured.get("protocol") or asked.get("protocol") or options.get("protocol")
        ),
        seed=_whole(asked.get("seed")),
        asked=0.0 if method.startswith(DENSE) else sparsity,
        layers=layers,
        keep=keep,
        base_keep=number(asked.get("base_keep")),
        status="failed" if failed else "done",
        error=_error(cell, measured, metric) if failed else None,
        metric=metric,
        higher_is_better=bool(measured.get("higher_is_better", True)),
        value=None if failed else value,
        items=len(sample.sample),
        weight_bytes=number(facts.get("weight_bytes")),
        notes=_notes(measured.get("notes")),
        checkpoint=known,
        scores=sample,
        **numbers,
    )


def _of_pruned(counted: Mapping[str, Any]) -> dict[str, Any]:
    """What an accounting says; nothing is known where there is none."""
    return {
        "achieved": number(counted.get("achieved_sparsity")),
        "while_pruned": number(counted.get("sparsity_while_pruned")),
        "dense_share": number(counted.get("dense_token_share")),
        "remasks": _whole(counted.get("remasks")),
        "decoded": _whole(counted.get("decoded_tokens")),
        "executor": _text(counted.get("executor")),
        "bytes_executed": number(counted.get("ffn_bytes_share")),
        "bytes_if_compact": number(counted.get("ffn_bytes_share_if_compact")),
    }


def _of_untouched(method: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A model that is not pruned; rounded weights have fewer bytes all the same."""
    share = 1.0 if method == DENSE else number(facts.get("ffn_bytes_share"))
    known = {"achieved": 0.0, "dense_share": 1.0, "remasks": 0}
    return {**known, "bytes_executed": share, "bytes_if_compact": share}


def _method(given: Any, label: str) -> str:
    """``dense-8bit`` and the like may stand in the label alone."""
    named = label.partition("@")[0]
    if given in (None, "", DENSE) and named:
        return named
    return str(given or "unknown")


def _notes(value: Any) -> tuple[str, ...]:
    return tuple(str(note) for note in value) if isinstance(value, list | tuple) else ()


def _layers(cell: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The layers that were pruned, and the share that they keep."""
    layers = cell.get("layers")
    if layers is None or layers in ("", "all", [], ()):
        return None, None
    if isinstance(layers, list | tuple):
        layers = ",".join(str(layer) for layer in layers)
    return str(layers), number(cell.get("keep"))


def _error(cell: Mapping[str, Any], measured: Mapping[str, Any], metric: str) -> str:
    if cell.get("error"):
        return str(cell["error"])
    if not measured:
        return "no measurement was written"
    return f"{metric or 'the metric'} is not a finite number"


def _short(name: Any) -> str:
    return str(name or "unknown model").rstrip("/").rsplit("/", 1)[-1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)


# Methods x sparsities x tasks as rows, each compared item by item with dense and with GRIFFIN.
#
# A row comes from one cell of a sweep or comparison (a mapping as its ``results.jsonl`` holds it).
# Rows are comparable when model, dtype, task and protocol agree; dense and GRIFFIN are those of
# the same seed where there are any, else of another seed.


def rows(cells: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """One row per cell, in a fixed order: model, protocol and task as they first appear, dense
    first, then each method by sparsity.  ``seed``: of the bootstrap; the same cells give the same
    numbers.  Missing fields are None; failed cells keep their sentence.
    """
    found = _named(_ordered([read_row(cell) for cell in _known(map(mapping, cells))]))
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(row.group, []).append(row)
    for name, members in groups.items():
        groups[name] = _with_bytes(members)
    found = [groups[row.group].pop(0) for row in found]
    groups = {name: [row for row in found if row.group == name] for name in groups}
    return [_compared(row, groups[row.group], seed) for row in found]


def _known(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A cell that failed before its model was known takes what another cell of it knew."""

    def asked(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(mapping(cell.get("cell")).get(key) for key in ("model", "revision", "dtype"))

    found = list(cells)
    checkpoints = {asked(cell): cell["checkpoint"] for cell in found if cell.get("checkpoint")}
    return [
        cell
        if cell.get("checkpoint") or asked(cell) not in checkpoints
        else {**cell, "checkpoint": checkpoints[asked(cell)]}
        for cell in found
    ]


def _named(found: list[Row]) -> list[Row]:
    """Tasks over files lose their folders, unless two of them would then be the same."""
    tasks = {row.task for row in found}
    if len({short(task) for task in tasks}) < len(tasks):
        return found
    return [replace(row, task=short(row.task)) for row in found]


def _ordered(found: Sequence[Row]) -> list[Row]:
    def places(key: Callable[[Row], Any]) -> dict[Any, int]:
        return {name: place for place, name in enumerate(dict.fromkeys(map(key, found)))}

    groups = [
        (key, places(key))
        for key in (lambda r: (r.model, r.dtype), lambda r: r.protocol, lambda r: r.task)
    ]
    methods = places(lambda row: row.method)

    def order(row: Row) -> tuple[Any, ...]:
        layered = row.layers is not None
        first = (layered, not row.method.startswith(DENSE), methods[row.method])
        return *(known[key(row)] for key, known in groups), *first, row.asked or 0.0, row.seed or 0

    return sorted(found, key=order)


def _with_bytes(members: Sequence[Row]) -> list[Row]:
    """Bytes as executed where all skip work, else what compact would have read, for all alike."""
    pruned = [row for row in members if row.executor is not None]
    executed = all(row.executor != "masked" for row in pruned)
    return [
        replace(row, bytes_share=row.bytes_executed if executed else row.bytes_if_compact)
        for row in members
    ]


def _compared(row: Row, group: Sequence[Row], seed: int) -> Row:
    if row.status != "done":
        return row
    row = replace(row, interval=row.scores.interval(seed))
    dense = reference(row, [other for other in group if other.method == DENSE])
    if dense is not None and row.method != DENSE:
        row = replace(row, to_dense=row.scores.against(dense.scores, seed))
    if row.method in (DENSE, GRIFFIN) or row.layers is not None:
        return row
    curve = _seeded(row, [o for o in group if o.method == GRIFFIN and o.layers is None])
    griffin = reference(row, [o for o in curve if _same(o.asked, row.asked)])
    against = cache(lambda place: row.scores.against(curve[place].scores, seed))
    if griffin is not None:
        gap = None
        if row.achieved is not None and griffin.achieved is not None:
            gap = row.achieved - griffin.achieved
        row = replace(row, to_griffin=against(curve.index(griffin)), gap=gap)
    return replace(
        row,
        equal_sparsity=_equal(row, curve, lambda other: other.achieved, against, seed),
        equal_bytes=_equal(row, curve, lambda other: other.bytes_share, against, seed),
    )


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) < 1e-9


def _seeded(row: Row, candidates: Sequence[Row]) -> list[Row]:
    """The finished ones of the row's seed, or else of the smallest seed that there is."""
    done = [other for other in candidates if other.status == "done"]
    seeds = {other.seed for other in done}
    if not seeds:
        return []
    chosen = row.seed if row.seed in seeds else min(seeds, key=lambda s: (s is None, s or 0))
    return [other for other in done if other.seed == chosen]


def reference(row: Row, candidates: Sequence[Row]) -> Row | None:
    """The one of ``candidates`` to compare ``row`` with, if any was measured."""
    return next(iter(_seeded(row, candidates)), None)


def _equal(
    row: Row,
    curve: Sequence[Row],
    x: Callable[[Row], float | None],
    against: Callable[[int], Interval | None],
    seed: int,
) -> Equal | None:
    """GRIFFIN where ``x`` is the row's: measured within ``TOLERANCE``, or on the line between the
    two nearest measured points; None outside of what was measured.  ``against``: the comparison
    with one row of the curve."""
    at = x(row)
    points = sorted((here, place) for place, o in enumerate(curve) if (here := x(o)) is not None)
    if at is None or not points:
        return None
    near, place = min(points, key=lambda point: abs(point[0] - at))
    if abs(near - at) <= TOLERANCE + 1e-9:
        return Equal(curve[place].value, against(place), (near,))
    for (low, a), (high, b) in pairwise(points):
        if low < at < high:
            mixed = curve[a].scores.mixed(curve[b].scores, (at - low) / (high - low))
            return Equal(mixed.mean, row.scores.against(mixed, seed), (low, high))
    return None


# Sweeps over layers: the metric by the layer that was pruned, one curve per share kept.


@dataclass(frozen=True)
class LayerCurve:
    """One method on one task, pruned to ``keep`` in one layer, or group of layers, at a time."""

    method: str
    keep: float | None
    base_keep: float | None
    seed: int | None
    rows: tuple[Row, ...]
    dense: Row | None

    @property
    def name(self) -> str:
        """ "griffin, keep 50 %"; with what the other layers keep, where they are pruned too."""
        kept = "" if self.keep is None else f", keep {percent(self.keep)}"
        base = "" if self.base_keep is None else f" (others {percent(self.base_keep)})"
        return f"{self.method}{kept}{base}"


def curves(rows: Sequence[Row]) -> list[LayerCurve]:
    """All layer curves, layers in the order of their numbers; failed cells leave a gap."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if row.layers is not None and row.value is not None:
            key = (row.group, row.method, row.keep, row.base_keep, row.seed)
            found.setdefault(key, []).append(row)
    return [_curve(own, rows) for own in found.values()]


def _curve(own: Sequence[Row], rows: Sequence[Row]) -> LayerCurve:
    first = own[0]
    ordered = sorted(own, key=lambda row: first_layer(row.layers))
    dense = [r for r in rows if r.method == DENSE and r.group == first.group and r.value]
    return LayerCurve(
        first.method,
        first.keep,
        first.base_keep,
        first.seed,
        tuple(ordered),
        dense[0] if dense else None,
    )


def first_layer(layers: str | None) -> tuple[int, str]:
    """Sorts "2" before "10", and "0-3" before "4-7"."""
    text = str(layers)
    digits = text.partition("-")[0].partition(",")[0]
    return (int(digits) if digits.isdigit() else 10**9), text


def sentences(rows: Sequence[Row]) -> list[str]:
    """Which layer costs the most, a sentence per curve."""
    found = curves(rows)
    several = len({curve.rows[0].model for curve in found}) > 1
    return [
        f"{f'{curve.rows[0].model}: ' if several else ''}{_sentence(curve)}." for curve in found
    ]


def _sentence(curve: LayerCurve) -> str:
    first = curve.rows[0]
    sign = -1 if first.higher_is_better else 1
    ranked = sorted(curve.rows, key=lambda row: sign * (row.value or 0.0))
    worst, best = ranked[-1], ranked[0]

    def said(row: Row) -> str:
        return f"layer {row.layers} ({first.metric} {quantity(row.value, row.perplexity)})"

    dense = ""
    if curve.dense is not None:
        dense = f"; dense has {quantity(curve.dense.value, curve.dense.perplexity)}"
    words = f"On {first.task}, {curve.name}"
    if len(curve.rows) == 1:
        return f"{words}: {said(worst)}{dense}"
    return f"{words}: {said(worst)} costs the most, {said(best)} the least{dense}"
