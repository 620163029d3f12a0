"""Picture: neurons between topics: kept, left, joined.

Each column is the mask in force where a topic ends: the neurons that live above, the pruned ones
below.  Heights are shares of all FFN neurons, summed over the layers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dart_llm.reporting.figures import INK, SOFT, Drawing, Kit, Palette, Plot
from dart_llm.reporting.words import percent
from dart_llm.studies.drift.plots import web_keys
from dart_llm.studies.drift.view import DriftCell, DriftView, Flow, Masks, cell_name, columns, flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


KINDS = ("kept", "left", "joined", "out")

WORDS = {"kept": "kept", "left": "left", "joined": "joined", "out": "pruned in both"}

COLOURS = {"kept": "#114260", "left": "#c98259", "joined": "#818232", "out": "#d5d8dc"}
"""batlow, apart in lightness too: dark, light, middle, pale."""

WEB_COLOURS = {**COLOURS, "kept": "#7d97a6"}
"""Of an interactive figure: its labels stand on the kept neurons."""

HATCHES = {"kept": "", "left": "\\\\\\", "joined": "///", "out": ""}

THICK, GAP = 0.05, 0.06
"""Width of a column's bars and the white between live and pruned, as shares of the picture."""


def make(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing | None:
    """Of a cell with masks of two topics, or two masks where topics have no places."""
    names = [name for name, _ in columns(cell)]
    if len(names) < 2:
        return None
    flows = [flow(masks, *two) for two in pairwise(number for _, number in columns(cell))]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        axes.axis("off")
        for place, between in enumerate(flows):
            _ribbons(axes, place, between, narrow)
        for place, name in enumerate(names):
            between = flows[min(place, len(flows) - 1)]
            live = between.kept + (between.joined if place == len(flows) else between.left)
            _column(axes, place, live / between.total, name, narrow)
        axes.set(xlim=(-0.12, len(flows) + 0.12), ylim=(-0.04, 1.16 + GAP))

    keep = (flows[0].kept + flows[0].left) / flows[0].total
    told = "; ".join(
        f"{old} to {new}: {percent(f.share_kept, 0)} of the live neurons kept"
        for (old, new), f in zip(pairwise(names), flows, strict=True)
    )
    small = f"shares of all FFN neurons · {told} (independent masks: {percent(keep, 0)})"
    title = f"{cell_name(cell)}: neurons from one mask to the next"
    alt = f"Flow of neurons between masks. {told}."
    plot = Plot("flow", title, alt, view.noted(small), 3.7, draw)
    return Drawing(plot, lambda kit: _web(kit, names, flows), cell_name(cell), 420)


def bounds(flow: Flow) -> dict[str, tuple[float, float, float]]:
    """Per kind the lower end on the left, on the right, and the height; both sides fill 1 + GAP.

    Live neurons stand above pruned ones: kept above left, and kept above joined.
    """
    share = {kind: getattr(flow, kind) / flow.total for kind in KINDS}
    old_live = 1 + GAP - share["kept"]
    return {
        "kept": (old_live, old_live, share["kept"]),
        "left": (old_live - share["left"], share["out"], share["left"]),
        "joined": (share["out"], old_live - share["joined"], share["joined"]),
        "out": (0.0, 0.0, share["out"]),
    }


def _ribbons(axes: Axes, place: int, flow: Flow, narrow: bool) -> None:
    x = np.linspace(0, 1, 60)
    ease = x * x * (3 - 2 * x)
    for kind, (left, right, height) in bounds(flow).items():
        if height <= 0:
            continue
        low = left + (right - left) * ease
        axes.fill_between(
            place + THICK / 2 + x * (1 - THICK),
            low,
            low + height,
            facecolor=COLOURS[kind],
            edgecolor="white",
            hatch=HATCHES[kind],
            linewidth=0.6,
            zorder=1 if kind == "out" else 2,
        )
        if height > 0.035:
            plain = kind in ("kept", "out")
            side = 0.5 if plain else 0.22
            axes.text(
                place + side,
                float(np.interp(side, x, low)) + height / 2,
                f"{WORDS[kind]} {percent(height, 0)}",
                ha="center",
                va="center",
                fontsize=8 if narrow else 9,
                color="white" if kind == "kept" else INK,
                zorder=4,
                bbox=None if plain else {"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )


def _column(axes: Axes, place: int, live: float, name: str, narrow: bool) -> None:
    for low, height, colour in ((1 + GAP - live, live, INK), (0.0, 1 - live, "#9aa1a9")):
        axes.fill_between(
            [place - THICK / 2, place + THICK / 2], low, low + height, color=colour, zorder=3
        )
    text = textwrap.fill(name, 16 if narrow else 24)
    axes.text(
        place,
        1.03 + GAP,
        f"{text}\nlive: {percent(live, 0)}",
        ha="left" if place == 0 else "right" if axes.get_xlim()[1] < place + 0.5 else "center",
        va="bottom",
        fontsize=8.5,
        color=INK,
    )


def _web(kit: Kit, names: Sequence[str], flows: Sequence[Flow]) -> Any:
    """The interactive figure."""
    area = {"y": [0.14, 1]}
    figure = kit.go.Figure(
        kit.go.Sankey(arrangement="snap", domain=area, node=_nodes(names), link=_links(flows))
    )
    web_keys(kit, figure, {WORDS[kind]: WEB_COLOURS[kind] for kind in KINDS})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _nodes(names: Sequence[str]) -> dict[str, Any]:
    """Two per column: live above, pruned below."""
    short = [textwrap.shorten(name, 22, placeholder="…") for name in names]
    places = np.linspace(0.001, 0.999, len(names)).repeat(2)  # plotly takes no 0 and no 1
    return {
        "label": [label for name in short for label in (f"{name}: live", "pruned")],
        "color": [INK, SOFT] * len(names),
        "pad": 26,
        "thickness": 14,
        "line": {"width": 0},
        "x": places.tolist(),
        "y": [0.2, 0.8] * len(names),
        "hovertemplate": "%{label}: %{value:,.0f} neurons<extra></extra>",
    }


def _links(flows: Sequence[Flow]) -> dict[str, Any]:
    """Those that hold neurons, in the order of ``KINDS``, between the nodes of ``_nodes``."""
    links: list[tuple[int, int, int, str]] = []
    for place, between in enumerate(flows):
        live, pruned, new_live, new_pruned = range(2 * place, 2 * place + 4)
        starts, ends = (live, live, pruned, pruned), (new_live, new_pruned, new_live, new_pruned)
        sizes = [getattr(between, kind) for kind in KINDS]
        links += [link for link in zip(starts, ends, sizes, KINDS, strict=True) if link[2]]
    sources, targets, values, kinds = (list(part) for part in zip(*links, strict=True))
    return {
        "source": sources,
        "target": targets,
        "value": values,
        "color": [WEB_COLOURS[kind] for kind in kinds],
        "label": [WORDS[kind] for kind in kinds],
        "customdata": [percent(value / flows[0].total) for value in values],
        "hovertemplate": "%{label}: %{value:,.0f} neurons (%{customdata} of all)<extra></extra>",
    }
