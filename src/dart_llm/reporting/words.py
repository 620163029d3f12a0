"""Numbers, bytes, durations and counts as words; the conclusion of a run as a sentence.

What was not measured is left out.  Rows are those of perplexity.json, accounting is
``RunReport.to_dict()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TRANSFORMERS, OUR_KERNELS = "transformers", "our kernels"
"""What decodes a dense text: the untouched model, or the kernels that the pruned one runs by."""

WORTH = 0.1
"""A gain in speed below this is not worth a loss."""

FEWEST_ITEMS = 6
"""Items that an interval needs, and that must differ before a difference can be called significant:
with five even a sign test in which all agree has a two-sided probability of 1/16."""

Row = Mapping[str, Any]


def too_few(n: int | None) -> str | None:
    """Why ``n`` items have no interval: "too few (n = 2)"; None where they have one."""
    return None if n is None or n >= FEWEST_ITEMS else f"too few (n = {n})"


def intervals_over(marks: str, n: int, items: str) -> str:
    """ "whiskers: 95 % bootstrap intervals over 8 passages", or why a picture has none."""
    few = too_few(n)
    return (
        f"no {marks}: {items} {few}"
        if few
        else f"{marks}: 95 % bootstrap intervals over {n} {items}"
    )


def with_interval(value: float, interval: Row, form: str) -> str:
    """ "0.123 (0.100 to 0.150)", or why there is no interval.  ``interval``: low, high and n."""
    if interval["low"] is None:
        return f"{value:{form}} {too_few(interval['n']) or ''}".rstrip()
    return f"{value:{form}} ({interval['low']:{form}} to {interval['high']:{form}})"


def mostly_dense(accounting: Row | None) -> str:
    """ ", 56 % of tokens dense" behind the name of a pruned row of which that is true, or ""."""
    share = (accounting or {}).get("dense_token_share")
    return f", {percent(share, 0)} of tokens dense" if share is not None and share > 0.5 else ""


def percent(share: float | None, digits: int = 1) -> str:
    """0.4375 -> "43.8 %", 0.5 -> "50 %"; None -> "not known"."""
    if share is None:
        return "not known"
    text = f"{100 * share:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{'0' if text == '-0' else text} %"


def dtype_text(facts: Mapping[str, Any]) -> str:
    """A checkpoint's dtype, and its weight format if that is in blocks."""
    weights = facts.get("weights")
    return f"{facts.get('dtype')}{f', weights {weights}' if weights else ''}"


def file_text(facts: Mapping[str, Any]) -> str:
    """ "file quantisation Q4_1", or "unquantised": of the file that a checkpoint came from."""
    quantisation = facts.get("file_quantisation") or "none"
    return "unquantised" if quantisation == "none" else f"file quantisation {quantisation}"


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
    """ "dense", "dart 50 %", or "dart, own counts" where no sparsity was requested.

    Behind it that most of its tokens ran dense, where they did.
    """
    method = str(row.get("method", "unknown"))
    if method == "dense":
        return "dense"
    requested = row.get("sparsity")
    name = f"{method}, own counts" if requested is None else f"{method} {percent(requested)}"
    return f"{name}{mostly_dense(row.get('accounting'))}"


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows with a finite perplexity."""
    return [row for row in rows if isinstance(row.get("perplexity"), int | float)]


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The dense row, if it was measured."""
    return next((row for row in measured(rows) if row.get("method") == "dense"), None)


def headline(rows: Sequence[Row], method: str | None = None) -> Row | None:
    """The row to speak of: the largest sparsity of ``method``, or of all methods."""
    pruned = [row for row in measured(rows) if row.get("method") != "dense"]
    chosen = [row for row in pruned if row.get("method") == method] or pruned
    return max(chosen, key=_removed, default=None)


def _removed(row: Row) -> float:
    """The requested sparsity, or what was achieved where the method set the counts itself."""
    requested = row.get("sparsity")
    if requested is None:
        requested = (row.get("accounting") or {}).get("achieved_sparsity")
    return float(requested or 0.0)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """A row's perplexity over dense; None when dense was not measured."""
    ratio_to_dense, dense = row.get("ratio_to_dense"), dense_row(rows)
    if isinstance(ratio_to_dense, int | float):
        return float(ratio_to_dense)
    return row["perplexity"] / dense["perplexity"] if dense else None


