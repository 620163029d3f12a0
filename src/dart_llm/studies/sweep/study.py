"""``eval``, ``perplexity``, ``summarize``, ``compare`` and ``sweep``: cells of a grid, measured.

Finished cells are never computed again.  In a grid a cell that fails is recorded, with the
sentence that says why, and the others are computed; the same command tries it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dart_llm.errors import DartError
from dart_llm.experiments import comparison, comparison_plots, comparison_report
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import versions
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.store import PARTS
from dart_llm.experiments.study import Study, Unit
from dart_llm.experiments.trackers import tracked
from dart_llm.files import read_json, whole_rows, write_lines, write_tensors, write_text
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.heartbeat import Pace
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import duration
from dart_llm.studies.sweep.compute import (
    DONE,
    LoadedModelCache,
    Value,
    compute,
    failed_value,
    measure_cell,
)
from dart_llm.studies.sweep.grid import cells_of, execution_order
from dart_llm.studies.sweep.settings import MeasureSettings, SweepSettings

S = TypeVar("S", bound=MeasureSettings)

PACKAGES = ("dart-llm", "torch", "transformers", "python")
"""Packages whose versions must agree before a cell of an earlier run is reused."""

CSV = (
    *("key", "status", "model", "method", "sparsity", "layers", "keep", "task", "protocol"),
    *("seed", "metric", "value"),
    *("achieved_sparsity", "sparsity_while_pruned", "dense_token_share", "remasks"),
)
"""Columns of cells.csv."""


class MeasureStudy(Study[S], Generic[S]):
    """A unit is a cell: one method on one task."""

    remote = staticmethod(compute)
    """Computes a cell on a cluster."""
    noun = "cell"
    shown = frozenset({"style", "engine", "workers", "tracker", "results_dir", "experiment_name"})

    def __init__(self, settings: S, ui: Ui, cells: Sequence[Cell] | None = None) -> None:
        super().__init__(settings, ui)
        self.kind, self.document = settings.kind, settings.document
        self.on_error = "record" if settings.adopts else "stop"
        self.cells = tuple(cells_of(settings) if cells is None else cells)
        self.values: dict[str, Value] = {}
        """Finished and failed cells by key."""
        self.cache = LoadedModelCache()
        self.rows: list[comparison.Row] = []
        self.pace = Pace(len(self.cells))

    @property
    def model_name(self) -> str:
        return ", ".join(dict.fromkeys(cell.model for cell in self.cells))

    def inputs(self) -> Mapping[str, Any]:
        return {replace(cell, inputs={}).key: dict(cell.inputs) for cell in self.cells}

    def config_extra(self) -> dict[str, Any]:
        """The cells, and the checkpoint where there is only one."""
        checkpoints = [one["checkpoint"] for one in self.lines if one["checkpoint"]]
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
        """Of the cells; the model itself is dropped after the last one."""
        devices = (value.get("times", {}).get("device") for value in self.values.values())
        return next(filter(None, devices), None)

    def load(self) -> None:
        """Nothing: models are loaded one after the other."""

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        settings = self.settings
        for note in settings.notes:
            self.ui.say(note)
        name = f"{settings.experiment}/{self.path.name}"
        folder = Path(settings.results_dir)
        tracker = tracked(settings.tracker, name, self.identity, folder, self.ui.say)
        try:
            with tracker as self.log_line:
                yield
        finally:
            self.cache.forget()

    # cells

    def units(self) -> Iterable[Unit]:
        return self.units_of(self.cells)

    def units_of(self, cells: Sequence[Cell]) -> Iterable[Unit]:
        """The cells in the order in which they are computed, here or on a cluster."""
        ordered = execution_order(cells)
        if isinstance(self.settings, SweepSettings) and self.settings.engine == "ray":
            return self._units_of_cluster(ordered, self.settings.workers)
        return [_unit(cell) for cell in ordered]

    def _units_of_cluster(self, cells: Sequence[Cell], workers: int | None) -> Iterator[Unit]:
        from dart_llm.studies.sweep import ray_backend

        finished = [cell for cell in cells if self.finished(_unit(cell)) is not None]
        yield from map(_unit, finished)
        todo = [cell for cell in cells if cell not in finished]
        if todo:
            with contextlib.closing(
                ray_backend.results(todo, self.remote, workers, self.ui.say)
            ) as results:
                yield from (_unit(cell, value) for cell, value in results)

    def finished(self, unit: Unit) -> Value | None:
        value: Value | None = self.folder.part(unit.key)
        if value is None and self.settings.adopts and not self.fresh:
            value = finished_before(self.path.parent, unit.key)
        return value

    def compute(self, unit: Unit) -> Value:
        cell, value = unit.data
        if value is None:
            value = measure_cell(cell, self.cache, self.ui, CellStore(self.folder, cell.key))
        if value["document"]["status"] != DONE:
            self.values[unit.key] = value
            raise DartError(value["document"]["error"])
        return dict(value)

    def take(self, unit: Unit, value: Value) -> None:
        self.values[unit.key] = value
        known = [self.values[cell.key] for cell in self.cells if cell.key in self.values]
        self.lines = [one["document"] for one in known]
        write_lines(self.path / "results.jsonl", self.lines)
        self.pace.advance(1)
        document = value["document"]
        if document["status"] == DONE:
            measured, seconds = document["measurement"], value["times"]["seconds"]
            metric = f"{measured['metric']} {measured['metrics'][measured['metric']]:.4g}"
            self.timing.setdefault("measure_s", {})[unit.key] = seconds
            left = self.pace.left()
            rest = f"; about {duration(left)} left" if left and left > 0 else ""
            self.ui.say(f"{unit.label}: {metric}, {duration(seconds)}{rest}")
        self.log_line(comparison.result_line(comparison.read_row(document)))

    def fail(self, unit: Unit, sentence: str) -> None:
        cell, _ = unit.data
        value = self.values.get(unit.key)
        self.take(unit, failed_value(cell, sentence) if value is None else value)

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        self.rows = comparison.rows(self.lines)
        self._write_samples()
        if self.settings.adopts:
            return comparison_report.document(self.rows)
        return measure_rows.document(self.lines)

    def _write_samples(self) -> None:
        """samples.jsonl, and masks.safetensors: ``<key>.layer<l>.kept``, how often each neuron."""
        import torch

        samples, tensors = list[Any](), dict[str, Any]()
        for key, value in ((cell.key, self.values[cell.key]) for cell in self.cells):
            document = value["document"]
            head = {"key": key, "label": document["label"], "task": document["cell"]["task"]}
            samples += [{**head, **sample} for sample in value["samples"]]
            tensors |= {
                f"{key}.layer{layer}.kept": torch.tensor(counts, dtype=torch.int32)
                for layer, counts in enumerate(value["counts"])
                if counts
            }
        if samples and getattr(self.settings, "log_samples", True):
            write_lines(self.path / "samples.jsonl", samples)
        write_tensors(self.path / "masks.safetensors", tensors)

    def result_lines(self) -> Sequence[ResultLine]:
        return [comparison.result_line(row) for row in self.rows]

    def tables(self) -> Sequence[Table]:
        cells = Table("cells", "", (), [_csv_row(one) for one in self.lines], terminal=False)
        if self.settings.adopts:
            compared = comparison_report.csv_table(self.rows)
            return [cells, compared, *comparison_report.tables(self.rows)]
        return [cells, measure_rows.table(self.lines, self.rows)] if self.lines else []

    def sentences(self) -> Sequence[str]:
        if self.settings.adopts:
            return [comparison_report.conclusion(self.rows)]
        several = len({row["label"] for row in self.lines}) > 1
        conclusion = [comparison_report.conclusion(self.rows)] if several else []
        return [*conclusion, *(f"note: {note}" for note in measure_rows.notes(self.lines))]

    def markdown(self) -> str:
        return comparison_report.markdown(self.rows)

    def figures(self) -> Iterable[Plot]:
        return comparison_plots.make(self.rows) if self.settings.adopts else ()

    def write_page(self) -> Path | None:
        path = self.path / "report.html"
        write_text(path, comparison_report.page_text(self.config, self.rows))
        return path

    def answer(self) -> dict[str, Any]:
        return {**super().answer(), "computed": self.computed}


class CellStore:
    """The part of a folder's cache in which one cell keeps its finished items."""

    def __init__(self, folder: Any, key: str) -> None:
        self._folder, self._key = folder, key

    def part(self, key: str) -> Any:
        return self._folder.part(f"{self._key}/{key}")

    def save_part(self, key: str, value: Any) -> None:
        self._folder.save_part(f"{self._key}/{key}", value)


