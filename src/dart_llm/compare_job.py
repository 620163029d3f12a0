"""``dart-llm sweep`` and ``dart-llm compare``: a grid of cells, and what is made of its results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.cell import Cell
from dart_llm.compare_row import DENSE
from dart_llm.errors import CellsFailed, MissingExtra
from dart_llm.grid import GridSpec, collect, expand
from dart_llm.measure import check_calibration, check_task
from dart_llm.settings_base import BaseSettings, from_environment
from dart_llm.sweep import SweepPlace, SweepResult, run_sweep
from dart_llm.sweep_plan import Plan, plan, plan_table
from dart_llm.trackers import open_tracker
from dart_llm.ui import Ui

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
    from dart_llm import compare, compare_files, compare_tables, report_compare

    try:
        rows = compare.rows(result.results)
        compare_files.write_all(result.path, rows)
        for table in compare_tables.rich_tables(rows):
            ui.table(table)
        ui.say(compare_tables.summary(rows))
        _write_pictures(result.path, rows, ui)
        ui.say(f"report: {report_compare.write(result.path, rows)}")
        return compare_files.document(rows)
    except MissingExtra as error:
        ui.say(f"no tables of comparison: {error}")
        return {"cells": list(result.results)}


def _write_pictures(folder: Path, rows: Any, ui: Ui) -> None:
    from dart_llm import plot_compare, plot_layers, plots

    try:
        plots.save(folder, [*plot_compare.make(rows), *plot_layers.make(rows)])
    except MissingExtra as error:
        ui.say(f"no plots: {error}")


def dry_run(request: SweepRequest, ui: Ui) -> Plan:
    """Say what ``run`` would do; nothing is loaded or written."""
    found = plan(_cells(request), request.place, request.workers or 1)
    ui.result(plan_table(found))
    for sentence in found.sentences():
        ui.result(sentence)
    return found
