"""The pictures that a drift folder allows, and its page: texts token by token, tables.

``report.html`` holds one copy of plotly and runs no other script; everything from a file is
escaped.  Where pointing helps, a picture is interactive; without plotly all are images, and
without matplotlib there are none and the page says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dart_llm.errors import MissingExtra
from dart_llm.experiments import run_facts
from dart_llm.files import page_json, write_text
from dart_llm.reporting import figures, page
from dart_llm.reporting.figures import Drawing, Kit, Plot
from dart_llm.reporting.table import Column, PageTable, Table, grouped
from dart_llm.reporting.words import percent
from dart_llm.studies.detection import report as detection_report
from dart_llm.studies.drift import flow_plot, plots, summary
from dart_llm.studies.drift.view import (
    MODES,
    DriftCell,
    DriftView,
    accounted,
    cell_name,
    conclusion,
    plural,
    read,
    source_name,
)

MOST_PICTURES = 3
"""Pictures of one kind that the page shows where they are not interactive."""

MOST_MASKS = 300
"""Rows of the table of re-masks."""

MOST_BYTES = 800_000
"""Of all free texts, and of all passages' tokens and losses, on one page."""

SECTIONS = {
    "methods": (
        "Methods compared",
        "Each method's quality beside what it really removed. Passages: the loss over dense on the "
        "same tokens. Prompts: how close the text is to the dense one.",
    ),
    "similarity": (
        "Similarity over time",
        "Each mark compares one window of tokens with the tokens the masks were made from. Windows "
        "under the threshold count towards a re-mask.",
    ),
    "masks": (
        "Masks, before and after",
        "Which neurons live when, how much of the first masks is left in each layer, and which "
        "neurons one topic leaves and the next one brings in.",
    ),
    "detection": (
        "Detection of the change",
        "How many known changes each signal and rule finds, how late, and how often it fires where "
        "nothing changed.",
    ),
}
"""Heading and words of each section."""


def kinds(view: DriftView) -> Iterator[tuple[str, Iterator[Drawing]]]:
    """The section and the pictures of each kind, the best to show first.

    A picture is made when it is asked for: making one of masks reads their file.
    """
    for drawing in (plots.make_methods(view), plots.make_loss(view)):
        yield "methods", filter(None, [drawing])
    yield "similarity", plots.make_timeline(view)
    for make in (plots.make_overlap, plots.make_raster, flow_plot.make):
        drawn = (make(view, cell, masks) for cell, masks in plots.remasked(view))
        yield "masks", filter(None, drawn)
    for drawing in detection_report.make_drawings(view.detection):
        yield "detection", iter([drawing])


def pictures(folder: Path) -> Iterator[Plot]:
    """One picture of each kind that the folder allows.

    Raises ``ResultsError`` when it is no drift folder.
    """
    firsts = (next(kind, None) for _, kind in kinds(read(folder)))
    return (drawing.plot for drawing in firsts if drawing is not None)


def write_all(folder: Path) -> list[Path]:
    """Write these as ``plots/<name>.png``.

    Raises also ``ResultsError`` when a file cannot be written, and ``MissingExtra`` without
    matplotlib or cmcrameri.
    """
    return figures.save(folder, pictures(folder))


# The tables: every quality number beside what was really removed.


def methods(view: DriftView) -> PageTable | None:
    """The summary as ``summary.md`` has it."""
    if not view.summary:
        return None
    unit = "losses in nats per token; " if view.mode == "forced" else ""
    sources = f"{view.summary['sources']} {MODES[view.mode]}s"
    return summary.table(
        view.summary, f"Means over {sources} ({unit}in brackets 95 % intervals)"
    ).html()


def remasks(view: DriftView) -> PageTable | None:
    """Every mask: where, why, from how many tokens, and what it keeps of the one before."""
    rows = [{**vars(mask), "cell": cell} for cell in view.done for mask in cell.remasks]
    caption = "Masks: when, why, and how much of the mask before they keep"
    if len(rows) > MOST_MASKS:
        caption += f" (the first {MOST_MASKS} of {len(rows):,})"
    columns = (
        Column("cell", "cell", cell_name),
        Column("decode step", "step"),
        Column("cause", "cause"),
        Column("topic", lambda row: _topic(row["cell"], row["step"])),
        Column("evidence (tokens)", "evidence_tokens", ".0f"),
        Column("Jaccard with the mask before", _overlaps, lambda values: f"{fmean(values):.2f}"),
        Column("over layers", _overlaps, lambda values: f"{min(values):.2f} to {max(values):.2f}"),
        Column("neurons kept", lambda row: sum(row["kept"]), ","),
    )
    return Table("", caption, columns, rows[:MOST_MASKS]).html() if rows else None


