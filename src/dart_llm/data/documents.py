"""Text arguments such as ``--text``: ``resolve`` parses an argument, ``load`` reads its text.

An argument is one of these:

``embedded``: the texts that come with the package
``wikitext2``, ``c4``, ...: a data set in ``catalogue.yaml``
``mmlu``, ``mmlu:astronomy+anatomy``: MMLU questions that no task scores
``hub:owner/name:split:COLUMN``: any other data set on the hub (``datasets.parse``)
``FILE``, ``FILE.jsonl[:COLUMN]``: a text file or JSON rows, in the current folder or its subfolder
``datasets/``; documents with summaries may name two columns, ``FILE.jsonl:DOCUMENT:SUMMARY``
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dart_llm.data import datasets, texts
from dart_llm.data.datasets import DataSet
from dart_llm.errors import ConfigError, LoadError, check_name
from dart_llm.files import read_rows

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = "embedded"

MMLU = "mmlu"

CALIBRATION = "c4_train"
"""The default calibration text, which no evaluation scores."""

NAMES = {
    ("text",): (EMBEDDED, MMLU, *datasets.names("perplexity"), CALIBRATION),
    ("document", "summary"): datasets.names("summarize"),
}
"""Maps roles of columns to the names of the sources that have them and are not files."""

JSONL = (".jsonl", ".ndjson")

COLUMNS = {
    "text": ("text", "document", "article", "report", "page"),
    "document": ("document", "text", "article", "report"),
    "summary": ("summary", "highlights"),
}
"""Maps a role to names of JSONL columns; the first of these that a row has is read."""

BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class TextSource:
    """What a text argument refers to: a file, a data set on the hub, or a name in ``NAMES``.

    ``columns``: the columns of a JSONL file to read, or () for the defaults.  ``subjects``: MMLU
    subjects, or () for all.
    """

    name: str
    path: Path | None = None
    columns: tuple[str, ...] = ()
    data: DataSet | None = None
    subjects: tuple[str, ...] = ()

    @property
    def has_rows(self) -> bool:
        """Whether the source is a JSONL file."""
        return self.path is not None and self.path.suffix in JSONL

    @property
    def label(self) -> str:
        """The source's name without folders."""
        return self.name if self.path is None else ":".join((self.path.stem, *self.columns))

    def overlaps(self, other: TextSource) -> bool:
        """Whether both sources read the same file, or the same split of a data set."""
        if self.path is not None and other.path is not None:
            return self.path.samefile(other.path)
        if self.data is not None and other.data is not None:
            a, b = self.data, other.data
            same_config = a.config == b.config or None in (a.config, b.config)
            return same_config and (a.hub_id, a.split) == (b.hub_id, b.split)
        return self.name == other.name


def resolve(name: str, summaries: bool = False) -> TextSource:
    """Find the source called ``name``; if ``summaries``, its rows must have reference summaries.

    Opens no file.  Raises ``ConfigError``, which lists the choices, for an unknown name.
    """
    roles = ("document", "summary") if summaries else ("text",)
    names = NAMES[roles]
    if name.startswith(datasets.PREFIX):
        return TextSource(name, data=datasets.parse(name, roles))
    if name in names:
        return TextSource(name, data=None if name == MMLU else datasets.DATA_SETS.get(name))
    if name.startswith(f"{MMLU}:") and not summaries:
        subjects = tuple(name.partition(":")[2].split("+"))
        for subject in subjects:
            check_name("MMLU subject", subject, datasets.MMLU_SUBJECTS)
        return TextSource(MMLU, subjects=subjects)
    file_name, *named = name.split(":")
    for file, columns in ((name, []), (file_name, named)):
        for path in (Path(file), texts.LOCAL / file, texts.LOCAL / f"{file}.txt"):
            if path.is_file() and (path.suffix in JSONL or not columns):
                return TextSource(name, path, tuple(columns))
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(
        f'unknown {"summarization data set" if summaries else "text"} "{name}"{hint}: use '
        f"{', '.join(names)}, a data set on the hub such as {datasets.EXAMPLES[roles]}, a text "
        "file, or a JSONL file, FILE.jsonl[:COLUMN]"
    )


