"""The texts of ``dart-llm bench quality``: sources of documents, and the two sets of each.

A source is ``embedded``, a JSONL file (its rows are the documents), or any text that perplexity
knows by name or path (its paragraphs are the documents, its lines where no line is blank).  The
first half of a source's documents is the set ``choose``, the second half the set ``report``: what
is chosen on one is reported on the other, and no document is in both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dart_llm import documents, drift_passages, ppl_texts, texts
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.jsonl import read_rows

CHOOSE, REPORT = "choose", "report"
SETS = {CHOOSE: "first", REPORT: "second"}
"""The sets, and which half of a source's documents each is."""

COLUMNS = (*documents.TEXT_COLUMNS, "page")
"""Columns of a JSONL file that hold its text, the first that is there; others are named."""

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """Documents in order, none of them blank, under a ``label`` without folders."""

    label: str
    documents: tuple[str, ...]

    def half(self, which: str) -> list[tuple[int, str]]:
        """The documents of one set with their numbers in the source, from 0.

        Raises ``UnknownName`` for a set that does not exist.
        """
        if which not in SETS:
            raise UnknownName("set", which, SETS)
        middle = len(self.documents) // 2
        chosen = range(middle) if which == CHOOSE else range(middle, len(self.documents))
        return [(number, self.documents[number]) for number in chosen]

    @property
    def digest(self) -> str:
        """sha256 of the documents."""
        lines = "".join(f"{len(text)}\n{text}" for text in self.documents)
        return hashlib.sha256(lines.encode()).hexdigest()


def sources(names: Sequence[str]) -> tuple[Source, ...]:
    """The sources that ``names`` mean, in order.

    Raises ``ConfigError`` for a name that is no text, a file that cannot be used, and a source
    that is given twice.
    """
    found = dict[str, Source]()
    for name in names:
        label, read = _documents(name)
        if label in found:
            raise ConfigError(f'the text "{label}" was given twice: leave one out, or rename it')
        kept = tuple(text.strip() for text in read if text.strip())
        if not kept:
            raise ConfigError(f'the text "{name}" holds nothing: give another one')
        found[label] = Source(label, kept)
    if not found:
        raise ConfigError("no text is named: give --text a file, or leave it out")
    return tuple(found.values())


def _documents(name: str) -> tuple[str, list[str]]:
    """The label of a source, and its documents as they stand."""
    if name == ppl_texts.EMBEDDED:
        return name, _embedded()
    path, column = _jsonl(name)
    if path is not None:
        return f"{path.stem}:{column}" if column else path.stem, list(_rows(path, column))
    text = ppl_texts.read(name)
    label = Path(name).stem if ppl_texts.is_file(name) else name
    return label, paragraphs(text)


def _embedded() -> list[str]:
    """The package's texts, half of each kind in each half.

    The kinds are the six subjects, and the parts of its passages about one topic.
    """
    subjects = [texts.read(subject) for subject in texts.subjects()]
    parts = [segment.text for passage in drift_passages.shipped() for segment in passage.segments()]
    half, middle = len(subjects) // 2, len(parts) // 2
    return [*subjects[:half], *parts[:middle], *subjects[half:], *parts[middle:]]


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines; the lines themselves where there is no blank one."""
    found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return found if len(found) > 1 else [line for line in text.split("\n") if line.strip()]


def _jsonl(name: str) -> tuple[Path | None, str]:
    """The JSONL file that ``FILE`` or ``FILE:COLUMN`` means, and the column; None: no such file."""
    for given, column in ((name, ""), (name.rpartition(":")[0], name.rpartition(":")[2])):
        for path in (Path(given), Path("datasets") / given):
            if given and path.suffix in JSONL and path.is_file():
                return path, column
    return None, ""


def _rows(path: Path, column: str) -> Iterator[str]:
    for number, row in read_rows(path):
        names = [column] if column else [name for name in COLUMNS if name in row]
        text = row.get(names[0]) if names else None
        if not isinstance(text, str):
            wanted = f'"{column}"' if column else ", ".join(COLUMNS)
            raise ConfigError(
                f"line {number} of {path} has no text under {wanted}, but {', '.join(row)}: name "
                f"the column, as in {path.name}:COLUMN"
            )
        yield text
