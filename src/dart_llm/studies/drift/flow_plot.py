"""Picture: neurons between topics: kept, left, joined.

Each column is the mask in force where a topic ends: the neurons that live above, the pruned ones
below.  Heights are shares of all FFN neurons, summed over the layers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dart_llm.reporting.figures import INK, SOFT, Drawing, Kit, Palette, Plot
from dart_llm.reporting.words import percent
from dart_llm.studies.drift import view as drift_masks
from dart_llm.studies.drift import view as drift_words
from dart_llm.studies.drift.plots import remasked
from dart_llm.studies.drift.view import DriftCell, DriftView, Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


KINDS = ("kept", "left", "joined", "out")

COLOURS = {"kept": "#114260", "left": "#f19d6b", "joined": "#818232", "out": "#d5d8dc"}
"""batlow, apart in lightness too: dark, light, middle, pale."""

PALE = "#7d97a6"
"""The kept neurons of an interactive figure: its labels stand on them."""

HATCHES = {"kept": "", "left": "\\\\\\", "joined": "///", "out": ""}

THICK, GAP = 0.05, 0.06
"""Width of a column's bars and the white between live and pruned, as shares of the picture."""


def make(view: DriftView) -> Iterator[Drawing]:
    """One per cell with masks of two topics, or two masks where topics have no places."""
    for cell, masks in remasked(view):
        columns = drift_masks.columns(cell)
        if len(columns) < 2:
            continue
        numbers = [number for _, number in columns]
        flows = [drift_masks.flow(masks, a, b) for a, b in zip(numbers, numbers[1:], strict=False)]
        yield _drawing(view, cell, [name for name, _ in columns], flows)


def _drawing(
    view: DriftView, cell: DriftCell, names: Sequence[str], flows: Sequence[Flow]
) -> Drawing:
    keep = (flows[0].kept + flows[0].left) / _total(flows[0])
    title = drift_words.flow_title(cell, names, flows, keep)
    small = f"shares of all FFN neurons, all layers together · {view.results.small_print}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        axes.axis("off")
        for place, flow in enumerate(flows):
            _ribbons(axes, place, flow, narrow)
        for place, name in enumerate(names):
            flow = flows[min(place, len(flows) - 1)]
            live = flow.kept + (flow.joined if place == len(flows) else flow.left)
            _column(axes, place, live / _total(flow), name, narrow)
        axes.set(xlim=(-0.12, len(flows) + 0.12), ylim=(-0.04, 1.16 + GAP))

    alt = f"Flow of neurons between masks. {title}"
    plot = Plot("flow", title, alt, small, 3.7, draw)
    return Drawing(plot, lambda kit: _web(kit, names, flows), drift_words.choice(cell), 420)


def _total(flow: Flow) -> int:
    return flow.kept + flow.left + flow.joined + flow.out


def bounds(flow: Flow) -> dict[str, tuple[float, float, float]]:
    """Per kind the lower end on the left, on the right, and the height; both sides fill 1 + GAP.

    Live neurons stand above pruned ones: kept above left, and kept above joined.
    """
    share = {kind: getattr(flow, kind) / _total(flow) for kind in KINDS}
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
            side = 0.5 if kind in ("kept", "out") else 0.22
            word = "pruned in both" if kind == "out" else kind
            axes.text(
                place + side,
                float(np.interp(side, x, low)) + height / 2,
                f"{word} {percent(height, 0)}",
                ha="center",
                va="center",
                fontsize=8 if narrow else 9,
                color="white" if kind == "kept" else INK,
                zorder=4,
                bbox=None
                if kind in ("kept", "out")
                else {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
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
    sankey = kit.go.Sankey(
        arrangement="snap",
        domain={"y": [0.14, 1]},
        node=_nodes(names),
        link=_links(flows),
    )
    figure = kit.go.Figure(sankey)
    _legend(kit, figure, flows)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _nodes(names: Sequence[str]) -> dict[str, Any]:
    """Two per column: live above, pruned below."""
    labels, colours, ends = [], [], []
    for place, name in enumerate(names):
        short = textwrap.shorten(name, 22, placeholder="…")
        labels += [f"{short}: live", "pruned"]
        colours += [INK, SOFT]
        ends += [(place / (len(names) - 1), 0.0), (place / (len(names) - 1), 1.0)]
    return {
        "label": labels,
        "color": colours,
        "pad": 26,
        "thickness": 14,
        "line": {"width": 0},
        "x": [min(0.999, max(0.001, x)) for x, _ in ends],
        "y": [min(0.999, max(0.001, 0.2 + 0.6 * y)) for _, y in ends],
        "hovertemplate": "%{label}: %{value:,.0f} neurons<extra></extra>",
    }


def _links(flows: Sequence[Flow]) -> dict[str, Any]:
    """Those that hold neurons, in the order of ``KINDS``, between the nodes of ``_nodes``."""
    links: list[tuple[int, int, int, str]] = []
    for place, flow in enumerate(flows):
        live, pruned, new_live, new_pruned = range(2 * place, 2 * place + 4)
        pairs = {
            "kept": (live, new_live),
            "left": (live, new_pruned),
            "joined": (pruned, new_live),
            "out": (pruned, new_pruned),
        }
        links += [(*pairs[kind], getattr(flow, kind), kind) for kind in KINDS]
    links = [link for link in links if link[2]]
    return {
        "source": [link[0] for link in links],
        "target": [link[1] for link in links],
        "value": [link[2] for link in links],
        "color": [_web_colour(link[3]) for link in links],
        "label": [_web_word(link[3]) for link in links],
        "customdata": [percent(link[2] / _total(flows[0])) for link in links],
        "hovertemplate": "%{label}: %{value:,.0f} neurons (%{customdata} of all)<extra></extra>",
    }


def _legend(kit: Kit, figure: Any, flows: Sequence[Flow]) -> None:
    """Points that are nowhere: Sankeys have no legend of their own."""
    for kind in KINDS:
        marker = {"symbol": "square", "size": 11, "color": _web_colour(kind)}
        word = _web_word(kind)
        if len(flows) == 1:
            word += f" {percent(getattr(flows[0], kind) / _total(flows[0]), 0)}"
        figure.add_trace(
            kit.go.Scatter(x=[None], y=[None], mode="markers", name=word, marker=marker)
        )


def _web_colour(kind: str) -> str:
    return PALE if kind == "kept" else COLOURS[kind]


def _web_word(kind: str) -> str:
    return "pruned in both" if kind == "out" else kind
