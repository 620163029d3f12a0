"""The files of a sweep: ``cells/<key>/...``, and the tables that grow with every cell.

A cell's folder is written beside its place and renamed, so that it is there whole or not at all.
Tables are made from the cells alone: the same cells give the same bytes, however often the sweep
was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dart_llm.cache import sync
from dart_llm.errors import ResultsError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import origin, versions
from dart_llm.experiments.store import INPUTS, SCHEMA, ResultsFolder, mapping, now, open_folder
from dart_llm.files import write_csv, write_json, write_tensors, write_text

RESULT, SAMPLES, MASKS, TIMING = "result.json", "samples.jsonl", "masks.safetensors", "timing.json"

DONE, FAILED = "done", "failed"

CELLS, TABLE = "cells", "results.jsonl"

_PARTIAL = ".partial-"

_SAME = ("dart-llm", "torch", "transformers", "python")
"""Packages whose versions must agree before a cell of an earlier sweep is taken over."""

_COLUMNS = (
    *("key", "status", "model", "method", "sparsity", "layers", "keep", "task", "protocol"),
    *("seed", "metric", "value"),
)

_ACCOUNTING = ("achieved_sparsity", "sparsity_while_pruned", "dense_token_share", "remasks")


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


@dataclass
class SweepFolder:
    """A results folder with one folder per cell.

    ``finished``: when all cells were there.  ``documents``: finished and failed cells.
    """

    folder: ResultsFolder
    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    started: str = field(default_factory=lambda: now().isoformat())
    finished: str | None = None
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def todo(self) -> list[Cell]:
        """The cells that have no result yet; those that failed are tried again."""
        known = self.documents
        return [cell for cell in self.cells if known.get(cell.key, {}).get("status") != DONE]

    def rows(self) -> list[dict[str, Any]]:
        """The documents in table order."""
        return [self.documents[cell.key] for cell in self.cells if cell.key in self.documents]

    def save(self, cell: Cell, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Keep a computed cell and write the tables; returns its document.

        Raises ``ResultsError`` when the disk is full or read-only.
        """
        write_cell(self.path / CELLS, cell.key, files)
        document: dict[str, Any] = json.loads(files[RESULT])
        self.documents[cell.key] = document
        self.write_tables()
        return document

    def write_tables(self) -> None:
        """``results.jsonl`` and ``cells.csv``, over all cells so far."""
        rows = self.rows()
        lines = (json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
        write_text(self.path / TABLE, "".join(lines))
        write_csv(self.path / "cells.csv", (*_COLUMNS, *_ACCOUNTING), map(_csv_row, rows))

    def write_masks(self) -> None:
        """``masks.safetensors``: how often each neuron was kept, ``<key>.layer<l>.kept``."""
        from safetensors.torch import load_file

        tensors: dict[str, Any] = {}
        for row in self.rows():
            path = self.path / CELLS / row["key"] / MASKS
            if path.exists():
                tensors |= {f"{row['key']}.{name}": t for name, t in load_file(path).items()}
        write_tensors(self.path / MASKS, tensors)

    def write_config(self, status: str, engine: str) -> None:
        """``config.json``: what the sweep is, how far it came, and where it ran."""
        devices = (times.get("device") for times in self.times().values())
        if status != "running" and self.finished is None:
            self.finished = now().isoformat()
        document = {
            "schema": SCHEMA,
            "status": status,
            "kind": str(self.settings.get("kind", "sweep")),
            "settings": dict(self.settings),
            "cells": [cell.to_dict() for cell in self.cells],
            "engine": engine,
            **origin(next(filter(None, devices), None)),
            "started": self.started,
            "finished": self.finished,
        }
        write_json(self.path / "config.json", document)

    def times(self) -> dict[str, dict[str, Any]]:
        """Times and provenance of the cells that have any, by key."""
        folder = self.path / CELLS
        found = {cell.key: read_timing(folder / cell.key) for cell in self.cells}
        return {key: times for key, times in found.items() if times}

    def write_all(self, seconds: float) -> None:
        """What is made of all cells; ``timing.json`` has the seconds of this run, and of each."""
        self.write_tables()
        self.write_masks()
        cells = {key: times.get("seconds") for key, times in self.times().items()}
        write_json(self.path / TIMING, {"total_s": seconds, "cells": cells})

    def write_log(self, lines: Sequence[str]) -> None:
        """``output_<time>.log``, what was said."""
        write_text(self.path / f"output_{self.folder.stamp}.log", "\n".join(lines) + "\n")


def open_sweep(place: SweepPlace, cells: Sequence[Cell]) -> SweepFolder:
    """The unfinished folder of the same cells, or a new one; with what is finished already.

    Raises ``ResultsError``.
    """
    plain = {replace(cell, inputs={}).key: dict(cell.inputs) for cell in cells}
    identity = {**place.settings, "sweep": list(plain), INPUTS: plain}
    folder = open_folder(place.root, place.experiment, identity, place.fresh)
    sweep = SweepFolder(folder, tuple(cells), identity)
    for left in (folder.path / CELLS).glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)  # what was being written when a run stopped
    for cell in sweep.cells:
        document = read_document(folder.path / CELLS / cell.key, cell.key)
        if document is not None:
            sweep.documents[cell.key] = document
    return sweep


