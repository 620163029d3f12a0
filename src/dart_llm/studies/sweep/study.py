"""`sweep` and `compare`: cells in, results out; one loaded model at a time; dry run.

The engine behind ``dart-llm sweep`` and ``dart-llm compare``: cells in, a results folder out.

Finished cells are never computed again.  A cell that fails is recorded, with the sentence that
says why, and the sweep goes on; the same command tries it again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dart_llm.cache import free_bytes
from dart_llm.data import datasets
from dart_llm.data.datasets import MMLU_SUBJECTS
from dart_llm.errors import (
    CellsFailed,
    ConfigError,
    DartError,
    MissingExtra,
    ResultsError,
    UnknownName,
)
from dart_llm.evaluation.task_names import FEWSHOT, split
from dart_llm.evaluation.tasks import check_calibration, check_task
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.comparison import DENSE
from dart_llm.experiments.model_facts import ModelSize, model_size
from dart_llm.experiments.provenance import machine, peak_memory_bytes, versions
from dart_llm.experiments.store import now
from dart_llm.experiments.trackers import open_tracker
from dart_llm.files import finite, size_text, write_text
from dart_llm.reporting.console import Ui
from dart_llm.settings import BaseSettings, from_environment
from dart_llm.studies.sweep.cells import (
    CELLS,
    DONE,
    FAILED,
    MASKS,
    RESULT,
    SAMPLES,
    TIMING,
    SweepFolder,
    adopt,
    finished_before,
    open_sweep,
    read_timing,
)
from dart_llm.studies.sweep.grid import GridSpec, collect, expand

if TYPE_CHECKING:
    from dart_llm.evaluation.measurement import Measurement
    from dart_llm.session.prepare import PreparedMethod


# What a cell costs where nothing was measured yet: items of known tasks, tokens, a model's name.
#
# Only ``--dry-run`` reads these numbers, and it says that they are rough.


ITEMS: Mapping[str, int] = MappingProxyType(
    {
        "boolq": 3270,
        "rte": 277,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "openbookqa": 500,
        "mmlu": 14042,
        "gpqa_main_n_shot": 448,
        "medmcqa": 4183,
        "summarize:xsum": 11334,
        "summarize:cnn_dailymail": 11490,
        "summarize:multi_news": 5622,
        "summarize:gov_report": 973,
    }
)
"""Items of the split that is scored, of the tasks in ``catalogue.py``."""

_OTHER = {"perplexity": 100, "summarize": 100, "lm-eval": 1000}
"""Items of any other task without a limit."""

_TOKENS = 400
"""Tokens of an lm-eval item with its choices."""

_DOCUMENT = 1024
"""Tokens of a document to summarise."""

_DECODED = 8
"""A token that is decoded alone costs as much as so many of a prompt."""


def rough_items(cell: Cell) -> int:
    """Items that the cell measures; a limit holds for every subject of ``mmlu``."""
    known, limit = ITEMS.get(cell.task, _OTHER[split(cell.task)[0]]), cell.options.limit
    if limit is None:
        return known
    limit *= len(MMLU_SUBJECTS) if cell.task == "mmlu" else 1
    return min(limit, known) if cell.task in ITEMS else limit


def rough_tokens(cell: Cell) -> float:
    """Tokens that a cell runs, in units of what a prompt token costs."""
    kind, options, items = split(cell.task)[0], cell.options, rough_items(cell)
    if kind == "perplexity":
        return items * (options.prompt_tokens + options.scored_tokens)
    if kind == "summarize":
        return items * (_DOCUMENT + _DECODED * options.max_output)
    shots = FEWSHOT.get(cell.task, 0) if options.num_fewshot is None else options.num_fewshot
    return items * _TOKENS * (1 + shots)


# The model that a sweep holds from one cell to the next, so that it is loaded once.


_CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype")
"""What ``result.json`` says of the checkpoint: nothing that differs between machines."""


@dataclass
class LoadedModelCache:
    """The newest model of one process's share of a sweep, and the newest candidate made of it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    prepared: str = ""
    candidate: PreparedMethod | None = None
    seconds: float = 0.0
    """What loading took, until ``loading_time`` is asked."""
    broken: dict[str, DartError] = field(default_factory=dict)
    """Models that could not be loaded: not tried again for the next cell."""

    def forget(self) -> None:
        """Drop the model, so that its memory is free; failed models stay known."""
        self.name, self.model, self.tokenizer, self.seconds = "", None, None, 0.0
        self.prepared, self.candidate = "", None
        gc.collect()

    def make(self, cell: Cell, ui: Ui) -> PreparedMethod:
        """The cell's model, pruned as it asks.

        Raises ``DartError`` when it cannot be had, at once when that is known from an earlier cell.
        """
        self._load(cell, ui)
        config = cell.config()
        wanted = json.dumps([config.to_dict(), cell.calibration, cell.inputs.get("calibration")])
        if self.candidate is None or self.prepared != wanted:
            from dart_llm.session.prepare import prepare

            self.candidate = None
            self.candidate = prepare(
                self.model,
                self.tokenizer,
                config,
                calibration=cell.calibration,
                cache_dir=cell.cache_dir,
                say=ui.say,
            )
            self.prepared = wanted
        return self.candidate

    def checkpoint(self) -> dict[str, Any]:
        """What is known of the model's checkpoint, the same on every machine."""
        from dart_llm.models.checkpoint import checkpoint_facts

        facts = checkpoint_facts(self.model)
        return {name: facts.get(name) for name in _CHECKPOINT}

    def loading_time(self) -> float:
        """Seconds that loading took; 0 when they have been told already."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _load(self, cell: Cell, ui: Ui) -> None:
        from dart_llm.models.loading import load

        arguments = cell.load_arguments
        name = json.dumps([arguments, cell.inputs.get("model")])
        if name in self.broken:
            raise self.broken[name]
        if self.name == name:
            return
        self.forget()  # the old model goes before the new one comes
        _free_cuda()
        began = time.perf_counter()
        try:
            with ui.status(f"loading {cell.model}") as news:
                self.model, self.tokenizer = load(**arguments, progress=news)
        except DartError as error:
            self.broken[name] = error
            raise
        self.name, self.seconds = name, time.perf_counter() - began


def _free_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# One cell of a sweep, computed: plain data in, the bytes of its files out.
#
# ``compute`` runs in any process, on any machine.  The model that it is handed is used again, so
# that the cells of one model load it once per worker.  Nothing in ``result.json``,
# ``samples.jsonl`` and ``masks.safetensors`` depends on when or where it ran; times and provenance
# are in ``timing.json``.


def compute(
    data: Mapping[str, Any], held: LoadedModelCache, ui: Ui | None = None
) -> dict[str, bytes]:
    """The files of the cell ``data`` (``Cell.to_dict``), by name.

    ``held``: the model of the cell before; afterwards that of this one.  ``ui``: shows progress.
    An error becomes a failed cell, never an exception; only an interrupt is passed on.
    """
    from dart_llm.reporting.console import Ui

    cell = Cell.from_dict(data)
    began, started = time.perf_counter(), now().isoformat()
    measurement: Measurement | None = None
    try:
        measurement = _measure(cell, held, ui or Ui(quiet=True))
        error = not_finite(measurement)
    except Exception as found:
        error = _sentence(found, cell, held)
    files = document_files(cell, measurement, error, held)
    times = {"started": started, "seconds": time.perf_counter() - began}
    files[TIMING] = _lines([_timing(times, held)])
    return files


def document_files(
    cell: Cell,
    measurement: Measurement | None,
    error: str | None,
    held: LoadedModelCache | None = None,
) -> dict[str, bytes]:
    """The files that do not depend on time or place.  ``held``: what was measured, if anything."""
    candidate = held.candidate if held is not None and measurement is not None else None
    document = {
        "key": cell.key,
        "label": cell.label,
        "status": DONE if error is None else FAILED,
        "error": error,
        "cell": {**cell.to_dict(), "protocol": cell.options.protocol},
        "checkpoint": None if held is None or candidate is None else held.checkpoint(),
        "facts": {} if candidate is None else dict(candidate.facts),
        "measurement": None if measurement is None else measurement.to_dict(),
    }
    files = {RESULT: _lines([document])}
    if measurement is not None:
        from safetensors.torch import save

        from dart_llm.evaluation.masks_seen import tensors

        files[SAMPLES] = _lines(measurement.samples)
        files[MASKS] = save(tensors(measurement.counts))
    return files


def _lines(rows: Any) -> bytes:
    """One JSON document a line; keys sorted, so that equal results are equal bytes."""
    texts = (json.dumps(finite(row), sort_keys=True, allow_nan=False) for row in rows)
    return "".join(f"{text}\n" for text in texts).encode()


def _measure(cell: Cell, held: LoadedModelCache, ui: Ui) -> Measurement:
    import torch

    from dart_llm.evaluation.tasks import count, measure
    from dart_llm.session.prepare import MemoryStore

    candidate = held.make(cell, ui)
    torch.manual_seed(cell.seed)  # whatever ran before in this process
    items = count(cell.task, cell.options, candidate.tokenizer, candidate.model)
    with ui.progress(f"{cell.label} on {cell.short_task}", items) as advance:
        return measure(candidate, cell.task, cell.options, MemoryStore(), advance)


def not_finite(measurement: Measurement) -> str | None:
    """Where a number of a measurement is not finite, as one sentence; None when all are.

    A metric other than the headline one may be None: some have no value on few items.
    """
    for name, value in measurement.metrics.items():
        headline = name == measurement.metric
        if (value is None and headline) or (value is not None and not math.isfinite(value)):
            where = _first_item(measurement)
            return f"{name} of {measurement.task} is not finite{where}; try dtype float32"
    where = _first_item(measurement)
    if where:
        return f"a number of {measurement.task} is not finite{where}; try dtype float32"
    if measurement.metric not in measurement.metrics:
        return f"{measurement.task} gave no {measurement.metric}"
    return None


def _first_item(measurement: Measurement) -> str:
    for item in measurement.items:
        for name, value in item.items():
            values = value if isinstance(value, list | tuple) else (value,)
            if any(isinstance(one, float) and not math.isfinite(one) for one in values):
                return f" (first in item {item.get('id')}, {name})"
    return ""


def _sentence(error: Exception, cell: Cell, held: LoadedModelCache) -> str:
    """What went wrong, for people; with the type of what is no error of ours."""
    from dart_llm.models.devices import memory_failure

    if isinstance(error, DartError):
        return str(error)
    memory = memory_failure(error, cell.model, cell.dtype or "it is stored")
    if memory is not None:
        held.forget()  # the next cell starts with all the memory that there is
        return str(memory)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _timing(times: Mapping[str, Any], held: LoadedModelCache) -> dict[str, Any]:
    device = getattr(held.model, "device", None)
    return {
        **times,
        "finished": now().isoformat(),
        "load_s": held.loading_time(),
        "device": None if device is None else str(device),
        "process": os.getpid(),
        "peak_memory_bytes": peak_memory_bytes(),
        "machine": machine(None if device is None else str(device)),
        "versions": versions(),
    }


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
    sweep = open_sweep(place.root, place.experiment, cells, place.settings, place.fresh)
    held = LoadedModelCache()
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


# What a sweep would do, before it does it: cells, downloads, disk and time (``--dry-run``).


FINISHED, TO_DO = "finished", "to do"

MEASURED, ROUGH = "measured", "rough"

_LOADING = 5.0

_CELL_BYTES = 500_000
"""Results of a cell, when none is known."""


@dataclass(frozen=True)
class PlanRow:
    """One cell.  ``seconds``: what it will take, None when nothing is known; ``basis``: how that
    is known (``measured`` on finished cells, or ``rough``)."""

    key: str
    label: str
    model: str
    task: str
    protocol: str
    seed: int
    status: str
    seconds: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Download:
    """Something that must be fetched; ``size``: bytes, None when it cannot be known."""

    name: str
    size: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """``seconds``: of all cells that are to do, on ``workers`` workers; None when not known."""

    rows: tuple[PlanRow, ...]
    downloads: tuple[Download, ...]
    disk_bytes: int
    free_bytes: int
    seconds: float | None
    rough: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            **asdict(self),
            "rows": [asdict(row) for row in self.rows],
            "downloads": [asdict(download) for download in self.downloads],
        }

    def sentences(self) -> list[str]:
        """The plan's totals, one line each."""
        todo = sum(row.status == TO_DO for row in self.rows)
        lines = [f"{len(self.rows)} cells: {len(self.rows) - todo} finished, {todo} to do"]
        for one in self.downloads:
            size = "size unknown" if one.size is None else size_text(one.size)
            lines.append(f"download: {one.name}, {size}{f' ({one.note})' if one.note else ''}")
        if not self.downloads:
            lines.append("download: nothing")
        disk = f"disk: about {size_text(self.disk_bytes)}; {size_text(self.free_bytes)} are free"
        lines.append(disk)
        how = (
            "a rough guess for this machine as busy as it is"
            if self.rough
            else "from finished cells"
        )
        known = "not known" if self.seconds is None else f"about {duration(self.seconds)}, {how}"
        lines.append(f"time: {known}")
        return lines


