"""The model that a sweep holds from one cell to the next, so that it is loaded once."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dart_llm.errors import DartError

if TYPE_CHECKING:
    from dart_llm.candidate import Candidate
    from dart_llm.cell import Cell
    from dart_llm.ui import Ui

_CHECKPOINT = ("name", "revision", "file_quantisation", "sha256", "dtype")
"""What ``result.json`` says of the checkpoint: nothing that differs between machines."""


@dataclass
class HeldModel:
    """The newest model of one process's share of a sweep, and the newest candidate made of it."""

    name: str = ""
    model: Any = None
    tokenizer: Any = None
    prepared: str = ""
    candidate: Candidate | None = None
    seconds: float = 0.0
    """What loading took, until ``loading_time`` is asked."""
    broken: dict[str, DartError] = field(default_factory=dict)
    """Models that could not be loaded: not tried again for the next cell."""

    def forget(self) -> None:
        """Drop the model, so that its memory is free; failed models stay known."""
        self.name, self.model, self.tokenizer, self.seconds = "", None, None, 0.0
        self.prepared, self.candidate = "", None
        gc.collect()

    def make(self, cell: Cell, ui: Ui) -> Candidate:
        """The cell's model, pruned as it asks.

        Raises ``DartError`` when it cannot be had, at once when that is known from an earlier cell.
        """
        self._load(cell, ui)
        config = cell.config()
        wanted = json.dumps([config.to_dict(), cell.calibration, cell.inputs.get("calibration")])
        if self.candidate is None or self.prepared != wanted:
            from dart_llm.prepare import prepare

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
        from dart_llm.loading import checkpoint_facts

        facts = checkpoint_facts(self.model)
        return {name: facts.get(name) for name in _CHECKPOINT}

    def loading_time(self) -> float:
        """Seconds that loading took; 0 when they have been told already."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _load(self, cell: Cell, ui: Ui) -> None:
        from dart_llm.loading import load

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
