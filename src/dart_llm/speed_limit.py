"""The arithmetic of ``dart-llm bench speed``: bytes, limits, shares, spreads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dart_llm.records import bytes_limit

WARM = 2
"""Tokens of a repetition that are not timed."""


def mean_context(prompt: int, tokens: int) -> float:
    """Positions of the key-value cache that a timed token reads, its own included, on average.

    The first timed token is number ``WARM`` after the prompt, counted from 0.
    """
    return prompt + WARM + (tokens + 1) / 2


@dataclass(frozen=True)
class Bytes:
    """What one dense token reads: ``ffn`` of ``weights`` bytes, and ``cache`` bytes."""

    ffn: float
    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def share(self) -> float:
        """f: the FFN's share of all bytes that a token reads, the cache's among them."""
        return self.ffn / self.total

    def limit(self, sparsity: float, proxy_share: float = 0.0) -> float:
        """1 / (1 - f s); ``proxy_share``: low-bit copies over the FFN's bytes, read on top."""
        return bytes_limit(self.share, sparsity, proxy_share)

    def read(self, ffn_share: float) -> float:
        """Bytes of one token that touches the share ``ffn_share`` of the FFN's bytes."""
        return self.total + self.ffn * (ffn_share - 1)


def timed_mean(end: float, tokens_end: int, warm: float, tokens_warm: int) -> float:
    """A mean over the timed tokens, from means over all tokens and over the untimed ones."""
    timed = tokens_end - tokens_warm
    return (end * tokens_end - warm * tokens_warm) / timed if timed else 0.0


def spread(values: Sequence[float]) -> float:
    """Median of the absolute distances to the median."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


def percentile(values: Sequence[float], percent: float) -> float:
    """With straight lines between the sorted values; the lowest is at 0, the highest at 100."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
