"""``report.html`` of a drift study: one page with its pictures, texts and tables.

The page holds one copy of plotly and runs no other script; everything from a file is escaped.
Without plotly it shows the same pictures as images; without matplotlib it has none and says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm import (
    drift_plots,
    drift_tables,
    drift_words,
    page,
    plotly_page,
    report_drift_tables,
    report_drift_texts,
    report_head,
    report_tables,
)
from dart_llm.drift_view import DriftView, read
from dart_llm.errors import MissingExtra
from dart_llm.page import Picture
from dart_llm.plotly_page import Figure
from dart_llm.report_tables import Table
from dart_llm.results import write_text
from dart_llm.sentences import percent

SECTIONS = {
    "methods": (
        "Methods compared",
        ("methods", "loss"),
        "Each method's quality beside what it really removed. Passages: the loss over dense on the "
        "same tokens. Prompts: how close the text is to the dense one.",
    ),
    "similarity": (
        "Similarity over time",
        ("similarity",),
        "Each mark compares one window of tokens with the tokens the masks were made from. Windows "
        "under the threshold count towards a re-mask.",
    ),
    "masks": (
        "Masks, before and after",
        ("overlap", "neurons", "flow"),
        "Which neurons live when, how much of the first masks is left in each layer, and which "
        "neurons one topic leaves and the next one brings in.",
    ),
    "detection": (
        "Detection of the change",
        ("detection",),
        "How many known changes each signal and rule finds, how late, and how often it fires where "
        "nothing changed.",
    ),
}
"""Heading, pictures (how their names begin) and words of each section."""

MORE = "The lists hold the first pictures of each kind that fit on the page."


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    id: str
    heading: str
    words: str
    figures: tuple[Sequence[Figure], ...]
    pictures: tuple[Picture, ...]
    table: Table | None
    folded: Table | None
    more: str


@dataclass(frozen=True)
class _Drawn:
    """All pictures by name: interactive ones, or images, or neither and the reason."""

    figures: dict[str, list[Figure]]
    pictures: dict[str, Picture]
    more: set[str]
    missing: str


def write(folder: Path) -> Path:
    """Write ``report.html`` into a drift folder and return its path.

    Raises ``ResultsError`` when it is no drift folder or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder)))
    return path


def render(view: DriftView) -> str:
    """The page of one drift study."""
    return page.render("drift.html", _content(view))


def _content(view: DriftView) -> dict[str, Any]:
    from markupsafe import Markup

    drawn = _draw(view)
    script = plotly_page.script() if drawn.figures else ""
    passages, more = report_drift_texts.passages(view)
    texts, more_texts = report_drift_texts.free(view)
    return {
        "title": title(view),
        "status": str(view.results.config.get("status") or "unknown"),
        "conclusion": drift_words.conclusion(view),
        "problems": view.problems,
        "notes": view.summary.get("notes") or [],
        "cards": _cards(view),
        "facts": _facts(view),
        "sections": _sections(view, drawn),
        "missing": drawn.missing,
        "texts": texts,
        "more_texts": "Further texts stand in texts.jsonl." if more_texts else "",
        "passages": passages,
        "more_passages": "Further passages stand in tokens.jsonl." if more else "",
        "failures": [f"{c.key}: {c.error or c.status}" for c in view.cells if not c.done],
        "settings": report_tables.settings(view.results),
        "provenance": report_tables.provenance(view.results),
        "script": Markup(script),
        "policy": Markup(plotly_page.policy(script) if script else ""),
    }


def title(view: DriftView) -> str:
    """What was studied, and on which model."""
    names = sorted({cell.model for cell in view.cells})
    model = view.results.checkpoint.get("name") or ", ".join(names) or "an unknown model"
    return f"Knowledge drift on {model}"


def _draw(view: DriftView) -> _Drawn:
    try:
        tools = plotly_page.kit()
    except MissingExtra as error:
        return _images(view, f"Pictures are not interactive: {error}")
    figures, more = {}, set()
    for kind in drift_plots.kinds(view):
        first = next(kind, None)
        if first is not None:
            name = first.plot.name
            figures[name], cut = plotly_page.figures(itertools.chain([first], kind), tools)
            more |= {name} if cut else set()
    return _Drawn(figures, {}, more, "")


def _images(view: DriftView, why: str) -> _Drawn:
    firsts = [next(kind, None) for kind in drift_plots.kinds(view)]
    pictures, missing = page.pictures(one.plot for one in firsts if one is not None)
    return _Drawn({}, {one.name: one for one in pictures}, set(), missing or why)


def _sections(view: DriftView, drawn: _Drawn) -> list[Section]:
    tables = {
        "methods": report_drift_tables.methods(view),
        "detection": report_drift_tables.detection(view.detection),
    }
    folded = {"masks": report_drift_tables.remasks(view)}
    found = []
    for name, (heading, kinds, words) in SECTIONS.items():
        own = [key for key in [*drawn.figures, *drawn.pictures] if key.startswith(kinds)]
        section = Section(
            name,
            heading,
            words,
            tuple(drawn.figures[key] for key in own if key in drawn.figures),
            tuple(drawn.pictures[key] for key in own if key in drawn.pictures),
            tables.get(name),
            folded.get(name),
            MORE if drawn.more.intersection(own) else "",
        )
        if section.figures or section.pictures or section.table or section.folded:
            found.append(section)
    return found


def _cards(view: DriftView) -> list[tuple[str, str, str]]:
    """The figures that head the page, of the method that lost least among comparable ones."""
    known = [line for line in view.lines if line["loss"] and line["loss"]["after_minus_dense"]]
    if not known:
        return []
    alike = drift_tables.comparable(known)
    best = min(alike, key=lambda line: float(line["loss"]["after_minus_dense"]["mean"]))
    among = f"the least of {len(alike)} methods"
    if len(alike) < len(known):
        among += " that removed about as much"
    lost, recovery = best["loss"]["after_minus_dense"], best["loss"]["recovery"]
    remasks = drift_words.plural(best["remasks_per_cell"])
    mean = recovery["mean_tokens"]
    return [
        (
            f"{lost['mean']:.2f} nats",
            f"per token over dense after the change with {best['label']}",
            f"95 %: {drift_words.bounds(lost)}; {among}",
        ),
        (percent(best["achieved_sparsity"]), "of the FFN neurons removed", best["label"]),
        (
            percent(best["dense_token_share"]),
            "of the decoded tokens ran dense",
            f"{remasks} per passage",
        ),
        (
            f"{recovery['recovered']} of {recovery['changes']}",
            "changes it recovered from",
            "" if mean is None else f"after {mean:.0f} tokens, mean",
        ),
    ]


def _facts(view: DriftView) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""

    done = len(view.done)
    found = [
        ("mode", report_head.named(cell.mode for cell in view.cells), False),
        ("methods", report_head.named(view.labels), False),
        ("sources", str(len({cell.source for cell in view.done})), False),
        ("seeds", report_head.named(cell.seed for cell in view.cells), False),
        ("cells", f"{done} done, {len(view.cells) - done or 'none'} failed", False),
        ("dtype", report_head.named(cell.dtype for cell in view.cells), False),
    ]
    known = {"checkpoint", "file quantisation", "device", "date", "sha256", "command"}
    return found + [fact for fact in report_head.facts(view.results) if fact[0] in known]
