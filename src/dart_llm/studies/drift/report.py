"""Which figures a folder allows; the page: texts token by token, tables.

``report.html`` of a drift study: one page with its pictures, texts and tables.

The page holds one copy of plotly and runs no other script; everything from a file is escaped.
Without plotly it shows the same pictures as images; without matplotlib it has none and says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dart_llm.errors import MissingExtra
from dart_llm.experiments import run_facts
from dart_llm.files import page_json, write_text
from dart_llm.reporting import figures, page
from dart_llm.reporting import figures as plotly_page
from dart_llm.reporting.figures import Drawing, InteractiveFigure
from dart_llm.reporting.page import Picture
from dart_llm.reporting.table import NOTHING, PageTable
from dart_llm.reporting.words import percent
from dart_llm.studies.detection import report
from dart_llm.studies.drift import flow_plot, plots, summary
from dart_llm.studies.drift import view as drift_words
from dart_llm.studies.drift.view import DriftCell, DriftView, read

# The pictures of a drift folder as ``plots/*.png``.


MAKERS = (
    plots.make_methods,
    plots.make_loss,
    plots.make_timeline,
    plots.make_overlap,
    plots.make_raster,
    flow_plot.make,
)
"""Each makes pictures of one kind, the best to show first."""


def kinds(view: DriftView) -> Iterator[Iterator[Drawing]]:
    """The pictures by kind, then those of detection.

    A picture is made when it is asked for: making one of masks reads their file.
    """
    for make in MAKERS:
        yield make(view)
    yield from (iter([drawing]) for drawing in report.make_drawings(view.detection))


def write_all(folder: Path) -> list[Path]:
    """Write ``plots/<name>.png``, one picture of each kind that the folder allows.

    Raises ``ResultsError`` when it is no drift folder, masks do not fit it or a file cannot be
    written, ``MissingExtra`` without matplotlib or cmcrameri.
    """
    firsts = (next(kind, None) for kind in kinds(read(folder)))
    return figures.save(folder, (drawing.plot for drawing in firsts if drawing is not None))


# The tables of a drift study's page: every quality number beside what was really removed.


MOST_MASKS = 300
"""Rows of the table of re-masks."""


def methods(view: DriftView) -> PageTable | None:
    """The summary as ``summary.md`` has it."""
    if not view.summary:
        return None
    shown = summary.columns(view.summary)
    rows = tuple(tuple(make(line) for _, make in shown) for line in view.summary["rows"])
    kind = drift_words.MODES.get(view.mode, "source")
    unit = "losses in nats per token; " if view.mode == "forced" else ""
    caption = f"Means over {view.summary['sources']} {kind}s ({unit}in brackets 95 % intervals)"
    return PageTable(caption, tuple(head for head, _ in shown), rows)


def remasks(view: DriftView) -> PageTable | None:
    """Every mask: where, why, from how many tokens, and what it keeps of the one before."""
    body = [
        (
            drift_words.choice(cell),
            str(mask.step),
            mask.cause,
            _topic(cell, mask.step),
            f"{mask.evidence_tokens:.0f}",
            f"{fmean(mask.jaccard):.2f}" if mask.jaccard else NOTHING,
            f"{min(mask.jaccard):.2f} to {max(mask.jaccard):.2f}" if mask.jaccard else NOTHING,
            f"{sum(mask.kept):,}",
        )
        for cell in view.done
        for mask in cell.remasks
    ]
    head = ("cell", "decode step", "cause", "topic", "evidence (tokens)")
    more = ("Jaccard with the mask before", "over layers", "neurons kept")
    caption = "Masks: when, why, and how much of the mask before they keep"
    if len(body) > MOST_MASKS:
        caption += f" (the first {MOST_MASKS} of {len(body):,})"
    return PageTable(caption, (*head, *more), tuple(body[:MOST_MASKS])) if body else None


def _topic(cell: DriftCell, step: int) -> str:
    """The topic at a step, and how far into it."""
    for topic in reversed(cell.topics):
        if topic.start is not None and topic.start <= step:
            return f"{topic.name}, token {step - topic.start}"
    return NOTHING


def detection(found: Mapping[str, Any]) -> PageTable | None:
    """Rate, delay and false alarms of every signal and rule, as ``detection.md`` has them."""
    if not found.get("rows"):
        return None
    body = []
    for row in found["rows"]:
        signal, rule, *cells = report.cells(row)
        body.append((f"{signal}, {rule}", *cells))
    _, _, *heads = report.HEADS
    caption = f"Detection of known changes of topic. {report.table_title(found)}"
    return PageTable(caption, ("signal, rule", *heads), tuple(body))


# The texts of a drift study's page: free ones side by side, passages token by token.


MOST_BYTES = 800_000
"""Of all free texts, and of all passages' tokens and losses, on one page."""


@dataclass(frozen=True)
class Column:
    """What one method wrote."""

    name: str
    note: str
    text: str


