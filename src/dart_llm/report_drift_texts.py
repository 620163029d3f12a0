"""The texts of a drift study's page: free ones side by side, passages token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dart_llm import drift_words
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.results import page_json

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


def passages(view: DriftView, room: int = MOST_BYTES) -> tuple[list[PassageTokens], bool]:
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
