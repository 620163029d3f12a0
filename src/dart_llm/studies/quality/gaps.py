"""The share of GRIFFIN's gap to the dense model that methods close: rows, tables and plots.

A variant is a method with its settings.  A variant's gap is its mean loss minus the untouched
model's mean loss on the same tokens, in nats: ln(P / P0), where P and P0 are the perplexities of
the variant and the untouched model.  A variant closes 1 - gap(variant) / gap(GRIFFIN) of the gap.
To pool several sparsities, their gaps are summed first; ratios are never averaged (docs/bench.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.perplexity import perplexity
from dart_llm.experiments import stats
from dart_llm.experiments.variants import DENSE, GRIFFIN
from dart_llm.reporting.figures import (
    INK,
    SOFT,
    Palette,
    Plot,
    key,
    panels,
    reference_line,
    whisker_lengths,
)
from dart_llm.reporting.table import Column, Table, grouped, keys_of
from dart_llm.reporting.words import figure, intervals_over, percent, times, too_few

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
"""A line of results.jsonl: one method on one task."""

Row = Mapping[str, Any]
"""A row of quality.json."""

Array = NDArray[np.float64]

DECIMALS = 3
"""Number of decimals to which GRIFFIN's matched sparsities are rounded."""

EQUAL_SPARSITY, EQUAL_BYTES = "equal_sparsity", "equal_bytes"
"""The two comparisons with GRIFFIN.  For equal sparsity, GRIFFIN runs at the method's achieved
sparsity, in which dense tokens count as 0.  For equal bytes, GRIFFIN runs at sparsity 1 - s, where
s is the share of the FFN bytes that the method reads with executor ``compact``."""

CLOSED = f"{EQUAL_SPARSITY}_gap_closed"
"""The column by which variants are ranked."""


class Group:
    """The lines of a task, by variant and sparsity; the dense model has sparsity 0."""

    def __init__(self, task: str, lines: Iterable[Line]) -> None:
        self.task, self._lines = task, dict[tuple[str, float], Line]()
        for line in lines:
            variant, _, sparsity = str(line["label"]).rpartition("@")
            self._lines[(variant, float(sparsity)) if variant else (DENSE, 0.0)] = line

    def has(self, variant: str, sparsities: Iterable[float]) -> bool:
        """Whether the variant was measured at all of these sparsities."""
        return all((variant, sparsity) in self._lines for sparsity in sparsities)

    def at(self, variant: str, sparsity: float) -> Line:
        """The line of a variant at a sparsity; raises ``KeyError`` if it is missing."""
        return self._lines[variant, sparsity]

    def losses(self, variant: str, sparsity: float) -> Array:
        """Mean loss of each slice, [slices]; sparsity 0 is the untouched model."""
        line = self.at(variant if sparsity else DENSE, sparsity)
        return np.array([item["mean_loss"] for item in line["measurement"]["items"]])

    def gaps(self, variant: str, sparsity: float) -> Array:
        """Mean loss of each slice minus the untouched model's, in nats, [slices]."""
        return self.losses(variant, sparsity) - self.losses(DENSE, 0.0)


def groups(lines: Iterable[Line]) -> list[Group]:
    """The successfully measured lines, grouped by task."""
    measured = (line for line in lines if line["measurement"])
    by_task = grouped(measured, lambda line: str(line["cell"]["task"]).partition(":")[0])
    return [Group(task, members) for task, members in by_task.items()]


def matched_sparsities(line: Line) -> dict[str, float]:
    """Maps each comparison to GRIFFIN's sparsity, at least 0, for the comparison with ``line``."""
    accounting = line["measurement"]["accounting"]
    sparsities = {
        EQUAL_SPARSITY: accounting["achieved_sparsity"],
        EQUAL_BYTES: 1 - accounting["ffn_bytes_share_if_compact"],
    }
    maximum = round(1 - 10.0**-DECIMALS, DECIMALS)
    return {
        name: min(max(0.0, round(value, DECIMALS)), maximum) for name, value in sparsities.items()
    }


