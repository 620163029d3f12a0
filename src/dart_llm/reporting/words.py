"""Formats numbers, durations, counts and metadata as text.

In this module, ``accounting`` is the result of ``RunReport.to_dict()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TRANSFORMERS, OUR_KERNELS = "transformers", "our kernels"
"""Two ways to decode with the dense model: by transformers, or by the kernels that pruning uses."""

WORTH = 0.1
"""Smallest relative gain in speed that can be worth a loss of quality."""

FEWEST_ITEMS = 6
"""An interval needs this many items; a significant difference, this many items that differ.
With five items, even a sign test in which all items agree has a two-sided p-value of 1/16."""

Row = Mapping[str, Any]


def too_few(n: int | None) -> str | None:
    """Why ``n`` items have no interval: "too few (n = 2)".  None if ``n`` is enough or None."""
    return None if n is None or n >= FEWEST_ITEMS else f"too few (n = {n})"


def intervals_over(marks: str, n: int, items: str) -> str:
    """A note like "whiskers: 95 % bootstrap intervals over 8 passages", or why there are none."""
    if few := too_few(n):
        return f"no {marks}: {items} {few}"
    return f"{marks}: 95 % bootstrap intervals over {n} {items}"


def with_interval(value: float, interval: Row, form: str) -> str:
    """A value with its interval, like "0.123 (0.100 to 0.150)", or with the reason for having none.

    ``interval`` has the keys low, high and n; low is None if there is no interval.
    """
    if interval["low"] is None:
        return f"{value:{form}} {too_few(interval['n']) or ''}".rstrip()
    return f"{value:{form}} ({interval['low']:{form}} to {interval['high']:{form}})"


def mostly_dense(accounting: Row | None) -> str:
    """A note like ", 56 % of tokens dense" if more than half of the tokens ran dense, else ""."""
    share = (accounting or {}).get("dense_token_share")
    return f", {percent(share, 0)} of tokens dense" if share is not None and share > 0.5 else ""


def percent(share: float | None, digits: int = 1) -> str:
    """The share in percent: 0.4375 gives "43.8 %", 0.5 gives "50 %", None gives "not known"."""
    if share is None:
        return "not known"
    text = f"{100 * share:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{'0' if text == '-0' else text} %"


def dtype_text(facts: Mapping[str, Any]) -> str:
    """A checkpoint's dtype and, if the weights are quantised in memory, their format."""
    weights = facts.get("weights")
    return f"{facts.get('dtype')}{f', weights {weights}' if weights else ''}"


def file_text(facts: Mapping[str, Any]) -> str:
    """The quantisation of a checkpoint's file: "file quantisation Q4_1", or "unquantised"."""
    quantisation = facts.get("file_quantisation") or "none"
    return "unquantised" if quantisation == "none" else f"file quantisation {quantisation}"


def checkpoint_line(name: str, facts: Mapping[str, Any]) -> str:
    """A checkpoint in one line: name, file quantisation, dtype, weights, start of the checksum."""
    if not facts.get("dtype"):
        return name
    checksum = f" · sha256 {facts['sha256'][:12]}" if facts.get("sha256") else ""
    return f"{name} · {file_text(facts)} · {dtype_text(facts)}{checksum}"


def figure(value: float | None) -> str:
    """A perplexity to about three digits: 1.23, 17.6, 1,234, 7.0e6."""
    if value is None or not math.isfinite(value):
        return "not known"
    if value >= 100_000:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(ratio: float) -> str:
    """A ratio to about three digits: 1.0, 2.1, 1.08, 12.4, 1,234."""
    if ratio >= 100:
        return figure(round(ratio)).removesuffix(".0")
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}".removesuffix("0")


def row_name(row: Row) -> str:
    """The name of a result's row, such as "dense" or "dart 50 %".

    The name is "dart, own counts" if no sparsity was requested; the masks then determine the number
    of neurons.  If most tokens ran dense, the share of dense tokens follows.
    """
    if row["method"] == "dense":
        return "dense"
    requested = row.get("sparsity")
    counts = ", own counts" if requested is None else f" {percent(requested)}"
    return f"{row['method']}{counts}{mostly_dense(row.get('accounting'))}"


def bytes_sentence(accounting: Row) -> str:
    """A sentence with the share of neurons removed and the share of bytes that this saves."""
    requested, achieved = accounting["requested_sparsity"], accounting["achieved_sparsity"]
    removed = f"{percent(achieved)} of the FFN neurons removed"
    if requested is not None and abs(requested - achieved) >= 0.005:
        removed = f"{percent(requested)} of the FFN neurons requested, {percent(achieved)} removed"
        removed += " on average"
    proxies = accounting.get("proxy_bytes_share") or 0.0  # read in addition, to rank the neurons
    saved = (accounting.get("ffn_share_of_bytes") or 0.0) * (achieved - proxies)
    if head := accounting.get("head"):
        removed += f", {head['bytes_share']:.2f} of the output head read"
        saved = 1 - 1 / accounting["bytes_limit"]
    if not 0 < saved < 1:
        return f"{removed}."
    less = f"{percent(saved, 0)} fewer weight bytes read per token"
    limit = f"at most {1 / (1 - saved):.2f} x faster"
    if accounting.get("executor") == "masked":
        return f"{removed}, by masking, which skips no work (compact would allow {less}: {limit})."
    return f"{removed} = {less} ({limit})."


def count(number: int, noun: str) -> str:
    """A number with its noun, such as "no windows", "1 window" or "2 windows"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def quantity(value: float | None, perplexity: bool) -> str:
    """A metric's value as text; ``figure`` writes a perplexity, and None gives ""."""
    if value is None:
        return ""
    if perplexity:
        return figure(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """A duration as text: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
