"""``eval``, ``perplexity``, ``summarize``, ``compare`` and ``sweep``: measure the cells of a grid.

A cell is a model, pruned in one way and measured on one task.  Finished cells are never computed
again.  In a grid, a cell that fails is recorded with its error message and the other cells are
computed; the same command tries the failed cell again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dart_llm.errors import DartError
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import versions
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit, announce_model
from dart_llm.experiments.trackers import tracked
from dart_llm.files import finite, read_json, write_json, write_lines, write_text
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import duration
from dart_llm.studies.sweep.grid import cells_of, execution_order, show_plan
from dart_llm.studies.sweep.settings import MeasureSettings, SweepSettings

if TYPE_CHECKING:
    from dart_llm.evaluation.measurement import Measurement
    from dart_llm.evaluation.parts import UnitStore
    from dart_llm.session.run import BoundMethod

DONE, FAILED = "done", "failed"

CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype", "weights")
"""Keys of the checkpoint metadata in a result; their values are equal on all machines."""

Value = dict[str, Any]
"""The result of a cell: ``document`` (a line of results.jsonl), ``samples`` and ``times``."""

# A cell can be computed in any process on any machine: it is plain data, and so is its value.  Only
# ``times`` in a value depends on when and where it was computed.


@dataclass
class LoadedModelCache:
    """The last model that a process loaded, and the last method prepared on it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    prepared: str = ""
    candidate: BoundMethod | None = None
    loads: int = 0
    """The number of models loaded so far."""
    broken: dict[str, DartError] = field(default_factory=dict)
    """Errors of models that could not be loaded, by name; these models are not tried again."""

    def forget(self) -> None:
        """Drop the model to free its memory, but remember models that failed to load."""
        self.name, self.model, self.tokenizer = "", None, None
        self.prepared, self.candidate = "", None
        gc.collect()

    def prepare(self, cell: Cell, ui: Ui) -> BoundMethod:
        """The cell's method, bound to its model (loaded if needed); raises ``DartError``."""
        from dart_llm.experiments.artifacts import check_masks, read_masks
        from dart_llm.models.describe import widths
        from dart_llm.session.run import other_model, prepare

        self._load(cell, ui)
        config = cell.config()
        files = [cell.inputs.get(name) for name in ("calibration", "setting", "masks")]
        wanted = json.dumps([config.to_dict(), cell.label, cell.calibration, cell.masks, files])
        if self.candidate is None or self.prepared != wanted:
            self.candidate, masks = None, None
            if cell.masks:
                check_masks(cell.masks, widths(self.model))
                masks = read_masks(cell.masks)
            where = (cell.calibration, cell.cache_dir, ui.say)
            self.candidate = prepare(self.model, self.tokenizer, config, *where, masks=masks)
            self.prepared = wanted
            if note := other_model(cell.method, self.model):
                ui.say(note)
        return self.candidate

    def _load(self, cell: Cell, ui: Ui) -> None:
        import torch

        from dart_llm.models import loading

        name = json.dumps([cell.load_arguments, cell.inputs.get("model")])
        if name in self.broken:
            raise self.broken[name]
        if self.name == name:
            return
        self.forget()  # free the old model before loading the next
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with ui.status(f"loading {cell.model}") as news:
                self.model, self.tokenizer = loading.load(**cell.load_arguments, progress=news)
        except DartError as error:
            self.broken[name] = error
            raise
        self.name, self.loads = name, self.loads + 1
        announce_model(self.model, ui)


def measure_cell(
    cell: Cell, cache: LoadedModelCache, ui: Ui | None = None, parts: UnitStore | None = None
) -> Value:
    """Measure a cell; returns its value.

    ``cache``: has the model of the previous cell, and afterwards the model of this cell.
    ``parts``: stores the results of finished items (such as documents), which a resumed run reuses;
    None keeps them only in memory.  Raises the errors of the measurement, and ``DartError`` if a
    number is not finite.
    """
    import torch

    from dart_llm.evaluation import tasks
    from dart_llm.evaluation.parts import MemoryStore
    from dart_llm.models.checkpoint import checkpoint_facts

    began, ui = time.perf_counter(), ui or Ui(quiet=True)
    try:
        candidate = cache.prepare(cell, ui)
        torch.manual_seed(cell.seed)  # independent of earlier cells in this process
        items = tasks.count(cell.task, cell.options, candidate.tokenizer, candidate.model)
        with ui.progress(f"{cell.label} on {cell.short_task}", items) as advance:
            store = MemoryStore() if parts is None else parts
            measurement = tasks.measure(candidate, cell.task, cell.options, store, advance)
    except Exception as error:
        if not isinstance(error, DartError):
            cache.forget()  # so that the next cell has all memory available
        raise
    if problem := not_finite(measurement):
        raise DartError(problem)
    checkpoint = {k: v for k, v in checkpoint_facts(cache.model).items() if k in CHECKPOINT}
    value = {
        "document": {
            **document(cell),
            "checkpoint": checkpoint,
            "facts": dict(candidate.facts),
            "measurement": measurement.to_dict(),
        },
        "samples": list(measurement.samples),
        "times": {"seconds": time.perf_counter() - began, "device": str(cache.model.device)},
    }
    return dict(finite(value))


