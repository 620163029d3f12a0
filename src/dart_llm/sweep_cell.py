"""One cell of a sweep, computed: plain data in, the bytes of its files out.

``compute`` runs in any process, on any machine.  It keeps the newest model, so that the cells of
one model load it once per worker.  Nothing in ``result.json``, ``samples.jsonl`` and
``masks.safetensors`` depends on when or where it ran; times and provenance are in ``timing.json``.
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

from dart_llm.cell import Cell
from dart_llm.errors import DartError
from dart_llm.provenance import machine, peak_memory_bytes, versions
from dart_llm.results import finite, now

if TYPE_CHECKING:
    from dart_llm.candidate import Candidate
    from dart_llm.measurement import Measurement
    from dart_llm.ui import Ui

RESULT, SAMPLES, MASKS, TIMING = "result.json", "samples.jsonl", "masks.safetensors", "timing.json"
DONE, FAILED = "done", "failed"
_CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype")
"""What ``result.json`` says of the checkpoint: nothing that differs between machines."""


@dataclass
class _Held:
    """The newest model of this process, and the newest candidate made of it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    seconds: float = 0.0
    """What loading took, until a cell's ``timing.json`` says so."""
    prepared: str = ""
    candidate: Candidate | None = None
    broken: dict[str, DartError] = field(default_factory=dict)
    """Models that could not be loaded: not tried again for the next cell."""


_held = _Held()


def forget() -> None:
    """Drop the model that is kept between cells, and what is known of models that failed."""
    global _held
    _held = _Held()
    gc.collect()


def compute(data: Mapping[str, Any], ui: Ui | None = None) -> dict[str, bytes]:
    """The files of the cell ``data`` (``Cell.to_dict``), by name.

    ``ui``: shows progress.  An error becomes a failed cell, never an exception; only an interrupt
    is passed on.
    """
    from dart_llm.ui import Ui

    cell = Cell.from_dict(data)
    began, started = time.perf_counter(), now().isoformat()
    measurement: Measurement | None = None
    try:
        measurement = _measure(cell, ui or Ui(quiet=True))
        error = not_finite(measurement)
    except Exception as found:
        error = _sentence(found, cell)
    files = document_files(cell, measurement, error)
    times = {"started": started, "seconds": time.perf_counter() - began}
    files[TIMING] = _lines([_timing(times)])
    return files


def document_files(
    cell: Cell, measurement: Measurement | None, error: str | None
) -> dict[str, bytes]:
    """The files that do not depend on time or place."""
    candidate = _held.candidate if measurement is not None else None
    document = {
        "key": cell.key,
        "label": cell.label,
        "status": DONE if error is None else FAILED,
        "error": error,
        "cell": {**cell.to_dict(), "protocol": cell.options.protocol},
        "checkpoint": None if candidate is None else _checkpoint(),
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


def _measure(cell: Cell, ui: Ui) -> Measurement:
    import torch

    from dart_llm.candidate import Memory
    from dart_llm.measure import count, measure

    candidate = _candidate(cell, ui)
    torch.manual_seed(cell.seed)  # whatever ran before in this process
    items = count(cell.task, cell.options, candidate.tokenizer, candidate.model)
    with ui.progress(f"{cell.label} on {cell.short_task}", items) as advance:
        return measure(candidate, cell.task, cell.options, Memory(), advance)


def _candidate(cell: Cell, ui: Ui) -> Candidate:
    """The cell's model, pruned as it asks; the newest one is kept."""
    _load(cell, ui)
    config = cell.config()
    wanted = json.dumps([config.to_dict(), cell.calibration, cell.inputs.get("calibration")])
    if _held.candidate is None or _held.prepared != wanted:
        from dart_llm.prepare import prepare

        _held.candidate = None
        _held.candidate = prepare(
            _held.model,
            _held.tokenizer,
            config,
            calibration=cell.calibration,
            cache_dir=cell.cache_dir,
            say=ui.say,
        )
        _held.prepared = wanted
    return _held.candidate


def _load(cell: Cell, ui: Ui) -> None:
    """Make the cell's model the one that is held; raises ``DartError`` when it cannot be had."""
    global _held
    from dart_llm.loading import load

    arguments = cell.load_arguments
    name = json.dumps([arguments, cell.inputs.get("model")])
    if name in _held.broken:
        raise _held.broken[name]
    if _held.name == name:
        return
    _held = _Held(broken=_held.broken)  # the old model goes before the new one comes
    _free_memory()
    began = time.perf_counter()
    try:
        with ui.status(f"loading {cell.model}") as news:
            _held.model, _held.tokenizer = load(**arguments, progress=news)
    except DartError as error:
        _held.broken[name] = error
        raise
    _held.name, _held.seconds = name, time.perf_counter() - began


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checkpoint() -> dict[str, Any]:
    from dart_llm.loading import checkpoint_facts

    facts = checkpoint_facts(_held.model)
    return {name: facts.get(name) for name in _CHECKPOINT}


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


def _sentence(error: Exception, cell: Cell) -> str:
    """What went wrong, for people; with the type of what is no error of ours."""
    from dart_llm.devices import memory_failure

    if isinstance(error, DartError):
        return str(error)
    memory = memory_failure(error, cell.model, cell.dtype or "it is stored")
    if memory is not None:
        forget()  # the next cell starts with all the memory that there is
        return str(memory)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _timing(times: Mapping[str, Any]) -> dict[str, Any]:
    device = getattr(_held.model, "device", None)
    load_s, _held.seconds = _held.seconds, 0.0
    return {
        **times,
        "finished": now().isoformat(),
        "load_s": load_s,
        "device": None if device is None else str(device),
        "process": os.getpid(),
        "peak_memory_bytes": peak_memory_bytes(),
        "machine": machine(None if device is None else str(device)),
        "versions": versions(),
    }
