"""Columns, footnotes, conclusion, files and page of a comparison.

What a comparison says in words: its conclusion, and the size of the leak.

A method beats another on a task when the paired 95 % interval excludes "no difference"; it is only
counted where both removed the same share of neurons, to a point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison, comparison_plots, run_facts
from dart_llm.experiments.comparison import DENSE, GRIFFIN, TOO_FEW, Equal, Row, amount
from dart_llm.experiments.stats import MIN_DISCORDANT, Interval
from dart_llm.experiments.store import ResultsView, mapping, read
from dart_llm.files import write_csv, write_json, write_text
from dart_llm.reporting import page
from dart_llm.reporting.table import NOTHING, PageTable, bytes_text
from dart_llm.reporting.words import count, percent, quantity

# The footnotes of a comparison's tables: only what applies to the rows that are shown.


UNEQUAL, BETWEEN, OTHER_MEAN = "†", "‡", "§"
"""Marks in the tables."""

MOST_NAMES = 4
"""Rows that a note names, at most."""

LEAK_NOTE = f"LEAK - {LEAK}. Its numbers are no measure of a method's quality."


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables must know; only what applies to these rows."""
    done = [row for row in rows if row.status == "done"]
    pruned = [r for r in done if not r.method.startswith(DENSE) and r.method != GRIFFIN]
    whole = [row for row in pruned if row.layers is None]
    intervals = [i for row in done for i in (row.to_dense, row.to_griffin) if i is not None]
    notes = [
        "Intervals are 95 % bootstrap intervals over items; differences are paired by item. "
        '"better" and "worse" stand where the interval excludes no difference and at least '
        f'{MIN_DISCORDANT} items differ, "{TOO_FEW}" where fewer do.',
        _chance(len(intervals)),
        _missing(done, whole),
        *_marks(done, whole),
        _bytes_note(done),
    ]
    leaking = any(row.leaks for row in rows)
    return [*([LEAK_NOTE] if leaking else []), *(note for note in notes if note), *_own(done)]


def _chance(comparisons: int) -> str:
    """How many of so many intervals mislead."""
    if not comparisons:
        return ""
    told = f"{count(comparisons, 'comparison')} with dense and GRIFFIN"
    if comparisons < 20:
        return (
            f"{told}: where nothing differs, each still has a chance of about 1 in 20 to look so."
        )
    return f"{told}: where nothing differs, about {round(comparisons / 20)} of them still look so."


def _own(done: Sequence[Row]) -> list[str]:
    """What the measurements themselves say, each once, with whom it concerns."""
    found: dict[str, dict[str, None]] = {}
    for row in done:
        for note in row.notes:
            if note != LEAK:
                found.setdefault(note, {})[f"{row.label} on {row.task}"] = None
    return [f"{note} ({_concerned(list(labels))})" for note, labels in found.items()]


def _concerned(labels: Sequence[str]) -> str:
    if len(labels) <= MOST_NAMES:
        return ", ".join(labels)
    return f"{', '.join(labels[: MOST_NAMES - 1])} and {len(labels) - MOST_NAMES + 1} others"


def _missing(done: Sequence[Row], pruned: Sequence[Row]) -> str:
    absent = [
        name
        for name, words in ((DENSE, "dense"), (GRIFFIN, "GRIFFIN"))
        if pruned and not any(row.method == words.lower() for row in done)
    ]
    if not absent:
        return ""
    names = " and ".join("GRIFFIN" if name == GRIFFIN else name for name in absent)
    verb = "was" if len(absent) == 1 else "were"
    return f"{names} {verb} not measured: the columns that compare with {names} are empty."


