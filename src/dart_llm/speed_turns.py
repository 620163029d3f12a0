"""Two rows that decode in turns, so that what drifts in the machine meets both alike.

Costs of a few hundredths of a token drown in the differences between whole repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dart_llm.session import Run
from dart_llm.speed_clock import greedy
from dart_llm.speed_limit import WARM

TURN = 32
"""Timed steps of a turn: observed tokens are added up that often at the latest."""

Make = Callable[[], Run | None]


class _Row:
    """One row and its sequence; attached only in its turns."""

    def __init__(self, model: Any, ids: Tensor, make: Make) -> None:
        self.model, self.run, self._ids = model, make(), ids
        self._cache: Any = None
        self._token = ids[:, -1:]
        self._built: list[int] = []
        self._steps = 0

    def turn(self, steps: int) -> dict[str, Any]:
        """``steps_s``, ``phases`` and ``built`` of some timed steps, after ``WARM`` others."""
        if self.run is None:
            return self._timed(steps, None)
        with self.run as run:
            run.on_remask = lambda remask: self._built.append(self._steps)
            return self._timed(steps, run)

    @torch.inference_mode()
    def _timed(self, steps: int, run: Run | None) -> dict[str, Any]:
        seconds: list[float] = []
        phases: list[str] = []
        if self._cache is None:
            self._cache, self._token = greedy(self.model, self._ids, logits_to_keep=1)
        first = self._steps + WARM
        for _ in range(steps + WARM):
            begin = time.perf_counter()
            _, self._token = greedy(self.model, self._token, cache=self._cache)
            seconds.append(time.perf_counter() - begin)
            phases.append("dense" if run is None else run.phase)
            self._steps += 1
        built = [at - first for at in self._built if at >= first]
        return {"steps_s": seconds[WARM:], "phases": phases[WARM:], "built": built}


def in_turns(model: Any, ids: Tensor, tokens: int, make: Make, base: Make) -> dict[str, Any]:
    """``turns``: pairs of what ``make`` and ``base`` took, ``tokens`` timed steps of each in all.

    Steps as in ``speed_clock.repetition``; ids: [1, P], the prompt of both.
    """
    rows = {"own": _Row(model, ids, make), "base": _Row(model, ids, base)}
    turns = []
    for number in range(max(1, tokens // TURN)):
        names = list(rows) if number % 2 else list(rows)[::-1]
        found = {name: rows[name].turn(min(TURN, tokens)) for name in names}
        turns.append({name: found[name] for name in rows})
    return {"turns": turns}
