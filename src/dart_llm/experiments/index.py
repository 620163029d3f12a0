"""Every results folder as typed records; list, filter, show.

Runs as flat records, JSON, CSV or Markdown; one line per run or per measured row.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.comparison import Row, Scores, read_row
from dart_llm.experiments.folder_lock import is_taken
from dart_llm.experiments.store import mapping, number
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.files import finite

# The summary of a drift study as the cells that lists of results are made of: one per method.


ACCOUNTING = (
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_bytes_share",
)
"""Of the reports of a method's cells, merged; ``remasks`` are those of all cells."""

CLOSEST = ("document_similarity", "rougeL")
"""Metrics that may stand for a study in mode free, the first that it has."""


def cells(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One cell per row of summary.json, in the form of results.jsonl of an evaluation.

    The metric is the mean loss after the changes (mode forced), the closeness to the dense text,
    or the mean length where nothing was compared.
    """
    for line in summary.get("rows") or ():
        name, value, higher = _headline(line)
        asked = {key: line.get(key) for key in ("method", "sparsity")}
        failed = not line.get("cells")
        yield {
            "label": line.get("label"),
            "status": "failed" if failed else "done",
            "error": f"all {line.get('failed')} cells failed: results.jsonl says why"
            if failed
            else None,
            "cell": {**asked, "model": summary.get("model"), "dtype": summary.get("dtype")},
            "measurement": {
                "task": f"drift:{summary.get('mode')}",
                "metric": name,
                "higher_is_better": higher,
                "metrics": {name: value},
                "items": [],
                "accounting": None
                if line.get("method") == "dense"
                else {key: line.get(key) for key in ACCOUNTING},
            },
        }


def _headline(line: Mapping[str, Any]) -> tuple[str, float | None, bool]:
    """Name, value, and whether more is better."""
    if line.get("loss"):
        after = line["loss"].get("after") or {}
        return "loss_after", after.get("mean"), False
    for name in CLOSEST:
        found = (line.get("metrics") or {}).get(name)
        if found:
            return name, found["mean"], True
    return "tokens", line.get("mean_tokens"), True


# What a run's folder measured, as the rows that ``compare`` works with, whatever kind it is.
#
# Everything becomes a cell as results.jsonl holds it: a damaged file is one sentence in
# ``problems``, never an exception.


GENERATE = "generate"
"""The task of a generated text; its metric is the speed."""

STUDIES = ("detect", "inspect", "quality", "speed")
"""Kinds whose results are no cells of a comparison; their folders have tables of their own."""

CELLS, MEASUREMENTS = "results.jsonl", "measurements.json"

EVALUATIONS = ("mmlu.json", "general_nlp.json", "summarization.json")
"""Of ``dart-llm run``: lines of results.jsonl, as ``rows``."""


def read_rows(folder: Path, config: Mapping[str, Any], problems: list[str]) -> tuple[Row, ...]:
    """The rows of a folder in the order of its files; adds to ``problems`` what is damaged."""
    found = []
    for cell in _of_kind(folder, config.get("kind"), problems):
        known = mapping(cell.get("checkpoint")) or mapping(config.get("checkpoint"))
        asked = {**_model_name(config), **mapping(cell.get("cell"))}
        row = read_row({**cell, "checkpoint": known, "cell": asked})
        row = replace(row, scores=Scores({}, False))  # every item of every run would be kept
        if row.task == GENERATE:
            row = replace(row, status="done", error=None)  # without timing.json there is no speed
        found.append(row)
    return tuple(found)


def read_json(path: Path, problems: list[str]) -> Any:
    """Parsed JSON; None when there is no such file, or it is damaged."""
    text = _text(path, problems)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is damaged")
        return None


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        problems.append(f"{path.name} cannot be read")
        return None


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    damaged = False
    for line in (_text(path, problems) or "").split("\n"):
        try:
            value = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            damaged = True
            continue
        if isinstance(value, Mapping) and value:
            yield dict(value)
        damaged |= not isinstance(value, Mapping)
    if damaged:
        problems.append(f"{path.name} is damaged")


def _model_name(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = mapping(config.get("settings"))
    return {name: settings[name] for name in ("model", "dtype", "seed") if settings.get(name)}


def _of_kind(folder: Path, kind: Any, problems: list[str]) -> Iterator[dict[str, Any]]:
    if kind == "drift":
        yield from cells(mapping(read_json(folder / "summary.json", problems)))
    elif kind not in STUDIES:
        yield from _cell_rows(folder, problems)


def _cell_rows(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    yield from _generations(folder, problems)
    cells = list(_lines(folder / CELLS, problems))
    yield from cells
    measured = mapping(read_json(folder / MEASUREMENTS, problems)).get("measurements")
    if cells:
        return  # the other files would repeat them
    for entry in map(mapping, measured if isinstance(measured, list) else ()):
        cell = {name: entry.get(name) for name in ("method", "sparsity")}
        yield {"cell": cell, "label": entry.get("label"), "measurement": entry}
    if not measured:
        yield from _perplexities(folder, problems)
    for name in EVALUATIONS:
        rows = mapping(read_json(folder / name, problems)).get("rows")
        yield from (dict(mapping(row)) for row in (rows if isinstance(rows, list) else ()))


def _perplexities(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    whole = mapping(read_json(folder / "perplexity.json", problems))
    texts = whole.get("texts", [whole])
    for text in map(mapping, texts if isinstance(texts, list) else ()):
        rows = text.get("rows")
        for row in map(mapping, rows if isinstance(rows, list) else ()):
            measurement: dict[str, Any] = {
                "task": f"perplexity:{text.get('text')}",
                "protocol": text.get("protocol"),
                "metric": "perplexity",
                "higher_is_better": False,
                "metrics": {"perplexity": row.get("perplexity")},
                "items": [],
                "accounting": row.get("accounting"),
            }
            cell = {name: row.get(name) for name in ("method", "sparsity")}
            yield {"cell": cell, "label": row.get("label"), "measurement": measurement}


def _generations(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    timing = mapping(read_json(folder / "timing.json", problems))
    speeds = mapping(timing.get("tokens_per_second"))
    for record in _lines(folder / "generation.jsonl", problems):
        variant = str(record.get("variant"))
        measurement = {
            "task": GENERATE,
            "metric": "tokens_per_second",
            "metrics": {"tokens_per_second": number(speeds.get(variant))},
            "accounting": record.get("accounting"),
        }
        cell = {name: record.get(name) for name in ("method", "sparsity")}
        label = variant if variant == "dense" else None
        yield {"cell": cell, "label": label, "measurement": measurement}


# One run's folder in a few facts, for lists of runs; what is damaged is said, never raised.


STATUSES = ("complete", "running", "stopped", "interrupted", "failed", "unknown")
"""Of config.json, and two more: ``stopped``, a run that says ``running`` while no process of this
machine is writing it, and ``unknown``."""

STAMP = re.compile(r"(\d{8}-\d{6})(-\d+)?")
"""Name of a run's folder."""


@dataclass(frozen=True)
class ResultsSummary:
    """One results folder; what is not known is None or empty."""

    path: Path
    experiment: str
    time: str
    """Name of the folder, ``<YYYYMMDD-HHMMSS>``."""
    started: datetime.datetime | None
    status: str
    kind: str
    """The command that wrote it, as config.json names it: ``run``, ``sweep``, ``quality``, ..."""
    models: tuple[str, ...] = ()
    quantisations: tuple[str, ...] = ()
    """Of the weight files; ``none`` when they are not quantised."""
    dtypes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    """Asked for; those of dense rows are left out where there are others."""
    tasks: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    measured: int = 0
    """Rows in the files; ``rows`` may have been narrowed since."""
    planned: int | None = None
    """Cells of a sweep, finished or not."""
    seconds: float | None = None
    config: Mapping[str, Any] | None = None
    problems: tuple[str, ...] = ()


def read_info(folder: Path, root: Path) -> ResultsSummary:
    """The facts of one folder; ``root``: where the list was asked for."""
    place = folder.resolve()
    base = root.resolve()
    experiment = place.parent.name
    if base in place.parent.parents:
        experiment = place.parent.relative_to(base).as_posix()
    name = ResultsSummary(folder, experiment, place.name, _stamp(place.name), "unknown", "run")
    try:
        return _read(name)
    except Exception as error:  # a listing shows the other runs, whatever is in this folder
        return replace(name, problems=(f"cannot be read ({type(error).__name__}: {error})",))


def _read(run: ResultsSummary) -> ResultsSummary:
    problems: list[str] = []
    config = mapping(read_json(run.path / "config.json", problems))
    if not config and not problems:
        problems.append("config.json is missing or empty")
    rows = read_rows(run.path, config, problems)
    settings, checkpoint = mapping(config.get("settings")), mapping(config.get("checkpoint"))
    cells = config.get("cells")
    planned = [mapping(cell) for cell in cells] if isinstance(cells, list) else []
    asked = planned or [{**settings, **_own(config)}]
    model = checkpoint.get("name")
    facts = [row.checkpoint for row in rows] or [checkpoint]
    return replace(
        run,
        started=_time(config.get("started")) or run.started,
        status=_status(run.path, config),
        kind=str(config.get("kind") or "run"),
        models=_texts(row.model for row in rows)
        or _texts([_short(model)] if model else [_short(cell.get("model")) for cell in asked]),
        quantisations=_texts(fact.get("file_quantisation") for fact in facts),
        dtypes=_texts(row.dtype for row in rows) or _texts([checkpoint.get("dtype")]),
        methods=_methods(config, rows) or _texts(cell.get("method") for cell in asked),
        sparsities=_sparsities(rows, asked),
        tasks=_texts(row.task for row in rows) or _texts(_tasks(asked)),
        rows=rows,
        measured=len(rows),
        planned=len(planned) or None,
        seconds=_seconds(run.path, config, problems),
        config=config,
        problems=tuple(dict.fromkeys(problems)),
    )


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    prune = mapping(config.get("prune"))
    return {name: prune[name] for name in ("method", "sparsity") if prune.get(name) is not None}


def _methods(config: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, ...]:
    """A single run's own method: the dense rows beside it are a reference."""
    method = _own(config).get("method")
    if config.get("kind") not in ("compare", "sweep") and method:
        return (str(method),)
    return _texts(row.method for row in rows)


def _sparsities(rows: Sequence[Row], asked: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    found = [row.asked for row in rows if not row.method.startswith("dense")]
    found = found or [row.asked for row in rows]
    found = found or [number(cell.get("sparsity")) for cell in asked]
    return tuple(sorted({value for value in found if value is not None}))


def _tasks(asked: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for cell in asked:
        for value in (cell.get("task"), cell.get("tasks")):
            parts = value.split(",") if isinstance(value, str) else value
            yield from (str(part).strip() for part in (parts if isinstance(parts, list) else ()))


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _short(name: Any) -> str:
    return str(name or "").rstrip("/").rsplit("/", 1)[-1]


def _stamp(name: str) -> datetime.datetime | None:
    found = STAMP.fullmatch(name)
    with contextlib.suppress(ValueError):
        return None if not found else datetime.datetime.strptime(found[1], "%Y%m%d-%H%M%S")
    return None


def _time(value: Any) -> datetime.datetime | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(value)
    return None


def _seconds(folder: Path, config: Mapping[str, Any], problems: list[str]) -> float | None:
    total = number(mapping(read_json(folder / "timing.json", problems)).get("total_s"))
    begin, end = _time(config.get("started")), _time(config.get("finished"))
    if total is None and begin is not None and end is not None:
        return seconds_of(end) - seconds_of(begin)
    return total


def _status(folder: Path, config: Mapping[str, Any]) -> str:
    status = str(config.get("status") or "unknown").lower()
    return "stopped" if status == "running" and not is_taken(folder) else status


def seconds_of(time: datetime.datetime | None) -> float:
    """Seconds; a time without an offset is local; no time is before every other."""
    if time is None:
        return 0.0
    with contextlib.suppress(OverflowError, OSError, ValueError):
        return time.timestamp()
    return 0.0


# All runs in a folder: find them and choose among them.  ``results_tables`` shows them.


_DEEPEST = 4
"""Folders below the root; the name of an experiment may hold slashes."""


def find(root: Path | str) -> list[ResultsSummary]:
    """The runs in ``root``, oldest first; ``root`` may also be an experiment's or a run's folder.

    Raises ``ConfigError`` when there is no such folder or no run in it.  Folders that are damaged
    are listed with what is known.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(
            f"there is no results folder {root}: give the folder that --results-dir named, or run "
            "dart-llm run first"
        )
    found = [read_info(folder, root) for folder in _folders(root)]
    if not found:
        raise ConfigError(f"{root} holds no runs (no <experiment>/<time>/config.json)")
    return sorted(found, key=lambda run: (seconds_of(run.started), run.experiment, run.time))


def filter(
    runs: Iterable[ResultsSummary],
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    status: str | None = None,
    experiment: str | None = None,
    since: str | None = None,
) -> list[ResultsSummary]:
    """The runs that match everything given, with only the rows that match.

    ``status`` is a name of ``STATUSES``, ``since`` a date, ``2026-03-04`` or ``2026-03-04 12:00``;
    the others are any part of a name, in upper or lower case.  Raises ``UnknownName`` or
    ``ConfigError``.
    """
    runs = list(runs)
    known = {*STATUSES, *(run.status for run in runs)}
    if status is not None and status.lower() not in known:
        raise UnknownName("status", status, known)
    first = None if since is None else _since(since)
    wanted = (model, method, task)
    found = []
    for run in runs:
        if status is not None and run.status != status.lower():
            continue
        if not _part_of(experiment, (run.experiment,)):
            continue
        if first is not None and seconds_of(run.started) < seconds_of(first):
            continue
        rows = tuple(row for row in run.rows if _matches(wanted, *_names(row)))
        whole = _matches(wanted, run.models, run.methods, run.tasks)
        if rows or (whole and (run.status != "complete" or not run.rows)):
            found.append(replace(run, rows=rows))
    return found


def _names(row: Row) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    source = str(row.checkpoint.get("source") or "")
    return (row.model, source), (row.method, row.label), (row.task,)


def _matches(wanted: Sequence[str | None], *names: Sequence[str]) -> bool:
    return all(_part_of(part, known) for part, known in zip(wanted, names, strict=True))


def _part_of(part: str | None, names: Sequence[str]) -> bool:
    return part is None or any(part.lower() in name.lower() for name in names)


def _since(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(
            f'--since "{text}" is not a date: write 2026-03-04 or "2026-03-04 12:00"'
        ) from None


def _config(folder: Path) -> Any:
    return read_json(folder / "config.json", [])


def _folders(root: Path, depth: int = 0) -> Iterator[Path]:
    """Folders of runs: named like one, or with a config.json of ours (models have one too)."""
    if STAMP.fullmatch(root.resolve().name) or "status" in mapping(_config(root)):
        yield root
        return
    try:
        inside = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return
    for folder in inside:
        hidden = folder.name.startswith(".") or folder.name in TRACKERS
        if depth < _DEEPEST and not hidden:
            yield from _folders(folder, depth + 1)


MOST = 4
"""Results of one run that fit into a line of the short table."""


def records(runs: Iterable[ResultsSummary], long: bool = False) -> list[dict[str, Any]]:
    """Flat data: one per run with distinct values joined, or with ``long`` one per measured row."""
    return [record for run in runs for record in (_rows(run) if long else [_run(run)])]


def _head(run: ResultsSummary) -> dict[str, Any]:
    return {
        "experiment": run.experiment,
        "time": run.time,
        "status": run.status,
        "kind": run.kind,
    }


def _run(run: ResultsSummary) -> dict[str, Any]:
    shown = own_rows(run)
    joined = {
        "model": run.models,
        "quantisation": run.quantisations,
        "dtype": run.dtypes,
        "method": run.methods,
        "sparsity": run.sparsities,
        "tasks": run.tasks,
        "achieved_sparsity": [row.achieved for row in shown],
        "dense_token_share": [row.dense_share for row in shown],
        "remasks": [row.remasks for row in shown],
    }
    return {
        **_head(run),
        **{name: _joined(values) for name, values in joined.items()},
        "results": "; ".join(results(run)),
        "seconds": run.seconds,
        "path": str(run.path),
    }


def _rows(run: ResultsSummary) -> list[dict[str, Any]]:
    found = [
        {
            **_head(run),
            "model": row.model,
            "quantisation": row.checkpoint.get("file_quantisation"),
            "dtype": row.dtype,
            "method": row.method,
            "label": row.label,
            "sparsity": row.asked,
            "layers": row.layers,
            "keep": row.keep,
            "task": row.task,
            "protocol": row.protocol,
            "seed": row.seed,
            "metric": row.metric,
            "value": row.value,
            "items": row.items or None,
            "achieved_sparsity": row.achieved,
            "sparsity_while_pruned": row.while_pruned,
            "dense_token_share": row.dense_share,
            "remasks": row.remasks,
            "ffn_bytes_share": row.bytes_executed,
            "result": row.status,
            "error": row.error,
            "path": str(run.path),
        }
        for row in run.rows
    ]
    return found or [
        {**_head(run), "error": "; ".join(run.problems) or None, "path": str(run.path)}
    ]


def own_rows(run: ResultsSummary) -> list[Row]:
    """The rows without dense ones, unless there are only those."""
    return [row for row in run.rows if not row.method.startswith("dense")] or list(run.rows)


def results(run: ResultsSummary) -> list[str]:
    """A run's results in a few words each, then what is missing or damaged."""
    rows = own_rows(run)
    several = len({row.label for row in rows}) > 1
    texts = [f"{row.label} {result(row)}" if several else result(row) for row in rows]
    if len(texts) > MOST:
        texts = [f"{len(run.rows)} results"]
    return [*texts, *remarks(run)]


def remarks(run: ResultsSummary) -> list[str]:
    """What is missing, failed or damaged."""
    found = list(run.problems)
    if run.planned is not None and run.planned != run.measured:
        found.append(f"{run.measured} of {run.planned} cells")
    failed = sum(row.status == "failed" for row in run.rows)
    return [*found, *([f"{failed} failed"] if failed else [])]


def result(row: Row) -> str:
    """Task, metric and value of one row; the protocol, unless it is ``decode``."""
    name = task_name(row.task)
    if row.status == "failed":
        return f"{name} failed: {row.error}"
    if row.value is None:
        return f"{name}: done"
    if row.protocol not in (None, "decode"):
        name = f"{name} ({row.protocol})"
    if row.task == GENERATE:
        return f"{name} {row.value:.4g} tokens/s"
    metric = "" if name.startswith(row.metric) else f"{row.metric} "
    return f"{name} {metric}{row.value:.4g}"


def task_name(task: str) -> str:
    """A task without the folders of its file."""
    kind, colon, text = task.partition(":")
    return f"{kind}:{Path(text).name}" if colon and text else task


def _joined(values: Iterable[Any]) -> str | float | int | None:
    """The one value, the distinct ones joined by spaces, or None."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    if len(distinct) > 1:
        return " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in distinct)
    return distinct[0] if distinct else None


def to_json(runs: Iterable[ResultsSummary]) -> str:
    """One document: a list of runs, each with its ``rows`` and ``problems``."""
    data = [
        {
            **_run(run),
            "started": None if run.started is None else run.started.isoformat(),
            "model": list(run.models),
            "quantisation": list(run.quantisations),
            "dtype": list(run.dtypes),
            "method": list(run.methods),
            "sparsity": list(run.sparsities),
            "tasks": list(run.tasks),
            "cells": run.planned,
            "problems": list(run.problems),
            "results": results(run),
            "rows": _json_rows(run),
        }
        for run in runs
    ]
    for run_data in data:
        for name in ("achieved_sparsity", "dense_token_share", "remasks"):
            del run_data[name]  # each row has its own
    return json.dumps(finite(data), indent=1, allow_nan=False)


def _json_rows(run: ResultsSummary) -> list[dict[str, Any]]:
    left_out = (*_head(run), "path")
    rows = _rows(run) if run.rows else []
    return [{key: v for key, v in row.items() if key not in left_out} for row in rows]


def to_csv(runs: Iterable[ResultsSummary], long: bool = False) -> str:
    """Comma-separated values with a header; numbers that are not known are empty."""
    buffer = io.StringIO()
    data = records(runs, long)
    writer = csv.DictWriter(buffer, _columns(data), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return buffer.getvalue()


def to_markdown(runs: Iterable[ResultsSummary], long: bool = False) -> str:
    """A Markdown table; shares as per cent."""
    hidden = ("path", "seconds", "label", "protocol", "seed", "ffn_bytes_share")
    data = records(runs, long)
    names = [name for name in _columns(data) if name not in hidden and _any(data, name)]
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(name, record.get(name)) for name in names] for record in data]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _columns(data: Sequence[Mapping[str, Any]]) -> list[str]:
    longest_first = sorted(data, key=lambda record: -len(record))
    return list(dict.fromkeys(name for record in longest_first for name in record))


def _any(data: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(record.get(name) not in (None, "") for record in data)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        share = name in ("sparsity", "keep") or name.endswith(("_sparsity", "_share", "_pruned"))
        return f"{value:.1%}" if share else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


# Runs as tables for the terminal, and what one run holds.


def table(runs: Sequence[ResultsSummary], long: bool = False) -> Table:
    """Each run on the left, what it measured on the right.

    Short: without dense rows, unless there are only those, and without details where there are
    many; ``long``: every row.
    """
    found = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("run", overflow="fold", min_width=17)
    found.add_column("method", overflow="fold")
    for name in ("asked", "achieved", "dense\ntokens", "re-\nmasks"):
        found.add_column(name, justify="right")
    found.add_column("result", overflow="fold", min_width=14)
    for run in runs:
        lines = list(zip_longest(_place(run), _measured(run, long), fillvalue=None))
        for line, (place, cells) in enumerate(lines):
            texts = [place or "", *(cells or [""] * 6)]
            # Text, because names may hold the square brackets of rich's markup
            found.add_row(*map(Text, texts), end_section=line == len(lines) - 1)
    return found


def _place(run: ResultsSummary) -> list[str]:
    return [
        run.experiment,
        f"{run.time} {run.kind}, {run.status}",
        *_model_words(run.models, run.quantisations, run.dtypes),
    ]


def _measured(run: ResultsSummary, long: bool) -> list[list[str]]:
    rows = list(run.rows) if long else own_rows(run)
    if not long and len(rows) > MOST:
        rows = []
        texts = results(run)
    else:
        texts = remarks(run)
    several = len({row.model for row in rows}) > 1
    return [*(_table_cells(row, several) for row in rows), *([*[""] * 5, text] for text in texts)]


def _table_cells(row: Row, several_models: bool) -> list[str]:
    method = row.label if row.layers else row.method
    return [
        f"{row.model} {method}" if several_models else method,
        _number(row.asked, "{:.0%}"),
        _number(row.achieved, "{:.1%}"),
        _number(row.dense_share, "{:.1%}"),
        _number(row.remasks, "{:.0f}"),
        result(row),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _model_words(names: Sequence[str], files: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    formats = ", ".join(value for value in (*files, *dtypes) if value != "none")
    return [*names, *([formats] if formats else [])]


def show(run: ResultsSummary) -> Table:
    """What one run is and where it comes from; ``table([run], long=True)`` has its numbers."""
    config = mapping(run.config)
    known, git = mapping(config.get("checkpoint")), mapping(config.get("git"))
    command = config.get("command")
    packages = mapping(config.get("versions")).items()
    facts = {
        "status": run.status,
        "kind": run.kind,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}",
        "took": "" if run.seconds is None else f"{run.seconds:.0f} s",
        "model": "\n".join(_model_words(run.models, run.quantisations, run.dtypes)),
        "source": " ".join(str(known[key]) for key in ("source", "revision") if known.get(key)),
        "sha256": str(known.get("sha256") or ""),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "versions": ", ".join(f"{name} {version}" for name, version in packages if version),
        "git": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else "",
        "problems": "\n".join(run.problems),
        "files": "\n".join(_files(run)),
    }
    found = Table(title=Text(str(run.path)), title_justify="left", show_header=False)
    for name, value in facts.items():
        if value:
            found.add_row(name, Text(value))
    return found


def _files(run: ResultsSummary) -> list[str]:
    try:
        files = sorted(path for path in run.path.iterdir() if path.is_file())
        return [f"{path.name} ({path.stat().st_size / 1024:.1f} KiB)" for path in files]
    except OSError:
        return []
