"""The next token, and its text while tokens arrive: whole characters, stop strings left out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.engine.requests import Sampling
from dart_llm.errors import DartError
from dart_llm.session.generation import CONTEXT, HALF, decode_ids

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
        if not all(map(math.isfinite, best.values.tolist())):
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


class Pieces:
    """The text of single tokens, special ones by their names; remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._known.get(token)
        if text is None:
            text = self._known[token] = self._find(token)
        return text

    def _find(self, token: int) -> str:
        text: str = decode_ids(self._tokenizer, [token], special=True)
        if text and not text[0].isspace():  # a first token may have lost its leading space
            twice = decode_ids(self._tokenizer, [token, token], special=True)
            if twice.startswith(text) and twice.endswith(text):
                return twice[len(text) :]
        return text

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text per token: a character of several tokens comes with its last one."""
        texts: list[str] = []
        held: list[int] = []
        for token in ids:
            own = self[token]
            if not held and HALF not in own:
                texts.append(own)
                continue
            held.append(token)
            joined = decode_ids(self._tokenizer, held, special=True)
            whole = not joined.endswith(HALF) or len(held) > CONTEXT
            texts.append(joined if whole else "")
            held = [] if whole else held
        if held:
            texts[-1] = decode_ids(self._tokenizer, held, special=True)
        return texts


class StopFinder:
    """Ends a text at the first of some strings to be complete, and hides it.

    Text that may be the beginning of one is held back until that is known, so that what came out
    does not depend on how the text was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far may be shown now; nothing more once ``found``."""
        if not self._stops:
            return text
        held = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)[1]]
        keep = max(_begun(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back: nothing will follow."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
