"""Every results folder: found, filtered and shown, from its ``config.json`` and ``rows.jsonl``."""

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
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.result_line import ROWS, ResultLine
from dart_llm.experiments.store import is_taken
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.files import read_json, whole_rows
from dart_llm.reporting.words import dtype_text, file_text

STATUSES = ("complete", "running", "stopped", "interrupted", "failed", "unknown")
"""Of config.json, and two more: ``stopped``, a run whose process died, and ``unknown``."""

STAMP = re.compile(r"(\d{8}-\d{6})(-\d+)?")
"""Name of a run's folder."""

DEEPEST = 4
"""Folders below the root; the name of an experiment may have slashes."""

MOST = 4
"""Results of one run that are listed one by one in the short table."""


@dataclass(frozen=True)
class Run:
    """One results folder: its configuration and its lines, which may have been filtered."""

    path: Path
    experiment: str
    config: Mapping[str, Any]
    lines: tuple[ResultLine, ...]
    measured: int
    """Lines in the file."""

    @property
    def time(self) -> str:
        """Name of the folder, ``<YYYYMMDD-HHMMSS>``."""
        return self.path.resolve().name

    @property
    def kind(self) -> str:
        """The command that wrote it."""
        return str(self.config.get("kind") or "run")

    @property
    def document(self) -> str:
        """File with the summary; its tables are beside it in Markdown."""
        return str(self.config.get("document") or "")

    @property
    def planned(self) -> int | None:
        """Cells of a grid, finished or not."""
        return len(self.config.get("cells") or ()) or None

    @cached_property
    def status(self) -> str:
        """One of ``STATUSES``."""
        status = str(self.config.get("status") or "unknown").lower()
        return "stopped" if status == "running" and not is_taken(self.path) else status

    @cached_property
    def started(self) -> datetime.datetime | None:
        """Of config.json, or else of the folder's name."""
        started = _time(self.config.get("started"))
        if started is None and (match := STAMP.fullmatch(self.time)):
            with contextlib.suppress(ValueError):
                started = datetime.datetime.strptime(match[1], "%Y%m%d-%H%M%S")
        return started

    @property
    def seconds(self) -> float | None:
        """From its start to its end."""
        finished, started = _time(self.config.get("finished")), self.started
        return None if finished is None else seconds_of(finished) - seconds_of(started)

    @property
    def models(self) -> tuple[str, ...]:
        """Short names."""
        return _distinct(line.model for line in self.lines) or _distinct(
            str(name).rstrip("/").rpartition("/")[2] for name in self._requested("model")
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Without the dense model, unless it is alone."""
        return _distinct(line.method for line in pruned_lines(self)) or _distinct(
            self._requested("method")
        )

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Requested ones."""
        return tuple(sorted({one for line in pruned_lines(self) if (one := line.requested)}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of what was, or is to be, measured."""
        return _distinct(line.task for line in self.lines) or _distinct(self._requested("task"))

    def _requested(self, name: str) -> Iterator[Any]:
        settings = self.config.get("settings") or {}
        for cell in [*(self.config.get("cells") or ()), settings]:
            value = cell.get(name, cell.get(f"{name}s"))
            yield from value if isinstance(value, list) else [value]


def _time(text: Any) -> datetime.datetime | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(text)
    return None


def seconds_of(time: datetime.datetime | None) -> float:
    """Seconds; a time without an offset is local; no time is before every other."""
    return 0.0 if time is None else time.timestamp()


def _distinct(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def pruned_lines(run: Run) -> list[ResultLine]:
    """The lines without dense ones, unless there are only those."""
    pruned = [line for line in run.lines if not line.method.startswith("dense")]
    return pruned or list(run.lines)


# Find and filter.


def find(root: Path | str) -> list[Run]:
    """The runs in ``root``, oldest first; ``root`` may also be an experiment's or a run's folder.

    Raises ``ConfigError`` when there is no such folder or no run in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(
            f"there is no results folder {root}: give the folder that --results-dir named, or run "
            "dart-llm run first"
        )
    runs = [read_run(folder, root) for folder in _folders(root)]
    if not runs:
        raise ConfigError(f"{root} has no runs (no <experiment>/<time>/config.json)")
    return sorted(runs, key=lambda run: (seconds_of(run.started), run.experiment, run.time))


def read_run(folder: Path, root: Path) -> Run:
    """One folder below ``root``.  What is damaged is left out."""
    path, base = folder.resolve(), root.resolve()
    inside = base in path.parent.parents
    experiment = path.parent.relative_to(base).as_posix() if inside else path.parent.name
    lines = []
    for row in whole_rows(folder / ROWS):
        with contextlib.suppress(ValidationError):
            lines.append(ResultLine.model_validate(row))
    return Run(folder, experiment, read_json(folder / "config.json"), tuple(lines), len(lines))


def _folders(root: Path, depth: int = 0) -> Iterator[Path]:
    """Folders of runs: named like one, or with a config.json that has a status."""
    if STAMP.fullmatch(root.resolve().name) or "status" in read_json(root / "config.json"):
        yield root
        return
    with contextlib.suppress(OSError):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            hidden = folder.name.startswith(".") or folder.name in TRACKERS
            if depth < DEEPEST and not hidden:
                yield from _folders(folder, depth + 1)


def filter(
    runs: Iterable[Run],
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    status: str | None = None,
    experiment: str | None = None,
    since: str | None = None,
) -> list[Run]:
    """The runs that match everything given, with only the lines that match.

    ``status`` is a name of ``STATUSES``, ``since`` a date, ``2026-03-04`` or ``2026-03-04 12:00``;
    the others are any part of a name, in upper or lower case.  Raises ``UnknownName`` or
    ``ConfigError``.
    """
    wanted = None if status is None else status.lower()
    check_name("status", wanted, STATUSES)
    day = None if since is None else _time(since.strip())
    if since is not None and day is None:
        raise ConfigError(
            f'--since "{since}" is not a date: write 2026-03-04 or "2026-03-04 12:00"'
        )

    def matches(*names: Sequence[str]) -> bool:
        return all(_part_of(*pair) for pair in zip((model, method, task), names, strict=True))

    chosen = []
    for run in runs:
        late = day is None or seconds_of(run.started) >= seconds_of(day)
        if not late or wanted not in (None, run.status) or not _part_of(experiment, [run.path]):
            continue
        lines = [
            line
            for line in run.lines
            if matches([line.model], [line.method, line.label], [line.task])
        ]
        whole = matches(run.models, run.methods, run.tasks)
        if lines or (whole and (run.status != "complete" or not run.lines)):
            chosen.append(replace(run, lines=tuple(lines)))
    return chosen


def _part_of(part: str | None, names: Sequence[Any]) -> bool:
    return part is None or any(part.lower() in str(name).lower() for name in names)


# Runs as flat records, JSON, CSV or Markdown; one per run or per line.


def records(runs: Iterable[Run], long: bool = False) -> list[dict[str, Any]]:
    """Flat data: one per run, distinct values joined, or with ``long`` one per line."""
    return [record for run in runs for record in (_long(run) if long else [_short(run)])]


def _head(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("experiment", "time", "status", "kind")}


def _short(run: Run) -> dict[str, Any]:
    lines = pruned_lines(run)
    lists: dict[str, Iterable[Any]] = {
        "model": run.models,
        "method": run.methods,
        "sparsity": run.sparsities,
        "task": run.tasks,
        "achieved": [line.achieved for line in lines],
        "dense_share": [line.dense_share for line in lines],
        "remasks": [line.remasks for line in lines],
    }
    return {
        **_head(run),
        **{name: _joined(values) for name, values in lists.items()},
        "results": "; ".join(results(run)),
        "seconds": run.seconds,
        "path": str(run.path),
    }


def _joined(values: Iterable[Any]) -> str | float | int | None:
    """The only value, the distinct ones joined by spaces, or None."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    if len(distinct) > 1:
        return " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in distinct)
    return distinct[0] if distinct else None


def _long(run: Run) -> list[dict[str, Any]]:
    nothing: dict[str, Any] = dict.fromkeys(ResultLine.model_fields)
    lines = [line.model_dump() for line in run.lines] or [nothing]
    return [{**_head(run), **line, "path": str(run.path)} for line in lines]


def results(run: Run) -> list[str]:
    """A run's results in a few words each, then what is missing."""
    lines = pruned_lines(run)
    several = len({line.label for line in lines}) > 1
    texts = [f"{line.label} {result(line)}" if several else result(line) for line in lines]
    if len(texts) > MOST:
        texts = [f"{len(run.lines)} results"]
    return [*texts, *remarks(run)]


def remarks(run: Run) -> list[str]:
    """What is missing or failed."""
    texts = [] if run.config else ["config.json is missing or damaged"]
    if run.planned is not None and run.measured < run.planned:
        texts.append(f"{run.measured} of {run.planned} cells")
    failed = sum(line.error is not None for line in run.lines)
    return [*texts, *([f"{failed} failed"] if failed else [])]


def result(line: ResultLine) -> str:
    """Task, metric and value of one line."""
    kind, colon, text = line.task.partition(":")
    name = f"{kind}:{Path(text).name}" if colon and text else line.task
    if line.error is not None:
        return f"{name} failed: {line.error}"
    metric = "" if name.startswith(line.metric) else f"{line.metric} "
    return f"{name}: no {line.metric}" if line.value is None else f"{name} {metric}{line.value:.4g}"


def to_json(runs: Iterable[Run]) -> str:
    """One document: a list of runs, each with its ``rows``."""
    data = [
        {
            **_head(run),
            "models": run.models,
            "methods": run.methods,
            "sparsities": run.sparsities,
            "tasks": run.tasks,
            "results": results(run),
            "seconds": run.seconds,
            "path": str(run.path),
            "started": run.started and run.started.isoformat(),
            "cells": run.planned,
            "rows": [line.model_dump() for line in run.lines],
        }
        for run in runs
    ]
    return json.dumps(data, indent=1)


def to_csv(runs: Iterable[Run], long: bool = False) -> str:
    """Comma-separated values with a header; numbers that are not known are empty."""
    buffer = io.StringIO()
    data = records(runs, long)
    writer = csv.DictWriter(buffer, data[0] if data else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return buffer.getvalue()


HIDDEN = ("path", "seconds", "label", "seed", "higher_is_better")
"""Not in the Markdown table."""


def to_markdown(runs: Iterable[Run], long: bool = False) -> str:
    """A Markdown table; shares as per cent."""
    data = records(runs, long)
    shown = [name for name in (data[0] if data else ()) if name not in HIDDEN]
    names = [name for name in shown if any(one[name] not in (None, "") for one in data)]
    lines = [[_cell(name, record[name]) for name in names] for record in data]
    return "".join(f"| {' | '.join(line)} |\n" for line in (names, ["---"] * len(names), *lines))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        share = name in ("sparsity", "requested", "achieved", "dense_share")
        return f"{value:.1%}" if share else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


# Runs as tables for the terminal.

NUMBERS = (
    ("requested", "requested", "{:.0%}"),
    ("achieved", "achieved", "{:.1%}"),
    ("dense\ntokens", "dense_share", "{:.1%}"),
    ("re-\nmasks", "remasks", "{:.0f}"),
)
"""Heads of the columns of numbers, their fields in a line, and their forms."""


def table(runs: Sequence[Run], long: bool = False) -> Table:
    """Each run on the left, what it measured on the right.

    Short: without dense lines, unless there are only those, and without details where there are
    many; ``long``: every line.
    """
    rich = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    rich.add_column("run", overflow="fold", min_width=17)
    rich.add_column("method", overflow="fold")
    for head, _, _ in NUMBERS:
        rich.add_column(head, justify="right")
    rich.add_column("result", overflow="fold", min_width=14)
    for run in runs:
        facts = [run.experiment, f"{run.time} {run.kind}, {run.status}", *_model_words(run)]
        rows = list(zip_longest(facts, _measured(run, long)))
        for number, (left, right) in enumerate(rows):
            texts = [left or "", *(right or [""] * 6)]
            # Text, because names may have the square brackets of rich's markup
            rich.add_row(*map(Text, texts), end_section=number == len(rows) - 1)
    return rich


def _measured(run: Run, long: bool) -> list[list[str]]:
    lines = list(run.lines) if long else pruned_lines(run)
    texts = remarks(run)
    if not long and len(lines) > MOST:
        lines, texts = [], results(run)
    several = len({line.model for line in lines}) > 1
    rows = []
    for line in lines:
        name = line.label if long else line.method
        values = ((getattr(line, field), form) for _, field, form in NUMBERS)
        numbers = ["" if value is None else form.format(value) for value, form in values]
        rows.append([f"{line.model} {name}" if several else name, *numbers, result(line)])
    return [*rows, *([*[""] * 5, text] for text in texts)]


def _model_words(run: Run) -> list[str]:
    facts = run.config.get("checkpoint") or {}
    formats = f"{file_text(facts)}, {dtype_text(facts)}" if facts.get("dtype") else ""
    return [*run.models, *([formats] if formats else [])]


def show(run: Run) -> Table:
    """What one run is and where it comes from; ``table([run], long=True)`` has its numbers."""
    config, git = run.config, run.config.get("git") or {}
    checkpoint, command = config.get("checkpoint") or {}, config.get("command")
    versions = (config.get("versions") or {}).items()
    facts = {
        "status": run.status,
        "kind": run.kind,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}",
        "took": "" if run.seconds is None else f"{run.seconds:.0f} s",
        "model": "\n".join(_model_words(run)),
        "source": " ".join(str(checkpoint.get(key) or "") for key in ("source", "revision")),
        "sha256": str(checkpoint.get("sha256") or ""),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions if version),
        "git": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else "",
        "files": "\n".join(_file_sizes(run.path)),
    }
    rich = Table(title=Text(str(run.path)), title_justify="left", show_header=False)
    for name, value in facts.items():
        if value.strip():
            rich.add_row(name, Text(value))
    return rich


def _file_sizes(folder: Path) -> list[str]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [f"{path.name} ({path.stat().st_size / 1024:.1f} KiB)" for path in files]
