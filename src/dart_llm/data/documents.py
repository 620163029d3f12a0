"""ONE resolver: `embedded`, a file, `FILE.jsonl[:COLUMN][#ROW]`, a catalogue name, `hub:…` ->
documents.

The text that static baselines are calibrated on, cut into token sequences.

A source is a text file, a JSONL file whose rows hold a ``text`` or a ``document``
(``FILE.jsonl#100``: from row 100 on, counted from 0), or ``c4_train``: C4's English training split
from the hub, which no evaluation uses.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import datasets, passages, texts
from dart_llm.data.datasets import HUB_TEXTS, calibration_text, mmlu_questions, perplexity_text
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.files import read_rows

HUB = (None, "c4_train", "c4")
"""Names of the hub's text; None: nothing was said."""

CALIBRATION_COLUMNS = ("text", "document")

SEPARATOR = "\n\n"

PIECE = 1 << 17
"""Characters that are tokenised at a time: no more of a long text is read than is needed."""

INSTEAD = (
    "give a text of your own with --calibration FILE: a text file, or JSONL rows with a text or a "
    "document (FILE.jsonl#100 starts at row 100)"
)


def documents(source: str | None) -> Iterator[str]:
    """The documents of a source; None is ``c4_train``.

    Raises ``ConfigError`` for a file that cannot be used, ``LoadError`` or ``MissingExtra`` when
    the hub cannot be reached; both name the way out.
    """
    if source in HUB:
        yield _from_hub()
        return
    path, first = split(source)
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _calibration_rows(path, first)
        return
    try:
        yield path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the calibration text {path}: {error}") from None


def split(source: str) -> tuple[Path, int]:
    """The file of a source and its first row; raises ``ConfigError`` when there is no such file."""
    name, mark, row = source.rpartition("#")
    if not mark or not row.isdigit() or Path(source).is_file():
        name, row = source, "0"
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f'no calibration text "{source}": {INSTEAD}')
    if int(row) and path.suffix not in (".jsonl", ".ndjson"):
        raise ConfigError(f'"{source}" starts at a row, but only a JSONL file has rows')
    return path, int(row)


def title(source: str | None) -> str:
    """The source in words, without its folder."""
    if source in HUB:
        return "C4 (English, training split)"
    path, first = split(source)
    return f"{path.name} from row {first} on" if first else path.name