def _overlaps(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    return row["jaccard"] or None


def _topic(cell: DriftCell, step: int) -> str | None:
    """The topic at a step, and how far into it."""
    before = [(name, start) for name, start, _ in cell.placed_topics if start <= step]
    return f"{before[-1][0]}, token {step - before[-1][1]}" if before else None


def detection(document: Mapping[str, Any]) -> PageTable | None:
    """Rate, delay and false alarms of every signal and rule, as ``detection.md`` has them."""
    return detection_report.rules_table(document).html() if document.get("rows") else None


# The texts: free ones side by side, passages token by token.


def _fitting(texts: Iterator[tuple[Any, int]], room: int) -> tuple[list[Any], bool]:
    """The first that fit into ``room`` bytes, at least one; whether there are more."""
    shown: list[Any] = []
    for text, size in texts:
        if shown and size > room:
            return shown, True
        room -= size
        shown.append(text)
    return shown, False


def free_texts(view: DriftView, room: int = MOST_BYTES) -> tuple[list[dict[str, Any]], bool]:
    """``name``, ``prompt`` and ``columns`` of the first texts that fit; whether there are more."""
    free = (cell for cell in view.done if cell.mode == "free")
    groups = grouped(free, lambda cell: (cell.source, cell.seed))

    def texts() -> Iterator[tuple[dict[str, Any], int]]:
        for cells in groups.values():
            columns = [_column(cell) for cell in sorted(cells, key=lambda cell: not cell.dense)]
            seed = f", seed {cells[0].seed}" if cells[0].seed else ""
            head = {"name": source_name(cells[0]) + seed, "prompt": view.prompt(cells[0].source)}
            yield {**head, "columns": columns}, sum(len(cell.text) + 200 for cell in cells)

    return _fitting(texts(), room)


def _column(cell: DriftCell) -> dict[str, str]:
    """What one method wrote."""
    parts = [f"{cell.decoded_tokens} decoded tokens"]
    if cell.accounting:
        parts.append(accounted(cell.accounting))
    for name, value in (cell.metrics or {}).items():
        digits = "not known" if value is None else f"{value:.{3 if abs(value) < 10 else 1}f}"
        parts.append(f"{name} {digits}")
    return {"name": cell.label, "note": " · ".join(parts), "text": cell.text or "(no text)"}


def passage_texts(view: DriftView, room: int = MOST_BYTES) -> tuple[list[dict[str, Any]], bool]:
    """The first passages that fit, whether there are more; of several seeds the first.

    ``data``: pieces and losses as JSON; ``methods``: label, and label with accounting.
    """
    groups: dict[str, dict[str, DriftCell]] = {}
    for cell in view.done:
        if cell.mode == "forced" and cell.pieces:
            groups.setdefault(cell.source, {}).setdefault(cell.label, cell)
    passages = (_passage([*cells.values()]) for cells in groups.values())
    return _fitting(((passage, len(passage["data"])) for passage in passages), room)


def _passage(cells: Sequence[DriftCell]) -> dict[str, Any]:
    """Pieces are those of the first cell: in forced mode all methods see the same tokens."""
    cells = sorted(cells, key=lambda cell: cell.dense)
    first = cells[0]
    losses = {
        cell.label: [None if loss is None else round(loss, 2) for loss in cell.losses]
        for cell in cells
        if len(cell.losses) == len(first.pieces)
    }
    topics = [{"name": name, "start": start} for name, start, _ in first.placed_topics]
    pruned = [(c.label, f"{c.label}: {accounted(c.accounting)}") for c in cells if c.accounting]
    return {
        "name": source_name(first),
        "methods": pruned or [("dense", "dense")],
        "text": "".join(first.pieces),
        "data": page_json({"pieces": first.pieces, "topics": topics, "losses": losses}),
    }


# The page.


def write(folder: Path) -> Path:
    """Write ``report.html`` into a drift folder and return its path.

    Raises ``ResultsError`` when it is no drift folder or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder)))
    return path


def render(view: DriftView) -> str:
    """The page of one drift study."""
    from markupsafe import Markup

    tools, missing = None, ""
    try:
        tools = figures.kit()
    except MissingExtra as error:
        missing = f"Pictures are not interactive: {error}"
    sections, reason = _sections(view, tools)
    script = figures.script() if any(section["figures"] for section in sections) else ""
    passages, more_passages = passage_texts(view)
    texts, more_texts = free_texts(view)
    content = {
        "title": title(view),
        "conclusion": conclusion(view),
        "problems": view.problems,
        "notes": view.summary.get("notes") or [],
        "cards": _cards(view),
        "facts": _facts(view),
        "sections": sections,
        "missing": reason or missing,
        "texts": texts,
        "more_texts": "Further texts stand in texts.jsonl." if more_texts else "",
        "passages": passages,
        "more_passages": "Further passages stand in tokens.jsonl." if more_passages else "",
        "failures": [f"{c.key}: {c.error or c.status}" for c in view.cells if not c.done],
        "script": Markup(script),
        "policy": Markup(figures.policy(script) if script else ""),
    }
    return run_facts.render(view.results, "drift.html", content)


def title(view: DriftView) -> str:
    """What was studied, and on which model."""
    names = sorted({cell.model for cell in view.cells})
    model = view.results.checkpoint.get("name") or ", ".join(names) or "an unknown model"
    return f"Knowledge drift on {model}"


def _sections(view: DriftView, tools: Kit | None) -> tuple[list[dict[str, Any]], str]:
    """The sections that show something, and why there are no pictures."""
    tables = {"methods": methods(view), "detection": detection(view.detection)}
    folded = {"masks": remasks(view)}
    live: dict[str, list[Any]] = {name: [] for name in SECTIONS}
    images: dict[str, list[Plot]] = {name: [] for name in SECTIONS}
    more: set[str] = set()
    for name, kind in kinds(view):
        first = next(kind, None)
        if first is None:
            continue
        drawings = itertools.chain([first], kind)
        if tools is not None and first.interactive is not None:
            shown, cut = figures.figures(drawings, tools)
            live[name].append(shown)
        else:
            images[name] += [one.plot for one in itertools.islice(drawings, MOST_PICTURES)]
            cut = next(drawings, None) is not None
        more |= {name} if cut else set()
    sections, missing = [], ""
    for name, (heading, words) in SECTIONS.items():
        drawn, reason = page.pictures(images[name])
        missing = missing or reason
        section = {
            "id": name,
            "heading": heading,
            "words": words,
            "figures": live[name],
            "pictures": drawn,
            "table": tables.get(name),
            "folded": folded.get(name),
            "more": "Of each kind, the first that fit are on the page." if name in more else "",
        }
        if any(section[part] for part in ("figures", "pictures", "table", "folded")):
            sections.append(section)
    return sections, missing


def _cards(view: DriftView) -> list[tuple[str, str, str]]:
    """What heads the page: of the method that lost least among comparable ones."""
    known = [line for line in view.lines if line["loss"] and line["loss"]["after_minus_dense"]]
    if not known:
        return []
    best = summary.best(known, "loss", "after_minus_dense")
    name, loss = best["label"], best["loss"]
    lost, recovery = loss["after_minus_dense"], loss["recovery"]
    recovered = f"{recovery['recovered']} of {recovery['changes']}"
    remasks = f"{plural(best['remasks_per_cell'])} per passage"
    return [
        (f"{lost['mean']:.2f} nats", f"per token over dense after the change with {name}", ""),
        (percent(best["achieved_sparsity"]), "of the FFN neurons removed", name),
        (percent(best["dense_token_share"]), "of the decoded tokens ran dense", remasks),
        (recovered, "changes it recovered from", ""),
    ]


def _facts(view: DriftView) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""
    done = len(view.done)
    found = [
        ("mode", run_facts.named(cell.mode for cell in view.cells), False),
        ("methods", run_facts.named(view.labels), False),
        ("sources", str(len({cell.source for cell in view.done})), False),
        ("seeds", run_facts.named(cell.seed for cell in view.cells), False),
        ("cells", f"{done} done, {len(view.cells) - done or 'none'} failed", False),
        ("dtype", run_facts.named(cell.dtype for cell in view.cells), False),
    ]
    known = {"checkpoint", "file quantisation", "device", "date", "sha256", "command"}
    return found + [fact for fact in run_facts.facts(view.results) if fact[0] in known]
