"""What the report pages share: their template, their plots as data addresses.

No script, no request to anywhere: styles are inline, plots are data.  Everything that came from a
model, a prompt or a file is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dart_llm.errors import MissingExtra
from dart_llm.reporting import figures
from dart_llm.reporting.figures import Plot

LARGE_SVG = 150_000
"""Bytes above which a plot travels as PNG."""


@dataclass(frozen=True)
class Picture:
    """A plot as a data address."""

    name: str
    title: str
    alt: str
    source: str


def render(
    template: str, content: dict[str, Any], filters: dict[str, Callable[..., Any]] | None = None
) -> str:
    """The page that ``template`` (a file of templates/, over page.html) makes of ``content``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dart_llm.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["tied"] = lambda text: str(text).replace(" %", "\u00a0%")
    environment.filters.update(filters or {})
    css = resources.files("dart_llm.reporting") / "templates" / "report.css"
    style = Markup(css.read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **content)


def pictures(wanted: Iterable[Plot]) -> tuple[list[Picture], str]:
    """All plots, or none and the reason."""
    try:
        return [Picture(plot.name, plot.title, plot.alt, _address(plot)) for plot in wanted], ""
    except MissingExtra as error:
        return [], f"No plots: {error}"


def _address(plot: Plot) -> str:
    data, kind = figures.render(plot, "svg"), "svg+xml"
    if len(data) > LARGE_SVG:
        data, kind = figures.render(plot, "png"), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
