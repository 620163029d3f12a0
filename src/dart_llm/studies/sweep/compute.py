"""One cell, computed: plain data in, plain data out.

``measure_cell`` runs in any process, on any machine, and keeps its model for the next cell.
Nothing in a value but ``times`` depends on when or where it was computed.
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
from dart_llm.files import finite
from dart_llm.reporting.console import Ui

if TYPE_CHECKING:
    from dart_llm.evaluation.measurement import Measurement
    from dart_llm.session.prepare import UnitStore
    from dart_llm.session.run import BoundMethod

DONE, FAILED = "done", "failed"

CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype", "weights")
"""What a result records of its checkpoint: nothing that differs between machines."""

Value = dict[str, Any]
"""A computed cell: ``document``, a line of results.jsonl; ``samples``; ``counts``, per layer how
often each neuron was kept; ``times``."""


@dataclass
class LoadedModelCache:
    """The newest model of a process, and the newest method that was prepared on it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    prepared: str = ""
    candidate: BoundMethod | None = None
    seconds: float = 0.0
    """What the newest loading took, until a value records it."""
    loads: int = 0
    """Models loaded so far."""
    broken: dict[str, DartError] = field(default_factory=dict)
    """Models that could not be loaded: not tried again for the next cell."""

    def forget(self) -> None:
        """Drop the model, so that its memory is free; failed models stay known."""
        self.name, self.model, self.tokenizer, self.seconds = "", None, None, 0.0
        self.prepared, self.candidate = "", None
        gc.collect()

    def prepare(self, cell: Cell, ui: Ui) -> BoundMethod:
        """The cell's model, pruned as it requests; raises ``DartError``."""
        self._load(cell, ui)
        config = cell.config()
        files = [cell.inputs.get(name) for name in ("calibration", "setting", "masks")]
        wanted = json.dumps([config.to_dict(), cell.label, cell.calibration, cell.masks, files])
        if self.candidate is None or self.prepared != wanted:
            from dart_llm.session.run import other_model  # which loads torch

            self.candidate = None
            self.candidate = self._prepared(cell, ui)
            self.prepared = wanted
            if note := other_model(cell.method, self.model):
                ui.say(note)
        return self.candidate

    def _prepared(self, cell: Cell, ui: Ui) -> BoundMethod:
        from dart_llm.session.prepare import prepare
        from dart_llm.session.run import BoundMethod

        if cell.rounding:
            from dart_llm.models.packed_loading import round_weights_to

            bits, part = cell.rounding.split()
            rounded = round_weights_to(self.model, int(bits), part == "ffn")
            facts, notes = rounded.facts, rounded.notes
            return BoundMethod(
                rounded.model, self.tokenizer, None, facts=facts, notes=notes, name=cell.label
            )
        masks = None
        if cell.masks:
            from dart_llm.experiments.artifacts import check_masks, read_masks
            from dart_llm.models.describe import widths

            check_masks(cell.masks, widths(self.model))
            masks = read_masks(cell.masks)
        where = (cell.calibration, cell.cache_dir, ui.say)
        return prepare(self.model, self.tokenizer, cell.config(), *where, masks=masks)

    def _load(self, cell: Cell, ui: Ui) -> None:
        import torch

        from dart_llm.experiments.study import announce_model
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
        self.loads += 1
        announce_model(self.model, ui)


def measure_cell(
    cell: Cell, cache: LoadedModelCache, ui: Ui | None = None, parts: UnitStore | None = None
) -> Value:
    """The value of a cell; ``failed`` where a number is not finite.

    ``cache``: has the model of the cell before, afterwards that of this one.  ``parts``: where
    finished items are kept.  Raises what went wrong.
    """
    import torch

    from dart_llm.evaluation.tasks import count, measure
    from dart_llm.models.loading import memory_failure
    from dart_llm.session.prepare import MemoryStore

    began, ui = time.perf_counter(), ui or Ui(quiet=True)
    try:
        candidate = cache.prepare(cell, ui)
        torch.manual_seed(cell.seed)  # whatever ran before in this process
        items = count(cell.task, cell.options, candidate.tokenizer, candidate.model)
        with ui.progress(f"{cell.label} on {cell.short_task}", items) as advance:
            store = MemoryStore() if parts is None else parts
            measurement = measure(candidate, cell.task, cell.options, store, advance)
    except Exception as error:
        memory = memory_failure(error, cell.model, cell.dtype or "the checkpoint's dtype")
        if memory is None or isinstance(error, DartError):
            raise
        cache.forget()  # the next cell starts with all the memory that there is
        raise memory from None
    device = str(cache.model.device)
    seconds, loading = time.perf_counter() - began, cache.seconds
    cache.seconds = 0.0
    times = {"seconds": seconds, "load_s": loading, "process": os.getpid(), "device": device}
    value = {
        "document": document(cell, measurement, not_finite(measurement), cache),
        "samples": list(measurement.samples),
        "counts": [layer.tolist() for layer in measurement.counts],
        "times": times,
    }
    return dict(finite(value))


def compute(data: Mapping[str, Any], cache: LoadedModelCache) -> Value:
    """The value of the cell ``data`` (``Cell.to_dict``); an error becomes a failed cell."""
    cell = Cell.from_dict(data)
    try:
        return measure_cell(cell, cache)
    except Exception as error:
        return failed_value(cell, failure_text(error))


def failed_value(cell: Cell, error: str) -> Value:
    """The value of a cell of which nothing was measured."""
    return {"document": finite(document(cell, None, error)), "samples": [], "counts": []}


def document(
    cell: Cell,
    measurement: Measurement | None,
    error: str | None,
    cache: LoadedModelCache | None = None,
) -> dict[str, Any]:
    """A cell as a line of results.jsonl."""
    checkpoint, facts = None, {}
    if cache is not None and cache.candidate is not None:
        from dart_llm.models.checkpoint import checkpoint_facts

        known, facts = checkpoint_facts(cache.model), dict(cache.candidate.facts)
        checkpoint = {name: known[name] for name in CHECKPOINT if name in known}
        if "weight_format" in facts:  # rounded weights run dequantised
            checkpoint.pop("weights", None)
    return {
        "key": cell.key,
        "label": cell.label,
        "status": DONE if error is None else FAILED,
        "error": error,
        "cell": {**cell.to_dict(), "protocol": cell.options.protocol},
        "checkpoint": checkpoint,
        "facts": facts,
        "measurement": None if measurement is None else measurement.to_dict(),
    }


def not_finite(measurement: Measurement) -> str | None:
    """Where a number of a measurement is not finite, as one sentence; None when all are.

    A metric other than the headline one may be None: some have no value on few items.
    """
    where = _first_item(measurement)
    for name, value in measurement.metrics.items():
        headline = name == measurement.metric
        if (value is None and headline) or (value is not None and not math.isfinite(value)):
            return f"{name} of {measurement.task} is not finite{where}; try dtype float32"
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
