"""Interactive figures for a report page; the only file that imports plotly.

The page holds one copy of plotly's script and every figure as JSON, drawn when it comes into view.
The page's policy allows this one script by its hash, so nothing that stands in a text can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dart_llm import plots
from dart_llm.errors import MissingExtra
from dart_llm.plot_base import FAINT, INK
from dart_llm.plot_topics import Drawing, Kit
from dart_llm.results import page_json

MOST_BYTES = 300_000
"""Of the figures of one kind: with plotly's script the page stays well under 8 MB."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif'

AXIS = {
    "gridcolor": FAINT,
    "zeroline": False,
    "linecolor": INK,
    "ticks": "outside",
    "tickcolor": INK,
    "automargin": True,
    "title_font_size": 12,
}

LAYOUT: dict[str, Any] = {
    "template": "none",
    "font": {"family": FONT, "size": 13, "color": INK},
    "paper_bgcolor": "#fff",
    "plot_bgcolor": "#fff",
    "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
    "legend": {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": -0.02,
        "yref": "container",
        "yanchor": "bottom",
    },
    "hoverlabel": {"bgcolor": "#fff", "font": {"color": INK}},
    "dragmode": False,
}


@dataclass(frozen=True)
class Figure:
    """A figure as JSON for a script block, and what the page says of it."""

    choice: str
    title: str
    alt: str
    small: str
    data: str
    tall: int
    """Pixels."""


def kit() -> Kit:
    """plotly's makers and our colours; raises ``MissingExtra``."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        raise MissingExtra("plotly", "plots") from None
    with plots._style() as palette:
        colours = tuple(
            "#" + "".join(f"{round(255 * float(part)):02x}" for part in colour)
            for colour in palette
        )
    return Kit(go, make_subplots, colours)


def figures(
    drawings: Iterable[Drawing], tools: Kit, room: int = MOST_BYTES
) -> tuple[list[Figure], bool]:
    """The first figures that fit into ``room`` bytes, at least one; whether there are more."""
    found: list[Figure] = []
    for drawing in drawings:
        data = to_json(drawing, tools)
        if found and len(data) > room:
            return found, True
        room -= len(data)
        plot = drawing.plot
        found.append(Figure(drawing.choice, plot.title, plot.alt, plot.small, data, drawing.tall))
    return found, False


def to_json(drawing: Drawing, tools: Kit) -> str:
    """``{"data", "layout", "narrow"}`` as ``page_json``.

    ``narrow``: what differs on a phone, by path into the layout.
    """
    figure = drawing.interactive(tools)
    figure.update_layout(**LAYOUT, height=drawing.tall)
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS)
    data = json.loads(figure.to_json())
    data["layout"].pop("template", None)
    data["narrow"] = _narrow(drawing)
    return page_json(data)


def _narrow(drawing: Drawing) -> dict[str, Any]:
    found: dict[str, Any] = {"font.size": 11, "height": drawing.tall}
    if drawing.columns > 1:
        found["height"] = round(0.8 * drawing.tall * drawing.columns)
        part = 1 / drawing.columns
        for place in range(drawing.columns):
            number = str(place + 1) if place else ""
            top = 1 - place * part
            found[f"xaxis{number}.domain"] = [0, 1]
            found[f"yaxis{number}.domain"] = [max(0.0, top - 0.62 * part), top]
            found[f"yaxis{number}.showticklabels"] = True
    return found


def script() -> str:
    """plotly's script and the page's own, as one; raises ``MissingExtra``."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("plotly", "plots") from None
    own = resources.files("dart_llm") / "templates" / "drift.js"
    text = f"{get_plotlyjs()}\n{own.read_text(encoding='utf-8')}".replace("\r\n", "\n")
    if "</script" in text.lower():
        raise ValueError("the script would end its own block")
    return text


def policy(text: str) -> str:
    """``script-src`` of a content security policy that allows this script and no other."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"script-src 'sha256-{base64.b64encode(digest).decode()}'; "