def _marks(done: Sequence[Row], pruned: Sequence[Row]) -> list[str]:
    found = []
    if any(row.unequal for row in pruned):
        found.append(
            f"{UNEQUAL} achieved sparsity differs from GRIFFIN's at the same asked sparsity by "
            "more than 1 point: compare at equal achieved sparsity instead."
        )
    equals = [e for row in pruned for e in (row.equal_sparsity, row.equal_bytes) if e]
    if any(len(equal.between) > 1 for equal in equals):
        found.append(
            f"{BETWEEN} against a GRIFFIN that was not run: item by item on the straight line "
            "between its two nearest measured points (losses in nats). GRIFFIN's true curve "
            "usually bends below that line's damage, so wide gaps flatter the other method."
        )
    if pruned and any(row.method == GRIFFIN for row in done):
        found.append(
            "At equal achieved sparsity, or FFN bytes: against GRIFFIN where it removed as much, "
            "or read as many bytes, to 1 point; empty where that lies outside of GRIFFIN's "
            "measured points."
        )
    if any(differs(row) for row in done):
        found.append(
            f"{OTHER_MEAN} the task's own aggregate is not the mean over items, which is what the "
            "intervals are of."
        )
    return found


def differs(row: Row) -> bool:
    """Whether the metric is not the mean over the items that the intervals are computed from."""
    mean = row.scores.mean
    if mean is None or row.value is None:
        return False
    return abs(mean - row.value) > 1e-4 * max(1.0, abs(row.value))


def _bytes_note(done: Sequence[Row]) -> str:
    executors = {row.executor for row in done if row.executor}
    if not executors:
        return ""
    if "masked" not in executors:
        return "FFN bytes: read per decoded token over dense, as executed, all overheads included."
    return (
        "FFN bytes: read per decoded token over dense, if the compact executor ran, all overheads "
        "included; the masked executor reads all of them."
    )


USUAL = 0.5
"""The sparsity that the conclusion speaks of, or the nearest one measured."""


@dataclass(frozen=True)
class Leak:
    """One method under the protocols ``full`` and ``published`` on the same items."""

    full: Row
    published: Row
    interval: Interval | None
    """Published against full: a difference, or a ratio of perplexities."""


def leaks(rows: Sequence[Row], seed: int = 0) -> list[Leak]:
    """Every row that was measured under both protocols; what differs is what the masks leak."""
    found: dict[Any, dict[str | None, Row]] = {}
    for row in rows:
        if row.status == "done" and not row.method.startswith(DENSE):
            key = (row.model, row.dtype, row.task, row.label, row.layers, row.keep, row.seed)
            found.setdefault(key, {})[row.protocol] = row
    return [
        Leak(
            pair["full"],
            pair["published"],
            pair["published"].scores.against(pair["full"].scores, seed),
        )
        for pair in found.values()
        if "full" in pair and "published" in pair
    ]


def conclusion(rows: Sequence[Row]) -> str:
    """One plain sentence: how the first method does at 50 %, or near it, on each model."""
    parts = []
    curves = comparison.sentences(rows)
    if curves and not any(_methods(own) for _, own in _models(rows)):
        return curves[0]
    for model, own in _headlined(_models(rows)):
        methods = _methods(own)
        told = _at(own, methods[0], _usual(own, methods[0])) if methods else _no_method(own)
        parts.append(f"{model}: {told}" if model else told)
    text = "; ".join(parts)
    return _sentence(text) if text else "Nothing was measured."


def conclusions(rows: Sequence[Row]) -> list[str]:
    """The conclusion, then the same of every other method and sparsity, a sentence each."""
    found = list(dict.fromkeys([conclusion(rows), *comparison.sentences(rows)]))
    models = _models(rows)
    headlined = [model for model, _ in _headlined(models)]
    for model, own in models:
        for place, method in enumerate(_methods(own)):
            usual = _usual(own, method)
            for asked in _sparsities(own, method):
                if place == 0 and asked == usual and model in headlined:
                    continue
                told = _at(own, method, asked)
                found.append(_sentence(f"{model}: {told}" if model else told))
    failed = [row for row in rows if row.status != "done"]
    if failed:
        found.append(f"{count(len(failed), 'cell')} failed and {_is(len(failed))} not counted.")
    return found


def _sentence(text: str) -> str:
    """With a full stop, and a capital unless a model's name comes first."""
    ours = text.startswith(("at ", "with ", "no ", "protocol "))
    return f"{text[0].upper()}{text[1:]}." if ours else f"{text}."


Models = list[tuple[str, list[Row]]]


