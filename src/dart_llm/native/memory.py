"""Measures free memory and how fast it is read, and moves weights to huge pages.

A decoded token reads every weight once.  With pages of 4 KB, the weights occupy more pages than the
CPU's TLB has entries, and the TLB misses take as much time as the reads; docs/performance.md has
measurements.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from dart_llm.native.build import ops

MAPS, MEMORY = Path("/proc/self/maps"), Path("/proc/meminfo")
"""``MAPS``: Linux's list of this process's mappings.  ``MEMORY``: the machine's free memory."""

GROUP = Path("/sys/fs/cgroup")
"""The folder with memory limits of this process's control group, if there is one."""

Span = tuple[int, int]
"""The first address of a range, and the address after its end."""

PAGE = 2 << 20
"""Bytes of a huge page."""

LEAST = 32 << 20
"""Minimum number of bytes of weights for which huge pages are worthwhile."""

COLLAPSE = 25
"""MADV_COLLAPSE of madvise(2), which moves memory to huge pages but keeps address and content."""

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
"""Linux's list of the CPU's caches."""

UNCACHED = 128 << 20
"""Bytes that ``read_speed`` reads at least."""

RESERVE = 1 << 30
"""Bytes that must stay free when weights are copied only for speed."""


def available() -> int:
    """Bytes that this process can still allocate within the limits of machine and control group."""
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    if MEMORY.is_file():
        fields = (line.split() for line in MEMORY.read_text("utf-8").splitlines())
        free = next((int(n) * 1024 for name, n, *_ in fields if name == "MemAvailable:"), free)
    try:
        limit, used, parts = (
            (GROUP / f"memory.{name}").read_text("utf-8") for name in ("max", "current", "stat")
        )
    except OSError:
        return free
    if limit.strip() == "max":
        return free
    # cached files count as used, but Linux drops them if memory is needed
    files = re.findall(r"^(?:in)?active_file (\d+)$", parts, re.MULTILINE)
    return min(free, int(limit) - int(used) + sum(map(int, files)))


def peak() -> int | None:
    """Peak resident bytes of this process, or peak GPU bytes if a GPU is used; None if unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(size if sys.platform == "darwin" else size * 1024)


def private_maps() -> list[Span]:
    """Private writable mappings of files, as safetensors makes them; adjacent ones are joined."""
    spans: list[Span] = []
    for line in MAPS.read_text("utf-8", "replace").splitlines() if MAPS.is_file() else []:
        where, rights, _, _, inode, *_ = line.split(maxsplit=5)
        if not rights.startswith("rw") or not rights.endswith("p") or inode == "0":
            continue
        low, high = (int(address, 16) for address in where.split("-"))
        if spans and spans[-1][1] == low:
            low = spans.pop()[0]
        spans.append((low, high))
    return spans


def out_of_files(model: nn.Module) -> int:
    """Copy CPU weights from mapped files to memory that can use huge pages.

    Returns the number of copied bytes: 0 for fewer than ``LEAST`` bytes, or if the copies would
    need more than half of the free memory.  Call it before anything else uses the model.
    """
    maps = private_maps()
    plain = [weight for weight in model.parameters() if type(weight) is nn.Parameter]
    weights = [w for w in plain if any(low <= w.data_ptr() < high for low, high in maps)]
    size = sum(weight.nbytes for weight in weights)
    if size < LEAST or size > available() / 2:
        return 0
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            weight.data = weight.data.clone()
    return size


def into_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Move CPU ``tensors`` to huge pages; return the number of pages moved.

    This needs Linux 6.1 or later and at least ``LEAST`` bytes in total; otherwise nothing is moved.
    Pages of mapped files are never moved.
    """
    spans = [(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"]
    if sys.platform != "linux" or sum(size for _, size in spans) < LEAST:
        return 0
    pages = {n for at, size in spans for n in range(at // PAGE, (at + size - 1) // PAGE + 1)}
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(advise(page * PAGE, PAGE, COLLAPSE) == 0 for page in sorted(pages))


def empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor [count] whose values are not set, in huge pages if it has at least two.

    Unlike ``into_huge_pages``, this asks for the pages before they exist, so nothing is moved.
    """
    size = count * dtype.itemsize
    if size < 2 * PAGE or device.type != "cpu" or sys.platform != "linux":
        return torch.empty(count, dtype=dtype, device=device)
    room = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(room, dtype=torch.uint8)
    begin = -data.data_ptr() % PAGE
    return data[begin : begin + size].view(dtype)


def read_speed() -> float:
    """Return how many bytes per second torch's threads read from memory: a few 10 ms.

    The result is what a decoded token could reach if it did nothing but read.  Raises
    ``DartError`` without native kernels.
    """
    return float(ops().read_speed(_uncached()))


@functools.cache
def _uncached() -> Tensor:
    """Numbers of which a cache holds at most half, if a sixteenth of free memory is enough."""
    size = max(UNCACHED, min(2 * largest_cache(), available() // 16))
    return empty(size // 8, torch.int64, torch.device("cpu")).fill_(1)


def largest_cache() -> int:
    """Bytes of the CPU's largest cache; 0 if the system does not say."""
    texts = [path.read_text("utf-8").strip() for path in CACHES.glob("index*/size")]
    return max((int(text[:-1]) << 10 for text in texts if re.fullmatch(r"\d+K", text)), default=0)
