"""One timed repetition: attach, then the model's own greedy ``generate``, with a clock beside it.

And what the machine can do, measured in the same run: read bandwidth, and growth of memory.
"""

from __future__ import annotations

import contextlib
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dart_llm.data import texts
from dart_llm.models.describe import describe
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.records import RunReport
from dart_llm.session.run import Run

WARM = 2
"""Tokens of a repetition that are not timed."""

Make = Callable[[], Run | None]
"""Makes a run, not attached; None for the untouched model."""

Sample = dict[str, Any]
"""JSON-able, see ``repetition``."""


def read_bandwidth(device: torch.device, mib: int = 512, reads: int = 5) -> float:
    """Bytes per second at which this process, with its threads, reads a buffer of ``mib`` MiB.

    The better of a sum and of a dot product of its halves, medians of ``reads`` after one that is
    not timed.  No cache should be large enough for the buffer.
    """
    buffer = torch.ones(mib * 2**20 // 4, device=device)
    half = len(buffer) // 2

    def seconds(product: Callable[[], Tensor]) -> float:
        times = [time.perf_counter()]
        for _ in range(1 + reads):
            product().item()
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(times[1:]))

    return buffer.nbytes / min(
        seconds(buffer.sum), seconds(lambda: torch.dot(buffer[:half], buffer[half : 2 * half]))
    )


STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Growth:
    """Peak memory of the process since this was made, beyond what it used then.

    Of the GPU's allocator for a model on a GPU.  ``bytes`` is None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            RESET_PEAK.write_text("5", encoding="ascii")
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
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def repetition(model: Any, ids: Tensor, tokens: int, make: Make) -> Sample:
    """Times in seconds, counts and bytes of one repetition; ``make``: its run, not attached.

    ``first_token_s``: prompt ids [1, P] read and the first token chosen.  ``steps_s``: each of the
    ``tokens`` timed decode steps, with the choice of the next token and what else ``generate`` does
    for it; ``WARM`` steps before them are ``warm_s``.  ``attach_s`` and accounting are absent of
    the untouched model.
    """
    growth = Growth(torch.device(model.device))
    return {**decode(model, ids, tokens, make), "peak_growth_bytes": growth.bytes}


def decode(model: Any, ids: Tensor, tokens: int, make: Make) -> Sample:
    """As ``repetition``, without the memory."""
    begin = time.perf_counter()
    run = make()
    if run is None:
        return _generate(model, ids, tokens, None)
    with run:
        attach = time.perf_counter() - begin
        return {**_generate(model, ids, tokens, run), "attach_s": attach}


def prefill(model: Any, ids: Tensor, make: Make) -> float:
    """Seconds until the first token after ids [1, P] is chosen; ``make`` as of ``repetition``."""
    with make() or contextlib.nullcontext(), torch.inference_mode():
        begin = time.perf_counter()
        logits = model(ids, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())  # no work is pending when the clock is read
        return time.perf_counter() - begin


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt and each token."""

    def __init__(self, run: Run | None) -> None:
        self.run = run
        self.times: list[float] = []
        self.warm: RunReport | None = None

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        steps = len(self.times) - 2  # the first token is the prompt's
        if self.run is not None and steps == WARM:
            self.warm = self.run.report()
            self.times[-1] = time.perf_counter()

    def end(self) -> None:
        return


def _generate(model: Any, ids: Tensor, tokens: int, run: Run | None) -> Sample:
    clock = _Clock(run)
    model.generate(
        ids,
        max_new_tokens=1 + WARM + tokens,
        do_sample=False,
        eos_token_id=None,  # every repetition has the same number of tokens
        streamer=clock,
    )
    seconds = [after - before for before, after in pairwise(clock.times)]
    sample: Sample = {
        "first_token_s": seconds[0],
        "warm_s": seconds[1 : 1 + WARM],
        "steps_s": seconds[1 + WARM :],
    }
    if run is not None and clock.warm is not None:
        sample |= _timed_accounting(clock.warm, run.report())
    return sample


def _timed_accounting(warm: RunReport, end: RunReport) -> Sample:
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


def timed_mean(end: float, tokens_end: int, warm: float, tokens_warm: int) -> float:
    """A mean over the timed tokens, from means over all tokens and over the untimed ones."""
    timed = tokens_end - tokens_warm
    return (end * tokens_end - warm * tokens_warm) / timed if timed else 0.0


def prompt_ids(model: Any, tokenizer: Any, length: int, seed: int) -> Tensor:
    """[1, length] int64 on the model's device: bundled text, repeated, or random tokens."""
    if tokenizer is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
    else:
        text = tokenizer(texts.all_text(), return_tensors="pt", verbose=False).input_ids
        ids = text.repeat(1, -(-length // text.shape[1]))[:, :length]
    return ids.to(model.device)


@torch.inference_mode()
def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position, all layers together, after ids [1, T]."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache
    length = int(cache.get_seq_length())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / length


def full_masks(model: Any) -> tuple[LayerMask, ...]:
    """Masks that keep every neuron."""
    return tuple(
        LayerMask(torch.arange(layer.width, device=layer.device), layer.width)
        for layer in describe(model).weights("output", 0)
    )


# Statistics of repetitions, and their order.


def mad(values: Sequence[float]) -> float:
    """Median of the absolute distances to the median."""
    return float(np.median(np.abs(np.array(values) - np.median(values))))


def token_seconds(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean time of a timed token, by repetition, in seconds."""
    return [statistics.fmean(sample["steps_s"]) for sample in samples]


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of repetition ``number``: it follows from the seed and the number alone."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))