def _headlined(models: Models) -> Models:
    """Those that the conclusion speaks of: not what leaks, where there is anything else."""
    honest = [(model, own) for model, own in models if not any(row.leaks for row in own)]
    return honest or models


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _models(rows: Sequence[Row]) -> Models:
    """Rows of whole-model pruning by model, dtype and protocol, which are named where several."""
    found: dict[tuple[str, str | None, str | None], list[Row]] = {}
    for row in rows:
        if row.layers is None and row.status == "done":
            found.setdefault((row.model, row.dtype, row.protocol), []).append(row)
    varied = [len({key[place] for key in found}) > 1 for place in range(3)]
    names = {}
    for model, dtype, protocol in found:
        parts = (model, dtype, f"protocol {protocol or 'not known'}")
        named = " ".join(str(p) for p, many in zip(parts, varied, strict=True) if many)
        leaking = any(row.leaks for row in found[model, dtype, protocol])
        names[model, dtype, protocol] = (
            f"{named} (LEAK)" if leaking and named else "LEAK" if leaking else named
        )
    return [(names[key], own) for key, own in found.items()]


def _methods(rows: Iterable[Row]) -> list[str]:
    """``dart`` first, then the others as they come, GRIFFIN only where it is alone."""
    names = dict.fromkeys(row.method for row in rows if not row.method.startswith(DENSE))
    others = sorted((name for name in names if name != GRIFFIN), key=lambda name: name != "dart")
    return others or list(names)


def _sparsities(rows: Iterable[Row], method: str) -> list[float | None]:
    return list(dict.fromkeys(row.asked for row in rows if row.method == method))


def _usual(rows: Iterable[Row], method: str) -> float | None:
    known = [asked for asked in _sparsities(rows, method) if asked is not None]
    return min(known, key=lambda asked: (abs(asked - USUAL), asked), default=None)


def _no_method(rows: Sequence[Row]) -> str:
    told = [
        f"{row.method} has {row.metric} {quantity(row.value, row.perplexity)} on {row.task}"
        for row in rows
    ]
    return f"no pruned model was measured; {_and(told)}"


def _at(rows: Sequence[Row], method: str, asked: float | None) -> str:
    own = [row for row in rows if row.method == method and row.asked == asked]
    where = "with its own counts" if asked is None else f"at {percent(asked)}"
    if method != GRIFFIN and any(_fair(row) for row in own):
        return f"{where} {_verdicts(own, method, GRIFFIN, _griffin)}"
    if all(row.to_dense is None for row in own):
        return f"{where} {_values(own, method)}"
    return f"{where} {_verdicts(own, method, DENSE, lambda row: row.to_dense)}"


def _values(own: Sequence[Row], method: str) -> str:
    """What was measured, where there is nothing to compare it with."""
    told = [f"{row.metric} {quantity(row.value, row.perplexity)} on {row.task}" for row in own]
    if any(row.items > 1 for row in own):
        return f"{method} has {_and(told)}; nothing was measured that it can be compared with"
    return f"{method} has {_and(told)}; one item is too few to compare"


def _fair(row: Row) -> bool:
    return row.to_griffin is not None or row.equal_sparsity is not None


def _griffin(row: Row) -> Interval | None:
    """Against GRIFFIN at equal achieved sparsity; None where there is no such GRIFFIN."""
    if row.to_griffin is not None and row.gap is not None and not row.unequal:
        return row.to_griffin
    return None if row.equal_sparsity is None else row.equal_sparsity.interval


