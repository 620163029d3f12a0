"""Every text argument: ``resolve`` reads its grammar, the loaders below read the text.

==============================  ===================================================================
``embedded``                    the package's texts
``wikitext2``, ``c4``, ...      a name of ``catalogue.yaml``
``mmlu``, ``mmlu-answers``      questions that no task scores: alone, or with choices and answers;
                                of some subjects: ``mmlu:astronomy+anatomy``
``hub:owner/name:split:COLUMN`` any other data set of the hub (``datasets.parse``)
``FILE``                        a text file, also one under ``datasets/`` in the current folder
``FILE.jsonl[:COLUMN][#ROW]``   JSON rows, from row ROW on, counted from 0; a source of summaries
                                may name two columns, ``:DOCUMENT:SUMMARY``
==============================  ===================================================================

Without a column the text is the first of ``TEXT_COLUMNS`` that a row has.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.data import datasets, texts
from dart_llm.data.datasets import DataSet, Document
from dart_llm.errors import ConfigError, check_name
from dart_llm.files import read_rows

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = "embedded"

MMLU = ("mmlu", "mmlu-answers")
"""The questions alone, or with their choices and answers."""

CALIBRATION = "c4_train"
"""The default calibration text: no evaluation scores it."""

TEXTS = (EMBEDDED, *MMLU, *datasets.names("perplexity"), CALIBRATION)
"""Texts that are not files."""

SUMMARIES = datasets.names("summarize")
"""Documents with summaries that are not files."""

LOCAL = Path("datasets")
"""A folder where files are looked for too."""

JSONL = (".jsonl", ".ndjson")

TEXT_COLUMNS = ("text", "document", "article", "report", "page")

DOCUMENT_COLUMNS = ("document", "text", "article", "report")

SUMMARY_COLUMNS = ("summary", "highlights")

BLANK_LINE = "\n\n"

_SUFFIXES = re.compile(r"(?P<file>.+?)(?P<columns>(?::[^:#/\\]+){0,2})(?:#(?P<row>\d+))?")


@dataclass(frozen=True)
class TextSource:
    """What a text argument means: a file, a data set of the hub, or one of the package's names.

    ``columns``: those that a JSONL file's rows are read from, if they were named; ``first``: the
    first row that is read, from 0; ``subjects``: of MMLU, all if empty.
    """

    name: str
    path: Path | None = None
    columns: tuple[str, ...] = ()
    first: int = 0
    data: DataSet | None = None
    subjects: tuple[str, ...] = ()

    @property
    def has_rows(self) -> bool:
        """Whether it is a JSONL file."""
        return self.path is not None and self.path.suffix in JSONL

    @property
    def label(self) -> str:
        """The source without its folder."""
        if self.path is None:
            return self.name
        columns = "".join(f":{column}" for column in self.columns)
        return f"{self.path.stem}{columns}" + (f"#{self.first}" if self.first else "")

    def title(self) -> str:
        """The source in words."""
        if self.name == CALIBRATION:
            return "C4 (English, training split)"
        if self.path is None:
            return self.name
        return f"{self.path.name} from row {self.first} on" if self.first else self.path.name

    def overlaps(self, other: TextSource, rows: int | None = None) -> bool:
        """Whether a text of this source is one of ``other``'s first ``rows`` (None: of any)."""
        if self.path is not None and other.path is not None:
            last = None if rows is None else other.first + rows
            return self.path.samefile(other.path) and (last is None or self.first < last)
        if self.data is not None and other.data is not None:
            mine, its = self.data, other.data
            one_config = mine.config == its.config or None in (mine.config, its.config)
            return one_config and (mine.hub_id, mine.split) == (its.hub_id, its.split)
        return self.name == other.name or {self.name, other.name} <= {*MMLU}


