"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any


@functools.cache
def _trim() -> Callable[[int], Any] | None:
    """glibc's ``malloc_trim``; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], Any] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return found


def give_back() -> None:
    """Return free pages, where the C library can.

    Between the many small blocks of a request glibc keeps what its large ones have left: a program
    that frees everything after every request grows all the same.
    """
    if (trim := _trim()) is not None:
        trim(0)
