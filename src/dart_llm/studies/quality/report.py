"""Tables and plot of quality.json: Markdown, CSV, the terminal's, and a line per cell."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.reporting.figures import (
    INK,
    SOFT,
    Look,
    Palette,
    Plot,
    key,
    log_scale,
    looks_of,
    panels,
    panels_height,
    reference_line,
    whisker_lengths,
)
from dart_llm.reporting.table import Column, Table, escaped, grouped, table_lines
from dart_llm.reporting.words import (
    count,
    dtype_text,
    figure,
    file_text,
    intervals_over,
    percent,
    times,
)
from dart_llm.studies.quality.gaps import ALL, BASELINES, EQUAL_BYTES, EQUAL_SPARSITY
from dart_llm.studies.quality.settings import SHIFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE = "n/a"
"""Where GRIFFIN loses nothing, so that there is no gap to close."""

POOLED = "pooled"

Row = Mapping[str, Any]


def _requested(row: Row) -> str:
    if "sparsities" not in row:
        return percent(row["sparsity"])
    amounts = [percent(value).removesuffix(" %") for value in row["sparsities"]]
    return f"{POOLED} {' + '.join(amounts)} %"


def _griffin(name: str) -> Callable[[Row], str | None]:
    """GRIFFIN's perplexity and sparsity in one of the comparisons."""

    def value(row: Row) -> str | None:
        if row[name] is None or "perplexity" not in row[name]:
            return None
        return f"{figure(row[name]['perplexity'])}\n({percent(row[name]['sparsity'])})"

    return value


def _closed(name: str) -> Callable[[Row], str | None]:
    return lambda row: None if row[name] is None else closed(row[name]).replace(" (", "\n(")


COLUMNS = (
    Column("variant", "variant"),
    Column("requested", _requested),
    Column("achieved", "achieved_sparsity", percent),
    Column("while pruned", "sparsity_while_pruned", percent, terminal=False),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks per slice", "remasks_per_slice", ".1f"),
    Column("FFN bytes", "ffn_bytes_share", ".3f", terminal=False),
    Column("bytes per token", "token_bytes_share", ".3f"),
    Column("perplexity", "perplexity", figure),
    Column("x dense", "times_dense", times),
    Column("GRIFFIN at equal sparsity", _griffin(EQUAL_SPARSITY), terminal=False),
    Column("gap closed", _closed(EQUAL_SPARSITY), needed=True),
    Column("GRIFFIN at equal bytes", _griffin(EQUAL_BYTES), terminal=False),
    Column("gap closed, equal bytes", _closed(EQUAL_BYTES)),
)


def closed(found: Mapping[str, Any]) -> str:
    """ "27.1 % (20 % to 33.2 %)", or n/a."""
    if found["gap_closed"] is None:
        return NONE
    ends, value = found["interval"], percent(found["gap_closed"])
    if ends is None:
        return f"{value} {found.get('no_interval') or ''}".rstrip()
    return f"{value} ({percent(ends[0])} to {percent(ends[1])})"


def tables(document: Row) -> list[Table]:
    """Per model and cell its rows, pooled ones last; at the end what is pooled over all models."""
    every: list[Row] = [*document["cells"], *document["pooled"]]
    return [
        Table("", _caption(document, rows[0]), COLUMNS, rows, nothing="", tight=True)
        for rows in grouped(every, lambda row: (row["model"], row["cell"])).values()
    ]


def _caption(document: Row, first: Row) -> str:
    if first["model"] == ALL:
        return f"{ALL}, {first['cell']}"
    facts = document["checkpoints"].get(first["model"], {})
    about = f"{file_text(facts)}, {dtype_text(facts)}"
    lead = document["lead_tokens"]
    scored = f"{document['prompt_tokens']} prompt"
    scored += f" + {lead} of the first topic" if first["cell"] == SHIFT else ""
    return (
        f"{first['model']} ({about}), {first['cell']}: {count(first['slices'], 'slice')} of "
        f"{', '.join(first['kinds'])}, set {document['set']}; {scored} + {document['tokens']} "
        f"scored tokens; dense perplexity {figure(first['dense_perplexity'])}"
    )


