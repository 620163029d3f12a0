"""Picture: similarity over time by method, with thresholds and re-masks, over the topics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dart_llm import drift_words
from dart_llm.drift_masks import periods
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.plot_base import INK, MAX_PANELS, SOFT, Palette, Plot, legend
from dart_llm.plot_drift import _draw as draw_checks
from dart_llm.plot_drift import _kind as kind
from dart_llm.plot_drift import _stretches as stretches
from dart_llm.plot_topics import CHANGE, TIME, Drawing, Kit, bands, web_bands, web_dense
from dart_llm.records import DriftCheck

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = Sequence[DriftCell]

LOOK = ("color", "marker", "linestyle", "markersize", "markeredgecolor", "markeredgewidth")


def make(view: DriftView) -> Iterator[Drawing]:
    """One per source, those with most triggers first; a panel per method with a detector."""
    found: dict[tuple[str, int], list[DriftCell]] = {}
    for cell in view.done:
        if cell.checks:
            found.setdefault((cell.source, cell.seed), []).append(cell)
    ranked = sorted(found.values(), key=lambda own: (-len(own), -sum(map(_triggers, own))))
    for own in ranked:
        seed = f", seed {own[0].seed}" if own[0].seed else ""
        yield _drawing(view, own, f"{drift_words.place(own[0])}{seed}")


def _triggers(cell: DriftCell) -> int:
    return sum(check.trigger for check in cell.checks)


def _drawing(view: DriftView, own: Cells, choice: str) -> Drawing:
    shown = own[:MAX_PANELS]
    title = drift_words.timeline_title(shown)
    small = f"{_layers(shown)} watched · {view.results.small_print}"
    if len(own) > len(shown):
        small = f"{len(shown)} of {len(own)} methods shown · {small}"
    alt = f"Marks: cosine similarity of each window to its reference, over decoded tokens. {title}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, cell in zip(panels, shown, strict=True):
            draw_checks(axes, palette, cell.checks, [asdict(mask) for mask in cell.remasks])
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.2 * (high - low), high)
            axes.set_title(cell.label, loc="right", fontsize=9)
            bands(axes, cell, inside=True)
        panels[-1].set_xlabel(TIME)
        if shown[0].changes:
            panels[0].plot([], [], color=INK, linestyle=CHANGE, label="change of topic")
        _name_all(list(panels))
        legend(panels[0], 2 if narrow else 4)

    plot = Plot("similarity", title, alt, small, 1.1 + 1.9 * len(shown), draw)
    return Drawing(plot, lambda kit: _web(kit, shown), choice, 150 + 240 * len(shown))


def _name_all(panels: Sequence[Axes]) -> None:
    """What only lower panels show gets its place in the first one's legend."""
    known = set(panels[0].get_legend_handles_labels()[1])
    for axes in panels[1:]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in known and hasattr(handle, "get_marker"):
                known.add(label)
                look = {name: getattr(handle, f"get_{name}")() for name in LOOK}
                panels[0].plot([], [], label=label, **look)


def _layers(shown: Cells) -> str:
    found = sorted({check.layer for cell in shown for check in cell.checks})
    return f"layer{'' if len(found) == 1 else 's'} {', '.join(map(str, found))}"


MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "armed": ("window", {"symbol": "circle", "size": 7}),
    "low": ("low window", {"symbol": "triangle-down", "size": 10}),
    "trigger": ("trigger", {"symbol": "star", "size": 15}),
    "held": ("held: guards put it off", {"symbol": "diamond-open", "size": 9}),
    "arming": ("arming: no threshold yet", {"symbol": "circle-open", "size": 7}),
}


def _web(kit: Kit, shown: Cells) -> Any:
    titles = [cell.label for cell in shown]
    figure = kit.subplots(
        rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=0.09 / len(shown)
    )
    named: set[str] = set()
    for row, cell in enumerate(shown, start=1):
        for trace in _traces(kit, cell, named):
            figure.add_trace(trace, row=row, col=1)
        for mask in cell.remasks:
            figure.add_vline(mask.step, line={"color": INK, "width": 1.2}, row=row, col=1)
        web_bands(figure, cell, row)
        web_dense(figure, periods(cell), row)
        title = f"{titles[row - 1]}<br>cosine similarity"
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_xaxes(title_text=TIME, row=len(shown), col=1)
    return figure


def _traces(kit: Kit, cell: DriftCell, named: set[str]) -> Iterator[Any]:
    """Similarity and threshold as lines broken at masks, then a mark per window."""
    lines: list[list[Any]] = [[], [], []]
    for stretch in stretches(cell.checks, [mask.step for mask in cell.remasks]):
        for check in stretch:
            for line, value in zip(
                lines, (check.step, check.similarity, check.threshold), strict=True
            ):
                line.append(value)
        for line in lines:
            line.append(None)
    x, similarity, threshold = lines
    yield kit.go.Scatter(
        x=x, y=similarity, mode="lines", line={"color": SOFT, "width": 1}, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    dashed = {"color": kit.colours[2], "width": 2, "dash": "6px,3px"}
    yield _legended(kit, named, "threshold", x=x, y=threshold, mode="lines", line=dashed)
    for name, (label, marker) in MARKS.items():
        points = [check for check in cell.checks if kind(check) == name]
        if points:
            colour = kit.colours[4 if name in ("low", "trigger") else 0]
            yield _legended(
                kit,
                named,
                label,
                x=[check.step for check in points],
                y=[check.similarity for check in points],
                mode="markers",
                marker={**marker, "color": colour, "line": {"color": INK, "width": 0.9}},
                customdata=[_told(check) for check in points],
                hovertemplate="token %{x}: %{y:.3f}<br>%{customdata}",
            )
    yield _legended(
        kit,
        named,
        "mask built",
        x=[mask.step for mask in cell.remasks],
        y=[max(check.similarity for check in cell.checks)] * len(cell.remasks),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 12, "color": INK},
        customdata=[f"{m.cause}, from {m.evidence_tokens:.0f} tokens" for m in cell.remasks],
        hovertemplate="mask of token %{x}<br>%{customdata}",
    )  # fmt: skip


def _told(check: DriftCheck) -> str:
    limit = "no threshold yet" if check.threshold is None else f"threshold {check.threshold:.3f}"
    return f"{limit}, counter {check.counter}"


def _legended(kit: Kit, named: set[str], label: str, **data: Any) -> Any:
    """A trace that stands in the legend once."""
    first = label not in named
    named.add(label)
    return kit.go.Scatter(name=label, legendgroup=label, showlegend=first, **data)
