"""Checks the memory that a calibration needs, and logs the share that is done and the time left."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.files import size_text
from dart_llm.models.describe import decoder_layers, describe
from dart_llm.models.float32_products import can_copy, copy_bytes, in_float32, is_emulated
from dart_llm.native.memory import available
from dart_llm.reporting.words import duration

logger = logging.getLogger("dart_llm")

Say = Callable[[str], None]
Advance = Callable[[float], None]
"""``Say``: logs a line.  ``Advance``: called with the share of a stage that is done, 0 to 1."""

FIRST_S, EVERY_S = 5.0, 10.0
"""Minimum seconds before the first progress line, and between two such lines."""

LARGE = 100_000_000
"""The first line reports the memory needed if that is more than this many bytes."""

FLOATS = 16
"""Approximate number of vectors of hidden size D that autograd's graph keeps per token and layer.
The graph also keeps a third as many vectors with one value per neuron."""


def ignore(share: float) -> None:
    """An ``Advance`` that logs nothing."""


class Progress:
    """Logs progress; ``stages`` maps each stage's name to its work, in forwards of one token."""

    def __init__(self, say: Say, stages: Mapping[str, float], what: str) -> None:
        """``say``: logs a line.  ``what``: the task, in words.

        In library calls, ``say`` is ``logger.info``, whose lines are usually hidden.  A slow task
        would then seem to hang, so its lines are logged as warnings.
        """
        self._stages, self._total, self._before = stages, sum(stages.values()), 0.0
        quiet = say == logger.info
        self._say, self._what = (logger.warning, what) if quiet else (say, "")
        self._began = self._logged = time.monotonic()
        if not quiet:
            say(what)

    def stage(self, name: str) -> Advance:
        """Begin stage ``name``; return the function to call as it advances."""
        before, work = self._before, self._stages[name]
        self._before += work
        return lambda share: self._advance(name, before + share * work)

    def _advance(self, name: str, done: float) -> None:
        now = time.monotonic()
        first = self._logged == self._began
        if now - self._logged < (FIRST_S if first else EVERY_S) or not done:
            return
        left = (self._total - done) * (now - self._began) / done
        if first and left < FIRST_S:
            return
        if self._what:
            self._say(self._what)
        self._what, self._logged = "", now
        rounded = max(1.0, round(left, -1) if left > 20 else round(left))
        time_left = duration(rounded).replace(".0 ", " ")
        self._say(f"learning ({name}): {100 * done / self._total:.0f} %, about {time_left} left")


@contextlib.contextmanager
def learning(
    model: Any, say: Say, what: str, work: Mapping[str, float], memory: int
) -> Iterator[tuple[Any, Progress]]:
    """A context with the model to calibrate (``model`` or a float32 copy) and a ``Progress``.

    ``what``: the task, in words.  ``work``: the stages of ``Progress``.  ``memory``: bytes needed
    in addition to the model.  Raises ``ConfigError``, before any computation, if the model is on a
    CPU and fewer bytes are free.
    """
    free = available()
    if next(model.parameters()).device.type == "cpu" and memory > free:
        raise ConfigError(
            f"learning needs {size_text(memory)} of memory in addition to this model, but only "
            f"{size_text(max(0, free))} is free: quantize the weights (--weights q8_0), learn from "
            "a smaller text (length and sequences of self_stats or calibration), or use method "
            "griffin, which learns nothing"
        )
    if is_emulated(model) and can_copy(model):
        memory += copy_bytes(model)
    size = f", {size_text(memory)} of memory" if memory > LARGE else ""
    with in_float32(model) as faster:
        what = f"{what}{size}; griffin and dart-prompt learn nothing"
        yield faster, Progress(say, work, what)


def graph_bytes(model: Any, tokens: int, backward: bool) -> int:
    """Approximate bytes of a forward of ``tokens`` tokens; ``backward``: with autograd's graph."""
    layers, _, text = decoder_layers(model)
    layer = FLOATS * int(text.hidden_size) + FLOATS * describe(model).blocks[0].down_width // 3
    logits = int(text.vocab_size)
    return 4 * tokens * (layer * len(layers) + 4 * logits if backward else layer + logits)


def text_bytes(model: Any, sequences: int, length: int) -> int:
    """Bytes of KV cache and logits while a batch is generated; ``sequences``: the batch size."""
    layers, _, text = decoder_layers(model)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    per_token = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * size * len(layers)
    return 4 * sequences * (2 * length * per_token + 4 * int(text.vocab_size))
