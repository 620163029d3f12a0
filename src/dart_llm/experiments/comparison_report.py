"""Reports of compared rows: headline, notes, tables, plots, files and page.

A method is better than another on a task if the paired 95 % interval excludes "no difference".
The headline counts this only if both achieved the same sparsity, within 1 point.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments.comparison import DENSE, GRIFFIN, UNTOUCHED, Equal, Row, amount
from dart_llm.experiments.stats import Interval
from dart_llm.experiments.store import SCHEMA
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting import page
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    Look,
    Palette,
    Plot,
    key,
    log_axis,
    looks_of,
    panels,
    panels_height,
    whisker_lengths,
)
from dart_llm.reporting.table import Column, Table, bytes_text, escaped, grouped
from dart_llm.reporting.words import (
    FEWEST_ITEMS,
    checkpoint_line,
    count,
    dtype_text,
    file_text,
    percent,
    quantity,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNEQUAL, OTHER_MEAN = "†", "§"
"""Marks used in the tables; ``footnotes`` explains them."""

LEAK_NOTE = f"LEAK - {LEAK}. Its numbers do not measure a method's quality."

HEADLINE_SPARSITY = 0.5
"""The headline reports this sparsity, or the nearest one measured."""

LONG = 24
"""On the page, tables with more rows than this are collapsed."""

UNCLEAR, INCOMPARABLE = "no clear difference", "not compared at equal sparsity"


# The headline, with a clause per model and protocol.


def conclusion(rows: Sequence[Row]) -> str:
    """The headline: how ``dart`` (if absent, the first method) does near ``HEADLINE_SPARSITY``."""
    done = [row for row in rows if row.done and row.layers is None]
    without_leaks = [row for row in done if not row.leaks] or done
    groups = grouped(without_leaks, lambda r: (r.model, r.dtype, f"protocol {r.protocol}"))
    varied = [part for part in range(3) if len({names[part] for names in groups}) > 1]
    parts = []
    for names, members in groups.items():
        leak = ["LEAK"] if any(row.leaks for row in members) else []
        name = " ".join([*(str(names[part]) for part in varied), *leak])
        parts.append(f"{name}: {_headline(members)}" if name else _headline(members))
    failed = sum(not row.done for row in rows)
    parts += [f"{count(failed, 'cell')} failed"] if failed else []
    return f"{'; '.join(parts) or 'Nothing was measured'}."


def _headline(rows: Sequence[Row]) -> str:
    """A clause that compares one method at one sparsity with GRIFFIN or dense, on all tasks."""
    pruned = [row for row in rows if row.pruned]
    shown = [row for row in pruned if row.method != GRIFFIN] or pruned or rows
    method = next((row.method for row in shown if row.method == "dart"), shown[0].method)
    of_method = [row for row in shown if row.method == method]
    nearest = min(of_method, key=lambda row: abs((row.requested or 0.0) - HEADLINE_SPARSITY))
    compared = [row for row in of_method if row.requested == nearest.requested]
    at = f" at {percent(nearest.requested)}" if nearest.requested and nearest.pruned else ""
    if method != GRIFFIN and any(row.to_griffin or row.equal_sparsity for row in compared):
        return _verdicts(compared, f"{method}{at} against {GRIFFIN}", _against_griffin)
    if any(row.to_dense is not None for row in compared):
        return _verdicts(compared, f"{method}{at} against {DENSE}", lambda row: row.to_dense)
    values = ", ".join(f"{row.metric} {row.quantity} on {row.task}" for row in compared)
    return f"{method}{at}: {values}"


def _against_griffin(row: Row) -> Interval | None:
    """The difference to GRIFFIN at equal achieved sparsity; None without such a GRIFFIN row."""
    if row.gap is not None and not row.unequal:
        return row.to_griffin
    return None if row.equal_sparsity is None else row.equal_sparsity.interval


def _verdicts(rows: Sequence[Row], subject: str, against: Callable[[Row], Interval | None]) -> str:
    """Return "dart at 50 % against griffin: better on 2 of 3 tasks, no clear difference on 1"."""
    outcomes = dict.fromkeys(("better", "worse", UNCLEAR, INCOMPARABLE), 0)
    for row in rows:
        interval = against(row)
        verdict = INCOMPARABLE if interval is None else row.verdict(interval)
        outcomes[verdict if verdict in outcomes else UNCLEAR] += 1
    won = f"better on {outcomes.pop('better')} of {count(len(rows), 'task')}"
    others = [f"{outcome} on {number}" for outcome, number in outcomes.items() if number]
    return f"{subject}: {', '.join([won, *others])}"


# The effect of the published protocol's leak.


@dataclass(frozen=True)
class Leak:
    """One method, measured under both protocols, ``full`` and ``published``, on the same items.

    ``interval``: published minus full or, for perplexities, published divided by full; None if the
    two measurements share no items.
    """

    full: Row
    published: Row
    interval: Interval | None

    @property
    def sentence(self) -> str:
        """A sentence: how much the score improves if answers take part in selecting the masks."""
        row = self.published
        if self.interval is None:
            return f"{row.label} on {row.task}: unknown, no shared items."
        change, verdict = amount(self.interval, row.perplexity), row.verdict(self.interval)
        words = {"better": "flattered by the leak", "": "within noise"}
        judgement = f", {words.get(verdict, verdict)}" if self.interval.ends else ""
        return f"{row.label} on {row.task}: published against full {change}{judgement}."


def leaks(rows: Sequence[Row]) -> list[Leak]:
    """Pair the rows that were measured under both protocols; the differences show the leak."""
    done = [row for row in rows if row.done and row.pruned]
    same = grouped(done, lambda r: (r.model, r.dtype, r.task, r.label, r.layers, r.keep, r.seed))
    pairs = [{row.protocol: row for row in members} for members in same.values()]
    return [
        Leak(pair["full"], pair["published"], pair["published"].scores.against(pair["full"].scores))
        for pair in pairs
        if {"full", "published"} <= pair.keys()
    ]


# Notes.


def footnotes(rows: Sequence[Row]) -> list[str]:
    """The notes that apply to these rows; docs/evaluation.md defines the columns."""
    done = [row for row in rows if row.done]
    pairs = sum(i is not None for row in done for i in (row.to_dense, row.to_griffin))
    conditions = {
        LEAK_NOTE: any(row.leaks for row in rows),
        "Intervals are 95 % bootstrap intervals over items: of the score itself or, beside a "
        'difference, of the paired difference. "better" and "worse" require an interval that '
        f'excludes "no difference" and at least {FEWEST_ITEMS} items that differ.': bool(done),
        f"{count(pairs, 'comparison')} with dense and GRIFFIN: about 1 in 20 without a true "
        "difference still shows one.": pairs > 0,
        f"{UNEQUAL} achieved sparsity differs from GRIFFIN's at the same requested sparsity by "
        "more than 1 point: compare at equal achieved sparsity instead.": any(
            row.unequal for row in done
        ),
        f"{OTHER_MEAN} the metric is not the mean of the items, but the interval is that of their "
        "mean.": any(map(differs, done)),
        "FFN bytes are those that the compact executor would read: masking skips no work.": any(
            row.executor == "masked" for row in done
        ),
    }
    measured = (note for note in notes(done) if LEAK not in note)
    return [*(note for note, applies in conditions.items() if applies), *measured]


def notes(rows: Sequence[Row]) -> list[str]:
    """The notes of the measurements, without repeats."""
    lines = (f"{r.task}: {note}" for r in rows for note in r.measurement.get("notes", ()))
    return list(dict.fromkeys(lines))


def differs(row: Row) -> bool:
    """Whether the metric differs from the items' mean; the interval shown is that of the mean."""
    mean, value = row.scores.mean, row.value
    if mean is None or value is None:
        return False
    return not math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-4)


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence per failed cell."""
    return [
        f"{name(row, True)} on {row.task} ({row.model}) failed: {row.error}"
        for row in rows
        if not row.done
    ]


# The tables.


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table per model, dtype, task and protocol; layer sweeps have separate tables."""
    full = {row.group for row in rows if row.layers is None and row.method != DENSE}
    groups = grouped(rows, lambda row: (*row.group, row.layers is not None and row.group in full))
    return [Table("", caption(group), _columns(group), group) for group in groups.values()]


