"""One timed repetition: attach, then the model's own greedy ``generate``, with a clock beside it.

And what the machine can do, measured in the same run: read bandwidth, and how far memory grew.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dart_llm.pruning.records import RunReport
from dart_llm.session.run import Run
from dart_llm.studies.speed.summary import WARM, timed_mean

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_bandwidth(device: torch.device, mib: int = 512, reads: int = 5) -> float:
    """Bytes per second at which this process, with its threads, reads a buffer of ``mib`` MiB.

    The better of a sum and of a dot product of its halves, medians of ``reads``.  No cache should
    hold the buffer.
    """
    buffer = torch.ones(mib * 2**20 // 4, device=device)
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


Make = Callable[[], Run | None]
"""Gives a run, not attached; None for the untouched model."""

Sample = dict[str, Any]
"""JSON-able, see ``repetition``."""


def repetition(model: Any, ids: Tensor, tokens: int, make: Make) -> Sample:
    """Times in seconds, counts and bytes of one repetition; ``make``: its run, not attached.

    ``first_token_s``: prompt ids [1, P] read and the first token chosen.  ``steps_s``: each of the
    ``tokens`` timed decode steps, with the choice of the next token and what else ``generate`` does
    for it; ``WARM`` steps before them are ``warm_s``.  ``phases``: by step, ``built``: steps in
    which masks were built.  ``attach_s`` and what follows are absent of the untouched model.
    """
    growth = Growth(torch.device(model.device))
    begin = time.perf_counter()
    run = make()
    if run is None:
        found = _decode(model, ids, tokens, None)
    else:
        with run:
            attach = time.perf_counter() - begin
            found = _decode(model, ids, tokens, run)
            found["attach_s"] = attach
    return {**found, "peak_growth_bytes": growth.bytes}


def prefill(model: Any, ids: Tensor, make: Make) -> float:
    """Seconds until the first token after ids [1, P] is chosen; ``make`` as of ``repetition``."""
    with make() or contextlib.nullcontext(), torch.inference_mode():
        begin = time.perf_counter()
        greedy(model, ids, logits_to_keep=1)
        return time.perf_counter() - begin


def greedy(model: Any, ids: Tensor, **given: Any) -> tuple[Any, Tensor]:
    """One forward of ids [1, T]: its cache and the likeliest next token [1, 1]."""
    output = model(ids, use_cache=True, **given)
    token = output.logits[:, -1:].argmax(-1)
    int(token)  # no work is pending when the clock is read
    return output.cache, token


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt and each token, and what ``run`` is doing."""

    def __init__(self, run: Run | None) -> None:
        self.run = run
        self.times: list[float] = []
        self.phases: list[str] = []
        self.built: list[int] = []
        self.warm: RunReport | None = None
        if run is not None:
            run.on_remask = lambda remask: self.built.append(self.steps)

    @property
    def steps(self) -> int:
        """Decode steps that are over: the first token is the prompt's."""
        return len(self.times) - 2

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.run is None or self.steps <= 0:
            return
        self.phases.append(self.run.phase)
        if self.steps == WARM:
            self.warm = self.run.report()
            self.times[-1] = time.perf_counter()

    def end(self) -> None:
        return


def _decode(model: Any, ids: Tensor, tokens: int, run: Run | None) -> Sample:
    clock = _Clock(run)
    model.generate(
        ids,
        max_new_tokens=1 + WARM + tokens,
        do_sample=False,
        eos_token_id=None,  # a text that ends is no measure
        streamer=clock,
    )
    seconds = [after - before for before, after in pairwise(clock.times)]
    found: Sample = {
        "first_token_s": seconds[0],
        "warm_s": seconds[1 : 1 + WARM],
        "steps_s": seconds[1 + WARM :],
    }
    if run is not None and clock.warm is not None:
        built = [at - WARM for at in clock.built if at >= WARM]
        found |= {"phases": clock.phases[WARM:], "built": built}
        found |= _counted(clock.warm, run.report())
    return found


def _counted(warm: RunReport, end: RunReport) -> Sample:
    """Accounting of the timed tokens alone."""
    counts = end.decoded_tokens, warm.decoded_tokens
    names = ("achieved_sparsity", "dense_token_share", "ffn_bytes_share", "proxy_bytes_share")
    means = {
        name: timed_mean(getattr(end, name), counts[0], getattr(warm, name), counts[1])
        for name in names
    }
    remasks = end.remasks - warm.remasks
    if end.head is not None and warm.head is not None:
        read = end.head.read(counts[0]), warm.head.read(counts[1])
        means["head_bytes_share"] = timed_mean(read[0], counts[0], read[1], counts[1])
    return {**means, "remasks": remasks, "extra_memory_bytes": end.extra_memory_bytes}
