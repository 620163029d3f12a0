"""One cell of a sweep, computed: plain data in, the bytes of its files out.

``compute`` runs in any process, on any machine.  The model that it is handed is used again, so
that the cells of one model load it once per worker.  Nothing in ``result.json``,
``samples.jsonl`` and ``masks.safetensors`` depends on when or where it ran; times and provenance
are in ``timing.json``.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dart_llm.errors import DartError, failure_text
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import machine, versions
from dart_llm.experiments.store import now
from dart_llm.files import finite
from dart_llm.reporting.console import Ui
from dart_llm.studies.sweep.cells import DONE, FAILED, MASKS, RESULT, SAMPLES, TIMING

if TYPE_CHECKING:
    from dart_llm.evaluation.measurement import Measurement
    from dart_llm.session.run import BoundMethod

_CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype", "weights")
"""What ``result.json`` says of the checkpoint: nothing that differs between machines."""


@dataclass
class LoadedModelCache:
    """The newest model of one process's share of a sweep, and the newest candidate made of it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    prepared: str = ""
    candidate: BoundMethod | None = None
    seconds: float = 0.0
    """What loading took, until ``loading_time`` is asked."""
    broken: dict[str, DartError] = field(default_factory=dict)
    """Models that could not be loaded: not tried again for the next cell."""

    def forget(self) -> None:
        """Drop the model, so that its memory is free; failed models stay known."""
        self.name, self.model, self.tokenizer, self.seconds = "", None, None, 0.0
        self.prepared, self.candidate = "", None
        gc.collect()

    def make(self, cell: Cell, ui: Ui) -> BoundMethod:
        """The cell's model, pruned as it asks.

        Raises ``DartError`` when it cannot be had, at once when that is known from an earlier cell.
        """
        self._load(cell, ui)
        config = cell.config()
        wanted = json.dumps([config.to_dict(), cell.calibration, cell.inputs.get("calibration")])
        if self.candidate is None or self.prepared != wanted:
            from dart_llm.session.kept import other_model  # which loads torch
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
            if said := other_model(cell.method, self.model):
                ui.say(said)
        return self.candidate

    def checkpoint(self) -> dict[str, Any]:
        """What is known of the model's checkpoint, the same on every machine."""
        from dart_llm.models.checkpoint import checkpoint_facts

        facts = checkpoint_facts(self.model)
        return {name: facts[name] for name in _CHECKPOINT if name in facts}

    def loading_time(self) -> float:
        """Seconds that loading took; 0 when they have been told already."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _load(self, cell: Cell, ui: Ui) -> None:
        import torch

        from dart_llm.models.float32_products import float32_note
        from dart_llm.models.loading import load

        arguments = cell.load_arguments
        name = json.dumps([arguments, cell.inputs.get("model")])
        if name in self.broken:
            raise self.broken[name]
        if self.name == name:
            return
        self.forget()  # the old model goes before the new one comes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        began = time.perf_counter()
        try:
            with ui.status(f"loading {cell.model}") as news:
                self.model, self.tokenizer = load(**arguments, progress=news)
        except DartError as error:
            self.broken[name] = error
            raise
        self.name, self.seconds = name, time.perf_counter() - began
        if note := float32_note(self.model):
            ui.say(note)


def compute(
    data: Mapping[str, Any], held: LoadedModelCache, ui: Ui | None = None
) -> dict[str, bytes]:
    """The files of the cell ``data`` (``Cell.to_dict``), by name.

    ``held``: the model of the cell before; afterwards that of this one.  ``ui``: shows progress.
    An error becomes a failed cell, never an exception; only an interrupt is passed on.
    """
    from dart_llm.native.memory import peak  # which loads torch

    cell = Cell.from_dict(data)
    began, started = time.perf_counter(), now()
    measurement: Measurement | None = None
    try:
        measurement = _measure(cell, held, ui or Ui(quiet=True))
        error = not_finite(measurement)
    except Exception as found:
        error = _sentence(found, cell, held)
    files = document_files(cell, measurement, error, held)
    device = getattr(held.model, "device", None)
    timing = {
        "started": started.isoformat(),
        "seconds": time.perf_counter() - began,
        "finished": now().isoformat(),
        "load_s": held.loading_time(),
        "device": None if device is None else str(device),
        "process": os.getpid(),
        "peak_memory_bytes": peak(),
        "machine": machine(None if device is None else str(device)),
        "versions": versions(),
    }
    return {**files, TIMING: _lines([timing])}


def document_files(
    cell: Cell,
    measurement: Measurement | None,
    error: str | None,
    held: LoadedModelCache | None = None,
) -> dict[str, bytes]:
    """The files that do not depend on time or place.  ``held``: what was measured, if anything."""
    candidate = held.candidate if held is not None and measurement is not None else None
    checkpoint = None
    if held is not None and candidate is not None:
        from dart_llm.experiments import rows as measure_rows  # which loads torch

        checkpoint = measure_rows.checkpoint_of(candidate, held.checkpoint())
    document = {
        "key": cell.key,
        "label": cell.label,
        "status": DONE if error is None else FAILED,
        "error": error,
        "cell": {**cell.to_dict(), "protocol": cell.options.protocol},
        "checkpoint": checkpoint,
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

    memory = memory_failure(error, cell.model, cell.dtype or "it is stored")
    if memory is not None and not isinstance(error, DartError):
        held.forget()  # the next cell starts with all the memory that there is
        return str(memory)
    return failure_text(error)
