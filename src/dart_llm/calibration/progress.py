"""What learning says: before it starts how long it takes and how much memory, then how far it is.

One object for all steps of learning.  Work is counted in multiply-adds; how many this machine does
in a second is measured first, on one of the model's own matrices.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.files import size_text
from dart_llm.models.describe import decoder_layers, describe
from dart_llm.models.ffn import matrix_of
from dart_llm.models.float32_copy import can_copy, copy_bytes, in_float32
from dart_llm.models.float32_products import is_emulated
from dart_llm.native.memory import available
from dart_llm.reporting.words import duration

logger = logging.getLogger("dart_llm")

Say = Callable[[str], None]
Advance = Callable[[float], None]
"""Takes the share of a stage that is done, from 0 to 1."""

WRITING, READING = "the model writes text", "the model reads it"
"""Stages that learning has in common, in words."""

INSTEAD = "griffin and dart-prompt learn nothing"
"""What to do where it takes too long."""

EVERY_S = 10.0
"""Between two lines; with what runs between two chances to say one they are 15 apart at most."""

QUICK_S = 5.0
"""What takes no longer is not logged where nobody asked for news."""

LARGE = 100_000_000
"""Bytes from which a first line names the memory that learning takes."""

ROWS = 64
"""Vectors of the product by which the speed is measured."""

ONE_BY_ONE = 3
"""Tokens that are read in the time in which one is written: all weights for a few rows."""

SURE = 0.02
"""Share of the work, or of a stage, from which its own speed says how long the rest takes."""

FLOATS = 16
"""Numbers of width D that the graph of one layer keeps for each token, about; and of width I, a
third as many."""


def nothing(share: float) -> None:
    """An ``Advance`` that tells nobody."""


class Progress:
    """Lines about ``stages``: their names for people, and the multiply-adds of each."""

    def __init__(self, say: Say, stages: Mapping[str, float], speed: float) -> None:
        """``speed``: multiply-adds a second."""
        self._say, self._stages, self._speed = say, dict(stages), speed
        self.expected = sum(stages.values()) / speed
        self._stage, self._share, self._done = "", 0.0, 0.0
        self._began = self._stage_began = self._told = time.monotonic()

    def announce(self, what: str, memory: int, instead: str) -> None:
        """Say how long ``what`` takes, and how much memory; ``instead``: what to do if too long.

        Where nobody asked for news they are logged as warnings, if they are worth it: a call that
        is silent for minutes seems to hang.
        """
        quick = self.expected < QUICK_S
        if self._say == logger.info:
            self._say = logger.warning
            if quick:
                return
        about = "a few seconds" if quick else f"about {_rough(self.expected)}"
        size = f", {size_text(memory)} of memory" if memory > LARGE else ""
        self._say(f"{what}: {about}{size}{'' if quick or not instead else f'; {instead}'}")

    def stage(self, name: str) -> Advance:
        """Begin stage ``name``; returns what takes how far it is."""
        self._done += self._stages.pop(self._stage, 0.0)
        self._stage, self._share, self._stage_began = name, 0.0, time.monotonic()
        return self._advance

    def _advance(self, share: float) -> None:
        now, self._share = time.monotonic(), share
        first = self._told == self._began and now - self._began >= QUICK_S
        if now - self._told < EVERY_S and not first:
            return
        left = self._left(now)
        if first and left < QUICK_S:
            return
        self._told = now
        whole = self._done + sum(self._stages.values())
        done = self._done + share * self._stages.get(self._stage, 0.0)
        self._say(
            f"learning ({self._stage}): {100 * done / whole:.0f} %, about {_rough(left)} left"
        )

    def _left(self, now: float) -> float:
        """Seconds: of this stage by its own speed, of the later ones by the speed until now."""
        here = self._stages.get(self._stage, 0.0)
        later = sum(self._stages.values()) - here
        done = self._done + self._share * here
        sure = done > SURE * (self._done + here + later) and now > self._began
        speed = done / (now - self._began) if sure else self._speed
        if self._share < SURE:
            return (here + later - self._share * here) / speed
        return (now - self._stage_began) * (1 / self._share - 1) + later / speed


def _rough(seconds: float) -> str:
    """A duration of which nobody knows more than a digit."""
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
    multiply-adds of each stage.  ``memory``: bytes that it takes beside the model.  Raises
    ``ConfigError`` where more than is free, before anything is computed.
    """
    check_memory(model, memory)
    if is_emulated(model) and can_copy(model):
        memory += copy_bytes(model)
    with in_float32(model) as faster:
        progress = Progress(say, work, speed_of(faster))
        progress.announce(what, memory, instead)
        yield faster, progress