def _verdicts(own: Sequence[Row], method: str, other: str, against: Any) -> str:
    """ "dart beats griffin on 3 of 4 tasks; on mmlu the difference is within noise (...)"."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "": [], TOO_FEW: [], "unknown": []}
    seeds = len({row.seed for row in own}) > 1
    for row in own:
        interval = against(row)
        name = f"{row.task} (seed {row.seed})" if seeds else row.task
        verdict = "unknown" if interval is None else row.verdict(interval)
        if interval is not None and verdict in ("", TOO_FEW):
            few = f", {interval.differing} differ" if verdict else ""
            name = f"{name} ({_ends(interval, row.perplexity)}{few})"
        found[verdict].append(name)
    total = sum(len(names) for names in found.values())
    tasks = count(total, "task")
    parts = []
    if found["better"]:
        parts.append(f"{method} beats {other} on {len(found['better'])} of {tasks}")
        if len(found["better"]) < total:
            parts[0] += f" ({_and(found['better'])})"
        if found["worse"]:
            parts.append(f"it loses on {_and(found['worse'])}")
    elif found["worse"]:
        parts.append(f"{method} is worse than {other} on {len(found['worse'])} of {tasks}")
        if len(found["worse"]) < total:
            parts[0] += f" ({_and(found['worse'])})"
    else:
        where = f" on any of {tasks}" if total > 1 else ""
        parts.append(f"{method} neither beats nor loses to {other}{where}")
    if found[""]:
        parts.append(f"on {_and(found[''])} the difference is within noise")
    if found[TOO_FEW]:
        parts.append(f"on {_and(found[TOO_FEW])} too few items differ to tell")
    if found["unknown"]:
        why = (
            "has no interval" if other == DENSE else "is not at equal sparsity, or has no interval"
        )
        parts.append(f"on {_and(found['unknown'])} the comparison {why}")
    return "; ".join(parts)


def _ends(interval: Interval, perplexity: bool) -> str:
    text = amount(interval, perplexity)
    return f"interval {text.partition('(')[2].rstrip(')')}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def leak_sentence(leak: Leak) -> str:
    """How much better the protocol that has seen the answers looks."""
    row = leak.published
    change = amount(leak.interval, row.perplexity) or "not known: no shared items"
    verdict = row.verdict(leak.interval)
    told = {
        "better": "flattered by the leak",
        "worse": "worse all the same",
        TOO_FEW: f"only {leak.interval.differing if leak.interval else 0} items differ",
        "": "within noise",
    }
    known = f", {told[verdict]}" if leak.interval else ""
    return f"{row.label} on {row.task}: published against full {change}{known}."


# The tables of a comparison: their cells in words, for the terminal and as Markdown.


TERMINAL = {
    0: "method",
    2: "achieved",
    8: "dense",
    9: "re-masks",
    3: "{}",
    4: "against dense",
    5: "against GRIFFIN",
}
"""Columns of the full table that fit a terminal, and their heads there."""


def tables(rows: Sequence[Row]) -> list[PageTable]:
    """One table per model, task and protocol, in the order of the rows."""
    whole = {row.group for row in rows if row.layers is None and row.method != DENSE}
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        layered = row.layers is not None and row.group in whole
        found.setdefault((*row.group, layered), []).append(row)
    return [_table(own) for own in found.values()]


def caption(row: Row) -> str:
    """ "arc_easy_local, SmolLM2 (float32), protocol decode"."""
    dtype = f" ({row.dtype})" if row.dtype else ""
    layers = ", one layer pruned at a time" if row.layers is not None else ""
    return f"{row.task}: {row.model}{dtype}, protocol {row.protocol or 'not known'}{layers}"


def _table(rows: Sequence[Row]) -> PageTable:
    measured = [row for row in rows if row.status == "done"]
    metric = measured[0].metric if measured else "metric"
    better = "higher" if not measured or measured[0].higher_is_better else "lower"
    counts = sorted({row.items for row in measured if row.items})
    items = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
    noun = "item" if items == "1" else "items"
    about = f"; {items} {noun}" if items else ""
    leak = "LEAK, " if any(row.leaks for row in rows) else ""
    head: tuple[str, ...] = (
        "method",
        "asked",
        "achieved",
        f"{metric} ({better} is better)",
        "against dense",
        "against GRIFFIN, same asked sparsity",
        "at equal achieved sparsity",
        "at equal FFN bytes",
        "dense tokens",
        "re-masks",
        "FFN bytes",
        "weights",
    )
    seeds = len({row.seed for row in rows}) > 1
    body = tuple(_cells(row, seeds) for row in rows)
    weights = {row.weight_bytes for row in measured}
    if len(weights) < 2:  # the same for all: no column
        head, body = head[:-1], tuple(cells[:-1] for cells in body)
        about += f"; weights {bytes_text(*weights)}" if weights - {None} else ""
    return PageTable(f"{leak}{caption(rows[-1])}{about}", head, body)


def name(row: Row, seeds: bool = False) -> str:
    """The row's label, with what tells it from its neighbours."""
    parts = [row.label]
    if row.layers is not None:
        keep = "" if row.keep is None else f", keep {percent(row.keep)}"
        parts = [f"{row.method}, layer {row.layers}{keep}"]
    if seeds:
        parts.append(f"seed {'?' if row.seed is None else row.seed}")
    return ", ".join(parts)


