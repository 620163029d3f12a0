"""Rows of ``dart-llm tune``: the loss of every candidate, its time, and which one is recommended.

The loss of a candidate on a text is its perplexity over the reference's, minus 1, on the same
tokens; the reference is the dense model in its own dtype.  A few tokens can flatter a candidate, so
it is no less than the exponential of the mean KL, minus 1: what the loss would be on all that the
reference may write there.  Of fewer slices than an interval needs it is that alone: their tokens
say nothing, KL varies little.  Its loss is that of the worse text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.evaluation.perplexity import perplexity
from dart_llm.experiments import stats
from dart_llm.experiments.timing import mad, token_ms, token_seconds
from dart_llm.reporting.speed_up import judge
from dart_llm.reporting.words import FEWEST_ITEMS

REFERENCE = "reference"
"""Variant of the lines that losses are counted from."""

Line = Mapping[str, Any]
"""One slice of one candidate: ``candidate``, ``text``, ``slice``, ``loss``, ``kl``, ``tokens``,
``accounting``."""

Row = dict[str, Any]


def quality_row(label: str, lines: Sequence[Line], seed: int) -> Row:
    """Loss by text, the worse one's with its interval, KL and accounting of a candidate."""
    own = [line for line in lines if line["candidate"] == label]
    scored = {line["slice"] for line in own}
    base = [one for one in lines if one["candidate"] == REFERENCE and one["slice"] in scored]
    texts = {
        text: _on_text(_of(own, text), _of(base, text), seed)
        for text in dict.fromkeys(line["text"] for line in base)
    }
    worst = max(texts, key=lambda text: texts[text]["loss"])
    return {
        "worse_text": worst,
        "loss": texts[worst]["loss"],
        "loss_interval": texts[worst]["loss_interval"],
        "kl": max(one["kl"] for one in texts.values()),
        "loss_range": texts[worst]["loss_range"],
        "perplexity": texts[worst]["perplexity"],
        "slices": len(own),
        **_accounting([line["accounting"] for line in own]),
        "texts": texts,
    }


def _of(lines: Sequence[Line], text: str) -> list[Line]:
    return [line for line in lines if line["text"] == text]


def _on_text(own: Sequence[Line], base: Sequence[Line], seed: int) -> Row:
    losses, dense = ({one["slice"]: (one["loss"], one["tokens"]) for one in x} for x in (own, base))
    found = stats.paired_interval(losses, dense, "ratio_of_exp_mean", seed)
    total = sum(one["tokens"] for one in own)
    means = [sum(one["loss"] * one["tokens"] for one in x) / total for x in (own, base)]
    kl, spread = sum(one["kl"] * one["tokens"] for one in own) / total, [one["kl"] for one in own]
    around = stats.interval(spread, seed=seed)
    over = found and found.ends and [end - 1 for end in found.ends]
    by_tokens = perplexity(means[0] - means[1]) - 1, over
    by_kl = math.expm1(kl), around and around.ends and [*map(math.expm1, around.ends)]
    enough = len(own) >= FEWEST_ITEMS
    loss, ends = max(by_tokens, by_kl, key=lambda one: one[0]) if enough else by_kl
    return {
        "loss": loss,
        "loss_interval": ends,
        "loss_range": [math.expm1(min(spread)), math.expm1(max(spread))],
        "kl": kl,
        "perplexity": perplexity(means[0]),
        "dense_perplexity": perplexity(means[1]),
        "slices": len(own),
    }


def _accounting(parts: Sequence[Mapping[str, Any]]) -> Row:
    """Over all slices, weighted by their decoded tokens."""
    total = sum(part["decoded_tokens"] for part in parts)

    def mean(name: str) -> float | None:
        known = [part[name] for part in parts]
        if None in known:
            return None
        weighted = zip(known, parts, strict=True)
        return float(sum(value * part["decoded_tokens"] for value, part in weighted) / total)

    return {
        "achieved_sparsity": mean("achieved_sparsity"),
        "dense_token_share": mean("dense_token_share"),
        "remasks": sum(part["remasks"] for part in parts),
        "bytes_share": mean("token_bytes_share"),
        "extra_memory_bytes": max(part["extra_memory_bytes"] for part in parts),
    }


