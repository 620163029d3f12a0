"""Whether an attached model still computes what runs in its place: asked at every prompt."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dart_llm.errors import AttachError, ConfigError, UnsupportedModel
from dart_llm.models.agreement import (
    Replacement,
    check_ffns,
    parts_of,
    weights_unsupported_reason,
)
from dart_llm.models.packed import PackedTensor, place_of
from dart_llm.models.steps import step_numbers
from dart_llm.patching.executors import no_steps_reason
from dart_llm.patching.executors.step_agreement import model_signature
from dart_llm.patching.executors.whole_step import WITHOUT
from dart_llm.patching.patched_ffn import PatchedFFN

LEAVE = "while this model is being pruned: leave the block first, or call dart_llm.restore(model)"


class Watch:
    """One attached model, and what was found of it last.

    ``steps``: whether a whole decode step may stand for the model's own.  ``hosts``: modules whose
    forward was replaced, under which name, and that of their class; ``linears``: those whose
    forward was replaced by a product with their weights.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PatchedFFN], executor: str) -> None:
        self.hosts: list[tuple[nn.Module, str, Any]] = []
        self.linears: list[nn.Linear] = []
        self.steps = self._alike = True
        self._numbers: tuple[Any, ...] = ()
        self._model, self._layers, self._executor = model, layers, executor
        self._places: list[tuple[Any, ...]] = []
        self._mark: tuple[Any, ...] = ()

    def remember_places(self) -> None:
        """The native kernels go on reading the weights where they lie now."""
        self._places = _weight_places(parts_of(self._model))

    def look(self) -> None:
        """Fall back where that is right; raise ``AttachError`` for what changed and cannot be.

        A layer whose projections have hooks or forwards of their own runs as by ``masked``, a model
        whose steps would differ runs its own.
        """
        if torch.compiler.is_compiling():  # torch cannot trace this, nor any native call
            return
        parts = parts_of(self._model)
        if self._places and self._places != _weight_places(parts):
            raise AttachError(f"weights were replaced or moved {LEAVE}")
        mark = model_signature(self._model, parts)
        unchanged = mark == self._mark
        for layer in self._layers:
            known = layer.by_weights and unchanged
            layer.by_weights = not weights_unsupported_reason(layer.block, known)
        for host, name, forward in self.hosts:
            ours = isinstance(host.__dict__.get(name), Replacement)
            if not ours or type(host).forward is not forward:
                raise AttachError(f"the forward of a {type(host).__name__} was changed {LEAVE}")
        odd = next((type(one).__name__ for one in self.linears if type(one) is not nn.Linear), "")
        if odd:
            raise AttachError(f"a linear layer was made a {odd} {LEAVE}")
        self._look_at_modules(mark)
        if self._executor in WITHOUT:
            self.steps = self._alike
            if self._alike:
                numbers = step_numbers(self._model)
                self._numbers = self._numbers or numbers
                self.steps = numbers == self._numbers

    def _look_at_modules(self, mark: tuple[Any, ...]) -> None:
        if mark == self._mark:
            return
        try:
            check_ffns(type(self._model).__name__, [layer.block for layer in self._layers])
        except UnsupportedModel as error:
            raise AttachError(f"an FFN was changed {LEAVE} ({error})") from error
        if self._executor in WITHOUT:
            self._alike = not no_steps_reason(self._executor, self._model, mark)
        self._mark = mark


def _weight_places(parts: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    held = (one for part in parts for one in part._parameters.values())
    weights = [one for one in held if one is not None]
    strides = [() if isinstance(one, PackedTensor) else one.stride() for one in weights]
    return list(zip(map(place_of, weights), strides, strict=True))


RUNS, GENERATES = ("_call_impl", "_decode"), ("_call_impl", "generate")
"""Names of the functions in which a thread is while a forward, or any text, is under way."""


class Turn:
    """Which thread runs an attached model: what its hooks see must be one text.

    ``owners``: the model, and the patch that may take steps without a call of it.
    """

    def __init__(self, *owners: object) -> None:
        self._owners = owners
        self._runs = self._generates = 0
        self.is_over = False

    def take(self) -> bool:
        """A forward begins: whether the one before it was left unfinished.

        Raises ``ConfigError`` while another thread runs the model, ``AttachError`` after ``close``.
        """
        own, before = threading.get_ident(), self._runs
        others = {self._generates, before if self._is_inside(before, RUNS) else 0} - {0, own}
        if others:
            raise ConfigError(
                "another thread is running this model: a pruned model runs one forward at a time"
            )
        self._runs = own
        self.check()
        return before != 0

    def check(self) -> None:
        """Raise ``AttachError`` after ``close``."""
        if self.is_over:
            raise AttachError(
                "the run was left while another thread was generating in it: let it wait for that "
                "thread, or let both take turns by a lock"
            )

    def end(self) -> None:
        """The forward is done."""
        self._runs = 0

    def reserve(self) -> None:
        """``generate`` begins: until ``free`` no other thread's forward comes between."""
        self._generates = threading.get_ident()

    def free(self) -> None:
        """``generate`` is done."""
        self._generates = 0

    def begin(self) -> None:
        """Raise ``AttachError`` where another thread is in the middle of a text."""
        own = threading.get_ident()
        if any(self._is_inside(one, GENERATES) for one in sys._current_frames() if one != own):
            raise AttachError(
                "another thread is generating with this model: attach when it has finished, or "
                "let both take turns by a lock"
            )

    def close(self) -> None:
        """No forward begins any more, and none of another thread goes on after this."""
        self.is_over = True
        while self._runs != threading.get_ident() and self._is_inside(self._runs, RUNS):
            time.sleep(0.001)  # it reads what is freed next

    def _is_inside(self, thread: int, names: Sequence[str]) -> bool:
        """Whether ``thread`` is in one of these functions now; an interrupted one has been left."""
        frame = sys._current_frames().get(thread) if thread else None
        while frame is not None:
            called = frame.f_code.co_name in names and frame.f_locals.get("self")
            if any(called is one for one in self._owners):
                return True
            frame = frame.f_back
        return False