def _cells(row: Row, seeds: bool) -> tuple[str, ...]:
    unequal = f" {UNEQUAL}" if row.unequal else ""
    if row.status != "done":
        return (name(row, seeds), _share(row.asked), NOTHING, "failed", *[NOTHING] * 8)
    return (
        name(row, seeds),
        _share(row.asked),
        f"{_share(row.achieved)}{unequal}",
        _metric(row),
        _change(row, row.to_dense),
        f"{_change(row, row.to_griffin)}{unequal if row.to_griffin else ''}",
        _equal(row, row.equal_sparsity),
        _equal(row, row.equal_bytes),
        _share(row.dense_share),
        NOTHING if row.remasks is None else f"{row.remasks:,}",
        NOTHING if row.bytes_share is None else f"{row.bytes_share:.3f}",
        bytes_text(row.weight_bytes),
    )


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _metric(row: Row) -> str:
    text = quantity(row.value, row.perplexity)
    if row.interval is not None:
        ends = (row.interval.low, row.interval.high)
        text += f" ({' to '.join(quantity(end, row.perplexity) for end in ends)})"
    return f"{text} {OTHER_MEAN}" if differs(row) else text


def _change(row: Row, interval: Interval | None) -> str:
    if interval is None:
        return NOTHING
    verdict = row.verdict(interval)
    return f"{amount(interval, row.perplexity)}{f' {verdict}' if verdict else ''}"


def _equal(row: Row, equal: Equal | None) -> str:
    if equal is None:
        return NOTHING
    mark = f" {BETWEEN}" if len(equal.between) > 1 else ""
    return f"{_change(row, equal.interval)}{mark}"


def failures(rows: Sequence[Row]) -> list[str]:
    """One sentence per failed cell."""
    return [
        f"{name(row, row.seed is not None)} on {row.task} ({row.model}) failed: {row.error}"
        for row in rows
        if row.status != "done"
    ]


