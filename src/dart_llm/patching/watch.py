"""Checks at every prompt that an attached model is unchanged; lets one thread at a time run it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.agreement import (
    agreement,
    is_patched,
    parts_of,
    signature,
    weights_unsupported_reason,
)
from dart_llm.models.packed import PackedTensor, place_of
from dart_llm.patching.changes import Changes
from dart_llm.patching.patched_ffn import PatchedFFN

LEAVE = "while this model is being pruned: leave the block first, or call dart_llm.restore(model)"

SMALL = 4096
"""Buffers with at most this many values are compared, e.g. scales or rotary frequencies."""


class Watch:
    """Checks that an attached model is still the one that was attached.

    ``steps``: False if the last check found a change that rules out whole steps, which decode a
    token in one native call.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PatchedFFN], changes: Changes) -> None:
        self.steps = True
        self._model, self._layers, self._changes = model, layers, changes
        self._plain_weights = [agreement(layer.block).weights for layer in layers]
        self._ffns, self._mark = self._ffn_marks(), _model_mark(model)
        self._places: list[tuple[Any, ...]] = []

    def check(self, reads_weights: bool = False) -> None:
        """Look for changes to the model, and adapt to them or raise ``AttachError``.

        A layer whose projections got hooks or new forwards runs masked from now on; after any other
        change that is allowed, whole steps no longer run.  ``reads_weights``: True if kernels read
        the weights at their current addresses from now on.
        """
        if torch.compiler.is_compiling():  # torch can trace neither these checks nor native calls
            return
        parts = parts_of(self._model)
        if reads_weights:
            self._places = _weight_places(parts)
        if self._places and self._places != _weight_places(parts):
            raise AttachError(f"weights were replaced or moved {LEAVE}")
        if (changed := self._changes.overwritten(self._model)) is not None:
            raise AttachError(f"the forward of a {type(changed).__name__} was changed {LEAVE}")
        for layer, plain in zip(self._layers, self._plain_weights, strict=True):
            reason = weights_unsupported_reason(layer.block, attached=True)
            layer.by_weights = plain and reason is None
        unchanged = _model_mark(self._model) == self._mark
        if not unchanged and self._ffns != self._ffn_marks():
            raise AttachError(f"an FFN was changed {LEAVE}")
        self.steps = unchanged and not any(map(is_patched, parts[1:]))

    def _ffn_marks(self) -> list[tuple[Any, ...]]:
        return [signature(layer.block.ffn, layer.block.projections) for layer in self._layers]


def _model_mark(model: Any) -> tuple[Any, ...]:
    """Return what whole steps read only once: code, numbers, small buffers and settings."""
    buffers = [t.tolist() for t in model.buffers() if t.numel() <= SMALL and not t.is_meta]
    text = model.config.get_text_config()
    names = ("_attn_implementation", "attn_logit_softcapping", "final_logit_softcapping")
    return signature(model), buffers, [getattr(text, name, None) for name in names]


def _weight_places(parts: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    """Return each weight's place in memory and the strides; a packed weight's strides are ()."""
    weights = [t for part in parts for t in part._parameters.values() if t is not None]
    strides = [() if isinstance(t, PackedTensor) else t.stride() for t in weights]
    return list(zip(map(place_of, weights), strides, strict=True))


RUNS, GENERATES = ("_call_impl", "decode"), ("_call_impl", "generate")
"""``RUNS``: names of functions that are on a thread's stack during a forward.  ``GENERATES``: those
that are on it during a forward or ``generate``."""


class Turn:
    """Lets one thread at a time run an attached model, so that hooks see one forward at a time.

    ``owners``: the objects whose methods run forwards.  These are the model, and the patch, which
    may run whole steps without calling the model.
    """

    def __init__(self, *owners: object) -> None:
        self._owners = owners
        self._runs = self._generates = 0
        """``_runs``: id of the thread that runs the current forward.  ``_generates``: id of the
        thread that runs ``generate``.  0: no thread does."""
        self._is_closed = False

    def begin_forward(self) -> bool:
        """Begin a forward; return True if the previous one was interrupted.

        Raises ``ConfigError`` if another thread is running the model, ``AttachError`` after
        ``close``.
        """
        thread, before = threading.get_ident(), self._runs
        others = {self._generates, before if self._is_inside(before, RUNS) else 0} - {0, thread}
        if others:
            raise ConfigError(
                "another thread is running this model: a pruned model runs one forward at a time"
            )
        self._runs = thread
        self.check()
        return before != 0

    def check(self) -> None:
        """Raise ``AttachError`` after ``close``."""
        if self._is_closed:
            raise AttachError(
                "the run was left while another thread was generating in it: wait for that "
                "thread before leaving the block, or use one lock for both"
            )

    def end_forward(self) -> None:
        """End a forward."""
        self._runs = 0

    def reserve(self, generates: bool = True) -> None:
        """Begin a ``generate`` call, in which no other thread may run a forward; False: end it."""
        self._generates = threading.get_ident() if generates else 0

    def check_others(self) -> None:
        """Raise ``AttachError`` if another thread is running the model."""
        others = sys._current_frames().keys() - {threading.get_ident()}
        if any(self._is_inside(thread, GENERATES) for thread in others):
            raise AttachError(
                "another thread is generating with this model: attach when it has finished, or "
                "use one lock for both"
            )

    def close(self) -> None:
        """Refuse new forwards; if another thread is running a forward, wait for its end."""
        self._is_closed = True
        while self._runs != threading.get_ident() and self._is_inside(self._runs, RUNS):
            time.sleep(0.001)  # the caller will free memory that this forward reads

    def _is_inside(self, thread: int, names: Sequence[str]) -> bool:
        """Return True if ``thread`` is running a method of an owner with one of these names."""
        frame = sys._current_frames().get(thread) if thread else None
        while frame is not None:
            instance = frame.f_code.co_name in names and frame.f_locals.get("self")
            if any(instance is owner for owner in self._owners):
                return True
            frame = frame.f_back
        return False
