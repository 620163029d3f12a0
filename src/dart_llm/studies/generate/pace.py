"""Times of a token, dense, pruned and elsewhere: short interleaved turns on the same text.

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

from dart_llm.experiments.timing import WARM, Make, decode
from dart_llm.models.float32_copy import can_copy, float32_copy
from dart_llm.pruning.records import RunReport
from dart_llm.reporting.speed_up import judge
from dart_llm.session.run import Run

TURNS, FEWEST_TURNS = 8, 4
"""Turns of every way, and how many a slow machine gets at least."""

PATIENCE_S = 15.0
"""Seconds after which no turn begins, once there are ``FEWEST_TURNS``."""

STEPS = 8
"""Tokens that a turn times, at most."""

TAIL = 16
"""Tokens of the text that a turn reads first, at most."""


@dataclass
class Way:
    """A way to decode: a model, and what makes the run to attach (None: the untouched model).

    ``base``: name of the way that runs by the same kernels with nothing removed.
    """

    model: Any
    make: Make = lambda: None
    base: str | None = None
    _report: RunReport | None = field(default=None, init=False)

    def seconds(self, ids: Tensor, tokens: int) -> float:
        """Mean time of ``tokens`` tokens behind ids [1, T]."""
        made = list[Run | None]()

        def make() -> Run | None:
            made.append(self.make())
            return made[0]

        found = decode(self.model, ids.to(self.model.device), tokens, make)
        self._report = made[0].report() if made[0] is not None else None
        return statistics.fmean(found["steps_s"])

    @property
    def limit(self) -> float | None:
        """Bytes of dense over those of the tokens that were timed; None before the first turn."""
        if self._report is None:
            return None
        return 1.0 if self._report.executor == "masked" else self._report.bytes_limit


def interleave(ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds per token of every way, turn by turn; every second turn is in reversed order."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for turn in range(TURNS):
        if turn >= FEWEST_TURNS and time.perf_counter() - began > PATIENCE_S:
            break
        for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            found[name].append(ways[name]())
    return found


def text_end(ids: Tensor, more: Sequence[int], tokens: int, context: int | None) -> Tensor:
    """The end of a text, ids [1, T] and ``more`` behind them, that leaves room for a turn."""
    text = torch.cat([ids, torch.tensor([more], dtype=ids.dtype, device=ids.device)], dim=1)
    room = TAIL if context is None else min(TAIL, max(1, context - 1 - WARM - tokens))
    return text[:, -room:]


def document(
    turns: Mapping[str, Sequence[float]], ways: Mapping[str, Way], reference: str | None
) -> dict[str, Any]:
    """Keys of timing.json: ``turns``, medians of them, and the ratios that can be trusted.

    The time of a pruned text is dense's median over its speed-up, so that the two agree: machines
    drift from turn to turn, and the ratio of one turn does not.
    ``speed_ups``: of every pruned text over dense, as ``SpeedUp.to_dict`` has them; of the first
    one also at the top.  ``over_transformers``: the same over ``reference``, whose weights may be
    in another format, so that bytes set no limit.
    """
    each = {name: statistics.median(seconds) for name, seconds in turns.items()}
    judged = {
        name: judge(turns[way.base], turns[name], way.limit).to_dict()
        for name, way in ways.items()
        if way.base is not None
    }
    for name, one in judged.items():
        if one["speed_up"]:
            each[name] = each[str(ways[name].base)] / one["speed_up"]
    found: dict[str, Any] = {
        "turns": {name: list(seconds) for name, seconds in turns.items()},
        "seconds_per_token": each,
        "tokens_per_second": {name: 1 / seconds for name, seconds in each.items()},
    }
    if judged:
        found |= {"speed_ups": judged, **next(iter(judged.values()))}
    if reference is not None:
        found["over_transformers"] = {
            name: _over(turns, name, reference, ways.get(name), judged.get(name))
            for name in turns
            if name != reference
        }
    return found


def _over(
    turns: Mapping[str, Sequence[float]],
    name: str,
    reference: str,
    way: Way | None,
    judged: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """``name`` over ``reference``; of a pruned text by way of its dense one, so that both agree."""
    if way is None or way.base is None or judged is None:
        return judge(turns[reference], turns[name]).to_dict()
    base = judge(turns[reference], turns[way.base]).to_dict()
    if base["disturbed"] or judged["disturbed"]:
        return {**base, "speed_up": None, "disturbed": base["disturbed"] or judged["disturbed"]}
    return {**base, "speed_up": base["speed_up"] * judged["speed_up"]}


QUICK = 4
"""Tokens by which the faster of two dtypes is chosen."""


def fastest(models: Iterator[Any], ids: Tensor) -> Any:
    """The one of ``models`` whose quickest token behind ids [1, T] is quickest."""
    best, least = None, float("inf")
    for model in models:
        seconds = min(decode(model, ids.to(model.device), QUICK, lambda: None)["steps_s"])
        if seconds < least:
            best, least = model, seconds
    return best


def untouched(model: Any, in_blocks: bool, load: Callable[[], Any]) -> Iterator[Any]:
    """``model`` as transformers holds it: in its dtype, and on a CPU in float32 where that fits.

    ``in_blocks``: its weights are in a file's blocks, which transformers does not know; ``load``
    gives it dequantised, where there is no room for a copy in float32.
    """
    on_cpu = torch.device(model.device).type == "cpu"
    wide = float32_copy(model) if on_cpu and can_copy(model) else None
    if wide is not None:
        for weight in wide.parameters():
            weight.data = weight.data.contiguous()  # blocks may have been held transposed
        yield wide
    if model.dtype == torch.float32 and wide is not None:
        return
    if not in_blocks:
        yield model
    else:
        yield load() if wide is None else copy.deepcopy(wide).to(model.dtype)
