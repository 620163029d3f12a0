"""Long passages with marked topic changes, and two-topic prompts: shipped, or from JSONL files.

Each line of such a file has the fields of ``Passage``, or those of ``DriftPrompt``; of the latter,
only ``text`` is required.  ``benchmarks/make_prompts.py`` generates the shipped prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dart_llm.errors import ConfigError, UnknownName, check_name
from dart_llm.files import read_rows

SHIPPED = "shipped"
"""This word in place of a file name means the package's prompts or passages."""

FOLDER = Path(__file__).parent / "shipped" / "drift"

BREAK = "\n\n"
"""Separates two paragraphs."""


@dataclass(frozen=True)
class Topic:
    """The subject of a part of a passage, and the domain to which that subject belongs."""

    name: str
    domain: str


class Segment(NamedTuple):
    """A single-topic part of a passage: its characters ``start`` to ``end``.

    ``text`` omits the final paragraph break.
    """

    topic: Topic
    start: int
    end: int
    text: str


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The record as it is stored in a JSONL file."""
        data: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return data


@dataclass(frozen=True)
class Passage(_Record):
    """Paragraphs joined by blank lines, about at least two topics.

    ``changes``: for every topic but the first, the character offset at which its first paragraph
    begins.  Raises ``ConfigError`` if an offset is invalid, or if adjacent topics share a domain.
    """

    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)]
    topics: Annotated[tuple[Topic, ...], Field(min_length=2)]
    changes: tuple[StrictInt, ...]

    def __post_init__(self) -> None:
        problem = None
        if [*self.changes] != sorted({*self.changes}) or len(self.changes) != len(self.topics) - 1:
            problem = "needs one change for each topic but the first, in ascending order"
        elif any(before == after for before, after in pairwise(self.domains)):
            problem = f"has adjacent topics of the same domain: {', '.join(self.domains)}"
        for offset in self.changes:
            before, after = self.text[:offset], self.text[offset : offset + 1]
            if offset <= 0 or not before.endswith(BREAK) or not after.strip():
                at = f"at character {offset}"
                problem = problem or f"has a change {at}, where no paragraph begins"
        if problem:
            raise ConfigError(f'the passage "{self.id}" {problem}')

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the topics, in order."""
        return tuple(topic.domain for topic in self.topics)

    def segments(self) -> list[Segment]:
        """The single-topic parts; joined by paragraph breaks, they form the text."""
        bounds = pairwise([0, *self.changes, len(self.text)])
        return [
            Segment(topic, start, end, self.text[start:end].removesuffix(BREAK))
            for topic, (start, end) in zip(self.topics, bounds, strict=True)
        ]


@dataclass(frozen=True)
class DriftPrompt(_Record):
    """A prompt that asks for two topics.

    ``slots``: the values inserted into the template.  ``domains``: the domains of both topics.
    Only generated prompts have domains and a seed; the ``id`` of a generated prompt is the
    template's name and a hash.
    """

    id: str
    text: Annotated[str, Field(pattern=r"\S")]
    template: str = ""
    slots: Mapping[str, str] = Field(default_factory=dict)
    domains: Annotated[tuple[str, ...], Field(max_length=2)] = ()
    seed: int | None = None


Record = TypeVar("Record", DriftPrompt, Passage)


def _read_records(
    kind: type[Record], path: Path, rows: Iterable[tuple[int, dict[str, Any]]]
) -> list[Record]:
    """Validate a file's numbered rows; raises ``ConfigError`` for invalid rows or an empty file."""
    adapter, records = TypeAdapter(kind), dict[str, Record]()
    for number, row in rows:
        where = f"line {number} of {path}"
        try:
            record: Record = adapter.validate_python(row)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise ConfigError(f"{where}, {field}: {problem['msg']}") from None
        if record.id in records:
            raise ConfigError(f'the id "{record.id}" in {where} is used twice: make each id unique')
        records[record.id] = record
    if not records:
        raise ConfigError(f"the file {path} is empty: it has no prompts or passages")
    return list(records.values())


def _path(option: str, file: Path | str | None) -> Path | None:
    """The JSONL file given as ``--prompts`` or ``--passages``; None means the package's data."""
    if not file or file == SHIPPED:  # a script passes "" to omit the option
        return None
    if not (path := Path(file)).exists():
        raise ConfigError(
            f"--{option} {file}: there is no such file; use --{option} {SHIPPED} for the package's"
        )
    return path


def listed_prompts(file: Path | str | None = None) -> list[DriftPrompt]:
    """The package's prompts, or those in a JSONL file; the default id is the line number."""
    path = _path("prompts", file) or FOLDER / "prompts.jsonl"
    rows = (
        (number, {**row, "id": str(number if row.get("id") is None else row["id"])})
        for number, row in read_rows(path)
    )
    return _read_records(DriftPrompt, path, rows)


def listed_passages(file: Path | str | None = None) -> list[Passage]:
    """The package's passages in id order, or those in a JSONL file."""
    path = _path("passages", file) or FOLDER / "passages" / "index.jsonl"
    rows = dict(read_rows(path))
    if path.parent == FOLDER / "passages":
        for row in rows.values():
            text = path.with_name(f"{row['id']}.txt").read_text(encoding="utf-8")
            row["text"] = text.removesuffix("\n")
    return _read_records(Passage, path, rows.items())


def shipped() -> list[Passage]:
    """The package's passages."""
    return listed_passages()


def everything(file: Path | None = None) -> Sequence[DriftPrompt | Passage]:
    """The package's passages and prompts, or a file's: passages if any row has ``changes``."""
    if file is None:
        return [*listed_passages(), *listed_prompts()]
    has_changes = any("changes" in row for _, row in read_rows(file))
    return listed_passages(file) if has_changes else listed_prompts(file)


def choose(
    records: Sequence[Record], domain: str | None, template: str | None = None
) -> list[Record]:
    """The records that have this domain and this template; None matches all.

    Raises ``UnknownName`` for a domain or template that no record has.
    """
    check_name("domain", domain, {name for record in records for name in record.domains})
    templates = {str(getattr(record, "template", "")) for record in records} - {""}
    check_name("template", template, templates)

    def fits(record: DriftPrompt | Passage) -> bool:
        made_from = getattr(record, "template", "")
        return template in (None, made_from) and domain in (None, *record.domains)

    return list(filter(fits, records))


def find(records: Sequence[DriftPrompt | Passage], name: str) -> DriftPrompt | Passage:
    """The record with id ``name``, else the only one with this prefix; raises ``UnknownName``."""
    matches = [record for record in records if record.id == name]
    matches = matches or [record for record in records if name and record.id.startswith(name)]
    if len(matches) != 1:
        raise UnknownName("prompt or passage", name, [record.id for record in matches or records])
    return matches[0]


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return a text's token ids, and each token's end as a character offset (never decreasing)."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ends = (end for _, end in encoded["offset_mapping"])
    return list(encoded["input_ids"]), list(accumulate(ends, max))  # special tokens end at 0


def first_tokens(ends: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    """For each character offset, the first token that contains a character at or after it."""
    return tuple(next(k for k, end in enumerate(ends) if end > offset) for offset in offsets)