def _unit(cell: Cell, value: Value | None = None) -> Unit:
    return Unit(cell.key, f"{cell.label} on {cell.short_task}", (cell, value))


def _csv_row(document: Mapping[str, Any]) -> dict[str, Any]:
    measured = document["measurement"] or {}
    metric = measured.get("metric")
    value = (measured.get("metrics") or {}).get(metric)
    known = {
        **(measured.get("accounting") or {}),
        **document["cell"],
        **document,
        "metric": metric,
        "value": value,
    }
    return {name: known.get(name) for name in CSV}


def finished_before(experiment: Path, key: str) -> Value | None:
    """A cell of an earlier run of the experiment, under today's versions; None without one."""
    mine = versions()
    for folder in sorted(experiment.glob("*/"), reverse=True):
        theirs = read_json(folder / "config.json").get("versions") or {}
        if any(theirs.get(name) != mine.get(name) for name in PACKAGES):
            continue
        value = _kept_value(folder, key)
        if value is not None:
            return value
    return None


def _kept_value(folder: Path, key: str) -> Value | None:
    """From the cache of an unfinished run, or from the files of a finished one."""
    for row in whole_rows(folder / PARTS):
        if row["key"] == key:
            return dict(row["value"])
    lines = whole_rows(folder / "results.jsonl")
    document = next((one for one in lines if one["key"] == key and one["status"] == DONE), None)
    masks = folder / "masks.safetensors"
    if document is None or not masks.exists():  # the last of these files
        return None
    from safetensors import safe_open

    samples = [
        {name: value for name, value in row.items() if name not in ("key", "label", "task")}
        for row in whole_rows(folder / "samples.jsonl")
        if row["key"] == key
    ]
    seconds = read_json(folder / "timing.json").get("measure_s", {}).get(key, 0.0)
    with safe_open(masks, framework="pt") as file:
        names = {name for name in file.keys() if name.startswith(f"{key}.")}  # noqa: SIM118
        layers = max((int(name.split(".layer")[1].split(".")[0]) for name in names), default=-1)
        wanted = [f"{key}.layer{layer}.kept" for layer in range(layers + 1)]
        counts = [file.get_tensor(name).tolist() if name in names else [] for name in wanted]
    times = {"seconds": seconds}
    return {"document": document, "samples": samples, "counts": counts, "times": times}