def _columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    measured = next((row for row in rows if row.done), rows[0])
    better = "higher" if measured.higher_is_better else "lower"
    seeds = len({row.seed for row in rows}) > 1

    def achieved(row: Row) -> str | None:
        return None if row.achieved is None else _marked(percent(row.achieved), row)

    def difference(row: Row, equal: Equal | None) -> str | None:
        return row.change(equal.interval) if equal else None

    columns = (
        Column("method", lambda row: name(row, seeds)),
        Column("requested", lambda row: row.requested, percent, terminal=False),
        Column("achieved", achieved),
        Column("dense tokens", lambda row: row.dense_share, percent),
        Column("re-masks", lambda row: row.remasks, ","),
        Column(f"{measured.metric} ({better} is better)", _metric, needed=True),
        Column("against dense", lambda row: row.change(row.to_dense), needed=True),
        Column("against GRIFFIN", lambda row: _marked(row.change(row.to_griffin), row)),
        Column(
            "at equal achieved sparsity",
            lambda row: difference(row, row.equal_sparsity),
            terminal=False,
        ),
        Column("at equal FFN bytes", lambda row: difference(row, row.equal_bytes), terminal=False),
        Column("FFN bytes", lambda row: row.bytes_share, ".3f", terminal=False),
        Column("bytes per token", lambda row: row.token_bytes_share, ".3f"),
        Column("weights", lambda row: row.weight_bytes, bytes_text, terminal=False),
        Column("other metrics", _other_metrics),
    )
    return tuple(c for c in columns if c.head != "other metrics" or any(map(c.raw, rows)))