def adopt(sweep: SweepFolder) -> int:
    """Copy finished cells of earlier sweeps of the same experiment; returns how many."""
    taken = 0
    for cell in sweep.todo:
        source = finished_before(sweep.path.parent, cell.key)
        if source is None:
            continue
        files = {p.name: p.read_bytes() for p in sorted(source.iterdir()) if p.is_file()}
        write_cell(sweep.path / CELLS, cell.key, files)
        sweep.documents[cell.key] = json.loads(files[RESULT])
        taken += 1
    return taken


def finished_before(experiment: Path, key: str) -> Path | None:
    """The newest folder of a finished cell that was computed under the versions of now."""
    mine = versions()
    for folder in sorted(experiment.glob(f"*/{CELLS}/{key}"), reverse=True):
        document = read_document(folder, key)
        if document is None or document["status"] != DONE:
            continue
        theirs = read_timing(folder).get("versions") or {}
        if all(theirs.get(name) == mine.get(name) for name in _SAME):
            return folder
    return None


def write_cell(cells: Path, key: str, files: Mapping[str, bytes]) -> None:
    """Put ``files`` into ``cells/<key>``, all at once; raises ``ResultsError``."""
    partial, place = cells / f"{_PARTIAL}{os.getpid()}-{key}", cells / key
    old = cells / f"{_PARTIAL}{os.getpid()}-old-{key}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in files.items():
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync(partial)
        if place.exists():  # it failed before
            place.rename(old)
        partial.rename(place)
        sync(cells)
    except OSError as error:
        raise ResultsError(f"cannot write {place}: {error.strerror or error}") from None
    shutil.rmtree(old, ignore_errors=True)


def read_document(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of a cell; None when there is none, or it is another cell's."""
    document = _read(folder / RESULT)
    return document if document.get("key") == key else None


def read_timing(folder: Path) -> dict[str, Any]:
    """Times and provenance of a cell; empty when there are none."""
    return _read(folder / TIMING)


def _read(path: Path) -> dict[str, Any]:
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The documents of a sweep, in table order; raises ``ResultsError`` when there are none."""
    path = Path(folder) / TABLE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]
    except OSError as error:
        raise ResultsError(
            f"{folder} holds no sweep: {path} cannot be read ({error.strerror or error})"
        ) from None
    except ValueError:
        raise ResultsError(f"{path} is damaged: a line of it is not JSON") from None


def _csv_row(row: Mapping[str, Any]) -> list[Any]:
    cell, measured = row["cell"], row["measurement"] or {}
    accounting = measured.get("accounting") or {}
    metric = measured.get("metric")
    known = {**cell, "key": row["key"], "status": row["status"], "metric": metric}
    known["value"] = (measured.get("metrics") or {}).get(metric)
    return [*map(known.get, _COLUMNS), *map(accounting.get, _ACCOUNTING)]