def document(cell: Cell, error: str | None = None) -> dict[str, Any]:
    """The line of results.jsonl for a cell without a measurement; ``error``: why it failed."""
    return {
        "key": cell.key,
        "label": cell.label,
        "status": DONE if error is None else FAILED,
        "error": error,
        "cell": {**cell.to_dict(), "protocol": cell.options.protocol},
        "checkpoint": None,
        "facts": {},
        "measurement": None,
    }


def not_finite(measurement: Measurement) -> str | None:
    """A sentence that names a non-finite number of a measurement; None if all are finite.

    Metrics other than ``measurement.metric`` may be None, because some are undefined on few items.
    """
    metrics = dict(measurement.metrics)
    if metrics.get(measurement.metric) is None:
        metrics[measurement.metric] = math.nan
    for where, numbers in (
        ("", metrics),
        *((f"item {i.get('id')}, ", i) for i in measurement.items),
    ):
        for name, value in numbers.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{where}{name} of {measurement.task} is not finite; try dtype float32"
    return None


# The study.

S = TypeVar("S", bound=MeasureSettings)

PACKAGES = ("dart-llm", "torch", "transformers", "python")
"""Packages whose versions must match to reuse a cell of an earlier run."""


class MeasureStudy(Study[S], Generic[S]):
    """A unit is a cell: one method on one task."""

    remote = staticmethod(measure_cell)
    """The function that computes a cell on a cluster."""
    noun = "cell"
    shown = frozenset({"style", "engine", "workers", "tracker", "results_dir", "experiment_name"})

    def __init__(self, settings: S, ui: Ui, cells: Sequence[Cell] | None = None) -> None:
        super().__init__(settings, ui)
        self.kind, self.document = settings.kind, settings.document
        self.on_error = "record" if settings.adopts else "stop"
        self.cells = tuple(cells_of(settings) if cells is None else cells)
        self.values: dict[str, Value] = {}
        """Values of finished and failed cells, by key."""
        self.cache = LoadedModelCache()
        self.rows: list[comparison.Row] = []

    @property
    def model_name(self) -> str:
        return ", ".join(dict.fromkeys(cell.model for cell in self.cells))

    def inputs(self) -> Mapping[str, Any]:
        return {replace(cell, inputs={}).key: dict(cell.inputs) for cell in self.cells}

    def config_extra(self) -> dict[str, Any]:
        """The cells, and the checkpoint if there is only one model."""
        checkpoints = [line["checkpoint"] for line in self.lines if line["checkpoint"]]
        several = len({cell.model for cell in self.cells}) > 1
        return {
            "cells": [cell.to_dict() for cell in self.cells],
            "checkpoint": checkpoints[0] if checkpoints and not several else None,
        }

    @property
    def loaded(self) -> bool:
        return bool(self.cache.loads or self.values)

    @property
    def device(self) -> str | None:
        """The device, from the cells' values, as the model is dropped after the last cell."""
        devices = (value.get("times", {}).get("device") for value in self.values.values())
        return next(filter(None, devices), None)

    def load(self) -> None:
        """Does nothing: each model is loaded when its first cell is computed."""

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        settings = self.settings
        for note in settings.notes:
            self.ui.say(note)
        name, folder = f"{settings.experiment}/{self.path.name}", Path(settings.results_dir)
        try:
            with tracked(settings.tracker, name, self.identity, folder, self.ui.say) as self.track:
                yield
        finally:
            self.cache.forget()

    def units(self) -> Iterable[Unit]:
        return self.units_of(self.cells)

    def units_of(self, cells: Sequence[Cell]) -> Iterable[Unit]:
        """The cells' units in the order in which this process or a cluster computes them."""
        units = list(map(_unit, execution_order(cells)))
        if isinstance(self.settings, SweepSettings) and self.settings.engine == "ray":
            return self._units_of_cluster(units, self.settings.workers)
        return units

    def _units_of_cluster(self, units: Sequence[Unit], workers: int | None) -> Iterator[Unit]:
        from dart_llm.studies.sweep import ray_backend

        missing = [unit for unit in units if self.finished(unit) is None]
        yield from (unit for unit in units if unit not in missing)
        if missing:
            cells = [unit.data[0] for unit in missing]
            results = ray_backend.results(cells, self.remote, workers, self.ui.say)
            with contextlib.closing(results):
                yield from (_unit(cell, value) for cell, value in results)

    def _stored_file(self, key: str) -> Path:
        """The file of a finished cell, shared by all runs of the experiment."""
        settings = self.settings
        return Path(settings.results_dir) / settings.experiment / ".cells" / f"{key}.json"

    def finished(self, unit: Unit) -> Value | None:
        """The stored value or None; a grid also uses earlier runs with equal package versions."""
        if not self.settings.adopts:
            return self.folder.part(unit.key)  # type: ignore[no-any-return]
        if self.fresh and not self.folder.resumed:
            return None
        stored, current = read_json(self._stored_file(unit.key)), versions()
        same = all(stored.get("versions", {}).get(name) == current[name] for name in PACKAGES)
        return stored["value"] if stored and same else None

    def save(self, unit: Unit, value: Value) -> None:
        if not self.settings.adopts:
            super().save(unit, value)
            return
        path = self._stored_file(unit.key)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"versions": versions(), "value": value})

    def compute(self, unit: Unit) -> Value:
        cell, value = unit.data
        if isinstance(value, str):
            raise DartError(value)
        return value or measure_cell(cell, self.cache, self.ui, CellStore(self.folder, cell.key))

    def take(self, unit: Unit, value: Value) -> None:
        self.values[unit.key] = value
        values = [self.values[cell.key] for cell in self.cells if cell.key in self.values]
        self.lines = [finished["document"] for finished in values]
        write_lines(self.path / "results.jsonl", self.lines)
        line = value["document"]
        if line["status"] == DONE:
            measured, seconds = line["measurement"], value["times"]["seconds"]
            metric = f"{measured['metric']} {measured['metrics'][measured['metric']]:.4g}"
            self.timing.setdefault("measure_s", {})[unit.key] = seconds
            self.ui.say(f"{unit.label}: {metric}, {duration(seconds)}")
        self.track(comparison.result_line(comparison.read_row(line)))

    def fail(self, unit: Unit, sentence: str) -> None:
        self.take(unit, {"document": document(unit.data[0], sentence), "samples": []})

    # results

    def summarise(self) -> dict[str, Any]:
        self.rows = comparison.rows(self.lines)
        samples = [
            {
                **{name: line[name] for name in ("key", "label")},
                "task": line["cell"]["task"],
                **sample,
            }
            for line in self.lines
            for sample in self.values[line["key"]]["samples"]
        ]
        if samples:
            write_lines(self.path / "samples.jsonl", samples)
        if self.settings.adopts:
            return comparison_report.document(self.rows)
        return comparison_report.eval_document(self.rows)

    def result_lines(self) -> Sequence[ResultLine]:
        return [comparison.result_line(row) for row in self.rows]

    def tables(self) -> Sequence[Table]:
        if self.settings.adopts:
            return [comparison_report.csv_table(self.rows), *comparison_report.tables(self.rows)]
        return comparison_report.tables(self.rows)

    def sentences(self) -> Sequence[str]:
        several = self.settings.adopts or len({row["label"] for row in self.lines}) > 1
        conclusion = [comparison_report.conclusion(self.rows)] if several else []
        notes = [] if self.settings.adopts else comparison_report.notes(self.rows)
        return [*conclusion, *(f"note: {note}" for note in notes)]

    def markdown(self) -> str:
        return comparison_report.markdown(self.rows)

    def figures(self) -> Iterable[Plot]:
        return comparison_report.plots(self.rows) if self.settings.adopts else ()

    def write_page(self) -> Path | None:
        path = self.path / "report.html"
        write_text(path, comparison_report.page_text(self.config, self.rows))
        return path

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "computed": self.computed}


class CellStore:
    """Stores the results of a cell's finished items in a results folder."""

    def __init__(self, folder: Any, key: str) -> None:
        self._folder, self._key = folder, key

    def part(self, key: str) -> Any:
        return self._folder.part(f"{self._key}/{key}")

    def save_part(self, key: str, value: Any) -> None:
        self._folder.save_part(f"{self._key}/{key}", value)


def _unit(cell: Cell, value: Value | str | None = None) -> Unit:
    """The unit of a cell; ``value``: a cluster's result, or the reason of failure."""
    return Unit(cell.key, f"{cell.label} on {cell.short_task}", (cell, value))


def plan(settings: SweepSettings, ui: Ui, fresh: bool = False) -> dict[str, Any]:
    """Show what a study would do (``--dry-run``), without downloading, loading or writing."""
    study = MeasureStudy(settings, ui)
    cells = study.cells
    done = set() if fresh else {cell.key for cell in cells if study.finished(_unit(cell))}
    return show_plan(cells, done, ui)
