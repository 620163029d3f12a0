"""``report.html``: one self-contained page about a run, built from its results folder.

No script, no request to anywhere: styles are inline, plots are data.  Everything that came from a
model, a prompt or a file is escaped.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dart_llm import plots, report_evaluations, report_head, report_tables, report_texts, sentences
from dart_llm.errors import MissingExtra
from dart_llm.plot_base import Plot
from dart_llm.results import write_text
from dart_llm.results_view import ResultsView, read

LARGE_SVG = 150_000
"""Bytes above which a plot travels as PNG."""


@dataclass(frozen=True)
class Picture:
    """A plot as two data addresses, wide and narrow."""

    name: str
    title: str
    alt: str
    wide: str
    narrow: str


def write(folder: Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Files that are missing leave their section out; without matplotlib the page has no plots and
    says so.  Raises ``ResultsError`` when the folder does not exist or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder)))
    return path


def render(view: ResultsView) -> str:
    """The page of one folder."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files("dart_llm") / "templates"
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["tied"] = lambda text: str(text).replace(" %", "\u00a0%")
    template = environment.from_string((files / "report.html").read_text(encoding="utf-8"))
    style = Markup((files / "report.css").read_text(encoding="utf-8"))
    return template.render(style=style, **_content(view))


def _content(view: ResultsView) -> dict[str, Any]:
    pictures, missing = _pictures(view)
    prompts = report_texts.prompts(view)
    return {
        "title": report_head.title(view),
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": report_head.conclusion(view),
        "facts": report_head.facts(view),
        "cards": report_head.cards(view),
        "prompts": prompts,
        "phases": report_texts.phases(prompts),
        "pictures": {picture.name: picture for picture in pictures},
        "missing": missing,
        "remasks": report_tables.remasks(view),
        "layers": report_tables.layers(view),
        "accounting": report_tables.accounting(view),
        "perplexity": [
            (
                report_tables.perplexity(
                    document, sentences.headline(document["rows"], view.method)
                ),
                sentences.perplexity_sentence(document),
            )
            for document in view.perplexity
        ],
        "evaluations": report_evaluations.tables(view),
        "evaluation_notes": report_evaluations.notes(view),
        "timing": report_tables.timing(view),
        "timing_words": sentences.timing_sentence(view.timing),
        "other_times": report_head.other_times(view.timing),
        "settings": report_tables.settings(view),
        "provenance": report_tables.provenance(view),
        "name": view.name,
    }


def _pictures(view: ResultsView) -> tuple[list[Picture], str]:
    """All plots, or none and the reason."""
    found = []
    try:
        for plot in plots.available(view):
            wide, narrow = _address(plot, False), _address(plot, True)
            found.append(Picture(plot.name, plot.title, plot.alt, wide, narrow))
    except MissingExtra as error:
        return [], f"No plots: {error}"
    return found, ""


def _address(plot: Plot, narrow: bool) -> str:
    data, kind = plots.render(plot, "svg", narrow), "svg+xml"
    if len(data) > LARGE_SVG:
        data, kind = plots.render(plot, "png", narrow), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
