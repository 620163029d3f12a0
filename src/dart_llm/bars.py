"""transformers' own progress bars: on a terminal only, and only when they are wanted."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Silence transformers' bars in the block, unless ``shown`` and stderr is a terminal."""
    from transformers.utils import logging

    switch: Any = logging
    if (shown and sys.stderr.isatty()) or not switch.is_progress_bar_enabled():
        yield
        return
    switch.disable_progress_bar()
    try:
        yield
    finally:
        switch.enable_progress_bar()


@contextmanager
def no_stray_bars() -> Iterator[None]:
    """Inside a silent ``bars`` block: hide also the bars that transformers cannot switch.

    Its GGUF reader has one.  Log records still come through, for their handlers know their stream.
    """
    from transformers.utils import logging

    switch: Any = logging
    if switch.is_progress_bar_enabled():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