def resolve(name: str, summaries: bool = False) -> TextSource:
    """What ``name`` means; ``summaries``: as a source of documents with summaries.

    Asks no hub and opens no file.  Raises ``ConfigError``, which lists what there is, for a name
    that means nothing.
    """
    roles = ("document", "summary") if summaries else ("text",)
    known = SUMMARIES if summaries else TEXTS
    if name.startswith(datasets.PREFIX):
        return TextSource(name, data=datasets.parse(name, roles))
    if name in known:
        return TextSource(name, data=None if name in MMLU else datasets.DATA_SETS.get(name))
    kind, _, listed = name.partition(":")
    if kind in MMLU and not summaries:
        subjects = tuple(listed.split("+"))
        for subject in subjects:
            check_name("MMLU subject", subject, datasets.MMLU_SUBJECTS)
        return TextSource(kind, subjects=subjects)
    if (file := _find_file(name)) is None:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        what = "summarization data set" if summaries else "text"
        raise ConfigError(
            f'unknown {what} "{name}"{hint}: use {", ".join(known)}, a data set of the hub '
            f"such as {datasets.EXAMPLES[roles]}, the path of a text file, or that of a JSONL "
            "file, FILE.jsonl[:COLUMN][#ROW]"
        )
    if (file.columns or file.first) and not file.has_rows:
        raise ConfigError(f'"{name}" names a column or a row, but only a JSONL file has those')
    return file


def _find_file(name: str) -> TextSource | None:
    """The file that ``name`` means, by its whole name or without the suffixes; or None."""
    spellings: list[tuple[str, ...]] = [(name, "", "")]
    if spelled := _SUFFIXES.fullmatch(name):
        spellings.append(spelled.groups(default=""))
    for file, columns, row in spellings:
        for path in (Path(file), LOCAL / file, LOCAL / f"{file}.txt"):
            if path.is_file():
                return TextSource(name, path, tuple(columns.split(":")[1:]), int(row or 0))
    return None


def find_file(name: str) -> Path | None:
    """The file that a text argument reads, whose content a run should record; or None."""
    if name in (*TEXTS, *SUMMARIES) or name.startswith(datasets.PREFIX):
        return None
    file = _find_file(name)
    return None if file is None else file.path


