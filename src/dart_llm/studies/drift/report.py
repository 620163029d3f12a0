"""The page of ``dart-llm drift`` and ``dart-llm detect``: pictures, tables, texts by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from dart_llm.files import write_text
from dart_llm.reporting import page
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Column, PageTable, Table, grouped
from dart_llm.reporting.words import quantity
from dart_llm.studies.drift import detect_report, plots, summary
from dart_llm.studies.drift.cell import DriftCell
from dart_llm.studies.drift.plots import DriftView, accounted

MOST_PICTURES = 3
"""Pictures of one kind on the page."""

MOST_MASKS = 300
"""Rows of the table of re-masks."""

MOST_TEXTS = 24
"""Texts on the page; texts.jsonl and tokens.jsonl have all."""

SECTIONS = {
    "methods": "Methods compared",
    "similarity": "Similarity over time",
    "masks": "Masks, before and after",
    "detection": "Detection of the change",
}
"""Headings."""


def pictures(view: DriftView, most: int = MOST_PICTURES) -> Iterator[tuple[str, list[Plot]]]:
    """The section and up to ``most`` pictures of each kind that has some, the best ones first."""
    kinds: list[tuple[str, Iterable[Plot | None]]] = [
        ("methods", [plots.make_methods(view)] if view.summary else []),
        ("methods", [plots.make_loss(view)]),
        ("similarity", plots.make_timelines(view)),
        ("masks", (plots.make_overlap(view, *masks) for masks in plots.remasked(view))),
        ("masks", (plots.make_raster(view, *masks) for masks in plots.remasked(view))),
        ("detection", detect_report.make_curves(view.detection or {})),
    ]
    for section, kind in kinds:
        if drawn := list(islice(filter(None, kind), most)):
            yield section, drawn


def remasks(view: DriftView) -> PageTable | None:
    """Every mask: where, why, from how many tokens, and what it keeps of the one before."""
    rows = [{**mask, "cell": cell} for cell in view.cells for mask in cell.record["remasks"]]
    caption = "Masks: when, why, and how much of the mask before they keep"
    if len(rows) > MOST_MASKS:
        caption += f" (the first {MOST_MASKS} of {len(rows):,})"
    columns = (
        Column("cell", lambda row: row["cell"].name),
        Column("decode step", "step"),
        Column("cause", "cause"),
        Column("topic", lambda row: _topic(row["cell"], row["step"])),
        Column("evidence (tokens)", "evidence_tokens", ".0f"),
        Column("Jaccard with the mask before", "jaccard", lambda values: f"{fmean(values):.2f}"),
        Column("over layers", "jaccard", lambda values: f"{min(values):.2f} to {max(values):.2f}"),
        Column("neurons kept", lambda row: sum(row["kept"]), ","),
        Column("joined", lambda row: row["joined"] and sum(row["joined"]), ","),
    )
    return Table("", caption, columns, rows[:MOST_MASKS]).html() if rows else None


def _topic(cell: DriftCell, step: int) -> str | None:
    """The topic at a step, and how far into it."""
    before = [(name, start) for name, start, _ in cell.topics if start <= step]
    return f"{before[-1][0]}, token {step - before[-1][1]}" if before else None


# The texts: free ones side by side, passages token by token.


def free_texts(view: DriftView) -> Iterator[dict[str, Any]]:
    """Per source what each method wrote: ``name``, ``prompt`` and ``columns``."""
    free = (cell for cell in view.cells if "text" in cell.record)
    for cells in grouped(free, lambda cell: (cell.source.id, cell.seed)).values():
        seed = f", seed {cells[0].seed}" if cells[0].seed else ""
        columns = [(cell.label, _note(cell), cell.record["text"] or "(no text)") for cell in cells]
        name = cells[0].source_name + seed
        yield {"name": name, "prompt": cells[0].source.text, "columns": columns}


def _note(cell: DriftCell) -> str:
    parts = [f"{cell.decoded} decoded tokens"]
    if cell.record["accounting"]:
        parts.append(accounted(cell.record["accounting"]))
    for name, value in (cell.record["metrics"] or {}).items():
        parts.append(f"{name} {quantity(value, perplexity=False) or 'not known'}")
    return " · ".join(parts)


LARGE = 3.0
"""Nats over dense at which a token's shade is full."""