def conclusion(
    rows: Sequence[Row], *, accounting: Row | None = None, method: str | None = None
) -> str:
    """What was removed, what that saves, and what it costs: one sentence.

    ``accounting``: of the run, where no row has one.
    """
    row = headline(rows, method)
    counted = (row or {}).get("accounting") or accounting
    parts = []
    if counted:
        parts.append(_bytes(counted))
    elif row is not None:
        parts.append(f"{percent(_removed(row))} of the FFN neurons removed")
    if row is not None:
        parts.append(_quality(row, rows))
    text = "; ".join(parts)
    return f"{text}." if text else "Nothing was measured."


def bytes_sentence(accounting: Row) -> str:
    """How many neurons went, and what that saves of the bytes read per token."""
    return _bytes(accounting) + "."


def _bytes(accounting: Row) -> str:
    requested, achieved = accounting.get("requested_sparsity"), accounting.get("achieved_sparsity")
    if achieved is None:
        return "The share of neurons removed is not known"
    removed = f"{percent(achieved)} of the FFN neurons removed"
    if requested is not None and abs(requested - achieved) >= 0.005:
        shares = percent(requested), percent(achieved)
        removed = f"{shares[0]} of the FFN neurons requested, {shares[1]} removed on average"
    proxies = accounting.get("proxy_bytes_share") or 0.0  # read on top, to rank the neurons
    saved = (accounting.get("ffn_share_of_bytes") or 0.0) * (achieved - proxies)
    if head := accounting.get("head"):
        removed += f", {head['bytes_share']:.2f} of the output head read"
        saved = 1 - 1 / accounting["bytes_limit"]
    if not 0 < saved < 1:
        return removed
    less = f"{percent(saved, 0)} fewer weight bytes read per token"
    limit = f"at most {1 / (1 - saved):.2f} x faster"
    if accounting.get("executor") == "masked":
        return f"{removed}, by masking, which skips no work (compact would allow {less}: {limit})"
    return f"{removed} = {less} ({limit})"


def _quality(row: Row, rows: Sequence[Row]) -> str:
    dense, over = dense_row(rows), ratio(row, rows)
    if dense is None or over is None:
        return f"perplexity {figure(row['perplexity'])} (dense was not measured)"
    change = f"({figure(dense['perplexity'])} to {figure(row['perplexity'])})"
    return f"perplexity x {times(over)} {change}"


def timing_sentence(timing: Mapping[str, Any]) -> str:
    """Milliseconds per token, dense and pruned, and the speed-up beside its bandwidth limit."""
    each = timing.get("seconds_per_token") or {}
    dense, pruned = each.get("dense"), each.get("pruned")
    if not dense or not pruned:
        measured = dense or pruned
        return f"{1000 * measured:.1f} ms per token." if measured else "No time was measured."
    times = f"Dense {1000 * dense:.1f} ms per token{dense_by(timing)}; pruned {1000 * pruned:.1f}"
    return f"{times}{pace(timing)}."


def dense_by(timing: Mapping[str, Any]) -> str:
    """What decoded the dense text: " by our kernels", " by transformers", or "" if not known."""
    name = timing.get("dense_by")
    return f" by {name}" if name else ""


def pace(judged: Mapping[str, Any]) -> str:
    """A speed-up as ``SpeedUp.to_dict`` has it: ": 1.21 x as fast (bandwidth limit 1.30 x)"."""
    speed_up, limit = judged.get("speed_up"), judged.get("bytes_limit")
    at_most = f" (bandwidth limit {limit:.2f} x)" if limit else ""
    if speed_up is not None:
        how = f"{speed_up:.2f} x as fast" if speed_up >= 1 else f"{1 / speed_up:.2f} x slower"
        return f": {how}{at_most}"
    return f": {judged['disturbed']}{at_most}" if judged.get("disturbed") else ""


def count(number: int, noun: str) -> str:
    """ "no windows", "1 window", "2 windows"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def quantity(value: float | None, perplexity: bool) -> str:
    """A metric's value: perplexities to three digits, the rest to three decimals."""
    if value is None:
        return ""
    if perplexity:
        return figure(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """For people: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 10 min``, ``5 days``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes >= 72 * 60:
        return f"{minutes / 60 / 24:,.0f} days"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