@dataclass(frozen=True)
class Source:
    """The texts that answer one prompt."""

    name: str
    prompt: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class PassageTokens:
    """A passage and the losses of its tokens, as JSON for a script block."""

    name: str
    methods: tuple[tuple[str, str], ...]
    """Label and label with accounting, pruned methods first."""
    text: str
    data: str


def free(view: DriftView, room: int = MOST_BYTES) -> tuple[list[Source], bool]:
    """By source and seed, dense first: the first that fit; whether there are more."""
    found: dict[tuple[str, int], list[DriftCell]] = {}
    for cell in view.done:
        if cell.mode == "free":
            found.setdefault((cell.source, cell.seed), []).append(cell)
    shown: list[Source] = []
    for (source, seed), own in found.items():
        columns = tuple(_column(cell) for cell in sorted(own, key=lambda cell: not cell.dense))
        room -= sum(len(column.text) + 200 for column in columns)
        if shown and room < 0:
            return shown, True
        name = drift_words.place(own[0]) + (f", seed {seed}" if seed else "")
        shown.append(Source(name, view.prompt(source), columns))
    return shown, False


def _column(cell: DriftCell) -> Column:
    parts = [f"{cell.decoded_tokens} decoded tokens"]
    if cell.accounting:
        parts.append(drift_words.accounted(cell.accounting))
    for name, value in (cell.metrics or {}).items():
        parts.append(f"{name} {drift_words.figure(value)}")
    return Column(cell.label, " · ".join(parts), cell.text or "(no text)")


def passage_texts(view: DriftView, room: int = MOST_BYTES) -> tuple[list[PassageTokens], bool]:
    """The first passages that fit into ``room`` bytes, at least one; whether there are more."""
    found: dict[str, dict[str, DriftCell]] = {}
    for cell in view.done:
        if cell.mode == "forced" and cell.pieces:
            found.setdefault(cell.source, {}).setdefault(cell.label, cell)
    shown: list[PassageTokens] = []
    for own in found.values():
        made = _passage(sorted(own.values(), key=lambda cell: cell.dense))
        if shown and len(made.data) > room:
            return shown, True
        room -= len(made.data)
        shown.append(made)
    return shown, False


def _passage(cells: Sequence[DriftCell]) -> PassageTokens:
    """Pieces are those of the first cell: in forced mode all methods see the same tokens."""
    first, length = cells[0], len(cells[0].pieces)
    losses = {
        "dense" if cell.dense else cell.label: [
            None if loss is None else round(loss, 2) for loss in cell.losses
        ]
        for cell in cells
        if len(cell.losses) == length
    }
    data = {
        "pieces": first.pieces,
        "topics": [{"name": t.name, "start": t.start} for t in first.topics if t.start is not None],
        "losses": losses,
    }
    methods = tuple(
        (cell.label, f"{cell.label}: {drift_words.accounted(cell.accounting)}")
        for cell in cells
        if cell.accounting
    )
    return PassageTokens(
        drift_words.place(first),
        methods or (("dense", "dense"),),
        "".join(first.pieces),
        page_json(data),
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

MORE = "The lists hold the first pictures of each kind that fit on the page."


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    id: str
    heading: str
    words: str
    figures: tuple[Sequence[InteractiveFigure], ...]
    pictures: tuple[Picture, ...]
    table: PageTable | None
    folded: PageTable | None
    more: str


@dataclass(frozen=True)
class _Drawn:
    """All pictures by name: interactive ones, or images, or neither and the reason."""

    figures: dict[str, list[InteractiveFigure]]
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
    passages, more = passage_texts(view)
    texts, more_texts = free(view)
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
        "settings": run_facts.settings(view.results),
        "provenance": run_facts.provenance(view.results),
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
    for kind in kinds(view):
        first = next(kind, None)
        if first is not None:
            name = first.plot.name
            figures[name], cut = plotly_page.figures(itertools.chain([first], kind), tools)
            more |= {name} if cut else set()
    return _Drawn(figures, {}, more, "")


def _images(view: DriftView, why: str) -> _Drawn:
    firsts = [next(kind, None) for kind in kinds(view)]
    pictures, missing = page.pictures(one.plot for one in firsts if one is not None)
    return _Drawn({}, {one.name: one for one in pictures}, set(), missing or why)


def _sections(view: DriftView, drawn: _Drawn) -> list[Section]:
    tables = {
        "methods": methods(view),
        "detection": detection(view.detection),
    }
    folded = {"masks": remasks(view)}
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
    alike = summary.comparable(known)
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
        ("mode", run_facts.named(cell.mode for cell in view.cells), False),
        ("methods", run_facts.named(view.labels), False),
        ("sources", str(len({cell.source for cell in view.done})), False),
        ("seeds", run_facts.named(cell.seed for cell in view.cells), False),
        ("cells", f"{done} done, {len(view.cells) - done or 'none'} failed", False),
        ("dtype", run_facts.named(cell.dtype for cell in view.cells), False),
    ]
    known = {"checkpoint", "file quantisation", "device", "date", "sha256", "command"}
    return found + [fact for fact in run_facts.facts(view.results) if fact[0] in known]
