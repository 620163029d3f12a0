"""What stands on an attached model in place of its own methods."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from dart_llm.errors import AttachError


class NotCopied:
    """What hangs on an attached model: a copy would go on running the original's weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AttachError(
            "this model is being pruned, so it cannot be copied or pickled: leave the block first, "
            "or call dart_llm.restore(model)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})


class Replacement(NotCopied):
    """A method of an attached module; once ``end`` was called, the method that it stood for."""

    def __init__(self, original: Callable[..., Any], make: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.make = original, make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(self.original, *args, **kwargs)

    def end(self) -> None:
        """Whoever kept this (tools that wrap a forward, shallow copies) calls the original now."""
        self.make = _plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.make is not _plain:
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.make is not _plain:
            return super().__reduce_ex__(protocol)
        return _itself, (self.original,)


def _plain(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _itself(original: Any) -> Any:
    return original
