"""Plots and page of a drift study, from the records of its runs.

A run is one method on one source (a prompt or a passage).  ``never`` is dart without re-masks.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from dart_llm.experiments import stats
from dart_llm.experiments.line_plots import Curve, Panel, draw_checks, line_plot, worth_drawing
from dart_llm.experiments.stats import Interval
from dart_llm.files import write_text
from dart_llm.reporting import page
from dart_llm.reporting.figures import INK, MAX_PANELS, Palette, Plot, legend
from dart_llm.reporting.table import Column, PageTable, Table, grouped
from dart_llm.reporting.words import count, intervals_over, percent, quantity
from dart_llm.studies.drift import summary
from dart_llm.studies.drift.runs import DriftRun
from dart_llm.studies.drift.settings import DART, FORCED, NEVER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[DriftRun]

MAX_PICTURES = 3
"""Maximum number of plots of one kind."""

MAX_MASKS = 300
"""Maximum number of rows in the table of re-masks."""

MAX_TEXTS = 24
"""Maximum number of sources whose texts are on the page; results.jsonl has all texts."""


def pictures(runs: Runs, config: Mapping[str, Any]) -> dict[str, list[Plot]]:
    """The plots for each section of the page."""
    small, done = page.small_print(config), [run for run in runs if run.error is None]
    loss = plot_loss(done, small)
    checked = [run for run in done if worth_drawing(run.checks)]
    texts = list(grouped(checked, lambda run: run.source_key).values())
    texts.sort(key=lambda runs: -sum(check.trigger for run in runs for check in run.checks))
    remasked = [run for run in done if any(m["first_jaccard"] for m in run.record["remasks"])]
    remasked.sort(key=lambda r: (r.candidate.name != DART, abs(len(r.record["remasks"]) - 3)))
    return {
        "methods": [] if loss is None else [loss],
        "similarity": [plot_timeline(*each, small) for each in _numbered("similarity", texts)],
        "masks": [plot_overlap(*each, small) for each in _numbered("overlap", remasked)],
    }


def _numbered(name: str, members: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (plot name, member) for the first members; names are "overlap", "overlap-2", ..."""
    for number, member in enumerate(members[:MAX_PICTURES], 1):
        yield name if number == 1 else f"{name}-{number}", member


# A method's loss minus the dense loss around topic changes, in bins of tokens.  Each passage is one
# item: its changes and seeds are averaged first, because variation within a passage says little
# about other passages.

BIN = 16
"""Tokens per bin."""

BEFORE, AFTER = 128, 256
"""The number of tokens shown before and after a change."""


def excess_curves(runs: Runs) -> dict[str, dict[int, Interval | None]]:
    """Maps a method, then the first token of a bin, to mean loss minus dense loss with interval.

    Tokens are counted from the change.  A bin counts only if all its tokens have a loss and it lies
    between the start of the topic before the change and the end of the topic after it.
    """
    dense = {run.source_key: run.record["losses"] for run in runs if run.is_dense}
    bins: dict[str, dict[int, dict[str, list[float]]]] = {}
    for run in runs:
        if run.mode != FORCED or run.is_dense or run.source_key not in dense:
            continue
        excess = np.array(run.record["losses"], float) - np.array(dense[run.source_key], float)
        for (_, low, change), (_, _, high) in pairwise(run.topics):
            for start in range(-BEFORE, AFTER, BIN):
                first = change + start
                if low <= first and first + BIN <= high and not math.isnan(excess[first]):
                    sources = bins.setdefault(run.label, {}).setdefault(start, {})
                    mean = float(excess[first : first + BIN].mean())
                    sources.setdefault(run.source.id, []).append(mean)
    return {
        label: {
            start: stats.interval({source: fmean(values) for source, values in sources.items()})
            for start, sources in sorted(starts.items())
        }
        for label, starts in bins.items()
    }


def plot_loss(runs: Runs, small: str) -> Plot | None:
    """Plot ``excess_curves``: a panel per method, each also with ``never``; None if no curves."""
    lines = {}
    for label, bins in excess_curves(runs).items():
        points = [(start, bin_mean) for start, bin_mean in bins.items() if bin_mean is not None]
        ends = [mean.ends or (math.nan, math.nan) for _, mean in points]
        x, y = [start + BIN / 2 for start, _ in points], [mean.estimate for _, mean in points]
        lines[label] = Curve(label, x, y, ([low for low, _ in ends], [high for _, high in ends]))
    if not lines:
        return None
    never = [line for label, line in lines.items() if label.startswith(NEVER)][:1]
    references = [Curve(line.label, line.x, line.y, is_reference=True) for line in never]
    axes = "tokens after the change", "loss minus dense (nats)"
    panels = [
        Panel(*axes, [line, *(r for r in references if r.label != label)])
        for label, line in lines.items()
    ]
    sources = len({run.source.id for run in runs})
    words = f"means of {BIN}-token bins; {intervals_over('bands', sources, 'passages')} · {small}"
    return line_plot("loss", "Loss minus dense around the topic change", words, panels)