def clearly_over(row: Row, max_loss: float) -> bool:
    """Whether the whole interval of the loss lies above what may be lost.

    Of too few slices for an interval: whether the least of their losses does.
    """
    ends = row["loss_interval"]
    return bool((_lost(row, -1) if ends is None else ends[0]) > max_loss)


TIMES = ("ms", "ms_spread", "times_dense", "scatter", "bytes_limit", "disturbed")
"""What is known of a row's time: keys of ``time_row``."""


def time_row(
    samples: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
    limit: float | None = None,
) -> Row:
    """Milliseconds of a decoded token, and how many times as fast as ``base``.

    ``limit``: bytes of ``base`` over bytes of this, which no ratio exceeds; a timing that says so
    is ``disturbed``, and has no ratio.
    """
    each = token_seconds(samples)
    found = judge(token_seconds(base), each, limit)
    return {
        "ms": token_ms(samples),
        "ms_spread": mad([1000 * one for one in each]),
        "times_dense": found.ratio,
        "scatter": found.scatter,
        "bytes_limit": limit,
        "disturbed": found.to_dict()["disturbed"],
    }


def recommend(rows: Sequence[Row], base: str, max_loss: float, noise: float) -> str:
    """Label of the fastest row whose estimated loss is within ``max_loss``.

    What leaves something out must beat the fastest dense row by more than ``noise``, and that one
    the row ``base`` (the model as it is loaded): else the simpler one is taken.  Where nothing is
    within, and ``base`` is not, it is ``base`` all the same.  Disturbed timings recommend nothing.
    """
    fit = [row for row in rows if trusted(row) and row["loss"] <= max_loss]
    named = {row["row"]: row for row in rows}
    plain = [row for row in fit if row["dense"]]
    if not fit:
        return base
    best = min(fit, key=_ms)
    for simpler in (min(plain, key=_ms, default=None), named[base] if named[base] in fit else None):
        if simpler is not None and simpler["ms"] <= best["ms"] * (1 + noise):
            best = simpler
    return str(best["row"])


def trusted(row: Row) -> bool:
    """Whether a row was timed, and its timing was not disturbed."""
    return row["ms"] is not None and row["disturbed"] is None


def undecided(
    rows: Sequence[Row], base: str, recommended: str, max_loss: float, noise: float
) -> list[str]:
    """Labels of rows that further measurements may show to be the better choice; [] if none.

    A few slices and repetitions decide only what is clear: a row is clearly good where it is faster
    than dense by more than ``noise`` and loses no more than ``max_loss``, both beyond their scatter
    (of the repetitions, and over the slices), and clearly not where one of the two is beyond it on
    the other side.
    """
    others = [row for row in rows if row["row"] != base]
    clear = [row for row in others if _gain(row, -1) > 1 + noise and _lost(row, 1) <= max_loss]
    if any(row["row"] == recommended for row in clear):
        return []
    return [
        row["row"]
        for row in others
        if row["ms"] is not None and _gain(row, 1) > 1 + noise and _lost(row, -1) <= max_loss
    ]


def _gain(row: Row, side: int) -> float:
    """The least (-1) or the largest (1) speed-up that the repetitions allow."""
    if row["ms"] is None or row["disturbed"]:
        return math.inf if side > 0 else 0.0
    return float(row["times_dense"] * (1 + side * (row["scatter"] or 0.0)))


def _lost(row: Row, side: int) -> float:
    """The least (-1) or the largest (1) loss that the slices allow."""
    low, high = row["loss_range"]
    return float(min(low, row["loss"]) if side < 0 else max(high, row["loss"]))


def _ms(row: Row) -> float:
    return float(row["ms"])


def pareto(rows: Sequence[Row]) -> list[str]:
    """Labels of the timed rows that no other one beats in loss and time alike."""
    timed = [row for row in rows if trusted(row)]
    return [
        row["row"]
        for row in timed
        if not any(
            other["ms"] <= row["ms"]
            and other["loss"] <= row["loss"]
            and (other["ms"], other["loss"]) != (row["ms"], row["loss"])
            for other in timed
        )
    ]
