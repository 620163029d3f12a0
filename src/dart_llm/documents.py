"""The documents that summarisation is measured on: by name from the hub, or from a JSONL file.

A name is one of the summarisation data sets of ``catalogue.py`` (``xsum``, ``cnn_dailymail``,
``multi_news``, ``gov_report``); ``hub:owner/name[/configuration]:split:document:summary`` is any
other data set of the hub with columns of those kinds; anything else is the path of a JSONL file.

A JSONL file holds one JSON object a line: the text in ``document`` (or ``text``, ``article``,
``report``), the reference in ``summary`` (or ``highlights``), and, if wanted, an ``id``; without
one a document's id is its line number.  A reference that is a list of sentences becomes its
sentences, one a line, never the printed list.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm import catalogue, cleaning, hub_data, hub_reference
from dart_llm.errors import ConfigError
from dart_llm.jsonl import read_rows

TEXT_COLUMNS = ("document", "text", "article", "report")
SUMMARY_COLUMNS = ("summary", "highlights")
EXAMPLE = '{"document": "A long text ...", "summary": "A short one."}'


@dataclass(frozen=True)
class Document:
    """A text to summarise, its reference summary, and an ``id`` that is unique in its source."""

    id: str
    document: str
    summary: str


def load_documents(name: str, limit: int | None = None, seed: int | None = None) -> list[Document]:
    """At least one document of the data set or the JSONL file called ``name``, in its order.

    The first ``limit`` documents, or with ``seed`` a random sample of that many, of which a
    smaller sample with the same seed is a part.  ``None`` is all.

    Raises ``ConfigError`` for a name that is neither a data set nor a file, and for a file or a
    setting that cannot be used; ``MissingExtra`` without the ``datasets`` library; ``LoadError``
    for a data set that cannot be fetched, is empty or lacks a column.
    """
    check(name)
    if name in catalogue.names("summarize") or hub_reference.is_reference(name):
        return [Document(**row) for row in hub_data.documents(name, limit, seed)]
    found = read_documents(name)
    return [found[position] for position in hub_data.positions(len(found), limit, seed)]


def check(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` can be a source of documents.

    Asks no hub and opens no file, so that a long run can refuse a wrong name before it starts.
    """
    known = catalogue.names("summarize")
    if name in known:
        return
    if hub_reference.is_reference(name):
        hub_reference.parse(name, ("document", "summary"))
    elif not Path(name).is_file():
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ConfigError(
            f'no documents "{name}" to summarise{hint}: use {", ".join(known)}, a data set of the '
            f"hub such as {hub_reference.EXAMPLES['document', 'summary']}, or the path of a JSONL "
            "file with a document and a summary a line"
        )


def read_documents(path: str | Path) -> list[Document]:
    """All documents of a JSONL file; the module's docstring describes its lines.

    Raises ``ConfigError``, with the line's number, for a line that is not a JSON object, lacks a
    column or has an empty one, and for an id that occurs twice; also for a file without documents.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    found = []
    for number, row in read_rows(path):
        document = _document(row, number, f"line {number} of {path}")
        if document.id in lines:
            raise ConfigError(
                f"lines {lines[document.id]} and {number} of {path} have the same id "
                f'"{document.id}": give each document its own'
            )
        lines[document.id] = number
        found.append(document)
    if not found:
        raise ConfigError(f"the file {path} holds no documents: add lines such as {EXAMPLE}")
    return found


def _document(row: dict[str, Any], number: int, where: str) -> Document:
    text = _value(row, TEXT_COLUMNS, where)
    summary = cleaning.reference(_value(row, SUMMARY_COLUMNS, where))
    for name, value in (("document", text), ("summary", summary)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"the {name} in {where} is empty or no text: write {EXAMPLE}")
    own = row.get("id")
    return Document(str(number if own is None else own), text.strip(), summary)


def _value(row: dict[str, Any], columns: Sequence[str], where: str) -> Any:
    for name in columns:
        if name in row:
            return row[name]
    raise ConfigError(
        f"{where} has no {columns[0]} (or {', '.join(columns[1:])}) but "
        f"{', '.join(row) or 'nothing'}: write {EXAMPLE}"
    )
