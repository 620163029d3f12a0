"""Losses around changes of topic: means per topic, bins from the change on, recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

BIN = 16
"""Tokens of one mean in ``first``."""

WINDOW, BEFORE, MARGIN = 32, 64, 0.1
"""A loss has recovered where its mean excess over dense in a window of ``WINDOW`` tokens is at most
that of the ``BEFORE`` tokens before the change plus ``MARGIN`` nats."""

Losses = Sequence[float | None]
"""Nats per token after the prompt; None for the first one, which nothing pruned predicts."""


def topics(losses: Losses, starts: Sequence[int], moment: int) -> list[dict[str, Any]]:
    """Per topic its mean loss, and of consecutive whole bins of ``BIN`` tokens from its start on.

    ``starts``: index of each topic's first token.  ``later``: the same mean from ``moment`` tokens
    after the start on, None where the topic is shorter.
    """
    found = []
    for number, (start, end) in enumerate(spans(losses, starts)):
        own = _known(losses, start, end)
        bins = range(start, end - BIN + 1, BIN)
        later = _known(losses, start + moment, end)
        found.append(
            {
                "topic": number,
                "start": start,
                "tokens": len(own),
                "mean_loss": mean(own),
                "first": [mean(_known(losses, begin, begin + BIN)) for begin in bins],
                "later": {"from": moment, "tokens": len(later), "mean_loss": mean(later)}
                if later
                else None,
            }
        )
    return found


def spans(losses: Losses, starts: Sequence[int]) -> list[tuple[int, int]]:
    """First index of every topic, and the one after its last."""
    return list(zip(starts, [*starts[1:], len(losses)], strict=True))


def recovery(losses: Losses, dense: Losses, starts: Sequence[int]) -> list[dict[str, Any]]:
    """Per change: tokens after it until the loss has recovered, None when it does not.

    The smallest t such that the mean excess over dense of the tokens t to t + 31 after the change
    is at most that of the (up to) 64 tokens before it plus 0.1 nat.  All of them lie before the
    next change; ``within``: tokens up to there.
    """
    excess = [
        None if own is None or other is None else own - other
        for own, other in zip(losses, dense, strict=True)
    ]
    found = []
    for number, (start, end) in list(enumerate(spans(losses, starts)))[1:]:
        before = mean(_known(excess, max(0, start - BEFORE), start))
        windows = range(start, end - WINDOW + 1) if before is not None else ()
        bound = (before or 0.0) + MARGIN
        later = (t for t in windows if (mean(_known(excess, t, t + WINDOW)) or 0.0) <= bound)
        first = next(later, None)
        tokens = None if first is None else first - start
        found.append({"topic": number, "tokens": tokens, "within": end - start})
    return found


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def _known(losses: Losses, start: int, end: int) -> list[float]:
    return [loss for loss in losses[start:end] if loss is not None]
