"""One repetition of one row: attach, prompt, a bare greedy decode loop, with a clock beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dart_llm.records import RunReport
from dart_llm.session import Run
from dart_llm.speed_limit import WARM, timed_mean
from dart_llm.speed_machine import Growth

Sample = dict[str, Any]
"""JSON-able, see ``repetition``."""


def repetition(model: Any, ids: Tensor, tokens: int, make: Callable[[], Run | None]) -> Sample:
    """Times in seconds, counts and bytes of one repetition; ``make``: its run, not attached.

    ``first_token_s``: prompt ids [1, P] read and the first token chosen.  ``steps_s``: each of the
    ``tokens`` timed decode steps, the choice of the next token in it; ``WARM`` steps before them
    are ``warm_s``.  ``phases``: by step, ``built``: steps in which masks were built.  ``attach_s``
    and what follows are absent of the untouched model.
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


def greedy(model: Any, ids: Tensor, **given: Any) -> tuple[Any, Tensor]:
    """One forward of ids [1, T]: its cache and the likeliest next token [1, 1]."""
    output = model(ids, use_cache=True, **given)
    token = output.logits[:, -1:].argmax(-1)
    int(token)  # no work is pending when the clock is read
    return output.cache, token


@torch.inference_mode()
def _decode(model: Any, ids: Tensor, tokens: int, run: Run | None) -> Sample:
    begin = time.perf_counter()
    cache, token = greedy(model, ids, logits_to_keep=1)
    found: Sample = {"first_token_s": time.perf_counter() - begin}
    seconds: list[float] = []
    phases: list[str] = []
    built: list[int] = []
    before: RunReport | None = None
    if run is not None:
        run.on_remask = lambda remask: built.append(len(seconds))
    for step in range(tokens + WARM):
        if step == WARM and run is not None:
            before = run.report()
        begin = time.perf_counter()
        _, token = greedy(model, token, cache=cache)
        seconds.append(time.perf_counter() - begin)
        if run is not None:
            phases.append(run.phase)
    found |= {"warm_s": seconds[:WARM], "steps_s": seconds[WARM:]}
    if run is not None and before is not None:
        found |= {"phases": phases[WARM:], "built": [at - WARM for at in built if at >= WARM]}
        found |= _counted(before, run.report())
    return found


def _counted(warm: RunReport, end: RunReport) -> Sample:
    """Accounting of the timed tokens alone."""
    counts = end.decoded_tokens, warm.decoded_tokens
    means = ("achieved_sparsity", "dense_token_share", "ffn_bytes_share", "proxy_bytes_share")
    found: Sample = {
        name: timed_mean(getattr(end, name), counts[0], getattr(warm, name), counts[1])
        for name in means
    }
    return {
        **found,
        "remasks": end.remasks - warm.remasks,
        "extra_memory_bytes": end.extra_memory_bytes,
    }