# Similarity and masks over the tokens of a text.

TIME = "decoded tokens"

CHANGE = (0, (7, 2.5))
"""The line style of a topic change: long dashes."""


def _mark_topics(axes: Axes, run: DriftRun) -> None:
    """Draw lines at topic changes, with the name of the new topic at the bottom."""
    axes.set_xlim(0, max(1, run.decoded))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
    look: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "xytext": (3, 4)}
    look |= {"textcoords": "offset points", "fontsize": 8.5, "color": INK, "zorder": 5}
    for number, (name, start, _) in enumerate(run.topics):
        if number:  # a white line below keeps the line visible on dark fields
            axes.axvline(start, color="white", linewidth=2.6, zorder=3)
            axes.axvline(start, color=INK, linestyle=CHANGE, linewidth=1.5, zorder=3)
        short = textwrap.shorten(name, 28, placeholder="…")
        axes.annotate(short, (start, 0), bbox=box, **look)


def plot_timeline(name: str, runs: Runs, small: str) -> Plot:
    """A panel per method on one text: its detector's similarities and thresholds, and re-masks."""
    plotted = runs[:MAX_PANELS]

    def draw(figure: Figure, palette: Palette) -> None:
        panels = figure.subplots(len(plotted), 1, sharex=True, squeeze=False)[:, 0]
        for axes, run in zip(panels, plotted, strict=True):
            draw_checks(axes, palette, run.checks, run.record["remasks"])
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.2 * (high - low), high)
            axes.set_title(run.label, loc="right", fontsize=9)
            _mark_topics(axes, run)
        panels[-1].set_xlabel(TIME)
        legend(panels[0], 4, list(panels[1:]))

    title = f"Similarity to the reference on {runs[0].source_name}"
    built = ", ".join(
        f"{run.label} {count(run.record['accounting']['remasks'], 're-mask')}" for run in plotted
    )
    alt = f"Marks: cosine similarity of each window to its reference, over decoded tokens; {built}."
    words = f"{len(plotted)} of {count(len(runs), 'method')} with a detector · {small}"
    return Plot(name, title, alt, words, 1.1 + 1.9 * len(plotted), draw)


OVERLAP = "Jaccard overlap with the first mask"


def plot_overlap(name: str, run: DriftRun, small: str) -> Plot:
    """A heat map by layer and token: the overlap of the current mask with the first mask."""
    masks, layers = run.record["remasks"], run.record["accounting"]["layers"]
    values = np.array([mask["first_jaccard"] or [1.0] * len(layers) for mask in masks]).T
    pairs = zip(masks[0]["kept"], layers, strict=True)
    expected = chance([kept / layer["width"] for kept, layer in pairs])

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        steps, rows = [mask["step"] for mask in masks], np.arange(len(layers) + 1) - 0.5
        low = min(expected, float(values.min()))
        shades: dict[str, Any] = {"cmap": "GnBu", "vmin": low, "vmax": 1}
        mesh = axes.pcolormesh([*steps, run.decoded], rows, values, **shades)
        _mark_topics(axes, run)
        figure.colorbar(mesh, ax=axes, label=OVERLAP, pad=0.02)
        axes.set(xlabel=TIME, ylabel="layer")
        axes.locator_params(axis="y", integer=True)

    at_end = f"mean over layers at the end {values[:, -1].mean():.2f}"
    words = f"{at_end}, expected of independent masks {expected:.2f}"
    alt = f"Heat map: {OVERLAP}, by layer and decoded token; {words}."
    title = f"{run.source_name}, {run.label}: overlap of the masks with the first mask, by layer"
    return Plot(name, title, alt, f"{words} · {small}", 3.9, draw)


def chance(keep_ratios: Sequence[float]) -> float:
    """The expected Jaccard index of two independent masks: mean over layers of k / (2 - k).

    k is a layer's keep ratio, the fraction of neurons kept.  The intersection has k^2 of the
    neurons, the union 2 k - k^2.
    """
    return fmean(k / (2 - k) for k in keep_ratios)


# Tables and texts of the page.