def _rows(source: TextSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file from the source's first row on, with their line numbers."""
    assert source.path is not None
    count = 0
    for count, row in enumerate(read_rows(source.path), start=1):
        if count > source.first:
            yield row
    if source.first and count <= source.first:
        raise ConfigError(
            f"{source.path} has {count} rows: it cannot be read from row {source.first} on"
        )


def _row_texts(source: TextSource) -> Iterator[str]:
    columns = source.columns[:1] or TEXT_COLUMNS
    for line, row in _rows(source):
        text = next((row[name] for name in columns if name in row), None)
        if not isinstance(text, str):
            assert source.path is not None
            wanted = f'"{columns[0]}"' if source.columns else ", ".join(columns)
            raise ConfigError(
                f"line {line} of {source.path} has no text under {wanted}, but "
                f"{', '.join(row) or 'nothing'}: name the column, as in {source.path.name}:COLUMN"
            )
        yield text


def load(source: TextSource) -> list[str]:
    """The rows of a JSONL file, or one text.

    Raises ``ConfigError`` for a file that cannot be used or has no text, and what
    ``datasets.hub_text`` and ``datasets.mmlu_questions`` raise.
    """
    if source.data is not None:
        return [datasets.hub_text(source.name)]
    if source.name == EMBEDDED:
        return [texts.all_text()]
    if source.name in MMLU:
        subjects = source.subjects or datasets.local_subjects() or datasets.MMLU_SUBJECTS
        questions = (
            datasets.question_text(question)
            for subject in subjects
            for question in datasets.mmlu_questions(subject, answers=source.name == MMLU[1])
        )
        return [BLANK_LINE.join(questions)]
    assert source.path is not None
    if not source.has_rows:
        try:
            return [source.path.read_text(encoding="utf-8-sig")]  # a byte-order mark is not text
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {source.path} as text: {error}") from None
    rows = list(_row_texts(source))
    if not any(text.strip() for text in rows):
        raise ConfigError(f'the file {source.path} has no text: write {{"text": "..."}} a line')
    return rows


def read(name: str) -> str:
    """The text called ``name``, the rows of a JSONL file joined by blank lines; see ``load``."""
    return BLANK_LINE.join(load(resolve(name)))


def whole_texts(name: str) -> list[str]:
    """The texts behind ``name``, each to be read separately; raises what ``read`` raises."""
    if name == EMBEDDED:
        return [texts.read(subject) for subject in texts.subjects()]
    return load(resolve(name))


def names(settings: str) -> list[str]:
    """Comma-separated names, each once, checked before a model is loaded."""
    listed = list(dict.fromkeys(part.strip() for part in settings.split(",") if part.strip()))
    if not listed:
        raise ConfigError("no text for perplexity: use embedded, or the path of a text file")
    for name in listed:
        if (source := resolve(name)).path is not None:
            load(source)
    return listed


# The text for calibration, cut into token sequences.

PIECE = 1 << 17
"""Characters that are tokenised at a time: no more of a long text is read than is needed."""


def calibration_source(name: str | None) -> TextSource:
    """What ``--calibration`` means: nothing, and ``c4``, are ``c4_train``."""
    return resolve(CALIBRATION if name in (None, "c4") else name)


def calibration_texts(name: str | None) -> list[str]:
    """The calibration texts: the rows of a JSONL file, or one text; raises what ``read`` raises."""
    return load(calibration_source(name))


def check_disjoint(calibration: str | None, evaluated: Mapping[str, int | None]) -> None:
    """Raise ``ConfigError`` when the calibration text is among what is evaluated.

    ``evaluated``: texts, summaries and lm-eval's tasks, each with how many of its first rows are
    evaluated; None: any of them.
    """
    source = calibration_source(calibration)
    for name, rows in evaluated.items():
        for other in _evaluated(name):
            if not source.overlaps(other, rows):
                continue
            way = ""
            if source.path is not None and rows is not None:
                way = f", or start after the evaluated rows: {source.path}#{other.first + rows}"
            raise ConfigError(
                f"{source.path or source.name} is evaluated and cannot be the calibration text "
                f"too: give another text{way}"
            )


def _evaluated(name: str) -> Iterator[TextSource]:
    """The sources behind ``name``, a source or a task, as far as they are in the catalogue."""
    for summaries in (False, True):
        with contextlib.suppress(ConfigError):
            yield resolve(name, summaries)
    task = name.partition(":")[0]
    for data in datasets.DATA_SETS.values():
        if task in data.tasks:  # the entry of MMLU stands for all of its subjects
            yield TextSource(name, data=replace(data, config=None) if task == "mmlu" else data)


def sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int) -> Tensor:
    """The first ``count`` windows of ``length`` tokens of the joined texts; fewer if it is short.

    Where the tokenizer starts a text with a token of its own, every window starts with it.
    Returns [n, length] int64; raises ``ConfigError`` when the text does not fill one window.
    """
    import torch

    first = start_token(tokenizer)
    body = length - len(first)
    ids: list[int] = []
    for number, text in enumerate(texts):
        joined = BLANK_LINE + text if number else text
        for start in range(0, len(joined), PIECE):
            if len(ids) < count * body:
                piece = joined[start : start + PIECE]
                ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * body:
            break
    fit = min(count, len(ids) // body)
    if not fit:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens and one sequence needs {body}: give a "
            "longer one with --calibration"
        )
    rows = [first + ids[row * body : (row + 1) * body] for row in range(fit)]
    return torch.tensor(rows, dtype=torch.int64)


def start_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and ids and ids[0] == bos else []


# Documents with reference summaries.

EXAMPLE = '{"document": "A long text ...", "summary": "A short one."}'


def load_documents(name: str, limit: int | None = None, seed: int | None = None) -> list[Document]:
    """At least one document of the source ``name``, in its order.

    The first ``limit`` documents, or with ``seed`` a random sample of that many, of which a
    smaller sample with the same seed is a part.  ``None`` is all.  In a JSONL file a document's id
    is ``id``, or else its line number, and a reference that is a list of sentences becomes its
    sentences, one a line, never the printed list.

    Raises ``ConfigError``, with the line's number for a row that cannot be used, and what
    ``datasets.documents`` raises.
    """
    source = resolve(name, summaries=True)
    if source.data is not None:
        return datasets.documents(name, limit, seed)
    every, lines = list[Document](), dict[str, int]()
    for line, row in _rows(source):
        document = _document(row, line, source)
        if lines.setdefault(document.id, line) != line:
            raise ConfigError(
                f"lines {lines[document.id]} and {line} of {source.path} have the same id "
                f'"{document.id}": give each document its own'
            )
        every.append(document)
    if not every:
        raise ConfigError(f"the file {source.path} has no documents: add lines such as {EXAMPLE}")
    return [every[position] for position in datasets.positions(len(every), limit, seed)]


