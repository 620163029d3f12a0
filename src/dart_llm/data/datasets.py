"""Data sets of the hub: ``catalogue.yaml``, ``hub:`` references, MMLU.

The only file that imports the ``datasets`` library, and only when a data set is needed.  A data set
that cannot be fetched, is empty or misses a column is an error, never an empty result.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module, resources
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import AfterValidator, BeforeValidator, TypeAdapter
from pydantic.dataclasses import dataclass

from dart_llm.errors import ConfigError, LoadError, MissingExtra, check_name
from dart_llm.files import read_rows

LAST_RUN = "never run"
"""When ``make test-online`` last passed: a date, or "never run"."""

USES: Mapping[str, str] = MappingProxyType(
    {
        "perplexity": "text for perplexity",
        "calibration": "text that static baselines are calibrated on",
        "summarize": "documents with reference summaries",
        "prompts": "questions that are not scored, for prompts and perplexity",
        "eval": "questions that lm-eval's tasks score",
    }
)
"""What a data set is used for."""

Column = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One split of one data set of the hub.

    ``columns``: the columns by role (text, document, summary, question, choices, answer, id, ...).
    ``separator``: between the rows of a text.  ``revision``: a branch other
    than the main one.  ``first``: only so many rows are read, streamed.  ``tasks``: the lm-eval
    tasks that score it.  ``megabytes``: about what is downloaded.  ``licence_page``: its
    makers', or the card on the hub.  ``verified``: when ``make test-online`` last read it.
    """

    name: str
    hub_id: str
    config: str | None = None
    split: str
    columns: Annotated[Mapping[str, Column], AfterValidator(MappingProxyType)]
    separator: str = "\n\n"
    uses: tuple[str, ...] = ("eval",)
    licence: str = "unknown"
    licence_page: str = ""
    megabytes: int | None = None
    tasks: tuple[str, ...] = ()
    revision: str | None = None
    first: int | None = None
    gated: bool = False
    note: str = ""
    verified: str = "never"

    def __post_init__(self) -> None:
        card = f"https://huggingface.co/datasets/{self.hub_id}"
        object.__setattr__(self, "licence_page", self.licence_page or card)

    def column(self, role: str) -> str:
        """The one column of ``role``; ``KeyError`` when the data set has no such role."""
        return self.columns[role][0]

    @property
    def where(self) -> str:
        """Id, configuration and split, for people: ``allenai/c4 (en, validation)``."""
        return f"{self.hub_id} ({', '.join(part for part in (self.config, self.split) if part)})"


_CATALOGUE: dict[str, Any] = yaml.safe_load(
    (resources.files("dart_llm.data") / "catalogue.yaml").read_text(encoding="utf-8")
)

DATA_SETS: Mapping[str, DataSet] = MappingProxyType(
    {
        name: TypeAdapter(DataSet).validate_python({"name": name, **fields})
        for name, fields in _CATALOGUE["data_sets"].items()
    }
)

MMLU_SUBJECTS: tuple[str, ...] = tuple(_CATALOGUE["mmlu_subjects"])


def names(use: str | None = None) -> tuple[str, ...]:
    """The data sets that are used for ``use`` (a key of ``USES``), sorted; all without it."""
    check_name("use of data sets", use, USES)
    return tuple(sorted(n for n, data in DATA_SETS.items() if use is None or use in data.uses))


def get(name: str, *uses: str) -> DataSet:
    """The data set called ``name``; ``UnknownName`` unless it serves one of ``uses``, if any."""
    check_name("data set", name, [known for use in uses or (None,) for known in names(use)])
    return DATA_SETS[name]


# References to any data set of the hub: ``hub:owner/name[/configuration]:split[[:N]]:columns``.

PREFIX = "hub:"
"""What a reference starts with, and no name or path."""

EXAMPLES = {
    ("text",): "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
    ("document", "summary"): "hub:EdinburghNLP/xsum:test:document:summary",
}
"""By the roles that the columns of a reference have."""

_PART = r"[^/:\[\]\s]+"

_PATTERN = re.compile(
    rf"hub:(?P<id>{_PART}/{_PART})(?:/(?P<config>[^:]+))?"
    rf":(?P<split>{_PART})(?:\[:(?P<first>\d+)\])?(?P<columns>(?::[^:]+)+)"
)


def parse(name: str, roles: tuple[str, ...] = ("text",)) -> DataSet:
    """The data set that ``name`` refers to, with one column for each of ``roles``.

    ``hub:owner/name:test:text`` is the text column of the test split,
    ``hub:owner/name/en:validation[:500]:text`` the first 500 rows of the configuration en.
    Nothing is guessed: the split and the columns are always written out.  Raises ``ConfigError``,
    with an example, for anything else.
    """
    match = _PATTERN.fullmatch(name)
    columns = match["columns"][1:].split(":") if match else []
    if not match or len(columns) != len(roles) or match["first"] == "0":
        wanted = " and one for the ".join(roles)
        raise ConfigError(
            f'"{name}" is not a data set of the hub with a column for the {wanted}: write '
            f"hub:owner/name[/configuration]:split:{':'.join(f'{role}-column' for role in roles)}, "
            f"e.g. {EXAMPLES.get(roles, EXAMPLES['text',])}"
        )
    return DataSet(
        name=name,
        hub_id=match["id"],
        config=match["config"],
        split=match["split"],
        columns=dict(zip(roles, columns, strict=True)),  # type: ignore[arg-type]
        uses=(),
        first=int(match["first"]) if match["first"] else None,
    )


