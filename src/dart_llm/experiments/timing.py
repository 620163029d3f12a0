"""One timed repetition: attach, then the model's own greedy ``generate``, with a clock beside it.

And what the machine can do, measured in the same run: read bandwidth, and how far memory grew.
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
from dart_llm.experiments import llama_bench
from dart_llm.models.describe import describe
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.records import RunReport
from dart_llm.session.run import Run

WARM = 2
"""Tokens of a repetition that are not timed."""

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


def _generate(model: Any, ids: Tensor, tokens: int, run: Run | None) -> Sample:
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


def reference_turn(
    bench: str, file: Path, threads: int, prompt: int, tokens: int, long: int = 0
) -> Sample:
    """One turn of llama-bench, as ``repetition`` gives one: the mean step stands for all.

    It generates ``tokens`` after ``prompt`` others, as our timed ones; ``long``: tokens of a longer
    prompt whose first token is timed too, 0: none.  ``build`` says what ran.
    """
    sizes = dict.fromkeys(size for size in (prompt, long) if size)
    read = llama_bench.prompt_rows(bench, file, threads, list(sizes))
    depth = prompt + WARM
    generated = llama_bench.decode_row(bench, file, threads, tokens, depth)
    seconds = {one["n_prompt"]: one["avg_ns"] / 1e9 for one in read}
    names = ("build_commit", "build_number", "backends", "model_type", "type_k", "n_threads")
    found = {
        "first_token_s": seconds[prompt],
        "warm_s": [],
        "steps_s": [generated["avg_ns"] / 1e9 / tokens],
        "build": {name: generated.get(name) for name in names},
    }
    return found | ({"prefill_s": seconds[long]} if long else {})


def prompt_ids(model: Any, tokenizer: Any, length: int, seed: int) -> Tensor:
    """[1, length] int64 on the model's device: shipped text, over and over, or random tokens."""
    if tokenizer is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (1, length), generator=generator)
    else:
        known = tokenizer(texts.all_text(), return_tensors="pt", verbose=False).input_ids
        ids = known.repeat(1, -(-length // known.shape[1]))[:, :length]
    return ids.to(model.device)


@torch.inference_mode()
def cache_bytes(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values of one position, all layers together, after ids [1, T]."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache
    length = int(cache.get_seq_length())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / length


def everything(model: Any) -> tuple[LayerMask, ...]:
    """Masks that keep every neuron."""
    return tuple(
        LayerMask(torch.arange(layer.width, device=layer.device), layer.width)
        for layer in describe(model).weights("output", 0)
    )


# What is made of repetitions, and their order.


def timed_mean(end: float, tokens_end: int, warm: float, tokens_warm: int) -> float:
    """A mean over the timed tokens, from means over all tokens and over the untimed ones."""
    timed = tokens_end - tokens_warm
    return (end * tokens_end - warm * tokens_warm) / timed if timed else 0.0


def mad(values: Sequence[float]) -> float:
    """Median of the absolute distances to the median."""
    return float(np.median(np.abs(np.array(values) - np.median(values))))


def token_seconds(samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean time of a timed token, by repetition, in seconds."""
    return [statistics.fmean(one["steps_s"]) for one in samples]


def token_ms(samples: Sequence[Mapping[str, Any]]) -> float:
    """Median over repetitions of the mean time of a timed token, in ms."""
    return statistics.median(1000 * one for one in token_seconds(samples))


def shuffled(labels: Sequence[str], seed: int, number: int) -> list[str]:
    """The order of repetition ``number``: it follows from the seed and the number alone."""
    return random.Random(f"{seed} {number}").sample(list(labels), len(labels))
