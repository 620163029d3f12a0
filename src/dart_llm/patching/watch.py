"""What must hold while a model is attached: at every prompt, and between threads."""

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
"""Values of a buffer that is compared: scales and the frequencies of rotary embeddings."""


class Watch:
    """Whether what replaces parts of an attached model may still do so.

    ``steps``: whether whole steps may run, once they could when the model was attached.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PatchedFFN], changes: Changes) -> None:
        self.steps = True
        self._model, self._layers, self._changes = model, layers, changes
        self._plain = [agreement(layer.block).weights for layer in layers]
        self._ffns, self._mark = self._ffn_marks(), _model_mark(model)
        self._places: list[tuple[Any, ...]] = []

    def look(self, reads_weights: bool = False) -> None:
        """Fall back where that is right; raise ``AttachError`` for what cannot run any more.

        A layer whose projections have hooks or other forwards runs as by ``masked``; a model in
        which anything else changed runs its own steps.  ``reads_weights``: kernels read the weights
        at their present addresses from now on.
        """
        if torch.compiler.is_compiling():  # torch cannot trace this, nor any native call
            return
        parts = parts_of(self._model)
        if reads_weights:
            self._places = _weight_places(parts)
        if self._places and self._places != _weight_places(parts):
            raise AttachError(f"weights were replaced or moved {LEAVE}")
        if (changed := self._changes.overwritten(self._model)) is not None:
            raise AttachError(f"the forward of a {type(changed).__name__} was changed {LEAVE}")
        for layer, plain in zip(self._layers, self._plain, strict=True):
            reason = weights_unsupported_reason(layer.block, attached=True)
            layer.by_weights = plain and reason is None
        same = _model_mark(self._model) == self._mark
        if not same and self._ffns != self._ffn_marks():
            raise AttachError(f"an FFN was changed {LEAVE}")
        self.steps = same and not any(map(is_patched, parts[1:]))

    def _ffn_marks(self) -> list[tuple[Any, ...]]:
        return [signature(each.block.ffn, each.block.projections) for each in self._layers]


def _model_mark(model: Any) -> tuple[Any, ...]:
    """What whole steps read once, beside the weights: code, numbers, small buffers, settings."""
    buffers = [t.tolist() for t in model.buffers() if t.numel() <= SMALL and not t.is_meta]
    text = model.config.get_text_config()
    names = ("_attn_implementation", "attn_logit_softcapping", "final_logit_softcapping")
    return signature(model), buffers, [getattr(text, name, None) for name in names]


def _weight_places(parts: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    weights = [t for part in parts for t in part._parameters.values() if t is not None]
    strides = [() if isinstance(t, PackedTensor) else t.stride() for t in weights]
    return list(zip(map(place_of, weights), strides, strict=True))


RUNS, GENERATES = ("_call_impl", "_decode"), ("_call_impl", "generate")
"""Functions in which a thread is during a forward, and during any call of the model."""


class Turn:
    """Which thread runs an attached model: its hooks must see one sequence at a time.

    ``owners``: the model, and the patch that may take steps without a call of it.
    """

    def __init__(self, *owners: object) -> None:
        self._owners = owners
        self._runs = self._generates = 0
        """The threads of the newest forward, until it is done, and of ``generate``."""
        self._is_over = False

    def take(self) -> bool:
        """A forward begins: whether the one before it was left unfinished.

        Raises ``ConfigError`` while another thread runs the model, ``AttachError`` after ``close``.
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
        if self._is_over:
            raise AttachError(
                "the run was left while another thread was generating in it: let it wait for that "
                "thread, or use one lock for both"
            )

    def end(self) -> None:
        """The forward is done."""
        self._runs = 0

    def reserve(self, generates: bool = True) -> None:
        """``generate`` begins or ends: in between no other thread's forward runs."""
        self._generates = threading.get_ident() if generates else 0

    def begin(self) -> None:
        """Raise ``AttachError`` where another thread is in the middle of a text."""
        others = sys._current_frames().keys() - {threading.get_ident()}
        if any(self._is_inside(thread, GENERATES) for thread in others):
            raise AttachError(
                "another thread is generating with this model: attach when it has finished, or "
                "let both take turns by a lock"
            )

    def close(self) -> None:
        """No forward begins any more, and none of another thread continues after this."""
        self._is_over = True
        while self._runs != threading.get_ident() and self._is_inside(self._runs, RUNS):
            time.sleep(0.001)  # it reads what is freed next

    def _is_inside(self, thread: int, names: Sequence[str]) -> bool:
        """Whether ``thread`` is in one of these functions now; an interrupted one has been left."""
        frame = sys._current_frames().get(thread) if thread else None
        while frame is not None:
            called = frame.f_code.co_name in names and frame.f_locals.get("self")
            if any(called is owner for owner in self._owners):
                return True
            frame = frame.f_back
        return False