@dataclass(frozen=True)
class _Past:
    """A finished cell of an earlier sweep."""

    model: str
    task: str
    method: str
    seconds: float
    items: int


def plan(cells: Sequence[Cell], place: SweepPlace, workers: int = 1) -> Plan:
    """What ``run_sweep`` would do.  Nothing is downloaded, loaded or written.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    experiment = place.root / place.experiment
    done = set[str]()
    if not place.fresh:
        done = {cell.key for cell in cells if finished_before(experiment, cell.key) is not None}
    todo = [cell for cell in cells if cell.key not in done]
    sizes = {cell.model: model_size(cell) for cell in _distinct(todo)}
    history, speed = _history(place.root), flops() if todo else 1.0
    rows = tuple(
        _row(cell, FINISHED) if cell.key in done else _estimated(cell, sizes, history, speed)
        for cell in cells
    )
    downloads = (*_models(sizes), *_data(todo))
    known = [row.seconds for row in rows if row.status == TO_DO]
    total = sum(s for s in known if s is not None) / max(1, min(workers, len(todo)))
    return Plan(
        rows=rows,
        downloads=downloads,
        disk_bytes=sum(d.size or 0 for d in downloads) + _CELL_BYTES * len(todo),
        free_bytes=free_bytes(place.root),
        seconds=None if None in known else total,
        rough=any(row.basis == ROUGH for row in rows),
    )


def plan_table(found: Plan) -> Table:
    """The cells of a plan, for people."""
    table = Table(title="cells", title_justify="left")
    for name in ("model", "task", "protocol", "seed", "method", "status"):
        table.add_column(name)
    table.add_column("time", justify="right")
    for row in found.rows:
        known = "" if row.seconds is None else duration(row.seconds)
        mark = "~ " if row.basis == ROUGH else ""
        model = Path(row.model.rstrip("/")).name
        task = ":".join(Path(part).name for part in row.task.split(":"))
        values = (model, task, row.protocol, str(row.seed), row.label, row.status)
        table.add_row(*values, f"{mark}{known}" if known else "")
    return table


def _row(cell: Cell, status: str, seconds: float | None = None, basis: str = "") -> PlanRow:
    return PlanRow(
        key=cell.key,
        label=cell.label,
        model=cell.model,
        task=cell.task,
        protocol=cell.options.protocol,
        seed=cell.seed,
        status=status,
        seconds=seconds,
        basis=basis,
    )


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """One cell per model."""
    return list({cell.model: cell for cell in reversed(list(cells))}.values())[::-1]


def _estimated(
    cell: Cell, sizes: dict[str, ModelSize], history: Sequence[_Past], speed: float
) -> PlanRow:
    alike = [one for one in history if (one.model, one.task) == (cell.model, cell.task)]
    alike = [one for one in alike if one.method == cell.method] or alike
    if alike:
        each = [one.seconds / one.items for one in alike]
        items = cell.options.limit or max(one.items for one in alike)
        return _row(cell, TO_DO, items * sum(each) / len(each), MEASURED)
    weights = sizes[cell.model].weights
    if weights is None:
        return _row(cell, TO_DO)
    seconds = 2.0 * weights * rough_tokens(cell) / speed + _LOADING
    return _row(cell, TO_DO, seconds, ROUGH)


def flops(seconds: float = 0.2) -> float:
    """Floating-point operations per second of a matrix product here, measured for ``seconds``."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 512 if device == "cpu" else 4096
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    began, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not products:
        float((matrix @ matrix)[0, 0])  # reading a number waits for the device
        products += 1
    return 2.0 * size**3 * products / spent