def rich_tables(rows: Sequence[Row]) -> list[RichTable]:
    """The tables without their last columns, each interval under its number."""
    found = []
    for table in tables(rows):
        rich = RichTable(
            title=table.caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for place, head in TERMINAL.items():
            name = head.format(table.head[place].partition(" (")[0])
            rich.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
        for row in table.rows:
            rich.add_row(*(_two_lines(cell) for cell in (row[place] for place in TERMINAL)))
        found.append(rich)
    return found


def _two_lines(cell: str) -> str:
    """ "0.4 (0.3 to 0.5) better" as "0.4 better" over "0.3 to 0.5"."""
    start, _, rest = cell.partition(" (")
    ends, _, after = rest.partition(")")
    return f"{start}{after}\n{ends}" if rest else cell


def markdown(rows: Sequence[Row]) -> str:
    """The whole comparison as one Markdown document."""
    told = conclusions(rows)
    parts = ["# Comparison", _escaped(told[0]), *(_markdown_table(table) for table in tables(rows))]
    if len(told) > 1:
        parts += ["## In words", _list(told[1:])]
    found = leaks(rows)
    if found:
        parts += ["## What the published protocol leaks", _list(map(leak_sentence, found))]
    failed = failures(rows)
    if failed:
        parts += ["## Failed cells", _list(failed)]
    parts += ["## Notes", _list(footnotes(rows))]
    return "\n\n".join(parts) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Without line breaks, and with what Markdown would read as a column, HTML or emphasis."""
    plain = " ".join(text.split())
    for sign in "\\|<*`":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _markdown_table(table: PageTable) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    rule = f"| --- |{' ---: |' * (len(table.head) - 1)}"
    body = [line(row) for row in table.rows]
    return "\n".join([f"## {_escaped(table.caption)}", "", line(table.head), rule, *body])


def summary(rows: Sequence[Row]) -> str:
    """What ends the terminal's tables: the conclusion, and how many cells failed."""
    failed = sum(row.status != "done" for row in rows)
    told = conclusions(rows)[0]
    return f"{told} {count(failed, 'cell')} failed." if failed else told


# The files of a comparison: ``compare.md``, ``compare.csv`` and ``compare.json``.


SCHEMA = 1

INTERVALS = ("interval", "to_dense", "to_griffin")

EQUALS = ("equal_sparsity", "equal_bytes")

LEFT_OUT = ("scores", "checkpoint", "notes", *INTERVALS, *EQUALS)

ENDS = ("low", "high", "estimate", "n")

PAIRED = (*ENDS, "differing", "significant")


def record(row: Row) -> dict[str, Any]:
    """A row as JSON-able data, its intervals and comparisons nested."""
    data: dict[str, Any] = {
        field.name: getattr(row, field.name) for field in fields(Row) if field.name not in LEFT_OUT
    }
    for key in INTERVALS:
        interval = getattr(row, key)
        data[key] = None if interval is None else interval.to_dict()
    for key in EQUALS:
        equal = getattr(row, key)
        data[key] = None if equal is None else _equal_record(equal)
    data["unequal"] = row.unequal
    data["leaks"] = row.leaks
    data["notes"] = list(row.notes)
    data["checkpoint"] = dict(row.checkpoint)
    return data


def _equal_record(equal: Equal) -> dict[str, Any]:
    return {
        "griffin": equal.value,
        "between": list(equal.between),
        "interval": None if equal.interval is None else equal.interval.to_dict(),
    }


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The whole comparison as JSON-able data."""
    return {
        "schema": SCHEMA,
        "conclusion": conclusions(rows)[0],
        "conclusions": conclusions(rows),
        "rows": [record(row) for row in rows],
        "leaks": [
            {
                "label": leak.published.label,
                "model": leak.published.model,
                "task": leak.published.task,
                "full": leak.full.value,
                "published": leak.published.value,
                "interval": None if leak.interval is None else leak.interval.to_dict(),
            }
            for leak in leaks(rows)
        ],
        "failures": failures(rows),
        "notes": footnotes(rows),
    }


def _csv_row(row: Row) -> dict[str, Any]:
    """All columns of one row, the same for every row."""
    data = record(row)
    for key in ("notes", "checkpoint"):
        data.pop(key)
    for key in INTERVALS:
        ends = ENDS if key == "interval" else PAIRED
        data[key] = {end: (data[key] or {}).get(end) for end in ends}
    for key in EQUALS:
        equal = data[key] or {"griffin": None, "between": [], "interval": None}
        data[key] = {
            "griffin": equal["griffin"],
            "between": " ".join(f"{x:.6g}" for x in equal["between"]),
            **{end: (equal["interval"] or {}).get(end) for end in PAIRED},
        }
    return {
        f"{key}.{name}" if isinstance(value, Mapping) else key: item
        for key, value in data.items()
        for name, item in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


def write_all(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write ``compare.md``, ``compare.csv`` and ``compare.json``; returns their paths.

    Raises ``ResultsError`` when a file cannot be written.
    """
    paths = [folder / f"compare.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], markdown(rows))
    table = [_csv_row(row) for row in rows]
    write_csv(paths[1], table[0] if table else [], [list(row.values()) for row in table])
    write_json(paths[2], document(rows))
    return paths


# ``report.html`` of a comparison, a sweep or an evaluation, built from its ``results.jsonl``.
#
# Like the page of a run: no script, no request to anywhere, everything from a file escaped.


RESULTS = "results.jsonl"

LONG = 24
"""A table with more rows is folded."""

MANY = 4
"""So are more sentences than these."""


def write(folder: Path, rows: Sequence[Row] | None = None) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    ``rows``: what ``compare.rows`` gave for the folder's cells (default: computed here).  Without
    matplotlib the page has no plots and says so.  Raises ``ResultsError`` when the folder does not
    exist or cannot be written, ``MissingExtra`` without scipy.
    """
    view = read(folder)
    found = comparison.rows(read_cells(folder)) if rows is None else rows
    path = folder / "report.html"
    write_text(path, render(view, found))
    return path


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The finished and failed cells of a folder; a line that is not whole is left out."""
    try:
        lines = (folder / RESULTS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if isinstance(cell, dict):
            found.append(cell)
    return found


def render(view: ResultsView, rows: Sequence[Row]) -> str:
    """The page of one comparison."""
    return page.render("compare.html", _content(view, rows), {"stacked": stacked})


def stacked(cell: str) -> tuple[str, str, str]:
    """ "0.4 (0.3 to 0.5) better" as its number, its interval and what is said of it."""
    value, _, rest = cell.partition(" (")
    ends, closed, said = rest.partition(")")
    return (value, ends, said.strip()) if closed else (cell, "", "")


def _content(view: ResultsView, rows: Sequence[Row]) -> dict[str, Any]:
    told = conclusions(rows)
    pictures, missing = page.pictures(
        [*comparison_plots.make_comparison(rows), *comparison_plots.make_layers(rows)]
    )
    return {
        "title": title(rows),
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": told[0],
        "further": told[1:],
        "many": len(told) - 1 > MANY,
        "facts": _facts(view, rows),
        "leak": LEAK_NOTE if any(row.leaks for row in rows) else "",
        "leaks": [leak_sentence(leak) for leak in leaks(rows)],
        "pictures": pictures,
        "missing": missing,
        "tables": [(table, len(table.rows) > LONG) for table in tables(rows)],
        "failures": failures(rows),
        "notes": footnotes(rows),
        "checkpoints": _checkpoints(rows),
        "settings": run_facts.settings(view),
        "provenance": run_facts.provenance(view),
    }


def title(rows: Sequence[Row]) -> str:
    """What was compared, and on which model."""
    models = list(dict.fromkeys(row.model for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows if row.method != DENSE))
    where = f" on {models[0]}" if len(models) == 1 else f" on {len(models)} models"
    if not rows:
        return "Nothing was measured"
    if all(row.layers is not None or row.method == DENSE for row in rows) and labels:
        return f"Layer by layer{where}"
    if len(labels) < 2:
        return f"{labels[0] if labels else DENSE}{where}"
    methods = dict.fromkeys(row.method for row in rows if row.method != DENSE)
    return f"{count(len(methods), 'method')} compared{where}"


def _facts(view: ResultsView, rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""

    done = sum(row.status == "done" for row in rows)
    asked = sorted({row.asked for row in rows if row.asked})
    found = [
        ("models", run_facts.named([row.model for row in rows]), False),
        ("dtype", run_facts.named([row.dtype for row in rows]), False),
        ("methods", run_facts.named([row.method for row in rows]), False),
        ("sparsities asked for", ", ".join(map(percent, asked)) or "none", False),
        ("tasks", run_facts.named([row.task for row in rows]), False),
        ("protocols", run_facts.named([row.protocol for row in rows]), False),
        ("seeds", run_facts.named([row.seed for row in rows]), False),
        ("cells", f"{done} done, {len(rows) - done or 'none'} failed", False),
    ]
    known = {"device", "date", "command"}
    return found + [fact for fact in run_facts.facts(view) if fact[0] in known]


def _checkpoints(rows: Sequence[Row]) -> PageTable | None:
    """The files that were measured, with what identifies them."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = mapping(row.checkpoint)
        if known:
            found.setdefault(json.dumps(known, sort_keys=True, default=str), known)
    keys = ("name", "file_quantisation", "dtype", "revision", "sha256")
    body = tuple(
        tuple("not known" if known.get(key) is None else str(known[key])[:40] for key in keys)
        for known in found.values()
    )
    head = ("checkpoint", "file quantisation", "dtype", "revision", "sha256 (start)")
    return PageTable("Checkpoints", head, body, numeric=False) if body else None