def sentences(document: Row) -> list[str]:
    """What every variant closes of GRIFFIN's gap: pooled, or else at every sparsity."""
    rows = document["pooled"] or [r for r in document["cells"] if r[EQUAL_SPARSITY] is not None]
    return [
        f"{row['model']}, {row['cell']}, {_requested(row)}: {row['variant']} closes "
        f"{closed(row[EQUAL_SPARSITY])} of GRIFFIN's gap at equal sparsity, "
        f"{closed(row[EQUAL_BYTES])} at equal bytes"
        for row in rows
    ]


def markdown(document: Row) -> str:
    """All tables, and what the columns mean."""
    lines = ["# Quality", ""]
    for table in tables(document):
        rows = [[cell.replace("\n", " ") for cell in row] for row in table.cells()]
        lines += [f"## {escaped(table.caption)}", "", *table_lines(table.head, rows), ""]
    lines += ["## Definitions", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    lines += ["", *document["notes"]]
    return "\n".join(lines).rstrip("\n") + "\n"


def csv_table(document: Row) -> Table:
    """quality.csv: a line per measured and per pooled row."""
    rows = [_flat(row) for row in (*document["cells"], *document["pooled"])]
    fields = list(dict.fromkeys(name for row in rows for name in row))
    return Table("quality", "", (), rows, terminal=False, fields=fields)


def _flat(row: Row) -> dict[str, Any]:
    """One level: ``equal_sparsity.gap_closed`` and so on; intervals as two columns."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            nested = _flat({key: part for key, part in value.items() if key != "by_kind"})
            found.update({f"{name}.{key}": part for key, part in nested.items()})
        elif name == "interval":
            low, high = value or (None, None)
            found.update({"interval.low": low, "interval.high": high})
        elif name not in BASELINES:
            found[name] = ";".join(map(str, value)) if isinstance(value, list) else value
    return found


# The plot of quality.json: gap closed per cell with its interval, in both columns.


LOOKS: dict[str, tuple[str, int, str, float]] = {
    EQUAL_SPARSITY: ("at equal achieved sparsity", 0, "o", 0.14),
    EQUAL_BYTES: ("at equal FFN bytes", 4, "s", -0.14),
}
"""Per column its words, colour, marker and place beside the row."""


def make(document: Row) -> list[Plot]:
    """What is closed of the gap, and what each price in bytes buys; where there is anything."""
    return [*_gaps_plot(document), *_bytes_plot(document)]


def _gaps_plot(document: Row) -> list[Plot]:
    """One plot with a panel per model and cell; none where nothing is compared with GRIFFIN."""
    drawn = [
        (table.caption.partition(":")[0], rows)
        for table in tables(document)
        if (rows := [row for row in table.rows if row[EQUAL_SPARSITY]])
    ]
    if not drawn:
        return []

    def draw(figure: Figure, palette: Palette) -> None:
        above, *places = panels(figure, len(drawn), 1)
        for axes, (caption, rows) in zip(places, drawn, strict=True):
            _draw(axes, rows, palette)
            title = "\n".join(textwrap.wrap(caption, 44))
            axes.set_title(title, loc="left", fontsize=8.5, color=INK)
        key(above, places, 2)

    high = 0.9 + 0.24 * max(len(rows) for _, rows in drawn)
    cell = document["cells"][0]
    small = (
        f"{count(cell['slices'], 'slice')} of {', '.join(cell['kinds'])}, set {document['set']}, "
        f"{document['prompt_tokens']} prompt + {document['tokens']} scored tokens · "
        f"{intervals_over('whiskers', cell['slices'], 'slices')}, paired with GRIFFIN"
    )
    title = "Share of GRIFFIN's log-perplexity gap to dense that is closed"
    alt = "Points with intervals per sparsity and variant. " + " ".join(sentences(document))
    height = 0.9 + high * math.ceil(len(drawn) / 2)
    return [Plot("quality", title, alt, small, height, draw)]


ROUNDED = "dense, rounded"


def _bytes_plot(document: Row) -> list[Plot]:
    """Perplexity over dense by bytes per token: a curve per variant, and one of the roundings."""
    rows = [row for row in document["cells"] if row.get("token_bytes_share") is not None]
    drawn = grouped(rows, lambda row: (row["model"], row["cell"]))
    roundings = document.get("roundings", ())
    names = list(dict.fromkeys(_series(row, roundings) for row in rows))
    if not rows:
        return []

    def draw(figure: Figure, palette: Palette) -> None:
        looks = looks_of(names, palette)
        above, *places = panels(figure, len(drawn), 1 + len(names) // 3)
        for axes, (model, cell) in zip(places, drawn, strict=True):
            members = drawn[model, cell]
            for name in names:
                _draw_curve(axes, members, name, roundings, looks[name])
            axes.set_title(f"{model}, {cell}", loc="left", fontsize=8.5, color=INK)
            axes.set_xlabel("bytes per token over dense at bfloat16", fontsize=8, color=SOFT)
            values = [row["times_dense"] for row in members]
            axes.set_yscale("log")
            log_scale(axes, 0.92 * min(1.0, *values), 1.08 * max(1.1, *values))
            reference_line(axes, y=1.0, label="_dense")
            axes.grid(axis="both")
        key(above, places, 3)

    cell = rows[0]
    small = (
        f"{count(cell['slices'], 'slice')} of {', '.join(cell['kinds'])}, set {document['set']}; "
        "lower and further left is better"
    )
    alt = "Curves of perplexity over dense by bytes per token. " + " ".join(
        f"{row['model']}, {row['cell']}, {row['variant']} {_requested(row)}: "
        f"{row['token_bytes_share']:.3f} of the bytes, perplexity x {times(row['times_dense'])}."
        for row in rows
    )
    title = "Perplexity over dense, by the bytes that a token reads"
    height = panels_height(len(drawn), len(names))
    return [Plot("quality-bytes", title, alt, small, height, draw)]


def _series(row: Row, roundings: Sequence[str]) -> str:
    """The curve of a row: all roundings are one."""
    return ROUNDED if row["variant"] in roundings else str(row["variant"])


def _draw_curve(
    axes: Axes, rows: Sequence[Row], name: str, roundings: Sequence[str], look: Look
) -> None:
    curve = [row for row in rows if _series(row, roundings) == name]
    points = sorted((row["token_bytes_share"], row["times_dense"]) for row in curve)
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **look)


def _draw(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    for column, (words, colour, marker, aside) in LOOKS.items():
        known = [(at, row[column]) for at, row in enumerate(rows) if _known(row[column])]
        x = [100 * found["gap_closed"] for _, found in known]
        intervals = [found["interval"] for _, found in known]
        ends = [one and (100 * one[0], 100 * one[1]) for one in intervals]
        axes.errorbar(
            x,
            [at - aside for at, _ in known],
            xerr=whisker_lengths(x, ends) if x else None,
            label=words,
            color=palette[colour],
            marker=marker,
            markersize=5,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            linestyle="none",
            capsize=2.5,
        )
    for at, row in enumerate(rows):
        if not any(_known(row[column]) for column in LOOKS):
            axes.text(0.0, at, f" {NONE}", fontsize=7.5, va="center", color=SOFT)
    reference_line(axes, x=0.0, label="_GRIFFIN")
    names = [
        f"{row['variant']}, {POOLED if 'sparsities' in row else percent(row['sparsity'])}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("gap closed (%), 0 = GRIFFIN, 100 = dense", fontsize=8, color=SOFT)
    axes.grid(axis="x")


def _known(found: Mapping[str, Any]) -> bool:
    return found["gap_closed"] is not None
