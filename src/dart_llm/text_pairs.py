"""Texts and what they are compared with, paired by id out of JSONL files.

A text is found by the id that its line holds, never by its place or by what a log printed.  A text
without its counterpart is left out and said; a repeated one is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.jsonl import read_rows

DENSE = "dense"
SHOWN = 5
"""Ids that a sentence about missing texts names."""


@dataclass(frozen=True)
class Pair:
    """A text and what it is compared with.  ``key`` is unique; ``id`` names prompt or document."""

    key: str
    id: str
    method: str
    seed: int
    candidate: str
    reference: str


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of the file.  ``problems``: a sentence for every kind of missing text."""

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]


def read_pairs(texts: Path, references: Path | None = None) -> Pairs:
    """Pair every text of ``texts`` with the dense text of its id and seed, or with a reference.

    ``texts``: lines with ``id``, ``text`` and, where there are several per id, ``key`` (unique),
    ``method`` and ``seed``.  ``references``: lines with ``id`` and ``text``, one per id; then the
    dense texts are compared too.  Raises ``ConfigError`` for a line without text or id, for a
    repeated key or reference, and when no line is left to compare.
    """
    rows = _texts(texts)
    if references is None:
        known = {(row.id, row.seed): row.candidate for row in rows if row.method == DENSE}
        others = [row for row in rows if row.method != DENSE]
        found = [(row, known.get((row.id, row.seed))) for row in others]
        lacking = "no dense text of the same id and seed"
        unused: set[str] = set()
    else:
        given = _references(references)
        found = [(row, given.get(row.id)) for row in rows]
        lacking = f"no reference in {references.name}"
        unused = given.keys() - {row.id for row in rows}
    pairs = [_with(row, reference) for row, reference in found if reference is not None]
    problems = [
        *_said([row.key for row, reference in found if reference is None], f"{lacking} for"),
        *_said(sorted(unused), f"no text in {texts.name} for the reference"),
    ]
    if not pairs:
        reason = f": {problems[0]}" if problems else ", for it holds no text of a pruned method"
        raise ConfigError(f"nothing in {texts} can be compared{reason}")
    return Pairs(tuple(pairs), tuple(problems))


def _with(row: Pair, reference: str) -> Pair:
    return Pair(row.key, row.id, row.method, row.seed, row.candidate, reference)


def _texts(path: Path) -> list[Pair]:
    """The lines of ``path``, still without references; keys, and dense texts, are unique."""
    found: list[Pair] = []
    seen: set[Any] = set()
    for number, row in read_rows(path):
        name, text = _id_and_text(path, number, row)
        method, seed = str(row.get("method", "candidate")), row.get("seed", 0)
        if not isinstance(seed, int):
            raise ConfigError(f"line {number} of {path} has the seed {seed!r}: write a number")
        key = str(row.get("key", f"{name}/{method}/{seed}"))
        marks = {key} | ({(name, seed)} if method == DENSE else set())
        if marks & seen:
            raise ConfigError(
                f"line {number} of {path} repeats {key}: keep one text per id, method and seed"
            )
        seen |= marks
        found.append(Pair(key, name, method, seed, text, ""))
    return found


def _references(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, row in read_rows(path):
        name, text = _id_and_text(path, number, row)
        if name in found:
            raise ConfigError(f"line {number} of {path} repeats the id {name}: keep one reference")
        found[name] = text
    return found


def _id_and_text(path: Path, number: int, row: Mapping[str, Any]) -> tuple[str, str]:
    name, text = row.get("id"), row.get("text")
    if not isinstance(name, str | int) or not isinstance(text, str):
        raise ConfigError(f'line {number} of {path} needs "id" and "text", both as strings')
    return str(name), text


def _said(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what} {', '.join(names[:SHOWN])}{more}"]