COUNTS = ("tokens", "pruned_tokens", "mean_loss", "mean_loss_pruned_tokens")
"""Metrics that are in the JSON documents but not in the tables."""


def _other_metrics(row: Row) -> str | None:
    metrics = row.measurement.get("metrics", {}).items()
    others = ((n, v) for n, v in metrics if n not in (*COUNTS, row.metric) and v is not None)
    return ", ".join(f"{metric} {value:.4g}" for metric, value in others) or None


def caption(rows: Sequence[Row]) -> str:
    """Return "arc_easy_local: SmolLM2 (unquantised, float32), protocol decode; 40 items"."""
    row, items = rows[-1], sorted({row.items for row in rows if row.items})
    leak = "LEAK, " if any(row.leaks for row in rows) else ""
    formats = f" ({file_text(row.checkpoint)}, {dtype_text(row.checkpoint)})"
    layers = "" if row.layers is None else ", one layer pruned at a time"
    model = f"{row.model}{formats if row.checkpoint else ''}"
    number = " to ".join(map(str, dict.fromkeys([*items[:1], *items[-1:]])))
    item_count = f"; {number} items" if items else ""
    return f"{leak}{row.task}: {model}, protocol {row.protocol}{layers}{item_count}"


def name(row: Row, seeds: bool = False) -> str:
    """The row's label.  Layer sweeps add the layer and the kept share, ``seeds`` adds the seed."""
    text = row.label
    if row.layers is not None:
        keep = "" if row.keep is None else f", keep {percent(row.keep)}"
        text = f"{row.method}, layer {row.layers}{keep}"
    return f"{text}{f', seed {row.seed}' if seeds else ''}{row.mostly_dense}"


