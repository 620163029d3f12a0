"""The next token of every row: greedy, or drawn at a temperature from the likeliest ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dart_llm.engine_ask import Sampling
from dart_llm.errors import DartError

FEW = 64
"""Likeliest tokens that ``top_p`` looks at first; eight times as many whenever they are too few."""

COLDEST = 1e-30
"""Temperatures below it are taken as it: as float32 they would be 0, and 0 / 0 is no chance."""


class Sampler:
    """Draws for the rows of one request; row i of seed s draws the numbers of seed (s, i)."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed = sampling.seed
        self._draws = [
            random.Random(None if seed is None else f"{seed}/{row}") for row in range(sampling.n)
        ]

    def choose(self, logits: Tensor) -> list[int]:
        """Token ids of logits [n, V]; raises ``DartError`` where they are not finite."""
        scores = logits.float()
        best = scores.max(-1)
        if not all(map(_is_finite, best.values.tolist())):
            raise DartError("a logit is not finite: the model overflows; try dtype float32")
        if self.sampling.temperature == 0:
            ids: list[int] = best.indices.tolist()
            return ids
        heat = max(self.sampling.temperature, COLDEST)
        chances = torch.softmax((scores - best.values[:, None]) / heat, -1)
        return [self._draw(row, draw) for row, draw in zip(chances, self._draws, strict=True)]

    def _draw(self, chances: Tensor, draws: random.Random) -> int:
        """One of [V] by its chance."""
        point = draws.random()
        top = self.sampling.top_p
        if top >= 1:
            return _at(chances.double().cumsum(0), point)
        count = FEW
        while True:
            count = min(count, len(chances))
            found = chances.topk(count)
            sums = found.values.double().cumsum(0)
            if float(sums[-1]) >= top or count == len(chances):
                break
            count *= 8
        inside = min(count, int(torch.searchsorted(sums, top)) + 1)
        return int(found.indices[_at(sums[:inside], point)])


def _is_finite(value: float) -> bool:
    return value - value == 0


def _at(sums: Tensor, point: float) -> int:
    """Where ``point`` in [0, 1) of the whole falls in running sums [k]."""
    place = torch.searchsorted(sums, point * sums[-1], right=True)
    return min(int(place), len(sums) - 1)


def logprobs(logits: Tensor, ids: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
    """Per row the chosen token, then the ``count`` likeliest, each with its log probability.

    logits: [n, V].
    """
    known = torch.log_softmax(logits.float(), -1)
    best = known.topk(min(count, known.shape[-1]))
    rows = zip(ids, known, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token, float(row[token])), *zip(top, values, strict=True)]
        for token, row, top, values in rows
    ]
