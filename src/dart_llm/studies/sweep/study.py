"""``sweep`` and ``compare``: cells in, a results folder out, and what is made of its results.

Finished cells are never computed again.  A cell that fails is recorded, with the sentence that
says why, and the sweep goes on; the same command tries it again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm.cache import free_bytes
from dart_llm.data import datasets
from dart_llm.errors import (
    CellsFailed,
    ConfigError,
    MissingExtra,
    ResultsError,
    check_name,
)
from dart_llm.evaluation.tasks import check_calibration, check_task, split
from dart_llm.experiments import comparison, comparison_plots, comparison_report
from dart_llm.experiments.cell import Cell, short_task
from dart_llm.experiments.model_facts import download_size
from dart_llm.experiments.store import now
from dart_llm.experiments.trackers import open_tracker
from dart_llm.files import size_text
from dart_llm.reporting import figures
from dart_llm.reporting.console import Ui
from dart_llm.reporting.heartbeat import Pace
from dart_llm.reporting.words import count, duration
from dart_llm.settings import merge, read_file
from dart_llm.studies.sweep.cells import (
    CELLS,
    DONE,
    SweepFolder,
    SweepPlace,
    adopt,
    finished_before,
    open_sweep,
    read_timing,
)
from dart_llm.studies.sweep.compute import LoadedModelCache, compute
from dart_llm.studies.sweep.grid import SINGULAR, GridSpec, SweepFlags, collect, expand

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
    check_name("engine", engine, ENGINES)
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
        with (
            ui.working(f"{count(len(todo), 'cell')} to compute"),
            contextlib.closing(_results(todo, held, ui, engine, workers, compute)) as results,
        ):
            _collect(sweep, results, len(todo), ui, on_cell)
        seconds = time.perf_counter() - began
        result = SweepResult(sweep.path, tuple(sweep.rows()), len(todo), seconds)
        sweep.write_all(seconds)
        if result.failed:
            failed = f"{len(result.failed)} of {len(cells)} cells failed"
            ui.say(f"{failed}; the same command tries them again")
        ui.say(f"results: {sweep.path}")
        sweep.finished = now().isoformat()
        sweep.write_config("running", engine)  # a page tells of device and time
        with ui.working("tables and figures"):
            on_end(result)
        sweep.write_log(ui.log)
        sweep.write_config("failed" if result.failed else "complete", engine)  # the last file
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | GeneratorExit)
        with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
            sweep.write_all(time.perf_counter() - began)
            sweep.write_log(ui.log)
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
    for number, cell in enumerate(todo, 1):
        with ui.working(f"{cell.label} on {cell.short_task}", number, len(todo)):
            files = compute(cell.to_dict(), held, ui)
        yield cell, files


def _collect(
    sweep: SweepFolder,
    results: Iterator[tuple[Cell, dict[str, bytes]]],
    total: int,
    ui: Ui,
    on_cell: Callable[[dict[str, Any]], None],
) -> None:
    """Keep each cell as it comes, and say what it measured and how long the others will take."""
    said = set[str]()
    pace = Pace(total)
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
        pace.advance(1)
        left = pace.left()
        rest = f"; about {duration(left)} left" if left else ""
        ui.say(f"{done}/{total} {cell.label} on {cell.short_task}: {told}{rest}")
        on_cell(document)


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
    for note in request.grid.notes:
        ui.say(note)
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
            on_end=lambda result: document.update(_write_comparison(result, ui, flags.style)),
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


def _write_comparison(result: SweepResult, ui: Ui, style: str) -> dict[str, Any]:
    """Tables, plots and the report of all cells; the comparison as data."""
    rows = comparison.rows(result.results)
    comparison_report.write_all(result.path, rows)
    for table in comparison_report.tables(rows):
        ui.table(table.rich())
    ui.say(comparison_report.summary(rows))
    try:
        figures.save(result.path, comparison_plots.make(rows), style)
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


# What a sweep would do, before it does it: cells, downloads and disk (``--dry-run``).


FINISHED, TO_DO = "finished", "to do"

CELL_BYTES = 500_000
"""What the results of a cell take on the disk, about."""


@dataclass(frozen=True)
class PlanRow:
    """One cell."""

    key: str
    label: str
    model: str
    task: str
    protocol: str
    seed: int
    status: str


@dataclass(frozen=True)
class Download:
    """Something that must be fetched; ``size``: bytes, None when it cannot be known."""

    name: str
    size: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    rows: tuple[PlanRow, ...]
    downloads: tuple[Download, ...]
    disk_bytes: int
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The plan's totals, one line each."""
        todo = sum(row.status == TO_DO for row in self.rows)
        lines = [f"{len(self.rows)} cells: {len(self.rows) - todo} finished, {todo} to do"]
        for download in self.downloads:
            size = "size unknown" if download.size is None else size_text(download.size)
            note = f" ({download.note})" if download.note else ""
            lines.append(f"download: {download.name}, {size}{note}")
        if not self.downloads:
            lines.append("download: nothing")
        disk, free = size_text(self.disk_bytes), size_text(self.free_bytes)
        return [*lines, f"disk: about {disk}; {free} are free"]

    def table(self) -> Table:
        """The cells, for people."""
        table = Table(title="cells", title_justify="left")
        for name in ("model", "task", "protocol", "seed", "method", "status"):
            table.add_column(name)
        for row in self.rows:
            model = Path(row.model.rstrip("/")).name
            task = short_task(row.task)
            table.add_row(model, task, row.protocol, str(row.seed), row.label, row.status)
        return table


def plan(cells: Sequence[Cell], place: SweepPlace) -> Plan:
    """What ``run_sweep`` would do.  Nothing is downloaded, loaded or written.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    experiment = place.root / place.experiment
    done = set[str]()
    if not place.fresh:
        done = {cell.key for cell in cells if finished_before(experiment, cell.key) is not None}
    todo = [cell for cell in cells if cell.key not in done]
    downloads = (*_models(todo), *_data(todo))
    return Plan(
        rows=tuple(
            PlanRow(
                cell.key,
                cell.label,
                cell.model,
                cell.task,
                cell.options.protocol,
                cell.seed,
                FINISHED if cell.key in done else TO_DO,
            )
            for cell in cells
        ),
        downloads=downloads,
        disk_bytes=sum(d.size or 0 for d in downloads) + CELL_BYTES * len(todo),
        free_bytes=free_bytes(place.root),
    )


def _models(cells: Iterable[Cell]) -> list[Download]:
    """Models that are not on this machine."""
    downloads = []
    for model, cell in {cell.model: cell for cell in cells}.items():
        size = download_size(cell)
        note = "the hub cannot be asked, and the cache has none" if size is None else ""
        if size != 0:
            downloads.append(Download(model, size, note))
    return downloads


def _data(cells: Iterable[Cell]) -> list[Download]:
    """Data sets of the hub that the tasks read and that are not in its cache."""
    from huggingface_hub import constants

    wanted: dict[tuple[str, str | None], datasets.DataSet] = {}
    for cell in cells:
        kind, name = split(cell.task)
        for source in datasets.DATA_SETS.values():
            asked = name in source.tasks if kind == "lm-eval" else source.name == name
            if asked and (kind == "lm-eval" or kind in source.uses) and not Path(name).exists():
                wanted[source.hub_id, source.config] = source
    cache = Path(constants.HF_HUB_CACHE)
    return [
        Download(f"data set {source.where}", source.megabytes and source.megabytes * 10**6)
        for source in wanted.values()
        if not (cache / f"datasets--{source.hub_id.replace('/', '--')}").is_dir()
    ]
