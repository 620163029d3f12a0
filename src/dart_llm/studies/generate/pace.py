"""Times of a token, dense, pruned and elsewhere: short interleaved repetitions on the same text.

A machine that is busy for a while slows whatever runs then, so nothing is timed one after the
other.  ``reporting.speed_up`` decides which ratios can be trusted.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dart_llm.experiments.stats import judge
from dart_llm.experiments.timing import WARM, Make, decode
from dart_llm.models.float32_products import can_copy, float32_copy
from dart_llm.pruning.records import RunReport
from dart_llm.session.run import Run

DENSE, PRUNED = "dense", "pruned"
"""The two texts of a run, and their times."""

REPETITIONS, FEWEST_REPETITIONS = 8, 4
"""Repetitions of every timing, and how many a slow machine gets at least."""

PATIENCE_S = 15.0
"""Seconds after which no repetition begins, once there are ``FEWEST_REPETITIONS``."""

STEPS = 8
"""Tokens that a repetition times, at most."""

TAIL = 16
"""Tokens of the text that a repetition reads first, at most."""

QUICK = 4
"""Tokens by which the faster of two dtypes is chosen."""

Clock = Callable[[], float]
"""Times one repetition: seconds per token."""


@dataclass
class Decoding:
    """A model to decode with, and what makes the run to attach (None: the untouched model)."""

    model: Any
    make: Make = lambda: None
    _report: RunReport | None = field(default=None, init=False)

    def seconds(self, ids: Tensor, tokens: int) -> float:
        """Mean time of ``tokens`` tokens after ids [1, T]."""
        runs = list[Run | None]()

        def make() -> Run | None:
            runs.append(self.make())
            return runs[0]

        sample = decode(self.model, ids.to(self.model.device), tokens, make)
        self._report = runs[0].report() if runs[0] is not None else None
        return statistics.fmean(sample["steps_s"])

    @property
    def limit(self) -> float | None:
        """Bytes of dense over those of the tokens that were timed; None before that."""
        if self._report is None:
            return None
        return 1.0 if self._report.executor == "masked" else self._report.bytes_limit


def interleave(clocks: Mapping[str, Clock]) -> dict[str, list[float]]:
    """Seconds per token by name and repetition; every second repetition is in reversed order."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    began = time.perf_counter()
    for repetition in range(REPETITIONS):
        if repetition >= FEWEST_REPETITIONS and time.perf_counter() - began > PATIENCE_S:
            break
        for name in list(clocks) if repetition % 2 == 0 else reversed(list(clocks)):
            seconds[name].append(clocks[name]())
    return seconds


def text_end(ids: Tensor, more: Sequence[int], tokens: int, context: int | None) -> Tensor:
    """The end of a text, ids [1, T] and ``more``, that leaves room for a repetition."""
    text = torch.cat([ids, torch.tensor([more], dtype=ids.dtype, device=ids.device)], dim=1)
    room = TAIL if context is None else min(TAIL, max(1, context - 1 - WARM - tokens))
    return text[:, -room:]


def timing_document(
    repetitions: Mapping[str, Sequence[float]], limit: float | None, reference: str | None
) -> dict[str, Any]:
    """Keys of timing.json: ``repetitions``, medians of them, and the ratios that can be trusted.

    The time of the pruned text is dense's median over its speed-up, so that the two agree: machines
    drift from repetition to repetition, and the ratio of one repetition does not.  The speed-up
    over dense is at the top, as ``SpeedUp.to_dict`` has it.  ``over_transformers``: speed-ups over
    ``reference``, whose weights may be in another format, so that bytes set no limit.
    """
    medians = {name: statistics.median(seconds) for name, seconds in repetitions.items()}
    pruned = {}
    if PRUNED in repetitions:
        pruned = judge(repetitions[DENSE], repetitions[PRUNED], limit).to_dict()
        if pruned["speed_up"]:
            medians[PRUNED] = medians[DENSE] / pruned["speed_up"]
    document: dict[str, Any] = {
        "repetitions": {name: list(seconds) for name, seconds in repetitions.items()},
        "seconds_per_token": medians,
        "tokens_per_second": {name: 1 / seconds for name, seconds in medians.items()},
        **pruned,
    }
    if reference is not None:
        over = {
            name: judge(repetitions[reference], seconds).to_dict()
            for name, seconds in repetitions.items()
            if name != reference
        }
        if pruned:
            over[PRUNED] = _product(over[DENSE], pruned)
        document["over_transformers"] = over
    return document


def _product(base: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Dense over the reference, times pruned over dense, so that the three agree."""
    if disturbed := base["disturbed"] or pruned["disturbed"]:
        return {**base, "speed_up": None, "disturbed": disturbed}
    return {**base, "speed_up": base["speed_up"] * pruned["speed_up"]}


def fastest(models: Iterator[Any], ids: Tensor) -> Any:
    """The one of ``models`` whose quickest token after ids [1, T] is quickest."""
    best, least = None, float("inf")
    for model in models:
        seconds = min(decode(model, ids.to(model.device), QUICK, lambda: None)["steps_s"])
        if seconds < least:
            best, least = model, seconds
    return best


def untouched(model: Any, in_blocks: bool, load: Callable[[], Any]) -> Iterator[Any]:
    """``model`` as transformers runs it: in its dtype, and on a CPU in float32 where that fits.

    ``in_blocks``: its weights are in a file's blocks, which transformers does not know; ``load``
    gives it dequantised, where there is no room for a copy in float32.
    """
    on_cpu = torch.device(model.device).type == "cpu"
    wide = float32_copy(model) if on_cpu and can_copy(model) else None
    if wide is not None:
        for weight in wide.parameters():
            weight.data = weight.data.contiguous()  # blocks may have been stored transposed
        yield wide
    if model.dtype == torch.float32 and wide is not None:
        return
    if not in_blocks:
        yield model
    else:
        yield load() if wide is None else copy.deepcopy(wide).to(model.dtype)