def check(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` can be a source of documents with summaries."""
    resolve(name, summaries=True)


def _document(row: dict[str, Any], line: int, source: TextSource) -> Document:
    where = f"line {line} of {source.path}"
    texts_by_role = dict[str, str]()
    for role, columns in (
        ("document", source.columns[:1] or DOCUMENT_COLUMNS),
        ("summary", source.columns[1:] or SUMMARY_COLUMNS),
    ):
        name = next((name for name in columns if name in row), None)
        if name is None:
            others = f" (or {', '.join(columns[1:])})" if columns[1:] else ""
            raise ConfigError(
                f"{where} has no {columns[0]}{others} but {', '.join(row) or 'nothing'}: "
                f"write {EXAMPLE}"
            )
        value = datasets.reference(row[name]) if role == "summary" else row[name]
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"the {role} in {where} is empty or not text: write {EXAMPLE}")
        texts_by_role[role] = value.strip()
    return Document(str(line if row.get("id") is None else row["id"]), **texts_by_role)


# Documents in two halves: what is chosen on the first is reported on the second, and no document
# is in both.

CHOOSE, REPORT = "choose", "report"

SETS = {CHOOSE: "first", REPORT: "second"}
"""The sets, and which half of a source's documents each is."""


@dataclass(frozen=True)
class Source:
    """Documents in order, none of them blank, under a ``label`` without folders."""

    label: str
    documents: tuple[str, ...]

    def half(self, which: str) -> list[tuple[int, str]]:
        """The documents of one set (a key of ``SETS``) with their numbers in the source, from 0."""
        check_name("set", which, SETS)
        middle = len(self.documents) // 2
        every = list(enumerate(self.documents))
        return every[:middle] if which == CHOOSE else every[middle:]

    @property
    def digest(self) -> str:
        """sha256 of the documents."""
        lines = "".join(f"{len(text)}\n{text}" for text in self.documents)
        return hashlib.sha256(lines.encode()).hexdigest()


def sources(names: Sequence[str]) -> tuple[Source, ...]:
    """The sources that ``names`` mean, in order.

    The documents of a JSONL file are its rows, those of any other text its paragraphs, or its
    lines where no line is blank.  Raises ``ConfigError`` for an unknown name, a file that
    cannot be used, and a source that is given twice.
    """
    by_label = dict[str, Source]()
    for name in names:
        source = resolve(name)
        if source.label in by_label:
            raise ConfigError(
                f'the text "{source.label}" was given twice: leave one out, or rename it'
            )
        if source.name == EMBEDDED:
            every: Iterable[str] = _embedded()
        else:
            every = load(source) if source.has_rows else paragraphs(load(source)[0])
        documents = tuple(text.strip() for text in every if text.strip())
        if not documents:
            raise ConfigError(f'the text "{name}" is empty: give another one')
        by_label[source.label] = Source(source.label, documents)
    if not by_label:
        raise ConfigError("no text was given: give --text a file, or leave it out")
    return tuple(by_label.values())


def _embedded() -> list[str]:
    """The six subjects, and the parts of passages about one topic, half of each in each half."""
    from dart_llm.data import passages

    subjects = [texts.read(subject) for subject in texts.subjects()]
    parts = [segment.text for passage in passages.shipped() for segment in passage.segments()]
    half, middle = len(subjects) // 2, len(parts) // 2
    return [*subjects[:half], *parts[:middle], *subjects[half:], *parts[middle:]]


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines; the lines themselves where there is no blank one."""
    found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return found if len(found) > 1 else [line for line in text.split("\n") if line.strip()]
