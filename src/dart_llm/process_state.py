"""Processes: whether one lives, what a library changes in ours, and its prints kept quiet."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

logger = logging.getLogger("dart_llm")


class _Stdout:
    """A stream that logs what threads print whose names begin with ``prefix``."""

    def __init__(self, inner: Any, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith(self._prefix):
            if text.strip():
                logger.debug("%s", text.strip())
            return len(text)
        return int(self._inner.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def keep_off_stdout(prefix: str) -> Iterator[None]:
    """Send what threads called ``prefix...`` print to the log; others print as ever."""
    with contextlib.redirect_stdout(_Stdout(sys.stdout, prefix)):
        yield


def silent() -> contextlib.AbstractContextManager[None]:
    """Send what any thread prints to the log."""
    return keep_off_stdout("")


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started inside; as before afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def same_sigterm() -> Iterator[None]:
    """The handler of SIGTERM as it was; only the main thread can set it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def is_alive(process: Any) -> bool:
    """Whether this machine has a process of that number; True where that cannot be found out."""
    if not isinstance(process, int) or isinstance(process, bool) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