REMASKS = (
    Column("source", lambda row: row["run"].source_name),
    Column("method", lambda row: row["run"].label),
    Column("decode step", "step"),
    Column("cause", "cause"),
    Column("topic", lambda row: _topic_at(row["run"], row["step"])),
    Column("evidence (tokens)", "evidence_tokens", ".0f"),
    Column("Jaccard with the previous mask", "jaccard", lambda values: f"{fmean(values):.2f}"),
    Column(
        "range over layers", "jaccard", lambda values: f"{min(values):.2f} to {max(values):.2f}"
    ),
    Column("neurons kept", lambda row: sum(row["kept"]), ","),
)


def remask_table(runs: Runs) -> PageTable | None:
    """A row per mask with its overlap with the previous mask; None if there are no masks."""
    rows = [{**mask, "run": run} for run in runs for mask in run.record["remasks"]]
    caption = "Masks: step, cause, and overlap with the previous mask"
    if len(rows) > MAX_MASKS:
        caption += f" (the first {MAX_MASKS} of {len(rows):,})"
    return Table("", caption, REMASKS, rows[:MAX_MASKS], left=2).html() if rows else None


def _topic_at(run: DriftRun, step: int) -> str | None:
    """A decode step's topic and position, such as "bees, token 12"; None if it has no topic."""
    before = [(name, start) for name, start, _ in run.topics if start <= step]
    return f"{before[-1][0]}, token {step - before[-1][1]}" if before else None


def free_texts(runs: Runs) -> Iterator[dict[str, Any]]:
    """Yield, for each source, its ``name``, its ``prompt`` and the methods' texts (``columns``)."""
    generated = (run for run in runs if run.record["text"] is not None)
    for members in list(grouped(generated, lambda run: run.source_key).values())[:MAX_TEXTS]:
        columns = [(run.label, _note(run), run.record["text"] or "(no text)") for run in members]
        first = members[0]
        yield {"name": first.source_name, "prompt": first.source.text, "columns": columns}


def _note(run: DriftRun) -> str:
    """A note on how a text was decoded, and how close it is to the dense text."""
    parts = [f"{run.decoded} decoded tokens"]
    if accounting := run.record["accounting"]:
        parts += [
            f"{percent(accounting['achieved_sparsity'])} of the FFN neurons removed",
            f"{percent(accounting['dense_token_share'])} of the tokens dense",
            count(accounting["remasks"], "re-mask"),
        ]
    for name, value in (run.record["metrics"] or {}).items():
        parts.append(f"{name} {quantity(value, perplexity=False) or 'unknown'}")
    return " · ".join(parts)


HEADINGS = {
    "methods": "Methods compared",
    "similarity": "Similarity over time",
    "masks": "Masks, before and after",
    "detection": "Detection of the change",
}
"""The headings of the page's sections, by key."""


def render(runs: Runs, config: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """The page of a drift study; without matplotlib, the page notes that plots are missing."""
    done = [run for run in runs if run.error is None]
    return render_page(
        config,
        "Knowledge drift",
        summary.headline(document),
        pictures(runs, config),
        {"methods": summary.table(document).html()},
        folded={"masks": remask_table(done)},
        notes=document["notes"],
        texts=list(free_texts(done)),
        failures=[f"{run.key}: {run.error}" for run in runs if run.error],
    )


def render_page(
    config: Mapping[str, Any],
    kind: str,
    conclusion: str,
    plots: Mapping[str, Sequence[Plot]],
    tables: Mapping[str, PageTable],
    folded: Mapping[str, PageTable | None] | None = None,
    **content: Any,
) -> str:
    """A page with the sections in ``plots``; ``folded``: tables that are collapsed at first."""
    sections, missing = [], ""
    for name in plots:
        drawn, reason = page.pictures(plots[name])
        missing = missing or reason
        parts = {"pictures": drawn, "table": tables.get(name), "folded": (folded or {}).get(name)}
        if any(parts.values()):
            sections.append({"id": name, "heading": HEADINGS[name], **parts})
    required = {
        "title": f"{kind} on {page.model_name(config)}",
        "conclusion": conclusion or "Nothing can be compared.",
        "facts": page.facts(config),
        "sections": sections,
        "missing": missing,
    }
    optional = dict.fromkeys(("notes", "texts", "failures"), ())
    return page.render(config, "drift.html", {**optional, **required, **content})


def write(folder: Path, html: str) -> Path:
    """Write ``report.html`` into the results folder and return its path."""
    write_text(folder / "report.html", html)
    return folder / "report.html"
