"""Progress of calibration: how much memory it takes, then how far it is."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.files import size_text
from dart_llm.models.describe import decoder_layers, describe
from dart_llm.models.float32_products import can_copy, copy_bytes, in_float32, is_emulated
from dart_llm.native.memory import available
from dart_llm.reporting.words import duration

logger = logging.getLogger("dart_llm")

Say = Callable[[str], None]
Advance = Callable[[float], None]
"""Takes the share of a stage that is done, from 0 to 1."""

WRITING, READING = "the model writes text", "the model reads it"
"""Stages of every calibration, for people."""

INSTEAD = "griffin and dart-prompt learn nothing"
"""What to do where it takes too long."""

FIRST_S, EVERY_S = 5.0, 10.0
"""Until the first line, and between two; layers are the chances to log one."""

LARGE = 100_000_000
"""Bytes of memory that the first line names."""

ONE_BY_ONE = 3
"""Tokens that are read in the time in which one is written: all weights for a few rows."""

FLOATS = 16
"""Numbers of width D that the graph of one layer keeps for each token, about; and of width I, a
third as many."""


def ignore(share: float) -> None:
    """An ``Advance`` that logs nothing."""


class Progress:
    """Lines about ``stages``: their names for people, and the work of each, in tokens read."""

    def __init__(self, say: Say, stages: Mapping[str, float], what: str) -> None:
        """``what``: happens, for people.

        A library call logs warnings, where it takes long: else it seems to hang.
        """
        self._say, self._stages, self._total = say, stages, sum(stages.values())
        self._before, self._what = 0.0, what
        self._began = self._logged = time.monotonic()
        if say == logger.info:
            self._say = logger.warning
        else:
            self._announce()

    def _announce(self) -> None:
        if self._what:
            self._say(self._what)
        self._what = ""

    def stage(self, name: str) -> Advance:
        """Begin stage ``name``; returns what takes how far it is."""
        before, work = self._before, self._stages[name]
        self._before += work
        return lambda share: self._advance(name, before + share * work)

    def _advance(self, name: str, done: float) -> None:
        now = time.monotonic()
        wait = FIRST_S if self._logged == self._began else EVERY_S
        if now - self._logged < wait or not done:
            return
        left = (self._total - done) * (now - self._began) / done
        if self._logged == self._began and left < FIRST_S:
            return
        self._announce()
        self._logged = now
        self._say(f"learning ({name}): {100 * done / self._total:.0f} %, about {_rough(left)} left")


def _rough(seconds: float) -> str:
    """A duration to one digit."""
    return duration(max(1.0, round(seconds, -1) if seconds > 20 else round(seconds))).replace(
        ".0 s", " s"
    )


@contextlib.contextmanager
def learning(
    model: Any,
    say: Say,
    what: str,
    work: Mapping[str, float],
    memory: int,
    instead: str = "",
) -> Iterator[tuple[Any, Progress]]:
    """What to learn from in place of ``model`` (``in_float32``), and the progress of it.

    ``what``: happens, and ``instead``: what to do where that takes too long, for people.  ``work``:
    of each stage, in tokens read.  ``memory``: bytes that it takes beside the model.  Raises
    ``ConfigError`` where more than is free, before anything is computed.
    """
    free = available()
    if next(model.parameters()).device.type == "cpu" and memory > free:
        raise ConfigError(
            f"learning takes {size_text(memory)} of memory beside this model and "
            f"{size_text(max(0, free))} is free: store the weights in blocks (--weights q8_0), "
            "learn from a smaller text (length and sequences of self_stats or calibration), or use "
            "method griffin, which learns nothing"
        )
    if is_emulated(model) and can_copy(model):
        memory += copy_bytes(model)
    with in_float32(model) as faster:
        size = f", {size_text(memory)} of memory" if memory > LARGE else ""
        yield faster, Progress(say, work, f"{what}{size}{f'; {instead}' if instead else ''}")


def graph_bytes(model: Any, tokens: int, backward: bool) -> int:
    """Bytes that a forward of ``tokens`` takes, and its graph with ``backward``, about."""
    layers, _, text = decoder_layers(model)
    each = FLOATS * int(text.hidden_size) + FLOATS * describe(model).blocks[0].down_width // 3
    logits = int(text.vocab_size)
    return 4 * tokens * (each * len(layers) + 4 * logits if backward else each + logits)


def text_bytes(model: Any, sequences: int, length: int) -> int:
    """Bytes of the keys and values of sequences that are written together, and their logits."""
    layers, _, text = decoder_layers(model)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kept = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * size * len(layers)
    return 4 * sequences * (2 * length * kept + 4 * int(text.vocab_size))


@contextlib.contextmanager
def layer_ticks(model: Any, advance: Advance) -> Iterator[None]:
    """Inside, every forward of ``model`` reports after each layer which share of it is done."""
    layers: Sequence[nn.Module] = ()
    with contextlib.suppress(UnsupportedModel):  # without layers there are no ticks
        layers = list(decoder_layers(model)[0])

    def tick(share: float) -> Callable[..., None]:
        return lambda *_: advance(share)

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers, 1):
            hook = tick(number / len(layers))
            stack.callback(layer.register_forward_hook(hook).remove)
        yield


def forwards(model: Any, parts: Sequence[Tensor], advance: Advance) -> None:
    """Run parts of ids [B, T] through ``model``, one after the other; what reads them is hooked."""
    for number, part in enumerate(parts):
        with layer_ticks(model, part_of(advance, number, len(parts))):
            model(part.to(model.device), use_cache=False, logits_to_keep=1)


def part_of(advance: Advance, number: int, count: int) -> Advance:
    """What takes the share of part ``number`` of ``count`` that is done."""
    return lambda share: advance((number + share) / count)
