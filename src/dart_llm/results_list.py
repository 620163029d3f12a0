"""All runs in a folder: find them and choose among them.  ``results_tables`` shows them."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dart_llm.compare_row import Row
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.results_info import STAMP, STATUSES, RunInfo, read_info, seconds_of
from dart_llm.results_rows import read_json
from dart_llm.results_view import mapping
from dart_llm.trackers import TRACKERS

_DEEPEST = 4
"""Folders below the root; the name of an experiment may hold slashes."""


def find(root: Path | str) -> list[RunInfo]:
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
    runs: Iterable[RunInfo],
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    status: str | None = None,
    experiment: str | None = None,
    since: str | None = None,
) -> list[RunInfo]:
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
