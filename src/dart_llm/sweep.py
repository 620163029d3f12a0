"""The engine behind ``dart-llm sweep`` and ``dart-llm compare``: cells in, a results folder out.

Finished cells are never computed again.  A cell that fails is recorded, with the sentence that
says why, and the sweep goes on; the same command tries it again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm import sweep_cell
from dart_llm.cell import Cell
from dart_llm.errors import ConfigError, ResultsError, UnknownName
from dart_llm.results import now, write_text
from dart_llm.sweep_cell import DONE
from dart_llm.sweep_files import SweepFolder, adopt, open_sweep, read_results, read_timing
from dart_llm.sweep_model import HeldModel
from dart_llm.ui import Ui

__all__ = ["ENGINES", "SweepPlace", "SweepResult", "read_results", "run_sweep"]

ENGINES = ("local", "ray")

Compute = Callable[..., dict[str, bytes]]
"""``sweep_cell.compute``, or what a test puts in its place."""


@dataclass(frozen=True)
class SweepPlace:
    """Where a sweep's folder lies: ``<root>/<experiment>/<time>/``.

    ``settings``: further facts that make two sweeps the same, kept in ``config.json``.  ``fresh``:
    a new folder, with every cell computed anew.
    """

    root: Path
    experiment: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True)
class SweepResult:
    """A sweep that ran to its end.  ``results``: one document per cell, in table order."""

    path: Path
    results: tuple[dict[str, Any], ...]
    computed: int
    seconds: float

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """The documents of the cells that failed; ``error`` says why."""
        return tuple(row for row in self.results if row["status"] != DONE)


def run_sweep(
    cells: Sequence[Cell],
    place: SweepPlace,
    ui: Ui,
    engine: str = "local",
    workers: int | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
    compute: Compute = sweep_cell.compute,
    on_end: Callable[[SweepResult], None] = lambda result: None,
) -> SweepResult:
    """Compute the cells that have no result yet, and write the folder's tables.

    ``workers``: processes of the ray engine; None lets it choose.  ``on_cell`` gets every
    document as it is computed; the folder's tables hold it by then.  ``on_end`` gets the result and
    may write further files; the folder is finished after it alone, and what it raises leaves one
    that the same cells resume.  An interruption keeps what was computed and is raised again.
    Raises ``ConfigError`` for no cells or an unknown engine, ``MissingExtra`` when ray is not
    installed, ``ResultsError`` when the folder cannot be written.
    """
    if not cells:
        raise ConfigError("the sweep has no cells: name at least one model, method and task")
    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers} must be 1 or more")
    began = time.perf_counter()
    sweep = open_sweep(place.root, place.experiment, cells, place.settings, place.fresh)
    held = HeldModel()
    try:
        sweep.write_config("running", engine)
        _greet(sweep, ui, place.fresh)
        todo = execution_order(sweep.todo)
        sweep.write_tables()
        with contextlib.closing(_results(todo, held, ui, engine, workers, compute)) as results:
            _collect(sweep, results, todo, ui, on_cell)
        seconds = time.perf_counter() - began
        result = SweepResult(sweep.path, tuple(sweep.rows()), len(todo), seconds)
        _write_all(sweep, ui, engine, seconds)
        on_end(result)
        _write_log(sweep, ui)
        status = "failed" if result.failed else "complete"
        sweep.write_config(status, engine, _device(sweep))  # the last file: nothing is missing
    except BaseException as error:
        _keep(sweep, ui, engine, error, time.perf_counter() - began)
        raise
    finally:
        held.forget()
        sweep.folder.release()
    return result


def execution_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells so that a model is loaded, and a method prepared, once: by model, then by method."""

    def places(key: Callable[[Cell], str]) -> dict[str, int]:
        return {name: place for place, name in enumerate(dict.fromkeys(map(key, cells)))}

    def model(cell: Cell) -> str:
        return repr(cell.load_arguments)

    def way(cell: Cell) -> str:
        return f"{model(cell)} {cell.label} {cell.seed}"

    models, ways = places(model), places(way)
    return sorted(cells, key=lambda cell: (models[model(cell)], ways[way(cell)]))


def _greet(sweep: SweepFolder, ui: Ui, fresh: bool) -> None:
    total = len(sweep.cells)
    if sweep.folder.resumed:
        ui.say(f"resuming {sweep.path}: {total - len(sweep.todo)} of {total} cells are finished")
        return
    if sweep.folder.note:
        ui.say(sweep.folder.note)
    taken = 0 if fresh else adopt(sweep)
    if taken:
        ui.say(f"{taken} of {total} cells are finished in earlier sweeps of {sweep.path.parent}")


