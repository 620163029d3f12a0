"""``sweep`` and ``compare``: cells in, a results folder out, and what is made of its results.

Finished cells are never computed again.  A cell that fails is recorded, with the sentence that
says why, and the sweep goes on; the same command tries it again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import CellsFailed, ConfigError, MissingExtra, ResultsError, UnknownName
from dart_llm.evaluation.tasks import check_calibration, check_task
from dart_llm.experiments import comparison, comparison_plots, comparison_report
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.store import now
from dart_llm.experiments.trackers import open_tracker
from dart_llm.files import write_text
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge, read_file
from dart_llm.studies.sweep.cells import (
    CELLS,
    DONE,
    SweepFolder,
    SweepPlace,
    adopt,
    open_sweep,
    read_timing,
)
from dart_llm.studies.sweep.compute import LoadedModelCache, compute
from dart_llm.studies.sweep.grid import SINGULAR, GridSpec, collect, expand
from dart_llm.studies.sweep.plan import Plan, plan
from dart_llm.studies.sweep.settings import SweepFlags

ENGINES = ("local", "ray")

Compute = Callable[..., dict[str, bytes]]
"""``compute.compute``, or what a test puts in its place."""


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
    on_cell: Callable[[dict[str, Any]], None] = lambda document: None,
    compute: Compute = compute,
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
    sweep = open_sweep(place, cells)
    held = LoadedModelCache()
    try:
        sweep.write_config("running", engine)
        _greet(sweep, ui, place.fresh)
        todo = execution_order(sweep.todo)
        sweep.write_tables()
        with contextlib.closing(_results(todo, held, ui, engine, workers, compute)) as results:
            _collect(sweep, results, len(todo), ui, on_cell)
        seconds = time.perf_counter() - began
        result = SweepResult(sweep.path, tuple(sweep.rows()), len(todo), seconds)
        _write_all(sweep, seconds)
        if result.failed:
            failed = f"{len(result.failed)} of {len(cells)} cells failed"
            ui.say(f"{failed}; the same command tries them again")
        ui.say(f"results: {sweep.path}")
        sweep.finished = now().isoformat()
        sweep.write_config("running", engine)  # a page tells of device and time
        on_end(result)
        _write_log(sweep, ui)
        sweep.write_config("failed" if result.failed else "complete", engine)  # the last file
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | GeneratorExit)
        with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
            _write_all(sweep, time.perf_counter() - began)
            _write_log(sweep, ui)
        with contextlib.suppress(ResultsError):
            sweep.write_config("interrupted" if stopped else "failed", engine)
        raise
    finally:
        held.forget()
        sweep.folder.release()
    return result


def execution_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells so that a model is loaded, and a method prepared, once: by model, then by method."""

    def model(cell: Cell) -> str:
        return repr(cell.load_arguments)

    def preparation(cell: Cell) -> str:
        return f"{model(cell)} {cell.label} {cell.seed}"

    models = {name: place for place, name in enumerate(dict.fromkeys(map(model, cells)))}
    order = {name: place for place, name in enumerate(dict.fromkeys(map(preparation, cells)))}
    return sorted(cells, key=lambda cell: (models[model(cell)], order[preparation(cell)]))


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
    held: LoadedModelCache,
    ui: Ui,
    engine: str,
    workers: int | None,
    compute: Compute,
) -> Generator[tuple[Cell, dict[str, bytes]]]:
    """Cells with their files, as they finish; those of this process use ``held``."""
    if engine == "ray" and todo:
        from dart_llm.studies.sweep import ray_backend

        yield from ray_backend.results(todo, compute, workers, ui.say)
        return
    for cell in todo:
        yield cell, compute(cell.to_dict(), held, ui)


def _collect(
    sweep: SweepFolder,
    results: Iterator[tuple[Cell, dict[str, bytes]]],
    total: int,
    ui: Ui,
    on_cell: Callable[[dict[str, Any]], None],
) -> None:
    """Keep each cell as it comes, and say what it measured and how long the others will take."""
    said = set[str]()
    began = time.perf_counter()
    for done, (cell, files) in enumerate(results, 1):
        document = sweep.save(cell, files)
        if document["status"] == DONE:
            seconds = read_timing(sweep.path / CELLS / cell.key).get("seconds") or 0.0
            measured = document["measurement"]
            value = measured["metrics"][measured["metric"]]
            told = f"{measured['metric']} {value:.4g}, {duration(seconds)}"
        else:
            error = str(document["error"])
            told = "failed for the same reason" if error in said else f"failed: {error}"
            said.add(error)
        left = (time.perf_counter() - began) / done * (total - done)
        rest = f"; about {duration(left)} left" if done < total else ""
        ui.say(f"{done}/{total} {cell.label} on {cell.short_task}: {told}{rest}")
        on_cell(document)


