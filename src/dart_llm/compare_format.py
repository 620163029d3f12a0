"""Numbers of a comparison as text."""

from __future__ import annotations

from dart_llm.sentences import figure, times
from dart_llm.stats import Interval


def amount(interval: Interval | None, perplexity: bool) -> str:
    """A difference or a ratio with its interval: "-0.040 (-0.080 to -0.010)"."""
    if interval is None:
        return ""
    ends = (interval.low, interval.high)
    if perplexity:
        return f"x {_ratio(interval.estimate)} ({' to '.join(map(_ratio, ends))})"
    digits = 3 if abs(interval.estimate) < 10 else 1
    low, high = (_signed(end, digits) for end in ends)
    return f"{_signed(interval.estimate, digits)} ({low} to {high})"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else times(value)


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def quantity(value: float | None, perplexity: bool) -> str:
    """A metric's value: perplexities to three digits, the rest to three decimals."""
    if value is None:
        return ""
    if perplexity:
        return figure(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
