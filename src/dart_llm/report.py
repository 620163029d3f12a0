"""``report.html``: one self-contained page about a run, built from its results folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dart_llm import (
    page,
    plots,
    report_evaluations,
    report_head,
    report_tables,
    report_texts,
    sentences,
)
from dart_llm.results import write_text
from dart_llm.results_view import ResultsView, read


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
    return page.render("report.html", _content(view))


def _content(view: ResultsView) -> dict[str, Any]:
    pictures, missing = page.pictures(plots.available(view))
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
