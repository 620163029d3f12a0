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
from typing import Any, NamedTuple

from dart_llm.errors import MissingExtra
from dart_llm.experiments import run_facts
from dart_llm.files import page_json, write_text
from dart_llm.reporting import figures, page
from dart_llm.reporting.figures import Drawing, InteractiveFigure, Plot
from dart_llm.reporting.page import Picture
from dart_llm.reporting.table import Column, PageTable, Table
from dart_llm.reporting.words import percent
from dart_llm.studies.detection import report as detection_report
from dart_llm.studies.drift import flow_plot, summary
from dart_llm.studies.drift.plots import (
    make_loss,
    make_methods,
    make_overlap,
    make_raster,
    make_timeline,
)
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

MAKERS = (
    make_methods,
    make_loss,
    make_timeline,
    make_overlap,
    make_raster,
    flow_plot.make,
)
"""Each makes pictures of one kind, the best to show first."""

MOST_PICTURES = 3
"""Pictures of one kind that the page shows where they are not interactive."""

MOST_MASKS = 300
"""Rows of the table of re-masks."""

MOST_BYTES = 800_000
"""Of all free texts, and of all passages' tokens and losses, on one page."""


def kinds(view: DriftView) -> Iterator[Iterator[Drawing]]:
    """The pictures by kind, then those of detection.

    A picture is made when it is asked for: making one of masks reads their file.
    """
    for make in MAKERS:
        yield make(view)
    yield from (iter([drawing]) for drawing in detection_report.make_drawings(view.detection))


def plots(folder: Path) -> Iterator[Plot]:
    """One picture of each kind that the folder allows.

    Raises ``ResultsError`` when it is no drift folder, or masks do not fit it.
    """
    firsts = (next(kind, None) for kind in kinds(read(folder)))
    return (drawing.plot for drawing in firsts if drawing is not None)


def write_all(folder: Path) -> list[Path]:
    """Write these as ``plots/<name>.png``.

    Raises also ``ResultsError`` when a file cannot be written, and ``MissingExtra`` without
    matplotlib or cmcrameri.
    """
    return figures.save(folder, plots(folder))


# The tables: every quality number beside what was really removed.


def methods(view: DriftView) -> PageTable | None:
    """The summary as ``summary.md`` has it."""
    if not view.summary:
        return None
    unit = "losses in nats per token; " if view.mode == "forced" else ""
    sources = f"{view.summary['sources']} {MODES.get(view.mode, 'source')}s"
    caption = f"Means over {sources} ({unit}in brackets 95 % intervals)"
    return summary.table(view.summary, caption).html()


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
    if not document.get("rows"):
        return None
    table = detection_report.rules_table(document).html()
    _, _, *heads = table.head
    rows = tuple((f"{signal}, {rule}", *cells) for signal, rule, *cells in table.rows)
    caption = f"Detection of known changes of topic. {table.caption}"
    return PageTable(caption, ("signal, rule", *heads), rows)


# The texts: free ones side by side, passages token by token.


class MethodText(NamedTuple):
    """What one method wrote."""

    name: str
    note: str
    text: str


class Source(NamedTuple):
    """The texts that answer one prompt."""

    name: str
    prompt: str
    columns: tuple[MethodText, ...]


class PassageTokens(NamedTuple):
    """A passage and the losses of its tokens, as JSON for a script block.

    ``methods``: label and label with accounting, pruned methods first.
    """

    name: str
    methods: tuple[tuple[str, str], ...]
    text: str
    data: str


def free(view: DriftView, room: int = MOST_BYTES) -> tuple[list[Source], bool]:
    """By source and seed, dense first: the first that fit; whether there are more."""
    groups: dict[tuple[str, int], list[DriftCell]] = {}
    for cell in view.done:
        if cell.mode == "free":
            groups.setdefault((cell.source, cell.seed), []).append(cell)
    shown: list[Source] = []
    for (source, seed), cells in groups.items():
        columns = tuple(_column(cell) for cell in sorted(cells, key=lambda cell: not cell.dense))
        room -= sum(len(column.text) + 200 for column in columns)
        if shown and room < 0:
            return shown, True
        name = source_name(cells[0]) + (f", seed {seed}" if seed else "")
        shown.append(Source(name, view.prompt(source), columns))
    return shown, False


def _column(cell: DriftCell) -> MethodText:
    parts = [f"{cell.decoded_tokens} decoded tokens"]
    if cell.accounting:
        parts.append(accounted(cell.accounting))
    for name, value in (cell.metrics or {}).items():
        digits = "not known" if value is None else f"{value:.{3 if abs(value) < 10 else 1}f}"
        parts.append(f"{name} {digits}")
    return MethodText(cell.label, " · ".join(parts), cell.text or "(no text)")