def duration(seconds: float) -> str:
    """For people: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 10 min``, ``5 days``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 72 * 60:
        return f"{minutes / 60 / 24:,.0f} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _write_all(sweep: SweepFolder, seconds: float) -> None:
    """What is made of all cells."""
    sweep.write_tables()
    sweep.write_masks()
    sweep.write_timing(seconds)


def _write_log(sweep: SweepFolder, ui: Ui) -> None:
    write_text(sweep.path / f"output_{sweep.folder.stamp}.log", "\n".join(ui.log) + "\n")


# ``dart-llm sweep`` and ``dart-llm compare``: a grid of cells, and what is made of its results.


@dataclass(frozen=True)
class SweepRequest:
    """One call: ``kind`` is ``sweep`` or ``compare``."""

    kind: str
    grid: GridSpec
    flags: SweepFlags
    place: SweepPlace

    @classmethod
    def collect(
        cls,
        kind: str,
        flags: Mapping[str, Any],
        file: Path | None = None,
        defaults: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> SweepRequest:
        """The call: defaults < YAML file < ``DART_*`` < flags; None: not given.

        The variable of a list goes by either name, ``DART_MODELS`` or ``DART_MODEL``.
        """
        plural = {
            f"DART_{name.upper()}": os.environ.get(f"DART_{single.upper()}", "")
            for name, single in SINGULAR.items()
        }
        given = merge(SweepFlags, flags, environment={**plural, **os.environ})
        in_file = read_file(file) if file else {}
        experiment = given.experiment_name or (file.stem if file else kind)
        place = SweepPlace(Path(given.results_dir), experiment, {"kind": kind}, fresh)
        return cls(kind, collect(in_file, given.grid_flags(), defaults=defaults), given, place)

    def cells(self) -> tuple[Cell, ...]:
        """Raises ``ConfigError`` when one would be measured on its calibration text."""
        grid, dense = self.grid, comparison.DENSE
        if self.kind == "compare" and dense not in grid.methods:  # what it compares against
            grid = grid.model_copy(update={"methods": (dense, *grid.methods)})
        cells = expand(grid)
        with contextlib.suppress(MissingExtra):  # a cluster may have lm-eval where this has not
            for task, options in dict.fromkeys((cell.task, cell.options) for cell in cells):
                check_task(task, options)
        for cell in cells:
            check_calibration(cell.config(), cell.calibration, [cell.task], cell.options)
        return cells


def run(request: SweepRequest, ui: Ui) -> dict[str, Any]:
    """Compute what is missing and write tables, plots and the report; returns the document.

    Raises ``CellsFailed`` after everything is written when a cell failed.
    """
    cells, flags, place = request.cells(), request.flags, request.place
    config = request.grid.model_dump(mode="json")
    document: dict[str, Any] = {}
    with open_tracker(flags.tracker, "dart-llm", place.experiment, config, place.root) as tracker:
        if tracker.where:
            ui.say(tracker.where)

        def track(row: Mapping[str, Any]) -> None:
            if row.get("measurement"):
                tracker.log_measurement(row["measurement"], str(row.get("label")))

        result = run_sweep(
            cells,
            place,
            ui,
            flags.engine,
            flags.workers,
            track,
            on_end=lambda result: document.update(_write_comparison(result, ui)),
        )
    document = {"folder": str(result.path), "computed": result.computed, **document}
    if result.failed:
        first = result.failed[0]
        raise CellsFailed(
            f"{len(result.failed)} of {len(result.results)} cells failed, the others are kept in "
            f"{result.path}; the first, {first['key']}: {first.get('error')}",
            document,
        )
    return document


def _write_comparison(result: SweepResult, ui: Ui) -> dict[str, Any]:
    """Tables, plots and the report of all cells; the comparison as data."""
    rows = comparison.rows(result.results)
    comparison_report.write_all(result.path, rows)
    for table in comparison_report.tables(rows):
        ui.table(table.rich())
    ui.say(comparison_report.summary(rows))
    try:
        figures.save(result.path, comparison_plots.make(rows))
    except MissingExtra as error:
        ui.say(f"no plots: {error}")
    ui.say(f"report: {comparison_report.write(result.path, rows)}")
    return comparison_report.document(rows)


def dry_run(request: SweepRequest, ui: Ui) -> Plan:
    """Say what ``run`` would do; nothing is loaded or written."""
    found = plan(request.cells(), request.place)
    ui.result(found.table())
    for sentence in found.sentences():
        ui.result(sentence)
    return found