SEEN = 0.15
"""Nats over dense below which a token has no shade."""


def passage_texts(view: DriftView) -> Iterator[dict[str, Any]]:
    """The passages under each pruned method, of several seeds the first, in ``spans``.

    A span is a text, its shade from 0 to 1 by the loss over dense, the loss in words, and the name
    of the topic that begins with it.
    """
    read = [cell for cell in view.cells if "losses" in cell.record]
    dense = {cell.source.id: cell for cell in read if cell.dense}
    pruned = (cell for cell in read if not cell.dense and cell.source.id in dense)
    for (source, _), cells in grouped(pruned, lambda c: (c.source.id, c.label)).items():
        cell = cells[0]
        name = f"{cell.source_name}, {cell.label}: {accounted(cell.record['accounting'])}"
        yield {"name": name, "spans": list(_spans(cell, dense[source].record["losses"]))}


def _spans(cell: DriftCell, dense: Sequence[float | None]) -> Iterator[tuple[str, float, str, str]]:
    record, plain = cell.record, ""
    begins = {start: name for name, start, _ in cell.topics[1:]}
    tokens = zip(record["pieces"], record["losses"], dense, strict=True)
    for number, (piece, loss, reference) in enumerate(tokens):
        over = 0.0 if loss is None or reference is None else loss - reference
        if over < SEEN and number not in begins:
            plain += piece
            continue
        if plain:
            yield plain, 0.0, "", ""
        plain = ""
        shade = min(1.0, over / LARGE) if over >= SEEN else 0.0
        words = f"token {number}: {loss:.2f} nats, dense {reference:.2f}" if shade else ""
        yield piece, shade, words, begins.get(number, "")
    if plain:
        yield plain, 0.0, "", ""


# The page.


def write(view: DriftView) -> Path:
    """Write ``report.html`` into the results folder and return its path."""
    path = view.folder / "report.html"
    write_text(path, render(view))
    return path


def render(view: DriftView) -> str:
    """The page of one study; without matplotlib it has no pictures and says so."""
    sections, missing = _sections(view)
    conclusion = summary.headline(view.summary) if view.summary else ""
    if view.detection and not conclusion:
        conclusion = detect_report.headline(view.detection)
    kind = "Knowledge drift" if view.summary else "Drift detection"
    content = {
        "title": f"{kind} on {page.model_name(view.config)}",
        "conclusion": conclusion or "Nothing can be compared.",
        "notes": (view.summary or view.detection or {}).get("notes") or [],
        "facts": [fact for fact in page.facts(view.config) if fact[0] in FACTS],
        "sections": sections,
        "missing": missing,
        "texts": list(islice(free_texts(view), MOST_TEXTS)),
        "passages": list(islice(passage_texts(view), MOST_TEXTS)),
        "failures": [f"{key}: {sentence}" for key, sentence in (view.failed or {}).items()],
    }
    return page.render(view.config, "drift.html", content)


FACTS = {"checkpoint", "file quantisation", "dtype", "device", "date", "sha256", "command"}


def _sections(view: DriftView) -> tuple[list[dict[str, Any]], str]:
    """The sections that show something, and why there are no pictures."""
    tables = {
        "methods": summary.table(view.summary).html() if view.summary else None,
        "detection": detect_report.rules_table(view.detection).html() if view.detection else None,
    }
    folded = {"masks": remasks(view)}
    drawn: dict[str, list[Plot]] = {name: [] for name in SECTIONS}
    for name, kind in pictures(view):
        drawn[name] += kind
    sections, missing = [], ""
    for name, heading in SECTIONS.items():
        shown, reason = page.pictures(drawn[name])
        missing = missing or reason
        section = {
            "id": name,
            "heading": heading,
            "pictures": shown,
            "table": tables.get(name),
            "folded": folded.get(name),
        }
        if shown or section["table"] or section["folded"]:
            sections.append(section)
    return sections, missing