def check_memory(model: nn.Module, needed: int) -> None:
    """Raise ``ConfigError`` where learning would not fit into free memory."""
    free = available()
    if next(model.parameters()).device.type == "cpu" and needed > free:
        raise ConfigError(
            f"learning takes {size_text(needed)} of memory beside this model and "
            f"{size_text(max(0, free))} is free: hold the weights in blocks (--weights q8_0), "
            "learn from a smaller text (length and sequences of prior or calibration), or use "
            "method griffin, which learns nothing"
        )


def weights_of(model: nn.Module) -> int:
    """Multiply-adds of one token: a weight each."""
    return sum(one.numel() for one in model.parameters())


@torch.no_grad()
def speed_of(model: Any) -> float:
    """Multiply-adds a second of forwards of many tokens, by a product with one matrix."""
    try:
        weight = matrix_of(describe(model).blocks[0].up).detach()
    except UnsupportedModel:
        weight = next(one.detach() for one in model.parameters() if one.dim() == 2)
    if weight.is_meta:
        weight = torch.ones(weight.shape, dtype=weight.dtype)
    x = torch.ones(ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        F.linear(x, weight)[-1, -1].item()  # which waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return ROWS * weight.numel() / max(best, 1e-7)


def graph_bytes(model: Any, tokens: int, backward: bool) -> int:
    """Bytes that a forward of ``tokens`` takes, and its graph with ``backward``, about."""
    layers, _, text = decoder_layers(model)
    width = int(text.hidden_size)
    block = describe(model).blocks[0]
    each = FLOATS * width + FLOATS * block.down_width // 3
    logits = int(text.vocab_size)
    return 4 * tokens * (each * len(layers) + 4 * logits if backward else each + logits)


def text_bytes(model: Any, sequences: int, length: int) -> int:
    """Bytes of the keys and values of texts that are written together, and their logits."""
    layers, _, text = decoder_layers(model)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kept = 2 * int(getattr(text, "num_key_value_heads", None) or heads) * size * len(layers)
    return 4 * sequences * (2 * length * kept + 4 * int(text.vocab_size))


@contextlib.contextmanager
def layer_ticks(model: Any, advance: Advance) -> Iterator[None]:
    """Inside, every forward of ``model`` says after each layer which share of it is done."""
    layers: Sequence[nn.Module] = ()
    with contextlib.suppress(UnsupportedModel):  # nothing is known of what is inside
        layers = list(decoder_layers(model)[0])

    def tick(share: float) -> Callable[..., None]:
        return lambda *_: advance(share)

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            hook = tick((number + 1) / len(layers))
            stack.callback(layer.register_forward_hook(hook).remove)
        yield


def forwards(model: Any, parts: Sequence[Tensor], advance: Advance) -> Iterator[None]:
    """Run parts of ids [B, T] through ``model``, one after the other; what reads them is hooked."""
    for number, part in enumerate(parts):
        with layer_ticks(model, part_of(advance, number, len(parts))):
            model(part.to(model.device), use_cache=False, logits_to_keep=1)
        yield


def part_of(advance: Advance, number: int, count: int) -> Advance:
    """What takes the share of part ``number`` of ``count`` that is done."""
    return lambda share: advance((number + share) / count)
