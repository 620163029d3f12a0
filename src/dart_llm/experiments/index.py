"""Find, filter and list the results folders of past runs (config.json and rows.jsonl)."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.store import ROWS, ResultLine, is_taken
from dart_llm.files import read_json, whole_rows
from dart_llm.reporting.page import short_name
from dart_llm.reporting.table import Column, Table
from dart_llm.reporting.words import count

STATUSES = ("complete", "running", "stopped", "interrupted", "failed")
"""The statuses in config.json, and ``stopped``: the process ended without writing a status."""

RUN_KEYS = {"kind", "status", "settings", "started", "finished"}

MAX_LISTED = 4  # in the short table, a run with more results shows only their number


@dataclass(frozen=True)
class Run:
    """A results folder: configuration and result lines; ``filter`` keeps only matching lines."""

    path: Path
    experiment: str
    config: Mapping[str, Any]
    lines: tuple[ResultLine, ...]

    @property
    def time(self) -> str:
        """The name of the folder, ``<YYYYMMDD-HHMMSS>``."""
        return self.path.resolve().name

    @property
    def kind(self) -> str:
        """The command that created the run."""
        return str(self.config["kind"])

    @cached_property
    def status(self) -> str:
        """One of ``STATUSES``."""
        status = str(self.config["status"])
        return "stopped" if status == "running" and not is_taken(self.path) else status

    @property
    def started(self) -> datetime.datetime:
        """The start time, with the offset from UTC."""
        return datetime.datetime.fromisoformat(self.config["started"])

    @property
    def seconds(self) -> float | None:
        """Seconds from the start of the run to its end; None before it ends."""
        end = self.config["finished"]
        return end and (datetime.datetime.fromisoformat(end) - self.started).total_seconds()

    @property
    def models(self) -> tuple[str, ...]:
        """The models' short names."""
        return _distinct(
            [line.model for line in self.lines] or map(short_name, self._values("model"))
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods; dense is included only if there are no others."""
        return _distinct([line.method for line in pruned_lines(self)] or self._values("method"))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The requested sparsities, ascending."""
        return tuple(sorted({line.requested for line in pruned_lines(self) if line.requested}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks measured or to be measured."""
        return _distinct([line.task for line in self.lines] or self._values("task"))

    def _values(self, name: str) -> Iterator[str]:
        """The values of the setting ``name``, for runs that have no results yet."""
        settings = self.config["settings"]
        value = settings.get(name, settings.get(f"{name}s")) or []
        yield from [value] if isinstance(value, str) else value


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def pruned_lines(run: Run) -> list[ResultLine]:
    """The lines of pruned methods, or all lines if no method is pruned."""
    pruned = [line for line in run.lines if not line.method.startswith("dense")]
    return pruned or list(run.lines)


# Find and filter.


def find(root: Path | str) -> list[Run]:
    """Find the runs in ``root``, oldest first; ``root`` may be an experiment's or a run's folder.

    Raises ``ConfigError`` if the folder does not exist or contains no run.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(
            f"there is no results folder {root}: give the folder that was set with --results-dir, "
            "or run dart-llm run first"
        )
    runs = []
    for path in root.rglob("config.json"):
        config, folder = read_json(path), path.parent
        if config.keys() >= RUN_KEYS:  # otherwise it is a model's config.json
            parent, top = folder.resolve().parent, root.resolve()
            inside = parent != top and parent.is_relative_to(top)
            experiment = parent.relative_to(top).as_posix() if inside else parent.name
            lines = tuple(ResultLine.model_validate(row) for row in whole_rows(folder / ROWS))
            runs.append(Run(folder, experiment, config, lines))
    if not runs:
        raise ConfigError(f"{root} has no runs (there is no <experiment>/<time>/config.json)")
    return sorted(runs, key=lambda run: (run.started, run.experiment, run.time))


def filter(
    runs: Iterable[Run],
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    status: str | None = None,
    experiment: str | None = None,
    since: str | None = None,
) -> list[Run]:
    """Return the runs that match all arguments, with only their matching lines.

    ``status`` is a name in ``STATUSES``.  ``since`` is the earliest start, such as ``2026-03-04``
    or ``2026-03-04 12:00``.  The other arguments match any part of a name, ignoring case.  Raises
    ``UnknownName`` for the status, and ``ConfigError`` for the date.
    """
    status = status and status.lower()
    check_name("status", status, STATUSES)
    try:
        start = None if since is None else datetime.datetime.fromisoformat(since).astimezone()
    except ValueError:
        raise ConfigError(
            f'--since "{since}" is not a date: write 2026-03-04 or "2026-03-04 12:00"'
        ) from None

    def matches(*names: Sequence[str]) -> bool:
        return all(_contains(*pair) for pair in zip((model, method, task), names, strict=True))

    chosen = []
    for run in runs:
        early = start is not None and run.started < start
        if early or status not in (None, run.status) or not _contains(experiment, [str(run.path)]):
            continue
        lines = [row for row in run.lines if matches([row.model], [row.label], [row.task])]
        if lines or (not run.lines and matches(run.models, run.methods, run.tasks)):
            chosen.append(replace(run, lines=tuple(lines)))
    return chosen


def _contains(part: str | None, names: Sequence[str]) -> bool:
    return part is None or any(part.lower() in name.lower() for name in names)


# Runs as JSON or CSV.


def _head(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in ("experiment", "time", "status", "kind")}


def to_json(runs: Iterable[Run]) -> str:
    """A JSON list of runs, each with its ``rows``."""
    data = [
        {
            **_head(run),
            **{name: getattr(run, name) for name in ("models", "methods", "sparsities", "tasks")},
            "started": run.started.isoformat(),
            "seconds": run.seconds,
            "path": str(run.path),
            "rows": [line.model_dump() for line in run.lines],
        }
        for run in runs
    ]
    return json.dumps(data, indent=1)


def to_csv(runs: Iterable[Run]) -> str:
    """CSV text with a header and a line per result; unknown values are empty."""
    buffer = io.StringIO()
    run_columns = ("experiment", "time", "status", "kind", "path")
    writer = csv.DictWriter(buffer, [*run_columns, *ResultLine.model_fields], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        for line in run.lines:
            writer.writerow({**_head(run), "path": str(run.path), **line.model_dump()})
    return buffer.getvalue()


# Runs as a table for the terminal.

COLUMNS = (
    Column("run", "run"),
    Column("method", "label"),
    Column("requested", "requested", ".0%", terminal=False),
    Column("achieved", "achieved", ".1%"),
    Column("dense tokens", "dense_share", ".1%"),
    Column("re-masks", "remasks"),
    Column("result", "result", needed=True),
)


def table(runs: Sequence[Run], long: bool = False) -> Table:
    """The table of runs and their results.

    The short table omits dense lines, unless there are no others, and shows only the number of
    results of a run that has more than ``MAX_LISTED``.  With ``long``, every line is shown.
    """
    rows = []
    for run in runs:
        lines = list(run.lines) if long else pruned_lines(run)
        texts = [{**line.model_dump(), "result": result(line)} for line in lines]
        if not texts or (len(texts) > MAX_LISTED and not long):
            texts = [{"label": "", "result": f"{len(run.lines) or 'no'} results"}]
        head = f"{run.experiment} {run.time}\n{run.kind}, {run.status}"
        rows += [{**text, "run": "" if number else head} for number, text in enumerate(texts)]
    return Table("", count(len(runs), "run"), COLUMNS, rows, left=2, nothing="")


def result(line: ResultLine) -> str:
    """A line's task, metric and value as text, or its task and error."""
    kind, _, text = line.task.partition(":")
    name = f"{kind}:{Path(text).name}" if text else kind
    if line.value is None:
        verb = "" if (line.error or "").startswith("disturbed") else " failed"
        return f"{name}{verb}: {line.error}"
    metric = "" if name.startswith(line.metric) else f"{line.metric} "
    return f"{name} {metric}{line.value:.4g}"