def _marked(text: str | None, row: Row) -> str | None:
    return f"{text} {UNEQUAL}" if text and row.unequal else text


def _metric(row: Row) -> str:
    """The score as text, with its confidence interval if the row was not compared with dense."""
    if not row.done:
        return "failed"
    text = row.quantity
    if row.interval is not None and row.to_dense is None:
        text += f" ({row.interval.words(lambda end: quantity(end, row.perplexity))})"
    return f"{text} {OTHER_MEAN}" if differs(row) else text


# The files: the JSON document of ``eval``, ``perplexity`` or ``summarize`` (one method, all tasks),
# and ``compare.md``, ``compare.json``, ``compare.csv`` and ``report.html``.


def eval_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``results`` by task, the ``accounting`` and the ``notes`` of the last row's method.

    If there are rows of the dense model too, the entry ``dense`` has their results by task.
    """
    last = rows[-1].label
    of_method = {r.measurement["task"]: r.measurement for r in rows if r.label == last}
    others = {r.measurement["task"]: r.measurement for r in rows if r.label != last}
    reports = {task: measured["accounting"] or UNTOUCHED for task, measured in of_method.items()}
    merged = next(iter(reports.values()))
    if all("layers" in report for report in reports.values()):
        merged = merge_reports([{**report, "sequences": []} for report in reports.values()])
        merged.pop("sequences")
    document: dict[str, Any] = {
        "results": {task: measured["metrics"] for task, measured in of_method.items()},
        "accounting": {**merged, "tasks": reports},
        "notes": notes([row for row in rows if row.label == last]),
    }
    if groups := {t: m["subtasks"] for t, m in of_method.items() if m["subtasks"]}:
        document["subtasks"] = groups
    if others:
        document["dense"] = {task: measured["metrics"] for task, measured in others.items()}
    return document


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown document."""
    parts = ["# Comparison", escaped(conclusion(rows))]
    for table in tables(rows):
        parts.append("\n".join([f"## {escaped(table.caption)}", "", *table.lines()]))
    for head, lines in (
        ("What the published protocol leaks", [leak.sentence for leak in leaks(rows)]),
        ("Failed cells", failures(rows)),
        ("Notes", footnotes(rows)),
    ):
        if lines:
            parts += [f"## {head}", "\n".join(f"- {escaped(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


INTERVALS, EQUALS = ("interval", "to_dense", "to_griffin"), ("equal_sparsity", "equal_bytes")

PLAIN = [f.name for f in fields(Row) if f.repr and f.name not in (*INTERVALS, *EQUALS)]


def record(row: Row) -> dict[str, Any]:
    """A row as JSON-serialisable data with nested intervals; ``at`` is ``Equal.at``."""
    data = {key: getattr(row, key) for key in PLAIN}
    data |= {"checkpoint": dict(row.checkpoint), "unequal": row.unequal, "leaks": row.leaks}
    data |= {key: (i := getattr(row, key)) and i.to_dict() for key in INTERVALS}
    for cost in EQUALS:
        equal: Equal | None = getattr(row, cost)
        data[cost] = equal and {
            "griffin": equal.value,
            "at": equal.at,
            "interval": equal.interval and equal.interval.to_dict(),
        }
    return data


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison as JSON-serialisable data."""
    return {
        "schema": SCHEMA,
        "conclusion": conclusion(rows),
        "rows": [record(row) for row in rows],
        "leaks": [
            {
                **{key: getattr(leak.published, key) for key in ("label", "model", "task")},
                "full": leak.full.value,
                "published": leak.published.value,
                "interval": leak.interval and leak.interval.to_dict(),
            }
            for leak in leaks(rows)
        ],
        "failures": failures(rows),
        "notes": footnotes(rows),
    }


def csv_table(rows: Sequence[Row]) -> Table:
    """The table of compare.csv: a line per row; the only interval is that of ``to_dense``."""
    lines, nested = [], (*INTERVALS, *EQUALS, "checkpoint")
    for row in rows:
        data = {key: v for key, v in record(row).items() if key not in nested}
        ends = (row.to_dense and row.to_dense.ends) or (None, None)
        lines.append({**data, "to_dense.low": ends[0], "to_dense.high": ends[1]})
    return Table("compare", "", (), lines, terminal=False)


def page_text(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The text of report.html, without plots if matplotlib is missing; ``config``: config.json."""
    pictures, missing = page.pictures(plots(rows))
    content = {
        "title": title(rows),
        "conclusion": conclusion(rows),
        "further": [],
        "many": False,
        "facts": [*_facts(rows), *page.origin_facts(config)],
        "leak": LEAK_NOTE if any(row.leaks for row in rows) else "",
        "leaks": [leak.sentence for leak in leaks(rows)],
        "pictures": pictures,
        "missing": missing,
        "tables": [(table.html(), len(table.rows) > LONG) for table in tables(rows)],
        "failures": failures(rows),
        "notes": footnotes(rows),
        "checkpoints": None,
    }
    return page.render(config, "compare.html", content)


def title(rows: Sequence[Row]) -> str:
    """The page's title: what was compared, and on which model."""
    if not rows:
        return "Nothing was measured"
    models = list(dict.fromkeys(row.model for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows if row.pruned)) or [DENSE]
    subject = methods[0] if len(methods) == 1 else f"{len(methods)} methods compared"
    return f"{subject} on {models[0] if len(models) == 1 else f'{len(models)} models'}"


def _facts(rows: Sequence[Row]) -> page.Facts:
    """The models, methods, tasks, ... of the rows, and their checkpoints."""
    done = sum(row.done for row in rows)
    lists: dict[str, list[Any]] = {
        f"{key}s": [getattr(row, key) for row in rows]
        for key in ("model", "dtype", "method", "task", "protocol", "seed")
    }
    lists["requested sparsities"] = [percent(row.requested) for row in rows if row.requested]
    lists["checkpoints"] = [checkpoint_line(r.model, r.checkpoint) for r in rows if r.checkpoint]
    lists["cells"] = [f"{done} done, {len(rows) - done or 'none'} failed"]
    named = {name: dict.fromkeys(str(v) for v in vs if v is not None) for name, vs in lists.items()}
    return [(name, ", ".join(values) or "none", False) for name, values in named.items()]


# The plot: quality against achieved sparsity, with a panel per task.

MAX_PANELS = 6  # tasks per plot; further tasks go into further plots

OFFSET = 0.006  # horizontal distance, in sparsity, between the marks of adjacent methods

AXIS_LIMIT = 30.0  # a perplexity axis ends at this multiple of dense, to stay legible

WHISKERS = (
    f"whiskers: 95 % bootstrap intervals (at least {FEWEST_ITEMS} items) of the paired difference "
    "to dense, or of the score itself if dense was not measured; overlapping marks are moved "
    "sideways by up to 2 points"
)


def plots(rows: Sequence[Row]) -> list[Plot]:
    """The plots for each model, dtype and protocol; each plot shows up to ``MAX_PANELS`` tasks."""
    pages = []
    shown = [row for row in rows if row.layers is None and row.value is not None]
    for members in grouped(shown, lambda r: (r.model, r.dtype, r.protocol)).values():
        by_task = grouped(members, lambda row: row.task).values()
        tasks = [task for task in by_task if len(_points(task)) > 1]
        pages += [tasks[n : n + MAX_PANELS] for n in range(0, len(tasks), MAX_PANELS)]
    names = [f"quality_{n}" if n > 1 else "quality" for n in range(1, len(pages) + 1)]
    return [_plot(name, page) for name, page in zip(names, pages, strict=True)]


def _points(rows: Sequence[Row]) -> list[Row]:
    """The rows drawn as points; the untouched model is a horizontal line instead."""
    return [row for row in rows if row.method != DENSE and row.achieved is not None]


def _plot(name: str, tasks: Sequence[Sequence[Row]]) -> Plot:
    """A plot with one panel per task, and a common legend above the panels."""
    points = [row for task in tasks for row in _points(task)]
    first, methods = points[0], list(dict.fromkeys(row.method for row in points))
    leak = " (LEAK: the masks have seen the answers)" if first.leaks else ""
    values = "; ".join(f"{r.label} on {r.task}: {r.quantity}" for task in tasks for r in task)

    def draw(figure: Figure, palette: Palette) -> None:
        above, *drawn = panels(figure, len(tasks), math.ceil((len(methods) + 1) / 6))
        for axes, task in zip(drawn, tasks, strict=True):
            _draw_task(axes, task, looks_of(methods, palette))
        key(above, drawn, 6)

    facts = {**first.checkpoint, "dtype": first.dtype}
    return Plot(
        name,
        f"Quality against achieved sparsity: {first.model}, protocol {first.protocol}{leak}",
        f"Points: quality against achieved sparsity, by method. {values}.",
        f"{checkpoint_line(first.model, facts)} · {WHISKERS}",
        panels_height(len(tasks), len(methods)),
        draw,
    )


def _ends(row: Row, dense: Row | None) -> tuple[float, float] | None:
    """The ends of the row's whisker; None with too few items.

    If the row was compared with dense, the whisker shows the interval of the paired difference,
    moved to the dense value: pairing removes the variation in difficulty that all methods share.
    Otherwise the whisker shows the interval of the metric itself.
    """
    if row.to_dense is None or dense is None or dense.value is None:
        return None if row.interval is None else row.interval.ends
    if row.to_dense.ends is None:
        return None
    low, high = row.to_dense.ends
    if row.perplexity:
        return low * dense.value, high * dense.value
    return dense.value + low, dense.value + high


def _draw_task(axes: Axes, rows: Sequence[Row], looks: dict[str, Look]) -> None:
    """Draw points with intervals, a line per method and seed, and a horizontal line for dense."""
    dense = next((row for row in rows if row.method == DENSE), None)
    by_method = grouped(_points(rows), lambda row: row.method)
    for number, (method, of_method) in enumerate(by_method.items()):
        shift = OFFSET * (number - (len(by_method) - 1) / 2)
        label = method
        for line in grouped(of_method, lambda row: row.seed).values():
            line.sort(key=lambda row: row.achieved or 0.0)
            x = [100 * ((row.achieved or 0.0) + shift) for row in line]
            values = [row.value or 0.0 for row in line]
            ends = whisker_lengths(values, [_ends(row, dense) for row in line])
            look: Look = {**looks[method], "label": label, "capsize": 1.8, "elinewidth": 0.9}
            axes.errorbar(x, values, yerr=ends, capthick=0.9, **look)
            label = "_"
    row, limit = _points(rows)[0], math.inf
    if dense is not None and dense.value is not None:
        axes.axhline(dense.value, color=INK, linestyle=DASHES, linewidth=1.4, label=DENSE)
        limit = AXIS_LIMIT * dense.value
    better = "higher" if row.higher_is_better else "lower"
    task = textwrap.shorten(row.task, 44, placeholder=" ...")
    axes.set_title(f"{task}: {better} is better", loc="left", fontsize=9, color=INK)
    axes.set(xlabel="achieved sparsity (%)", ylabel=row.metric)
    axes.grid(axis="y")
    axes.margins(x=0.06)
    if row.perplexity:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        cut = f", cut at {AXIS_LIMIT:g} x dense" if high > limit else ""
        axes.set_ylabel(f"{row.metric} (log axis{cut})")
        log_axis(axes, low, min(high, limit))
    elif axes.get_ylim()[0] < 0 <= min(other.value or 0.0 for other in rows):
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # whiskers may end below zero
