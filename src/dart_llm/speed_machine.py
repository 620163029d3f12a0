"""What the machine can do, measured in the run: read bandwidth, and how far memory grew."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
BUFFER_MIB = 512
"""Of the buffer that is read: no cache holds it."""
READS = 5
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_bandwidth(device: torch.device, mib: int = BUFFER_MIB, reads: int = READS) -> float:
    """Bytes per second at which this process, with its threads, reads a buffer of ``mib`` MiB.

    The better of a sum and of a dot product of its halves, medians of ``reads``.
    """
    buffer = torch.ones(mib * MIB // 4, device=device)
    half = len(buffer) // 2
    first, second = buffer[:half], buffer[half:]
    ways: tuple[Callable[[], Any], ...] = (
        lambda: buffer.sum().item(),
        lambda: torch.dot(first, second).item(),
    )
    return max(buffer.nbytes / _median_seconds(way, reads) for way in ways)


def _median_seconds(way: Callable[[], Any], reads: int) -> float:
    way()
    found = []
    for _ in range(reads):
        begin = time.perf_counter()
        way()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


class Growth:
    """How many bytes the process held at most since this was made, beyond what it held then.

    Of the GPU's allocator for a model on a GPU.  ``bytes`` is None where the system does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            FORGET.write_text("5", encoding="ascii")  # the peak starts anew
        except OSError:
            self.before = None
        else:
            self.before = _status("VmRSS")

    @property
    def bytes(self) -> int | None:
        if self.before is None:
            return None
        peak = int(torch.cuda.max_memory_allocated()) if self.cuda else _status("VmHWM")
        return None if peak is None else max(0, peak - self.before)


def _status(name: str) -> int | None:
    try:
        text = STATUS.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
