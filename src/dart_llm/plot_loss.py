"""Picture: the loss over dense around a change of topic, a method at a time before the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm import drift_around, drift_words
from dart_llm.drift_around import Point
from dart_llm.drift_losses import BIN
from dart_llm.drift_view import DriftView
from dart_llm.plot_base import INK, SOFT, Palette, Plot
from dart_llm.plot_topics import Drawing, Kit, looks, web_looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = "tokens after the change of topic"
Y = "loss over dense (nats per token)"

Curves = Mapping[str, Sequence[Point]]


def make(view: DriftView) -> Iterator[Drawing]:
    """One, where dense and another method were measured on the same passages (forced mode)."""
    curves = drift_around.around(view)
    if curves:
        yield _drawing(view, curves)


def _drawing(view: DriftView, curves: Curves) -> Drawing:
    most = max(point.n for points in curves.values() for point in points)
    fewest = min(point.n for points in curves.values() for point in points)
    n = f"{most}" if most == fewest else f"{fewest} to {most}"
    title = _title(curves)
    small = (
        f"means of {BIN}-token bins over {n} passages; bands: 95 % bootstrap intervals over "
        f"passages · {view.results.small_print}"
    )
    bare = all(point.interval is None for points in curves.values() for point in points)
    if bare:
        small = f"means of {BIN}-token bins over {n} passages, no intervals · "
        small += view.results.small_print

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        columns = min(len(curves), 1 if narrow else 3)
        rows = math.ceil(len(curves) / columns)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        found = looks(list(curves), palette)
        for axes, label in zip(panels.flat, curves, strict=False):
            _panel(axes, label, curves, found)
        for axes in panels.flat[len(curves) :]:
            axes.axis("off")
        figure.supylabel(Y, fontsize=9.5)
        for axes in panels[-1]:
            axes.set_xlabel(X if columns < 3 else "tokens after the change")

    alt = f"Lines: {Y}, by method. {title}"
    height = 0.9 + 2.0 * math.ceil(len(curves) / 3)
    plot = Plot("loss", title, alt, small, height, draw, 0.9 + 1.7 * len(curves))
    return Drawing(plot, lambda kit: _web(kit, curves), tall=500)


def _title(curves: Curves) -> str:
    told = []
    for label, points in curves.items():
        after = [point.value for point in points if point.start >= 0]
        if after:
            told.append((sum(after) / len(after), label))
    if not told:
        return "Loss over dense around the change of topic."
    best, worst = min(told), max(told)
    shown = max(point.start for points in curves.values() for point in points) + BIN
    where = f"in the {shown} tokens after a change of topic"
    if best == worst:
        return f"{best[1]} loses {best[0]:.2f} nats per token over dense {where}."
    return (
        f"Loss over dense {where}: lowest with {best[1]} ({best[0]:.2f} nats per token), highest "
        f"with {worst[1]} ({worst[0]:.2f})."
    )


def _panel(axes: Axes, label: str, curves: Curves, found: Mapping[str, Any]) -> None:
    for other, points in curves.items():
        if other != label:
            x, y = [p.middle for p in points], [p.value for p in points]
            axes.plot(x, y, color="#c3c8ce", linewidth=0.9, zorder=1)
    points = curves[label]
    x = [point.middle for point in points]
    bounded = [(p.middle, p.interval.low, p.interval.high) for p in points if p.interval]
    if bounded:
        middles, low, high = zip(*bounded, strict=True)
        axes.fill_between(
            middles, low, high, color=found[label]["color"], alpha=0.25, linewidth=0, zorder=2
        )
    axes.plot(x, [point.value for point in points], zorder=3, **{**found[label], "markersize": 4})
    axes.axvline(0, color=INK, linestyle=(0, (7, 2.5)), linewidth=1.3)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_title(label, loc="left", fontsize=9.5)
    axes.grid(axis="y")


def _web(kit: Kit, curves: Curves) -> Any:
    figure, found = kit.go.Figure(), web_looks(list(curves), kit)
    for label, points in curves.items():
        bounded = [(p.middle, p.interval.low, p.interval.high) for p in points if p.interval]
        if bounded:
            x, low, high = (list(values) for values in zip(*bounded, strict=True))
            figure.add_trace(
                kit.go.Scatter(
                    x=x + x[::-1],
                    y=high + low[::-1],
                    fill="toself",
                    fillcolor=found[label]["line"]["color"],
                    opacity=0.14,
                    line={"width": 0},
                    hoverinfo="skip",
                    legendgroup=label,
                    showlegend=False,
                )
            )
        figure.add_trace(
            kit.go.Scatter(
                x=[point.middle for point in points],
                y=[point.value for point in points],
                name=label,
                legendgroup=label,
                mode="lines+markers",
                customdata=[
                    f"{drift_words.ends(p.interval) or 'no interval'}, {p.n} passages"
                    for p in points
                ],
                hovertemplate="%{y:.2f} (%{customdata})",
                **found[label],
            )
        )
    figure.add_vline(0, line={"color": INK, "width": 1.6, "dash": "10px,4px"})
    figure.add_hline(0, line={"color": SOFT, "width": 1})
    figure.add_annotation(
        x=0, y=1, xref="x", yref="paper", yanchor="bottom", text="change of topic", showarrow=False
    )
    figure.update_xaxes(title_text=X)
    figure.update_yaxes(title_text=Y)
    figure.update_layout(hovermode="x unified")
    return figure
