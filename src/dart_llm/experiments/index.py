"""Every results folder as a typed record; list, filter, show.

A folder is read with models that ignore what they do not know.  What is damaged is one sentence in
``problems``, never an exception.
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
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.comparison import Facts, Row, Scores, read_row
from dart_llm.experiments.folder_lock import is_taken
from dart_llm.experiments.store import EVALUATIONS, Files, mapping, mappings, number
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.files import finite
from dart_llm.reporting.table import keys_of

# The files of a folder; what is of another type than it should be counts as missing.


def _time(value: Any) -> datetime.datetime | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(value)
    return None


Records = Annotated[tuple[dict[str, Any], ...], BeforeValidator(mappings)]
Time = Annotated[datetime.datetime | None, BeforeValidator(_time)]


class Config(BaseModel, frozen=True):
    """config.json."""

    kind: Any = None
    status: Any = None
    settings: Facts = {}
    prune: Facts = {}
    checkpoint: Facts = {}
    cells: Records = ()
    started: Time = None
    finished: Time = None
    command: Any = None
    versions: Facts = {}
    git: Facts = {}


NOTHING = Config()


# Today's files as cells in the form of results.jsonl, whatever command wrote them.

GENERATE = "generate"
"""The task of a generated text; its metric is the speed."""

STUDIES = ("detect", "inspect", "quality", "speed")
"""Kinds whose results are no cells of a comparison; their folders have tables of their own."""

ACCOUNTING = (
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_bytes_share",
)
"""Of the reports of a drift method's cells, merged; ``remasks`` are those of all cells."""

CLOSEST = ("document_similarity", "rougeL")
"""Metrics that may stand for a drift study in mode free, the first that it has."""


def read_rows(files: Files, config: Config) -> tuple[Row, ...]:
    """The rows of a folder in the order of its files."""
    settings = {n: v for n in ("model", "dtype", "seed") if (v := config.settings.get(n))}
    rows = []
    for cell in upgrade(files, config.kind):
        known = mapping(cell.get("checkpoint")) or config.checkpoint
        asked = {**settings, **mapping(cell.get("cell"))}
        row = read_row({**cell, "checkpoint": known, "cell": asked})
        # the items of every run would be kept; without timing.json a text has no speed
        done: dict[str, Any] = {"status": "done", "error": None} if row.task == GENERATE else {}
        rows.append(replace(row, scores=Scores({}, False), **done))
    return tuple(rows)


def upgrade(files: Files, kind: Any) -> Iterator[dict[str, Any]]:
    """The cells of a folder of any kind; where a file repeats another one, it is left out."""
    if kind == "drift":
        yield from cells(files.json("summary.json"))
    if kind == "drift" or kind in STUDIES:
        return
    yield from upgrade_generations(files)
    lines = files.lines("results.jsonl")
    yield from lines
    measured = mappings(files.json("measurements.json").get("measurements"))
    if lines:
        return
    for entry in measured:
        yield _cell_of(entry, entry)
    if not measured:
        yield from upgrade_perplexity(files.json("perplexity.json"))
    for name in EVALUATIONS:
        yield from mappings(files.json(f"{name}.json").get("rows"))