def passage_texts(view: DriftView, room: int = MOST_BYTES) -> tuple[list[PassageTokens], bool]:
    """The first passages that fit into ``room`` bytes, at least one; whether there are more."""
    groups: dict[str, dict[str, DriftCell]] = {}
    for cell in view.done:
        if cell.mode == "forced" and cell.pieces:
            groups.setdefault(cell.source, {}).setdefault(cell.label, cell)
    shown: list[PassageTokens] = []
    for cells in groups.values():
        passage = _passage(sorted(cells.values(), key=lambda cell: cell.dense))
        if shown and len(passage.data) > room:
            return shown, True
        room -= len(passage.data)
        shown.append(passage)
    return shown, False


def _passage(cells: Sequence[DriftCell]) -> PassageTokens:
    """Pieces are those of the first cell: in forced mode all methods see the same tokens."""
    first = cells[0]
    losses = {
        "dense" if cell.dense else cell.label: [
            None if loss is None else round(loss, 2) for loss in cell.losses
        ]
        for cell in cells
        if len(cell.losses) == len(first.pieces)
    }
    topics = [{"name": name, "start": start} for name, start, _ in first.placed_topics]
    data = {"pieces": first.pieces, "topics": topics, "losses": losses}
    methods = tuple(
        (cell.label, f"{cell.label}: {accounted(cell.accounting)}")
        for cell in cells
        if cell.accounting
    )
    text = "".join(first.pieces)
    return PassageTokens(
        source_name(first), methods or (("dense", "dense"),), text, page_json(data)
    )


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

MORE = "Of each kind, the first pictures that fit are on the page."


class Section(NamedTuple):
    """One part of the page."""

    id: str
    heading: str
    words: str
    figures: tuple[Sequence[InteractiveFigure], ...]
    pictures: tuple[Picture, ...]
    table: PageTable | None
    folded: PageTable | None
    more: str


class _Drawn(NamedTuple):
    """All pictures: interactive ones by name, images, names of which there are more, a reason."""

    figures: dict[str, list[InteractiveFigure]]
    pictures: list[Picture]
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
    script = figures.script() if drawn.figures else ""
    passages, more = passage_texts(view)
    texts, more_texts = free(view)
    return {
        "title": title(view),
        "status": str(view.results.config.get("status") or "unknown"),
        "conclusion": conclusion(view),
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
        "settings": run_facts.settings(view.results),
        "provenance": run_facts.provenance(view.results),
        "script": Markup(script),
        "policy": Markup(figures.policy(script) if script else ""),
    }


def title(view: DriftView) -> str:
    """What was studied, and on which model."""
    names = sorted({cell.model for cell in view.cells})
    model = view.results.checkpoint.get("name") or ", ".join(names) or "an unknown model"
    return f"Knowledge drift on {model}"


def _draw(view: DriftView) -> _Drawn:
    tools, missing = None, ""
    try:
        tools = figures.kit()
    except MissingExtra as error:
        missing = f"Pictures are not interactive: {error}"
    live, images, more = {}, list[Drawing](), set[str]()
    for kind in kinds(view):
        first = next(kind, None)
        if first is None:
            continue
        if first.interactive is None:
            images += [first, *itertools.islice(kind, MOST_PICTURES - 1)]
            more |= {first.plot.name} if next(kind, None) else set()
        elif tools is None:
            images.append(first)
        else:
            drawings = itertools.chain([first], kind)
            live[first.plot.name], cut = figures.figures(drawings, tools)
            more |= {first.plot.name} if cut else set()
    pictures, reason = page.pictures(drawing.plot for drawing in images)
    return _Drawn(live, pictures, more, reason or missing)


def _sections(view: DriftView, drawn: _Drawn) -> list[Section]:
    tables = {"methods": methods(view), "detection": detection(view.detection)}
    folded = {"masks": remasks(view)}
    sections = []
    for name, (heading, starts, words) in SECTIONS.items():
        section = Section(
            name,
            heading,
            words,
            tuple(shown for key, shown in drawn.figures.items() if key.startswith(starts)),
            tuple(picture for picture in drawn.pictures if picture.name.startswith(starts)),
            tables.get(name),
            folded.get(name),
            MORE if any(key.startswith(starts) for key in drawn.more) else "",
        )
        if section.figures or section.pictures or section.table or section.folded:
            sections.append(section)
    return sections


def _cards(view: DriftView) -> list[tuple[str, str, str]]:
    """The figures that head the page, of the method that lost least among comparable ones."""
    known = [line for line in view.lines if line["loss"] and line["loss"]["after_minus_dense"]]
    if not known:
        return []
    alike, best = summary.comparable(known), summary.best(known, "loss", "after_minus_dense")
    among = f"the least of {len(alike)} methods"
    if len(alike) < len(known):
        among += " that removed about as much"
    lost, recovery = best["loss"]["after_minus_dense"], best["loss"]["recovery"]
    remasks = plural(best["remasks_per_cell"])
    mean = recovery["mean_tokens"]
    return [
        (
            f"{lost['mean']:.2f} nats",
            f"per token over dense after the change with {best['label']}",
            f"95 %: {_bounds(lost)}; {among}",
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


def _bounds(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return "no interval"
    return f"{estimate['low']:.2f} to {estimate['high']:.2f}"


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