def check_disjoint(source: str | None, evaluated: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` when the source reads what is evaluated.

    ``evaluated``: texts and files, each with how many of its first rows are; None: any of them.
    """
    if source in HUB:
        return
    path, first = split(source)
    for name, rows in evaluated.items():
        other = next((place for place in _places(name) if place.is_file()), None)
        if other is None or not path.samefile(other) or (rows is not None and first >= rows):
            continue
        way = "" if rows is None else f", or start after the evaluated rows: {path}#{rows}"
        raise ConfigError(
            f"{path} is evaluated and cannot be the calibration text too: give another text{way}"
        )


def _places(name: str) -> tuple[Path, ...]:
    """Where a text or a file of documents is looked for, in this order."""
    plain, local = name.partition("#")[0], Path("datasets")
    return Path(plain), local / plain, local / f"{plain}.txt"


def _calibration_rows(path: Path, first: int) -> Iterator[str]:
    count = 0
    for count, (line, row) in enumerate(read_rows(path), start=1):
        if count <= first:
            continue
        text = next(
            (row[name] for name in CALIBRATION_COLUMNS if isinstance(row.get(name), str)), None
        )
        if text is None:
            raise ConfigError(
                f"line {line} of {path} has neither a {' nor a '.join(CALIBRATION_COLUMNS)}: "
                "complete it"
            )
        yield text
    if count <= first:
        raise ConfigError(f"{path} has {count} rows: it cannot be read from row {first} on")


def _from_hub() -> str:
    try:
        return datasets.calibration_text()
    except LoadError as error:
        reason = str(error).removesuffix(f"; {datasets.INSTEAD['text']}")
        raise LoadError(f"{reason}; {INSTEAD}") from error


def sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of the joined texts; fewer if it is short.

    Where the tokenizer starts a text with a token of its own, every window starts with it.
    Returns [n, length] int64; raises ``ConfigError`` when the text does not fill one window.
    """
    first = start_token(tokenizer)
    body = length - len(first)
    ids: list[int] = []
    for piece in _pieces(texts):
        if len(ids) >= count * body:
            break
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    fit = min(count, len(ids) // body)
    if not fit:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens and one sequence needs {body}: {INSTEAD}"
        )
    rows = [first + ids[row * body : (row + 1) * body] for row in range(fit)]
    return torch.tensor(rows, dtype=torch.int64)


def start_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and ids and ids[0] == bos else []


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        joined = SEPARATOR + text if number else text
        for start in range(0, len(joined), PIECE):
            yield joined[start : start + PIECE]


# The documents that summarisation is measured on: by name from the hub, or from a JSONL file.
#
# A name is one of the summarisation data sets of ``catalogue.py`` (``xsum``, ``cnn_dailymail``,
# ``multi_news``, ``gov_report``); ``hub:owner/name[/configuration]:split:document:summary`` is any
# other data set of the hub with columns of those kinds; anything else is the path of a JSONL file.
#
# A JSONL file holds one JSON object a line: the text in ``document`` (or ``text``, ``article``,
# ``report``), the reference in ``summary`` (or ``highlights``), and, if wanted, an ``id``; without
# one a document's id is its line number.  A reference that is a list of sentences becomes its
# sentences, one a line, never the printed list.


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
    if name in datasets.names("summarize") or datasets.is_reference(name):
        return [Document(**row) for row in datasets.documents(name, limit, seed)]
    found = read_documents(name)
    return [found[position] for position in datasets.positions(len(found), limit, seed)]


def check(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` can be a source of documents.

    Asks no hub and opens no file, so that a long run can refuse a wrong name before it starts.
    """
    known = datasets.names("summarize")
    if name in known:
        return
    if datasets.is_reference(name):
        datasets.parse(name, ("document", "summary"))
    elif not Path(name).is_file():
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ConfigError(
            f'no documents "{name}" to summarise{hint}: use {", ".join(known)}, a data set of the '
            f"hub such as {datasets.EXAMPLES['document', 'summary']}, or the path of a JSONL "
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
    summary = datasets.reference(_value(row, SUMMARY_COLUMNS, where))
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


# The texts that perplexity can be measured on, by name.


EMBEDDED = "embedded"

MMLU = ("mmlu", "mmlu-answers")
"""The questions alone, or with their choices and answers."""

CALIBRATION = "c4_train"
"""Text that no evaluation scores; for calibration."""

KNOWN = (EMBEDDED, *MMLU, *HUB_TEXTS, CALIBRATION)
"""Texts that are not files."""


def read(name: str, subjects: str | None = None) -> str:
    """The text called ``name``, never empty.

    ``embedded``; ``wikitext2`` or ``c4``; ``c4_train``, for calibration; ``mmlu``, the questions
    of ``subjects`` (comma-separated; default: those in ``datasets/mmlu``, or else all 57), and
    ``mmlu-answers``, with choices and answers, neither from the scored test split; a data set of
    the hub (``hub_reference.py``); or a file: plain text, or JSONL with a ``text`` column.

    Raises ``ConfigError`` for a name that is none of these and for a file that cannot be used,
    and what ``hub_data.perplexity_text`` raises.
    """
    if name == EMBEDDED:
        return texts.all_text()
    if name in HUB_TEXTS or datasets.is_reference(name):
        return perplexity_text(name)
    if name == CALIBRATION:
        return calibration_text()
    if name in MMLU:
        wanted = [part.strip() for part in subjects.split(",") if part.strip()] if subjects else []
        found = [
            datasets.text(question)
            for subject in wanted or datasets.local_subjects() or datasets.MMLU_SUBJECTS
            for question in mmlu_questions(subject, answers=name == "mmlu-answers")
        ]
        return "\n\n".join(found)
    return _file(name)


def is_file(name: str) -> bool:
    """Whether ``read`` would read a file of the user's, whose content a run should record."""
    return name not in KNOWN and not datasets.is_reference(name)


def names(settings: str) -> list[str]:
    """Comma-separated names, each once, checked as far as possible before a model is loaded."""
    found = list(dict.fromkeys(part.strip() for part in settings.split(",") if part.strip()))
    if not found:
        raise ConfigError("no text for perplexity: use embedded, or the path of a text file")
    for name in found:
        if datasets.is_reference(name):
            datasets.parse(name)
        elif is_file(name):
            _file(name)
    return found


def _file(name: str) -> str:
    local = Path("datasets")
    for path in (Path(name), local / name, local / f"{name}.txt"):
        if path.is_file():
            return _jsonl(path) if path.suffix == ".jsonl" else _plain(path)
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f'no text "{name}" for perplexity{hint}: use {", ".join(KNOWN)}, a data set of the hub '
        f"such as {datasets.EXAMPLES['text',]}, or the path of a text file"
    )