def check(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` is a source of documents with summaries."""
    resolve(name, summaries=True)


def find_file(name: str) -> Path | None:
    """The file that a text argument refers to, or None; runs record the file's digest."""
    for summaries in (False, True):
        with contextlib.suppress(ConfigError):
            return resolve(name, summaries).path
    return None


def _value(source: TextSource, role: str, line: int, row: Mapping[str, Any]) -> str:
    """The text for ``role`` in a JSONL row; raises ``ConfigError``, which names the line."""
    named = source.columns[1:] if role == "summary" else source.columns[:1]
    columns = named or COLUMNS[role]
    value = next((row[name] for name in columns if name in row), None)
    if role == "summary":
        value = plain_summary(value)
    if not isinstance(value, str) or (role != "text" and not value.strip()):
        raise ConfigError(
            f"line {line} of {source.path} has no {role} in {' or '.join(columns)}, only columns "
            f"{', '.join(row) or '(none)'}: add it, or name its column: FILE.jsonl:COLUMN"
        )
    return value


def plain_summary(value: Any) -> str:
    """A reference summary as text, or ""; each sentence of a list is put on a separate line."""
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, map(plain_summary, value)))
    return value.strip() if isinstance(value, str) else ""


# Texts.


def load(source: TextSource) -> list[str]:
    """A list of texts: the rows of a JSONL file, the embedded texts, or a single text.

    If the text is missing or cannot be read, raises ``ConfigError`` for a file, and
    ``MissingExtra`` or ``LoadError`` for a data set on the hub.
    """
    if source.data is not None:
        (column,) = source.data.columns["text"]
        rows = [row[column] for row in datasets.rows(source.data)]
        if not all(isinstance(text, str) for text in rows) or not any(map(str.strip, rows)):
            raise LoadError(f"the column {column} of {source.data.where} is empty or not text")
        parts = [source.data.separator.join(rows)]
    elif source.name == EMBEDDED:
        parts = [texts.read(subject) for subject in texts.subjects()]
    elif source.name == MMLU:
        subjects = source.subjects or datasets.local_subjects() or datasets.MMLU_SUBJECTS
        questions = (row for subject in subjects for row in datasets.mmlu_questions(subject))
        parts = [BLANK_LINE.join(row["question"] for row in questions)]
    elif source.path is not None and source.has_rows:
        parts = [_value(source, "text", line, row) for line, row in read_rows(source.path)]
        if not any(text.strip() for text in parts):
            raise ConfigError(f'the file {source.path} has no text: write {{"text": "..."}} lines')
    else:
        assert source.path is not None
        try:
            parts = [source.path.read_text(encoding="utf-8-sig")]  # a byte-order mark is not text
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {source.path} as text: {error}") from None
    return parts


def read(name: str) -> str:
    """The text called ``name``; the rows of a JSONL file are joined by blank lines."""
    return BLANK_LINE.join(load(resolve(name)))


def names(settings: str) -> list[str]:
    """Split comma-separated names and drop repeats; raises ``ConfigError`` for an invalid name."""
    listed = list(dict.fromkeys(part.strip() for part in settings.split(",") if part.strip()))
    if not listed:
        raise ConfigError("no text for perplexity: use embedded, or the path of a text file")
    for name in listed:
        if (source := resolve(name)).path is not None:
            load(source)
    return listed


# The calibration text, cut into token sequences.


def calibration_source(name: str | None) -> TextSource:
    """The source for ``--calibration``; None and ``c4`` both mean ``c4_train``."""
    return resolve(CALIBRATION if name in (None, "c4") else name)


def check_disjoint(calibration: str | None, evaluated: Iterable[str]) -> None:
    """Raise ``ConfigError`` if a text or task in ``evaluated`` overlaps the calibration text."""
    source = calibration_source(calibration)
    if any(source.overlaps(other) for name in evaluated for other in _evaluated(name)):
        raise ConfigError(
            f"{source.path or source.name} is evaluated and cannot be the calibration text too: "
            "give another text"
        )


def _evaluated(name: str) -> Iterator[TextSource]:
    """The sources that are read for ``name``, which is a text argument or a task."""
    for summaries in (False, True):
        with contextlib.suppress(ConfigError):
            yield resolve(name, summaries)
    task = name.partition(":")[0]
    for data in datasets.DATA_SETS.values():
        if task in data.tasks:  # MMLU's entry stands for all subjects
            yield TextSource(name, data=replace(data, config=None) if task == "mmlu" else data)


def sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Tensor:
    """Cut the joined texts into up to ``count`` sequences of ``length`` tokens: [n, length] int64.

    Every sequence begins with the tokenizer's start token, if it adds one.  Raises ``ConfigError``
    if the texts do not fill one sequence.
    """
    import torch

    first = start_token(tokenizer)
    size = length - len(first)
    ids: list[int] = []
    for number, text in enumerate(texts):
        if len(ids) < count * size:  # tokenise only as many texts as needed
            joined = BLANK_LINE + text if number else text
            ids += tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    fit = min(count, len(ids) // size)
    if not fit:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, but one sequence needs {size}: give a "
            "longer text with --calibration"
        )
    rows = [first + ids[row * size : (row + 1) * size] for row in range(fit)]
    return torch.tensor(rows, dtype=torch.int64)


def start_token(tokenizer: Any) -> list[int]:
    """The BOS token as a list; the list is empty if the tokenizer adds none."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and ids and ids[0] == bos else []


# Documents with reference summaries.


class Document(NamedTuple):
    """A text to summarise, its reference summary, and an ``id`` that is unique in its source."""

    id: str
    document: str
    summary: str


def load_documents(name: str, limit: int | None = None, seed: int | None = None) -> list[Document]:
    """Load documents of the source ``name``, in the order of the source.

    Returns the first ``limit`` documents (streamed) or, with ``seed``, a random sample of that
    size; see ``datasets.positions``.  A document's id is the row's ``id``.  If the row has none,
    the id is the line number in a file, or the position from 0 on the hub.  Hub rows without a
    document or a summary are skipped.  Raises ``ConfigError`` if a row is invalid or there are no
    documents, and ``MissingExtra`` or ``LoadError`` if a data set on the hub cannot be loaded.
    """
    source = resolve(name, summaries=True)
    datasets.positions(0, limit, seed)
    stream = limit is not None and seed is None
    rows = _file_documents(source) if source.data is None else _hub_documents(source.data, stream)
    documents = list(islice(rows, limit if stream else None))
    if not stream:
        documents = [
            documents[position] for position in datasets.positions(len(documents), limit, seed)
        ]
    if not documents:
        where = source.path or (source.data and source.data.where)
        raise ConfigError(f"{where} has no row with a document and a summary; {datasets.USE_FILE}")
    return documents


def _file_documents(source: TextSource) -> Iterator[Document]:
    assert source.path is not None
    lines = dict[str, int]()
    for line, row in read_rows(source.path):
        id = str(line if row.get("id") is None else row["id"])
        if lines.setdefault(id, line) != line:
            raise ConfigError(
                f'lines {lines[id]} and {line} of {source.path} have the same id "{id}": give each '
                "document a unique id"
            )
        text, summary = (_value(source, role, line, row) for role in ("document", "summary"))
        yield Document(id, text.strip(), summary)


def _hub_documents(data: DataSet, stream: bool) -> Iterator[Document]:
    columns = {role: column for role, (column, *_) in data.columns.items()}
    for position, row in enumerate(datasets.rows(data, stream=stream)):
        text = str(row[columns["document"]] or "").strip()
        summary = plain_summary(row[columns["summary"]])
        if data.name == "multi_news":  # has markers between articles, dashes before summaries
            articles = map(str.strip, text.replace("NEWLINE_CHAR", "\n").split("|||||"))
            text, summary = BLANK_LINE.join(filter(None, articles)), summary.lstrip("–— \n")
        if text and summary:
            yield Document(str(row[columns["id"]] if "id" in columns else position), text, summary)


# Documents in two disjoint halves: settings are chosen on the first and reported on the second.

CHOOSE, REPORT = "choose", "report"

SETS = {CHOOSE: "first", REPORT: "second"}
"""Maps each of the two sets to the half of a source's documents that it contains."""


@dataclass(frozen=True)
class Source:
    """The non-blank documents of a source, in order; ``label``: the source's short name."""

    label: str
    documents: tuple[str, ...]

    def half(self, which: str) -> list[tuple[int, str]]:
        """The documents of the set ``which`` (a key of ``SETS``), with their positions."""
        check_name("set", which, SETS)
        middle = len(self.documents) // 2
        numbered = list(enumerate(self.documents))
        return numbered[:middle] if which == CHOOSE else numbered[middle:]

    @property
    def digest(self) -> str:
        """SHA-256 of the documents."""
        lines = "".join(f"{len(text)}\n{text}" for text in self.documents)
        return hashlib.sha256(lines.encode()).hexdigest()


def sources(names: Sequence[str]) -> tuple[Source, ...]:
    """Load the sources called ``names``, in order.

    The documents of a JSONL file are its rows; those of any other text are its paragraphs (or its
    lines, if it has only one paragraph).  Raises ``ConfigError`` for an invalid name or file, and
    for a source that is listed twice.
    """
    by_label = dict[str, Source]()
    for name in names:
        source = resolve(name)
        if source.label in by_label:
            raise ConfigError(
                f'the text "{source.label}" was given twice: remove one of them, or rename a file'
            )
        if source.name == EMBEDDED:
            parts = _embedded()
        else:
            parts = load(source)
            if not source.has_rows:
                paragraphs = re.split(r"\n\s*\n", parts[0].strip())
                parts = paragraphs if len(paragraphs) > 1 else parts[0].split("\n")
        documents = tuple(text.strip() for text in parts if text.strip())
        if not documents:
            raise ConfigError(f'the text "{name}" is empty: give another text')
        by_label[source.label] = Source(source.label, documents)
    if not by_label:
        raise ConfigError("no text was given: give a text with --text, or omit --text")
    return tuple(by_label.values())


def _embedded() -> list[str]:
    """The embedded texts and the single-topic parts of the passages.

    They are ordered so that each half of the list has half of the texts and half of the parts.
    """
    from dart_llm.data import passages

    subjects = [texts.read(subject) for subject in texts.subjects()]
    parts = [segment.text for passage in passages.shipped() for segment in passage.segments()]
    half, middle = len(subjects) // 2, len(parts) // 2
    return [*subjects[:half], *parts[:middle], *subjects[half:], *parts[middle:]]
