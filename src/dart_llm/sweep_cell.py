"""One cell of a sweep, computed: plain data in, the bytes of its files out.

``compute`` runs in any process, on any machine.  The model that it is handed is used again, so that
the cells of one model load it once per worker.  Nothing in ``result.json``, ``samples.jsonl`` and
``masks.safetensors`` depends on when or where it ran; times and provenance are in ``timing.json``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dart_llm.cell import Cell
from dart_llm.errors import DartError
from dart_llm.provenance import machine, peak_memory_bytes, versions
from dart_llm.results import finite, now

if TYPE_CHECKING:
    from dart_llm.measurement import Measurement
    from dart_llm.sweep_model import HeldModel
    from dart_llm.ui import Ui

RESULT, SAMPLES, MASKS, TIMING = "result.json", "samples.jsonl", "masks.safetensors", "timing.json"
DONE, FAILED = "done", "failed"


def compute(data: Mapping[str, Any], held: HeldModel, ui: Ui | None = None) -> dict[str, bytes]:
    """The files of the cell ``data`` (``Cell.to_dict``), by name.

    ``held``: the model of the cell before; afterwards that of this one.  ``ui``: shows progress.
    An error becomes a failed cell, never an exception; only an interrupt is passed on.
    """
    from dart_llm.ui import Ui

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
    cell: Cell, measurement: Measurement | None, error: str | None, held: HeldModel | None = None
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

        from dart_llm.mask_counts import tensors

        files[SAMPLES] = _lines(measurement.samples)
        files[MASKS] = save(tensors(measurement.counts))
    return files


def _lines(rows: Any) -> bytes:
    """One JSON document a line; keys sorted, so that equal results are equal bytes."""
    texts = (json.dumps(finite(row), sort_keys=True, allow_nan=False) for row in rows)
    return "".join(f"{text}\n" for text in texts).encode()


def _measure(cell: Cell, held: HeldModel, ui: Ui) -> Measurement:
    import torch

    from dart_llm.candidate import Memory
    from dart_llm.measure import count, measure

    candidate = held.make(cell, ui)
    torch.manual_seed(cell.seed)  # whatever ran before in this process
    items = count(cell.task, cell.options, candidate.tokenizer, candidate.model)
    with ui.progress(f"{cell.label} on {cell.short_task}", items) as advance:
        return measure(candidate, cell.task, cell.options, Memory(), advance)


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


def _sentence(error: Exception, cell: Cell, held: HeldModel) -> str:
    """What went wrong, for people; with the type of what is no error of ours."""
    from dart_llm.devices import memory_failure

    if isinstance(error, DartError):
        return str(error)
    memory = memory_failure(error, cell.model, cell.dtype or "it is stored")
    if memory is not None:
        held.forget()  # the next cell starts with all the memory that there is
        return str(memory)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _timing(times: Mapping[str, Any], held: HeldModel) -> dict[str, Any]:
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