def _history(root: Path) -> list[_Past]:
    """Finished cells under all experiments of the results root."""
    found = []
    for path in sorted(root.glob(f"*/*/{CELLS}/*/{RESULT}")):
        times = read_timing(path.parent)
        seconds = (times.get("seconds") or 0.0) - (times.get("load_s") or 0.0)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            cell, items = document["cell"], len(document["measurement"]["items"])
            known = (cell["model"], cell["task"], cell["method"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if seconds > 0 and items and document.get("status") == "done":
            found.append(_Past(*known, seconds=seconds, items=items))
    return found


def _models(sizes: dict[str, ModelSize]) -> list[Download]:
    found = []
    for name, size in sizes.items():
        if size.download is None:
            why = "the hub cannot be asked, and the cache has none"
            if size.weights is None:
                found.append(Download(name, None, why))
            else:
                found.append(Download(name, 2 * size.weights, f"by its name: {why}"))
        elif size.download:
            found.append(Download(name, size.download))
    return found


def _data(cells: Iterable[Cell]) -> list[Download]:
    """Data sets of the hub that the tasks read and that are not in its cache."""
    wanted: dict[tuple[str, str | None], datasets.DataSet] = {}
    for cell in cells:
        kind, name = split(cell.task)
        for one in datasets.DATA_SETS.values():
            asked = name in one.tasks if kind == "lm-eval" else (one.name == name)
            if asked and (kind == "lm-eval" or kind in one.uses) and not Path(name).exists():
                wanted[one.hub_id, one.config] = one
    found = []
    for one in wanted.values():
        if not _has_data(one.hub_id):
            size = None if one.megabytes is None else one.megabytes * 10**6
            found.append(Download(f"data set {one.where}", size))
    return found


def _has_data(hub_id: str) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"
    return folder.is_dir()


# ``dart-llm sweep`` and ``dart-llm compare``: a grid of cells, and what is made of its results.


_SHARED = {"model": "models", **{n: n for n in ("cache_dir", "device", "dtype", "device_map")}}
"""``DART_*`` variables that a sweep takes, and what they are called there."""


@dataclass(frozen=True)
class SweepRequest:
    """One call: ``kind`` is ``sweep`` or ``compare``."""

    kind: str
    grid: GridSpec
    root: Path
    experiment: str
    fresh: bool = False
    engine: str = "local"
    workers: int | None = None
    tracker: str | None = None

    @property
    def place(self) -> SweepPlace:
        return SweepPlace(self.root, self.experiment, {"kind": self.kind}, self.fresh)


def grid(
    flags: Mapping[str, Any], file: Path | None, defaults: Mapping[str, Any], first: Path | None
) -> GridSpec:
    """The grid: defaults < file < ``DART_*`` < flags.  ``first``: the file given by position."""
    variables = from_environment(BaseSettings, os.environ)
    known = {_SHARED[name]: value for name, value in variables.items() if name in _SHARED}
    path = first or file
    base = collect({}, path).model_dump(exclude_unset=True) if path else {}
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("options", "overrides"):
        given[name] = {**base.get(name, {}), **given.get(name, {})}
    merged = {**defaults, **base, **known, **given}
    if merged.get("layers") and "sparsities" not in {**base, **given}:
        merged.pop("sparsities", None)  # layers set the counts: the default would contradict them
    return collect(merged)


def _cells(request: SweepRequest) -> tuple[Cell, ...]:
    """The cells; raises ``ConfigError`` when one would be measured on its calibration text."""
    grid = request.grid
    if request.kind == "compare" and DENSE not in grid.methods:  # what it compares against
        grid = grid.model_copy(update={"methods": (DENSE, *grid.methods)})
    cells = expand(grid)
    with contextlib.suppress(MissingExtra):  # a cluster may have lm-eval where this machine has not
        for task, options in dict.fromkeys((cell.task, cell.options) for cell in cells):
            check_task(task, options)
    for cell in cells:
        check_calibration(cell.config(), cell.calibration, [cell.task], cell.options)
    return cells


def run(request: SweepRequest, ui: Ui) -> dict[str, Any]:
    """Compute what is missing and write tables, plots and the report; returns the document.

    Raises ``CellsFailed`` after everything is written when a cell failed.
    """
    cells = _cells(request)
    config = request.grid.model_dump(mode="json")
    name = f"{request.experiment}"
    documents: list[dict[str, Any]] = []
    with open_tracker(request.tracker, "dart-llm", name, config, request.root) as tracker:
        if tracker.where:
            ui.say(tracker.where)

        def track(row: Mapping[str, Any]) -> None:
            if row.get("measurement"):
                tracker.log_measurement(row["measurement"], str(row.get("label")))

        result = run_sweep(
            cells,
            request.place,
            ui,
            request.engine,
            request.workers,
            track,
            on_end=lambda result: documents.append(_write_comparison(result, ui)),
        )
    document = {"folder": str(result.path), "computed": result.computed, **documents[0]}
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
    from dart_llm.experiments import comparison, comparison_report

    try:
        rows = comparison.rows(result.results)
        comparison_report.write_all(result.path, rows)
        for table in comparison_report.rich_tables(rows):
            ui.table(table)
        ui.say(comparison_report.summary(rows))
        _write_pictures(result.path, rows, ui)
        ui.say(f"report: {comparison_report.write(result.path, rows)}")
        return comparison_report.document(rows)
    except MissingExtra as error:
        ui.say(f"no tables of comparison: {error}")
        return {"cells": list(result.results)}


def _write_pictures(folder: Path, rows: Any, ui: Ui) -> None:
    from dart_llm.experiments import comparison_plots
    from dart_llm.reporting import figures

    try:
        figures.save(
            folder, [*comparison_plots.make_comparison(rows), *comparison_plots.make_layers(rows)]
        )
    except MissingExtra as error:
        ui.say(f"no plots: {error}")


def dry_run(request: SweepRequest, ui: Ui) -> Plan:
    """Say what ``run`` would do; nothing is loaded or written."""
    found = plan(_cells(request), request.place, request.workers or 1)
    ui.result(plan_table(found))
    for sentence in found.sentences():
        ui.result(sentence)
    return found