# Documents and reference summaries as plain text, whatever form a data set keeps them in.


def reference(value: Any) -> str:
    """A reference summary, "" if empty; a list of sentences, also a printed one, one a line.

    The brackets and quotes of a printed list (``"['One.', 'Two.']"``) would count as text.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            printed = ast.literal_eval(value.strip())
            if isinstance(printed, list) and all(isinstance(part, str) for part in printed):
                value = printed
    if isinstance(value, list | tuple):
        return "\n".join(part for part in map(reference, value) if part)
    return value.strip() if isinstance(value, str) else ""


def multi_news(text: str) -> str:
    """A document of Multi-News: its articles separated by blank lines, without its markers."""
    articles = (article.strip() for article in text.replace("NEWLINE_CHAR", "\n").split("|||||"))
    return "\n\n".join(article for article in articles if article)


# MMLU: the questions that are not scored.

LOCAL_MMLU = Path("datasets/mmlu")  # in the current folder; read instead of the hub

SPLITS = ("dev", "validation")  # never "test": those questions are scored

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def mmlu_questions(subject: str, *, answers: bool = False) -> list[dict[str, Any]]:
    """The MMLU questions of a subject that are not scored: ``dev``, then ``validation``.

    Each is ``{"subject", "question", "choices"}``; the answer, a position in the choices, is
    dropped here unless ``answers``, so no prompt that is built from them can show it.  They are
    read from ``<subject>_dev.jsonl`` (and ``<subject>_validation.jsonl``) in ``LOCAL_MMLU`` where
    those exist, else from the hub's ``cais/mmlu``.

    Raises ``UnknownName``, ``ConfigError`` (a local file is malformed), ``MissingExtra`` (no
    ``datasets`` library) or ``LoadError`` (the hub cannot be reached).
    """
    check_name("MMLU subject", subject, MMLU_SUBJECTS)
    located = _local_questions if subject in local_subjects() else _hub_questions
    questions: list[dict[str, Any]] = []
    for where, row in located(subject):
        text, choices = row.get("question"), row.get("choices")
        if not isinstance(text, str) or not isinstance(choices, list) or not choices:
            raise ConfigError(
                f'{where} needs "question" (text) and "choices" (a list): complete it'
            )
        answer = {"answer": _answer(row, len(choices), where)} if answers else {}
        options = [str(choice) for choice in choices]
        questions.append({"subject": subject, "question": text, "choices": options, **answer})
    return questions


def local_subjects() -> tuple[str, ...]:
    """The subjects whose ``<subject>_dev.jsonl`` lies in ``LOCAL_MMLU``, in the usual order."""
    return tuple(s for s in MMLU_SUBJECTS if (LOCAL_MMLU / f"{s}_dev.jsonl").is_file())


def question_text(row: Mapping[str, Any]) -> str:
    """A question as perplexity reads it: alone, or with its choices and answer if it has one."""
    if "answer" not in row:
        return str(row["question"])
    return f"{with_choices(row)}\nAnswer: {LETTERS[row['answer']]}"


def with_choices(row: Mapping[str, Any]) -> str:
    """A question and its choices, one a line under letters, without the answer."""
    choices = zip(LETTERS, row["choices"], strict=False)
    lines = [f"{letter}. {str(choice).strip()}" for letter, choice in choices]
    return "\n".join([str(row["question"]).strip(), *lines])


Located = Iterator[tuple[str, dict[str, Any]]]
"""Rows, each with the words that locate it."""


def _hub_questions(subject: str) -> Located:
    instead = f"to work without it put {subject}_dev.jsonl into {LOCAL_MMLU.as_posix()}/"
    for split in SPLITS:
        source = replace(get("mmlu"), config=subject, split=split)
        for row in rows(source, instead):
            yield source.where, row


def _local_questions(subject: str) -> Located:
    paths = (LOCAL_MMLU / f"{subject}_{split}.jsonl" for split in SPLITS)
    for path in filter(Path.is_file, paths):
        for number, row in read_rows(path):
            yield f"line {number} of {path}", row


def _answer(row: dict[str, Any], choices: int, where: str) -> int:
    answer = row.get("answer")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if type(answer) is not int or not 0 <= answer < min(choices, len(LETTERS)):
        raise ConfigError(f'{where} needs "answer", the position of a choice from 0: complete it')
    return answer


# Texts and documents of the hub.

INSTEAD = {
    "text": "use the embedded text or a text file instead",
    "documents": 'give a JSONL file instead, one {"document": ..., "summary": ...} a line',
}
"""What to do without the hub."""


def hub_text(name: str) -> str:
    """The text of a data set of the catalogue, or of a reference: its rows, joined.

    ``wikitext2``: the test split of WikiText-2 (raw), lines joined by blank lines.  ``c4``: the
    first 1,100 documents of C4's English validation split, streamed, joined by spaces.  Both are
    the joins that the pruning literature uses.  ``c4_train``: the first 512 documents of the
    training split, which no evaluation scores.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    hub = name.startswith(PREFIX)
    source = parse(name) if hub else get(name, "perplexity", "calibration")
    column = source.column("text")
    texts = []
    for row in rows(source, INSTEAD["text"]):
        if not isinstance(row[column], str):
            raise LoadError(
                f"the column {column} of {source.where} has {type(row[column]).__name__}, not "
                f"text; name another of {', '.join(row)}"
            )
        texts.append(row[column])
    if not any(text.strip() for text in texts):
        raise LoadError(f"the column {column} of {source.where} has no text; {INSTEAD['text']}")
    return source.separator.join(texts)