def make_rows(
    lines: Iterable[Line],
    variants: Sequence[str],
    sparsities: Sequence[float],
    pool: Sequence[float],
    seed: int,
) -> list[Row]:
    """Per task, a row per measured sparsity and variant, then the pooled rows.

    A variant other than GRIFFIN has a pooled row if it was measured at all sparsities in ``pool``.
    """
    rows: list[Row] = []
    for group in groups(lines):
        for sparsity in sparsities:
            rows += [
                _row(group, variant, sparsity, seed)
                for variant in variants
                if group.has(variant, [sparsity])
            ]
        rows += [
            {
                "task": group.task,
                "variant": variant,
                "sparsities": list(pool),
                "slices": len(group.losses(DENSE, 0.0)),
                **_compared(group, variant, pool, seed),
            }
            for variant in variants
            if variant != GRIFFIN and len(pool) > 1 and group.has(variant, pool)
        ]
    return rows


def _row(group: Group, variant: str, sparsity: float, seed: int) -> Row:
    """The row of a variant at one sparsity."""
    line, gap = group.at(variant, sparsity), float(group.gaps(variant, sparsity).mean())
    items, accounting = line["measurement"]["items"], line["measurement"]["accounting"]
    return {
        "task": group.task,
        "variant": variant,
        "sparsities": [sparsity],
        "slices": len(items),
        "dense_perplexity": perplexity(float(group.losses(DENSE, 0.0).mean())),
        "perplexity": perplexity(float(group.losses(variant, sparsity).mean())),
        "times_dense": perplexity(gap),
        "gap": gap,
        "achieved_sparsity": accounting["achieved_sparsity"],
        "dense_token_share": accounting["dense_token_share"],
        "remasks_per_slice": accounting["remasks"] / len(items),
        "ffn_bytes_share": accounting["ffn_bytes_share_if_compact"],
        "token_bytes_share": accounting.get("token_bytes_share"),
        **({} if variant == GRIFFIN else _compared(group, variant, [sparsity], seed)),
    }


def _compared(group: Group, variant: str, sparsities: Sequence[float], seed: int) -> Row:
    """Both comparisons with GRIFFIN, from the gaps summed over ``sparsities``.

    ``gap_closed``, ``low`` and ``high`` are None if GRIFFIN's gap is not positive.  ``low`` and
    ``high`` are also None with too few slices.
    """
    gaps: Array = np.sum([group.gaps(variant, sparsity) for sparsity in sparsities], axis=0)
    matched = [matched_sparsities(group.at(variant, sparsity)) for sparsity in sparsities]
    compared: dict[str, Any] = {}
    for name in (EQUAL_SPARSITY, EQUAL_BYTES):
        others: Array = np.sum([group.gaps(GRIFFIN, equal[name]) for equal in matched], axis=0)
        interval = stats.gap_closed_interval(gaps, others, seed)
        low, high = (interval and interval.ends) or (None, None)
        values = {
            "sparsities": [equal[name] for equal in matched],
            "gap": float(gaps.mean()),
            "griffin_gap": float(others.mean()),
            "gap_closed": stats.gap_closed(gaps, others),
            "low": low,
            "high": high,
        }
        compared |= {f"{name}_{key}": value for key, value in values.items()}
    return compared


# Tables, the headline and the plot.


def _requested(row: Row) -> str:
    return " + ".join(percent(sparsity) for sparsity in row["sparsities"])


def closed(row: Row, name: str) -> str | None:
    """The gap closed, such as "27.1 % (20 % to 33.2 %)", or n/a; None for GRIFFIN itself."""
    if f"{name}_gap_closed" not in row:
        return None
    value, low, high = (row[f"{name}_{key}"] for key in ("gap_closed", "low", "high"))
    if value is None:  # GRIFFIN loses nothing
        return "n/a"
    interval = too_few(row["slices"]) if low is None else f"({percent(low)} to {percent(high)})"
    return f"{percent(value)} {interval or ''}".rstrip()


