"""Interrupts at chosen instructions, and what a model must still be after them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import dart_llm
from dart_llm.models import agreement as replacement
from dart_llm.patching import changes
from dart_llm.patching import patch as attach
from dart_llm.patching.executors import native_ffn as layout
from dart_llm.session import run as session

FILES = {str(module.__file__) for module in (attach, changes, layout, replacement, session)}
"""Where a model is changed and put back."""


@contextlib.contextmanager
def interrupted_at(moment: int | None, event: str = "opcode") -> Iterator[list[int]]:
    """Raise ``KeyboardInterrupt`` before the ``moment``-th instruction (or line) of ``FILES``.

    Counted from 1; None: never.  Yields a list of one number: how many were reached.
    """
    count = [0]

    def trace(frame: Any, kind: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = event == "opcode"
        if kind == event:
            count[0] += 1
            if count[0] == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


class Kept:
    """What a model is: values and places of its weights, attributes and hooks of its modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values = [p.detach().clone() for p in model.parameters()]
        self.rest = self._rest()

    def _rest(self) -> list[Any]:
        return [
            [(p.data_ptr(), p.stride()) for p in self.model.parameters()],
            [
                (key, dict(value) if "hooks" in key and value is not None else id(value))
                for module in self.model.modules()
                for key, value in module.__dict__.items()
            ],
        ]

    def out_of_order(self) -> int:
        """Parameters with other values."""
        pairs = zip(self.model.parameters(), self.values, strict=True)
        return sum(not bool((p == value).all()) for p, value in pairs)

    def changed(self) -> bool:
        """Whether anything at all is not what it was."""
        return self.out_of_order() > 0 or self._rest() != self.rest


def end(run: Any) -> None:
    """What a user does after an interrupt."""
    run.detach()
    dart_llm.restore(run.model)