class Document(NamedTuple):
    """A text to summarise, its reference summary, and an ``id`` that is unique in its source."""

    id: str
    document: str
    summary: str


def documents(name: str, limit: int | None = None, seed: int | None = None) -> list[Document]:
    """Documents with reference summaries, in their order.

    name: a data set of the catalogue that serves ``summarize``, or ``hub:...`` with the columns
    of the document and the summary.  The first ``limit`` documents (streamed), or with ``seed`` a
    random sample of that many; ``None`` is all.  Rows without a document or a summary are left
    out.  The id is the data set's own, or the row's position from 0.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    roles = ("document", "summary")
    source = parse(name, roles) if name.startswith(PREFIX) else get(name, "summarize")
    _check_limit(limit)
    stream = limit is not None and seed is None
    chosen = list(islice(_documents(source, stream), limit if stream else None))
    if not stream:
        chosen = [chosen[index] for index in positions(len(chosen), limit, seed)]
    if not chosen:
        raise LoadError(
            f"the data set {source.where} has no row with both a document and a summary; "
            + INSTEAD["documents"]
        )
    return chosen


def _documents(source: DataSet, stream: bool) -> Iterator[Document]:
    for position, row in enumerate(rows(source, INSTEAD["documents"], stream=stream)):
        text = str(row[source.column("document")] or "").strip()
        summary = reference(row[source.column("summary")])
        if source.name == "multi_news":
            text, summary = multi_news(text), summary.lstrip("–— \n")  # each begins with a dash
        if text and summary:
            identity = row[source.column("id")] if "id" in source.columns else position
            yield Document(str(identity), text, summary)


def positions(total: int, limit: int | None, seed: int | None) -> list[int]:
    """``limit`` of ``total`` positions, ascending: the first, or with ``seed`` a random sample.

    With the same seed a smaller sample is a part of a larger one.  ``None`` is all of them.
    """
    _check_limit(limit)
    order = list(range(total))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return sorted(order[:limit])


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of documents must be 1 or more, not {limit}")


def rows(source: DataSet, instead: str, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of ``source``, which has at least one and every column that it names.

    Streamed when ``stream`` or when only its first rows are wanted; otherwise the split is
    fetched once and read from the cache afterwards.  ``instead``: what an error says to do.

    Raises ``MissingExtra`` or ``LoadError``.
    """
    fetched = _fetch(source, instead, stream=stream or source.first is not None)
    first = next(fetched, None)
    if first is None:
        raise LoadError(f"the data set {source.where} is empty; {instead}")
    missing = [name for names in source.columns.values() for name in names if name not in first]
    if missing:
        raise LoadError(
            f"the data set {source.where} has no column {' or '.join(missing)}: its columns are "
            f"{', '.join(first)}; {instead}"
        )
    return chain((first,), fetched)


def _fetch(source: DataSet, instead: str, *, stream: bool) -> Iterator[dict[str, Any]]:
    """The rows of ``source``; what the library raises, first or late, becomes ``LoadError``."""
    try:
        load_dataset = import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:  # a folder named datasets/ imports as empty
        raise MissingExtra("datasets", "eval") from error
    branch = {"revision": source.revision} if source.revision else {}
    try:
        data = load_dataset(
            source.hub_id, source.config, split=source.split, streaming=stream, **branch
        )
        yield from islice(data, source.first)
    # The hub's clients share no base class for "cannot be reached", and streaming fails late.
    except Exception as error:
        raise LoadError(_sentence(source, error, instead)) from error


def _sentence(source: DataSet, error: BaseException, instead: str) -> str:
    from dart_llm.hub import redact

    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__  # its own message says nothing
    reason = redact(" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .")
    if "OfflineModeIsEnabled" in reason:
        reason = "it is not in the cache and HF_HUB_OFFLINE is set"
    if source.gated:
        instead = f"accept its conditions on the hub and set HF_TOKEN, or {instead}"
    return f"the data set {source.where} could not be fetched from the hub ({reason}); {instead}"


def no_bars() -> None:
    """Switch the library's progress bars off: dart-llm has its own."""
    with contextlib.suppress(ImportError, AttributeError):
        import_module("datasets").disable_progress_bars()