def _results(
    todo: Sequence[Cell],
    held: HeldModel,
    ui: Ui,
    engine: str,
    workers: int | None,
    compute: Compute,
) -> Generator[tuple[Cell, dict[str, bytes]]]:
    """Cells with their files, as they finish; those of this process use ``held``."""
    if engine == "ray" and todo:
        from dart_llm import engine_ray

        yield from engine_ray.results(todo, compute, workers, ui.say)
        return
    for cell in todo:
        yield cell, compute(cell.to_dict(), held, ui)


def _collect(
    sweep: SweepFolder,
    results: Iterator[tuple[Cell, dict[str, bytes]]],
    todo: Sequence[Cell],
    ui: Ui,
    on_cell: Callable[[dict[str, Any]], None] | None,
) -> None:
    clock, said = Clock(todo), set[str]()
    for cell, files in results:
        document = sweep.save(cell, files)
        clock.finished(cell)
        seconds = read_timing(sweep.path / "cells" / cell.key).get("seconds") or 0.0
        done = f"{clock.done}/{len(todo)} {cell.label} on {cell.short_task}"
        if document["status"] == DONE:
            ui.say(f"{done}: {headline(document)}, {duration(seconds)}{clock.left_text()}")
        else:
            error = str(document["error"])
            why = "failed for the same reason" if error in said else f"failed: {error}"
            said.add(error)
            ui.say(f"{done}: {why}{clock.left_text()}")
        if on_cell is not None:
            on_cell(document)


def headline(document: Mapping[str, Any]) -> str:
    """The first metric of a finished cell, as text."""
    measured = document["measurement"]
    value = measured["metrics"][measured["metric"]]
    return f"{measured['metric']} {value:.4g}"


class Clock:
    """Estimates the time left: cells of one model and kind of task take about equally long."""

    def __init__(self, todo: Sequence[Cell]) -> None:
        self.left = list(todo)
        self.done = 0
        self._began = time.perf_counter()
        self._spent: dict[tuple[str, str], list[float]] = {}
        self._last = self._began

    def finished(self, cell: Cell) -> None:
        """One more cell is there; the time since the last one was its share."""
        now = time.perf_counter()
        self._spent.setdefault(kind(cell), []).append(now - self._last)
        self._last = now
        self.done += 1
        self.left.remove(cell)

    def seconds_left(self) -> float | None:
        """None while nothing is known."""
        every = [seconds for known in self._spent.values() for seconds in known]
        if not every:
            return None
        mean = sum(every) / len(every)
        means = {name: sum(known) / len(known) for name, known in self._spent.items()}
        return sum(means.get(kind(cell), mean) for cell in self.left)

    def left_text(self) -> str:
        left = self.seconds_left()
        return "" if left is None or not self.left else f"; about {duration(left)} left"


def kind(cell: Cell) -> tuple[str, str]:
    """What decides how long a cell takes, roughly."""
    return cell.model, cell.task


def duration(seconds: float) -> str:
    """For people: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 10 min``, ``5 days``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 72 * 60:
        return f"{minutes / 60 / 24:,.0f} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _write_all(sweep: SweepFolder, ui: Ui, engine: str, seconds: float) -> None:
    """What is made of all cells, and ``config.json`` with what a page says of device and time."""
    sweep.finished = now().isoformat()
    sweep.write_tables()
    sweep.write_masks()
    sweep.write_timing(seconds)
    failed = [row for row in sweep.rows() if row["status"] != DONE]
    if failed:
        ui.say(
            f"{len(failed)} of {len(sweep.cells)} cells failed; the same command tries them again"
        )
    ui.say(f"results: {sweep.path}")
    sweep.write_config("running", engine, _device(sweep))


def _keep(sweep: SweepFolder, ui: Ui, engine: str, error: BaseException, seconds: float) -> None:
    """Leave what there is in order; a disk that is full must not hide the first error."""
    stopped = isinstance(error, KeyboardInterrupt | GeneratorExit)
    with contextlib.suppress(ResultsError):
        sweep.write_tables()
        sweep.write_masks()
        sweep.write_timing(seconds)
        _write_log(sweep, ui)
    with contextlib.suppress(ResultsError):
        sweep.write_config("interrupted" if stopped else "failed", engine)


def _write_log(sweep: SweepFolder, ui: Ui) -> None:
    write_text(sweep.path / f"output_{sweep.folder.stamp}.log", "\n".join(ui.log) + "\n")


def _device(sweep: SweepFolder) -> str | None:
    """The device of the first cell that says it."""
    for cell in sweep.cells:
        device = read_timing(sweep.path / "cells" / cell.key).get("device")
        if device:
            return str(device)
    return None