def _cell_of(row: Mapping[str, Any], measurement: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A cell of the method and sparsity in ``row``."""
    asked = {name: row.get(name) for name in ("method", "sparsity")}
    cell = {**asked, **more.pop("cell", {})}
    return {"cell": cell, "label": row.get("label"), "measurement": measurement, **more}


def upgrade_perplexity(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of every text; a document may be that of one text."""
    for text in mappings(document.get("texts", [document])):
        for row in mappings(text.get("rows")):
            measurement = {
                "task": f"perplexity:{text.get('text')}",
                "protocol": text.get("protocol"),
                "metric": "perplexity",
                "higher_is_better": False,
                "metrics": {"perplexity": row.get("perplexity")},
                "accounting": row.get("accounting"),
            }
            yield _cell_of(row, measurement)


def upgrade_generations(files: Files) -> Iterator[dict[str, Any]]:
    """The texts that a run wrote, by their speed."""
    speeds = mapping(files.json("timing.json").get("tokens_per_second"))
    for record in files.lines("generation.jsonl"):
        variant = str(record.get("variant"))
        measurement = {
            "task": GENERATE,
            "metric": "tokens_per_second",
            "metrics": {"tokens_per_second": number(speeds.get(variant))},
            "accounting": record.get("accounting"),
        }
        yield _cell_of(record, measurement, label=variant if variant == "dense" else None)


def cells(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a drift study's summary.json, one per method.

    The metric is the mean loss after the changes (mode forced), the closeness to the dense text,
    or the mean length where nothing was compared.
    """
    model = {"model": summary.get("model"), "dtype": summary.get("dtype")}
    for line in mappings(summary.get("rows")):
        name, value, higher = _headline(line)
        measurement = {
            "task": f"drift:{summary.get('mode')}",
            "metric": name,
            "higher_is_better": higher,
            "metrics": {name: value},
        }
        if line.get("method") != "dense":
            measurement["accounting"] = {key: line.get(key) for key in ACCOUNTING}
        found = _cell_of(line, measurement, cell=model)
        if not line.get("cells"):
            why = f"all {line.get('failed')} cells failed: results.jsonl says why"
            found |= {"status": "failed", "error": why}
        yield found


def _headline(line: Mapping[str, Any]) -> tuple[str, Any, bool]:
    """Name, value, and whether more is better."""
    if line.get("loss"):
        return "loss_after", mapping(mapping(line["loss"]).get("after")).get("mean"), False
    for name in CLOSEST:
        if closeness := mapping(mapping(line.get("metrics")).get(name)):
            return name, closeness.get("mean"), True
    return "tokens", line.get("mean_tokens"), True


# One run's folder in a few facts.

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
    weights: tuple[str, ...] = ()
    """How they are held where that is in blocks, in words."""
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
    config: Config = NOTHING
    problems: tuple[str, ...] = ()


def read_info(folder: Path, root: Path) -> ResultsSummary:
    """The facts of one folder; ``root``: where the list was asked for."""
    place, base = folder.resolve(), root.resolve()
    inside = base in place.parent.parents
    experiment = place.parent.relative_to(base).as_posix() if inside else place.parent.name
    began = None
    if match := STAMP.fullmatch(place.name):
        with contextlib.suppress(ValueError):
            began = datetime.datetime.strptime(match[1], "%Y%m%d-%H%M%S")
    run = ResultsSummary(folder, experiment, place.name, began, "unknown", "run")
    try:
        return _read(run)
    except Exception as error:  # a listing shows the other runs, whatever is in this folder
        return replace(run, problems=(f"cannot be read ({type(error).__name__}: {error})",))


def _read(run: ResultsSummary) -> ResultsSummary:
    files = Files(run.path)
    document = files.json("config.json")
    if not document and not files.problems:
        files.problems.append("config.json is missing or empty")
    config = Config.model_validate(document)
    rows = read_rows(files, config)
    prune = {n: v for n in ("method", "sparsity") if (v := config.prune.get(n)) is not None}
    asked = config.cells or [{**config.settings, **prune}]
    checkpoint = config.checkpoint
    models = [checkpoint.get("name")] if checkpoint.get("name") else [c.get("model") for c in asked]
    status = str(config.status or "unknown").lower()
    if status == "running" and not is_taken(run.path):
        status = "stopped"
    seconds = number(files.json("timing.json").get("total_s"))
    if seconds is None and config.started is not None and config.finished is not None:
        seconds = seconds_of(config.finished) - seconds_of(config.started)
    methods = [row.method for row in rows]
    if config.kind not in ("compare", "sweep") and prune.get("method"):
        methods = [prune["method"]]  # the dense rows beside it are a reference
    return replace(
        run,
        started=config.started or run.started,
        status=status,
        kind=str(config.kind or "run"),
        models=_texts(row.model for row in rows)
        or _texts(str(name or "").rstrip("/").rpartition("/")[2] for name in models),
        quantisations=_texts(
            fact.get("file_quantisation")
            for fact in [row.checkpoint for row in rows] or [checkpoint]
        ),
        dtypes=_texts(row.dtype for row in rows) or _texts([checkpoint.get("dtype")]),
        weights=_texts(
            fact.get("weights") for fact in [row.checkpoint for row in rows] or [checkpoint]
        ),
        methods=_texts(methods) or _texts(cell.get("method") for cell in asked),
        sparsities=_sparsities(rows, asked),
        tasks=_texts(row.task for row in rows) or _texts(_tasks(asked)),
        rows=rows,
        measured=len(rows),
        planned=len(config.cells) or None,
        seconds=seconds,
        config=config,
        problems=tuple(files.problems),
    )


def _sparsities(rows: Sequence[Row], asked: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    values = [row.asked for row in rows if not row.method.startswith("dense")]
    values = values or [row.asked for row in rows]
    values = values or [number(cell.get("sparsity")) for cell in asked]
    return tuple(sorted({value for value in values if value is not None}))


def _tasks(asked: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for cell in asked:
        for value in (cell.get("task"), cell.get("tasks")):
            names = value.split(",") if isinstance(value, str) else value
            yield from (str(name).strip() for name in (names if isinstance(names, list) else ()))


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def seconds_of(time: datetime.datetime | None) -> float:
    """Seconds; a time without an offset is local; no time is before every other."""
    with contextlib.suppress(OverflowError, OSError, ValueError):
        return 0.0 if time is None else time.timestamp()
    return 0.0


# All runs in a folder: find them and choose among them.

DEEPEST = 4
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
    runs = [read_info(folder, root) for folder in _folders(root)]
    if not runs:
        raise ConfigError(f"{root} holds no runs (no <experiment>/<time>/config.json)")
    return sorted(runs, key=lambda run: (seconds_of(run.started), run.experiment, run.time))


def _folders(root: Path, depth: int = 0) -> Iterator[Path]:
    """Folders of runs: named like one, or with a config.json of ours (models have one too)."""
    if STAMP.fullmatch(root.resolve().name) or "status" in Files(root).json("config.json"):
        yield root
        return
    with contextlib.suppress(OSError):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            hidden = folder.name.startswith(".") or folder.name in TRACKERS
            if depth < DEEPEST and not hidden:
                yield from _folders(folder, depth + 1)


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
    day = None if since is None else _time(since.strip())
    if since is not None and day is None:
        raise ConfigError(
            f'--since "{since}" is not a date: write 2026-03-04 or "2026-03-04 12:00"'
        )

    def asked(run: ResultsSummary) -> bool:
        late = day is None or seconds_of(run.started) >= seconds_of(day)
        return late and (status is None or run.status == status.lower())

    def matches(*names: Sequence[str]) -> bool:
        return all(_part_of(*pair) for pair in zip((model, method, task), names, strict=True))

    def row_matches(row: Row) -> bool:
        models = (row.model, str(row.checkpoint.get("source") or ""))
        return matches(models, (row.method, row.label), (row.task,))

    chosen = []
    for run in runs:
        if asked(run) and _part_of(experiment, (run.experiment,)):
            rows = tuple(row for row in run.rows if row_matches(row))
            whole = matches(run.models, run.methods, run.tasks)
            if rows or (whole and (run.status != "complete" or not run.rows)):
                chosen.append(replace(run, rows=rows))
    return chosen


def _part_of(part: str | None, names: Sequence[str]) -> bool:
    return part is None or any(part.lower() in name.lower() for name in names)


# Runs as flat records, JSON, CSV or Markdown; one per run or per measured row.

MOST = 4
"""Results of one run that fit into a line of the short table."""

HEAD = ("experiment", "time", "status", "kind")

ROW = {
    **{name: name for name in ("model", "quantisation", "dtype", "method", "label")},
    "sparsity": "asked",
    **{name: name for name in ("layers", "keep", "task", "protocol", "seed", "metric", "value")},
    "items": "items",
    "achieved_sparsity": "achieved",
    "sparsity_while_pruned": "while_pruned",
    "dense_token_share": "dense_share",
    "remasks": "remasks",
    "ffn_bytes_share": "bytes_executed",
    "result": "status",
    "error": "error",
}
"""Names of a row's values, and of their fields in ``Row``."""


def records(runs: Iterable[ResultsSummary], long: bool = False) -> list[dict[str, Any]]:
    """Flat data: one per run with distinct values joined, or with ``long`` one per measured row."""
    return [record for run in runs for record in (_long(run) if long else [_short(run)])]


def _head(run: ResultsSummary) -> dict[str, Any]:
    return {name: getattr(run, name) for name in HEAD}


LISTS = {
    "model": "models",
    "quantisation": "quantisations",
    "dtype": "dtypes",
    "method": "methods",
    "sparsity": "sparsities",
    "tasks": "tasks",
}
"""Names of a run's lists, and of their fields in ``ResultsSummary``."""


def _lists(run: ResultsSummary) -> dict[str, list[Any]]:
    return {name: list(getattr(run, field)) for name, field in LISTS.items()}


def _short(run: ResultsSummary) -> dict[str, Any]:
    names = ("achieved_sparsity", "dense_token_share", "remasks")
    numbers = {name: [getattr(row, ROW[name]) for row in own_rows(run)] for name in names}
    return {
        **_head(run),
        **{name: _joined(values) for name, values in (_lists(run) | numbers).items()},
        "results": "; ".join(results(run)),
        "seconds": run.seconds,
        "path": str(run.path),
    }


def _joined(values: Iterable[Any]) -> str | float | int | None:
    """The one value, the distinct ones joined by spaces, or None."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    if len(distinct) > 1:
        return " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in distinct)
    return distinct[0] if distinct else None


def _long(run: ResultsSummary) -> list[dict[str, Any]]:
    rows = [_values(row) for row in run.rows] or [{"error": "; ".join(run.problems) or None}]
    return [{**_head(run), **row, "path": str(run.path)} for row in rows]


def _values(row: Row) -> dict[str, Any]:
    quantisation = row.checkpoint.get("file_quantisation")
    found = {"quantisation": quantisation, "items": row.items or None}
    return {n: found[n] if n in found else getattr(row, field) for n, field in ROW.items()}


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
    texts = list(run.problems)
    if run.planned is not None and run.planned != run.measured:
        texts.append(f"{run.measured} of {run.planned} cells")
    failed = sum(row.status == "failed" for row in run.rows)
    return [*texts, *([f"{failed} failed"] if failed else [])]


def result(row: Row) -> str:
    """Task, metric and value of one row; the protocol, unless it is ``decode``."""
    kind, colon, text = row.task.partition(":")
    name = f"{kind}:{Path(text).name}" if colon and text else row.task
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


def to_json(runs: Iterable[ResultsSummary]) -> str:
    """One document: a list of runs, each with its ``rows`` and ``problems``."""
    data = [
        {
            **_head(run),
            **_lists(run),
            "results": results(run),
            "seconds": run.seconds,
            "path": str(run.path),
            "started": run.started and run.started.isoformat(),
            "cells": run.planned,
            "problems": list(run.problems),
            "rows": [_values(row) for row in run.rows],
        }
        for run in runs
    ]
    return json.dumps(finite(data), indent=1, allow_nan=False)


def to_csv(runs: Iterable[ResultsSummary], long: bool = False) -> str:
    """Comma-separated values with a header; numbers that are not known are empty."""
    buffer = io.StringIO()
    data = records(runs, long)
    writer = csv.DictWriter(buffer, keys_of(data), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return buffer.getvalue()


def to_markdown(runs: Iterable[ResultsSummary], long: bool = False) -> str:
    """A Markdown table; shares as per cent."""
    hidden = ("path", "seconds", "label", "protocol", "seed", "ffn_bytes_share")
    data = records(runs, long)
    shown = [name for name in keys_of(data) if name not in hidden]
    names = [name for name in shown if any(record.get(name) not in (None, "") for record in data)]
    lines = [[_cell(name, record.get(name)) for name in names] for record in data]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *lines))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        share = name in ("sparsity", "keep") or name.endswith(("_sparsity", "_share", "_pruned"))
        return f"{value:.1%}" if share else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


# Runs as tables for the terminal, and what one run holds.

NUMBERS = (
    ("asked", "asked", "{:.0%}"),
    ("achieved", "achieved", "{:.1%}"),
    ("dense\ntokens", "dense_share", "{:.1%}"),
    ("re-\nmasks", "remasks", "{:.0f}"),
)
"""Heads of the columns of numbers, their fields in ``Row``, and their forms."""


def table(runs: Sequence[ResultsSummary], long: bool = False) -> Table:
    """Each run on the left, what it measured on the right.

    Short: without dense rows, unless there are only those, and without details where there are
    many; ``long``: every row.
    """
    rich = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    rich.add_column("run", overflow="fold", min_width=17)
    rich.add_column("method", overflow="fold")
    for head, _, _ in NUMBERS:
        rich.add_column(head, justify="right")
    rich.add_column("result", overflow="fold", min_width=14)
    for run in runs:
        facts = [run.experiment, f"{run.time} {run.kind}, {run.status}", *_model_words(run)]
        lines = list(zip_longest(facts, _measured(run, long)))
        for place, (left, right) in enumerate(lines):
            texts = [left or "", *(right or [""] * 6)]
            # Text, because names may hold the square brackets of rich's markup
            rich.add_row(*map(Text, texts), end_section=place == len(lines) - 1)
    return rich


def _measured(run: ResultsSummary, long: bool) -> list[list[str]]:
    rows = list(run.rows) if long else own_rows(run)
    texts = remarks(run)
    if not long and len(rows) > MOST:
        rows, texts = [], results(run)
    several = len({row.model for row in rows}) > 1
    lines = []
    for row in rows:
        method = row.label if row.layers else row.method
        values = ((getattr(row, field), form) for _, field, form in NUMBERS)
        numbers = ["" if value is None else form.format(value) for value, form in values]
        lines.append([f"{row.model} {method}" if several else method, *numbers, result(row)])
    return [*lines, *([*[""] * 5, text] for text in texts)]


def _model_words(run: ResultsSummary) -> list[str]:
    held = (f"weights {words}" for words in run.weights)
    known = (*run.quantisations, *run.dtypes, *held)
    formats = ", ".join(word for word in known if word != "none")
    return [*run.models, *([formats] if formats else [])]


def show(run: ResultsSummary) -> Table:
    """What one run is and where it comes from; ``table([run], long=True)`` has its numbers."""
    config, known, git = run.config, run.config.checkpoint, run.config.git
    command = config.command
    facts = {
        "status": run.status,
        "kind": run.kind,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}",
        "took": "" if run.seconds is None else f"{run.seconds:.0f} s",
        "model": "\n".join(_model_words(run)),
        "source": " ".join(str(known[key]) for key in ("source", "revision") if known.get(key)),
        "sha256": str(known.get("sha256") or ""),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "versions": ", ".join(f"{name} {v}" for name, v in config.versions.items() if v),
        "git": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else "",
        "problems": "\n".join(run.problems),
        "files": "\n".join(_file_sizes(run.path)),
    }
    rich = Table(title=Text(str(run.path)), title_justify="left", show_header=False)
    for name, value in facts.items():
        if value:
            rich.add_row(name, Text(value))
    return rich


def _file_sizes(folder: Path) -> list[str]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return [f"{path.name} ({path.stat().st_size / 1024:.1f} KiB)" for path in files]
    except OSError:
        return []
