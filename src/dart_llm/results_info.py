"""One run's folder in a few facts, for lists of runs; what is damaged is said, never raised."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dart_llm.compare_row import Row
from dart_llm.folder_lock import is_taken
from dart_llm.results_rows import read_json, read_rows
from dart_llm.results_view import mapping, number

STATUSES = ("complete", "running", "stopped", "interrupted", "failed", "unknown")
"""Of config.json, and two more: ``stopped``, a run that says ``running`` while no process of this
machine is writing it, and ``unknown``."""

STAMP = re.compile(r"(\d{8}-\d{6})(-\d+)?")
"""Name of a run's folder."""


@dataclass(frozen=True)
class RunInfo:
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


def read_info(folder: Path, root: Path) -> RunInfo:
    """The facts of one folder; ``root``: where the list was asked for."""
    place = folder.resolve()
    base = root.resolve()
    experiment = place.parent.name
    if base in place.parent.parents:
        experiment = place.parent.relative_to(base).as_posix()
    name = RunInfo(folder, experiment, place.name, _stamp(place.name), "unknown", "run")
    try:
        return _read(name)
    except Exception as error:  # a listing shows the other runs, whatever is in this folder
        return replace(name, problems=(f"cannot be read ({type(error).__name__}: {error})",))


def _read(run: RunInfo) -> RunInfo:
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