COLUMNS = (
    Column("variant", "variant"),
    Column("requested", _requested),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks per slice", "remasks_per_slice", ".1f"),
    Column("bytes per token", "token_bytes_share", ".3f"),
    Column("perplexity", "perplexity", figure),
    Column("x dense", "times_dense", times),
    Column("gap closed", partial(closed, name=EQUAL_SPARSITY), needed=True),
    Column("gap closed, equal bytes", partial(closed, name=EQUAL_BYTES)),
)


def tables(rows: Sequence[Row], about: str) -> list[Table]:
    """A table per task; ``about``: a text on how the rows were measured."""
    options: dict[str, Any] = {"nothing": "", "fields": keys_of(rows)}
    return [
        Table(f"quality-{task}", f"{task}: {about}", COLUMNS, members, **options)
        for task, members in grouped(rows, lambda row: row["task"]).items()
    ]


def headlines(rows: Sequence[Row]) -> list[str]:
    """A sentence per task on the variant that closes most of GRIFFIN's gap, pooled if possible."""
    sentences = []
    for task, members in grouped(rows, lambda row: row["task"]).items():
        pooled = [row for row in members if len(row["sparsities"]) > 1]
        compared = [row for row in pooled or members if row["variant"] != GRIFFIN]
        for best in sorted(compared, key=lambda row: row[CLOSED] or -math.inf)[-1:]:
            sentences.append(
                f"{task}, {_requested(best)}: {best['variant']} closes "
                f"{closed(best, EQUAL_SPARSITY)} of GRIFFIN's gap at equal sparsity, "
                f"{closed(best, EQUAL_BYTES)} at equal bytes"
            )
    return sentences


LOOKS: dict[str, tuple[str, int, str, float]] = {
    EQUAL_SPARSITY: ("at equal achieved sparsity", 0, "o", 0.14),
    EQUAL_BYTES: ("at equal FFN bytes", 4, "s", -0.14),
}
"""Maps each comparison to its label, colour, marker and vertical offset."""


def plots(rows: Sequence[Row], about: str) -> list[Plot]:
    """A plot of the gap closed with its interval, a panel per task; empty without comparisons."""
    compared = [row for row in rows if row["variant"] != GRIFFIN]
    tasks = grouped(compared, lambda row: row["task"])
    if not tasks:
        return []

    def draw(figure: Figure, palette: Palette) -> None:
        above, *drawn = panels(figure, len(tasks), 1)
        for axes, (task, members) in zip(drawn, tasks.items(), strict=True):
            _draw(axes, members, palette)
            axes.set_title(task, loc="left", fontsize=8.5, color=INK)
        key(above, drawn, 2)

    height = 1.8 + 0.24 * max(map(len, tasks.values()))
    small = f"{about} · {intervals_over('whiskers', compared[0]['slices'], 'slices')}"
    title = "Share of GRIFFIN's log-perplexity gap to dense that is closed"
    alt = "Points with intervals per sparsity and variant. " + " ".join(headlines(rows))
    return [Plot("quality", title, alt, small, height, draw)]


def _draw(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    for name, (label, colour, marker, offset) in LOOKS.items():
        values = [row[f"{name}_gap_closed"] for row in rows]
        drawn = [at for at, value in enumerate(values) if value is not None]
        x = [100 * values[at] for at in drawn]
        ends = [[rows[at][f"{name}_{end}"] for end in ("low", "high")] for at in drawn]
        intervals = [None if low is None else (100 * low, 100 * high) for low, high in ends]
        axes.errorbar(
            x,
            [at - offset for at in drawn],
            xerr=whisker_lengths(x, intervals) if x else None,
            label=label,
            color=palette[colour],
            marker=marker,
            markersize=5,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            linestyle="none",
            capsize=2.5,
        )
    reference_line(axes, x=0.0, label="_GRIFFIN")
    names = [f"{row['variant']}, {_requested(row)}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("gap closed (%), 0 = GRIFFIN, 100 = dense", fontsize=8, color=SOFT)
    axes.grid(axis="x")