def _plain(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is not text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as text: {error}") from None
    return text


def _jsonl(path: Path) -> str:
    found = []
    for number, row in read_rows(path):
        if not isinstance(row.get("text"), str):
            raise ConfigError(
                f'line {number} of {path} needs "text" with a text in it and has '
                f"{', '.join(row) or 'nothing'}: name that column text"
            )
        found.append(row["text"])
    if not any(text.strip() for text in found):
        raise ConfigError(f'the file {path} holds no text: write {{"text": "..."}} a line')
    return "\n\n".join(found)


# The texts of ``dart-llm bench quality``: sources of documents, and the two sets of each.
#
# A source is ``embedded``, a JSONL file (its rows are the documents), or any text that perplexity
# knows by name or path (its paragraphs are the documents, its lines where no line is blank).  The
# first half of a source's documents is the set ``choose``, the second half the set ``report``:
# what is chosen on one is reported on the other, and no document is in both.


CHOOSE, REPORT = "choose", "report"

SETS = {CHOOSE: "first", REPORT: "second"}
"""The sets, and which half of a source's documents each is."""

QUALITY_COLUMNS = (*TEXT_COLUMNS, "page")
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
    if name == EMBEDDED:
        return name, _embedded()
    path, column = _jsonl_documents(name)
    if path is not None:
        return f"{path.stem}:{column}" if column else path.stem, list(_quality_rows(path, column))
    text = read(name)
    label = Path(name).stem if is_file(name) else name
    return label, paragraphs(text)


def _embedded() -> list[str]:
    """The package's texts, half of each kind in each half.

    The kinds are the six subjects, and the parts of its passages about one topic.
    """
    subjects = [texts.read(subject) for subject in texts.subjects()]
    parts = [segment.text for passage in passages.shipped() for segment in passage.segments()]
    half, middle = len(subjects) // 2, len(parts) // 2
    return [*subjects[:half], *parts[:middle], *subjects[half:], *parts[middle:]]


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines; the lines themselves where there is no blank one."""
    found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return found if len(found) > 1 else [line for line in text.split("\n") if line.strip()]


def _jsonl_documents(name: str) -> tuple[Path | None, str]:
    """The JSONL file that ``FILE`` or ``FILE:COLUMN`` means, and the column; None: no such file."""
    for given, column in ((name, ""), (name.rpartition(":")[0], name.rpartition(":")[2])):
        for path in (Path(given), Path("datasets") / given):
            if given and path.suffix in JSONL and path.is_file():
                return path, column
    return None, ""


def _quality_rows(path: Path, column: str) -> Iterator[str]:
    for number, row in read_rows(path):
        names = [column] if column else [name for name in QUALITY_COLUMNS if name in row]
        text = row.get(names[0]) if names else None
        if not isinstance(text, str):
            wanted = f'"{column}"' if column else ", ".join(QUALITY_COLUMNS)
            raise ConfigError(
                f"line {number} of {path} has no text under {wanted}, but {', '.join(row)}: name "
                f"the column, as in {path.name}:COLUMN"
            )
        yield text
