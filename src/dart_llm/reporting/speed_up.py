"""Speed-ups judged by the bandwidth limit: a ratio above it is never shown.

Decoding one token reads every weight that it needs once, so a way of decoding that reads fewer
bytes is faster by the ratio of the bytes at most.  A ratio that is clearly larger means that
something else used the machine while one of the two was timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

ADVICE = "measure with dart-llm bench speed"

DISTURBED = f"disturbed: {ADVICE}"
"""Replaces a ratio that cannot be trusted."""

TOLERANCE = 0.1
"""How far above the limit a ratio may lie on a quiet machine; it is shown as the limit.

Kernels that compute as long as they read gain by the weights they leave out, not by the bytes:
where the FFN has fewer bytes a weight than the head (SmolLM2's Q4_1 file: 5 and 8.5 bits), that is
some per cent more.  And bytes of caches and small tensors are estimates.
"""

LARGEST_SCATTER = 0.25
"""A ratio that varies more than this between repetitions says nothing."""


@dataclass(frozen=True)
class SpeedUp:
    """Time of a base over the time of something else.

    ``ratio``: never above ``limit``; None where the timings were disturbed.  ``limit``: bytes of
    the base over bytes of the other; None where they are not comparable.  ``scatter``: half the
    distance between the quartiles of the ratios of the repetitions, over their median; None for a
    single repetition.
    """

    ratio: float | None
    limit: float | None = None
    scatter: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether the timings contradict the bytes or each other."""
        return self.ratio is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: ``speed_up`` (null where disturbed), ``bytes_limit``, ``scatter``,
        ``disturbed`` (null, or a sentence)."""
        return {
            "speed_up": self.ratio,
            "bytes_limit": self.limit,
            "scatter": self.scatter,
            "disturbed": DISTURBED if self.disturbed else None,
        }


def judge(base: Sequence[float], other: Sequence[float], limit: float | None = None) -> SpeedUp:
    """The speed-up of ``other`` over ``base``: seconds per token of interleaved repetitions.

    The k-th entries were measured one after the other.  The ratio is the median of the ratios of
    the repetitions.  It counts as disturbed where it lies above ``limit`` by more than its scatter
    (its lower quartile does too) and more than ``TOLERANCE``, or where it scatters by more than
    ``LARGEST_SCATTER``; any other ratio above the limit is shown as the limit.  Raises
    ``ValueError`` for sequences that are empty or of different lengths.
    """
    ratios = [slow / fast for slow, fast in zip(base, other, strict=True)]
    if not ratios:
        raise ValueError("a speed-up needs at least one repetition")
    ratio, low, scatter = statistics.median(ratios), ratios[0], None
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        scatter = (high - low) / 2 / ratio
    above = limit is not None and ratio > limit * (1 + TOLERANCE) and low > limit
    if above or (scatter is not None and scatter > LARGEST_SCATTER):
        return SpeedUp(None, limit, scatter)
    return SpeedUp(ratio if limit is None else min(ratio, limit), limit, scatter)


def contradicting(times: Mapping[str, Sequence[float]], sizes: Mapping[str, float]) -> set[str]:
    """Names of the timings that contradict the bytes of another one, in the same run.

    ``times``: seconds per token of interleaved repetitions.  ``sizes``: bytes that a token reads,
    all by the same kernels.  Of two that contradict each other both are named: which one was
    disturbed is not known.
    """
    disturbed = set[str]()
    for pair in combinations(sizes, 2):
        slow, fast = sorted(pair, key=lambda name: -sizes[name])
        if judge(times[slow], times[fast], sizes[slow] / sizes[fast]).disturbed:
            disturbed |= {slow, fast}
    return disturbed
