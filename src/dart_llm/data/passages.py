"""Long passages with marked changes of topic, and the tokens at which these fall.

The package's are under ``shipped/drift/passages``: one text file each, and ``index.jsonl`` with
topics and changes.  In a user's JSONL file a line has ``id``, ``text``, ``topics`` (a list
of ``{"name", "domain"}``) and ``changes`` (see ``Passage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, StrictInt
from pydantic.dataclasses import dataclass

from dart_llm.data import topic_prompts
from dart_llm.data.topic_prompts import DriftPrompt, read_records
from dart_llm.errors import ConfigError, UnknownName, check_name
from dart_llm.files import read_rows

SHIPPED = "shipped"
"""Written in place of a file: the package's."""

BREAK = "\n\n"
"""Separates two paragraphs."""


@dataclass(frozen=True)
class Topic:
    """What a part of a passage is about, and the domain that this belongs to."""

    name: str
    domain: str


class Segment(NamedTuple):
    """The characters ``start`` to ``end`` (not included) of a passage, about one topic.

    ``text`` ends before the blank line that separates it from the next segment.
    """

    topic: Topic
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Passage:
    """Paragraphs joined by blank lines, with two topics or more.

    ``changes``: for every topic but the first, the offset in characters at which its first
    paragraph begins.  Raises ``ConfigError`` for an offset that begins no paragraph, for offsets
    that do not rise or do not match the topics, and for neighboring topics of one domain.
    """

    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)]
    topics: tuple[Topic, ...]
    changes: tuple[StrictInt, ...]

    def __post_init__(self) -> None:
        what = f'the passage "{self.id}"'
        if len(self.topics) < 2 or len(self.changes) != len(self.topics) - 1:
            raise ConfigError(
                f"{what} has {len(self.topics)} topic(s) and {len(self.changes)} change(s): it "
                "needs two topics or more, and one change less"
            )
        if list(self.changes) != sorted(set(self.changes)):
            raise ConfigError(f"the changes {list(self.changes)} of {what} must rise")
        for offset in self.changes:
            starts = 0 < offset < len(self.text) and not self.text[offset].isspace()
            if not starts or self.text[:offset][-len(BREAK) :] != BREAK:
                raise ConfigError(
                    f"the change at character {offset} of {what} begins no paragraph: give the "
                    "offset of the first character after a blank line"
                )
        for one, other in pairwise(self.topics):
            if one.domain == other.domain:
                raise ConfigError(
                    f'{what} goes from "{one.name}" to "{other.name}", both of the domain '
                    f"{one.domain}: give them different domains"
                )

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the topics, in order."""
        return tuple(topic.domain for topic in self.topics)

    def segments(self) -> list[Segment]:
        """The parts about one topic each; with the breaks between them they make up the text."""
        bounds = [0, *self.changes, len(self.text)]
        return [
            Segment(topic, start, end, self.text[start:end].removesuffix(BREAK))
            for topic, (start, end) in zip(self.topics, pairwise(bounds), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data; ``read_passages`` reads it back from a line."""
        return {**asdict(self), "topics": [*map(asdict, self.topics)], "changes": [*self.changes]}


def shipped() -> list[Passage]:
    """The passages in the package, in the order of their ids."""
    data = resources.files("dart_llm.data") / "shipped" / "drift" / "passages"
    with resources.as_file(data) as folder:
        index = folder / "index.jsonl"
        rows = dict(read_rows(index))
        for row in rows.values():
            text = (folder / f"{row['id']}.txt").read_text(encoding="utf-8")
            row["text"] = text.removesuffix("\n")
        return read_records(Passage, index, rows.items())


def passages(source: str | None) -> list[Passage]:
    """Those of a JSONL file, or the package's (``SHIPPED``, no name); raises as ``existing``."""
    if not source or source == SHIPPED:  # "" is how a script says that nothing is given
        return shipped()
    return read_passages(existing("passages", source))


def existing(option: str, source: str) -> Path:
    """The file of ``--passages`` or ``--prompts``; raises ``ConfigError`` where there is none."""
    path = Path(source)
    if not path.exists():
        raise ConfigError(
            f"--{option} {source}: there is no such file; --{option} {SHIPPED} takes the package's"
        )
    return path


def read_passages(path: str | Path) -> list[Passage]:
    """The passages in a JSONL file; raises as ``read_records``."""
    return read_records(Passage, path, read_rows(Path(path)))


Record = TypeVar("Record", DriftPrompt, Passage)


def listed_prompts(file: Path | None = None) -> list[DriftPrompt]:
    """The package's prompts, or those in a JSONL file."""
    return topic_prompts.shipped() if file is None else topic_prompts.read_prompts(file)


def listed_passages(file: Path | None = None) -> list[Passage]:
    """The package's passages, or those in a JSONL file."""
    return shipped() if file is None else read_passages(file)


def everything(file: Path | None = None) -> Sequence[DriftPrompt | Passage]:
    """The package's prompts and passages, or those of a JSONL file: passages have ``changes``."""
    if file is None:
        return [*shipped(), *topic_prompts.shipped()]
    has_changes = any("changes" in row for _, row in read_rows(file))
    return listed_passages(file) if has_changes else listed_prompts(file)


def in_domain(records: Sequence[Record], domain: str | None) -> list[Record]:
    """Those of which a topic belongs to the domain; raises ``UnknownName`` when no topic does."""
    _check("domain", domain, {name for record in records for name in record.domains})
    return [record for record in records if domain is None or domain in record.domains]


def choose(
    prompts: Sequence[DriftPrompt], domain: str | None, template: str | None
) -> list[DriftPrompt]:
    """Those with the domain on either side and made from the template; None is any.

    Raises ``UnknownName`` for a domain or a template that none of the prompts has.
    """
    _check("template", template, {prompt.template for prompt in prompts})
    return [one for one in in_domain(prompts, domain) if template in (None, one.template)]


def _check(kind: str, name: str | None, known: set[str]) -> None:
    known = known - {""}
    if name is not None and not known:
        raise ConfigError(f"this file names no {kind}: leave out --{kind}")
    check_name(kind, name, known)


def find(records: Sequence[DriftPrompt | Passage], name: str) -> DriftPrompt | Passage:
    """The record with this id, or the only one whose id begins so.

    Raises ``UnknownName``, and ``ConfigError`` when several ids begin so.
    """
    for record in records:
        if record.id == name:
            return record
    close = [record for record in records if name and record.id.startswith(name)]
    if len(close) == 1:
        return close[0]
    if close:
        raise ConfigError(
            f'{len(close)} ids begin with "{name}", such as {close[0].id} and {close[1].id}: '
            "write more of the one you mean"
        )
    raise UnknownName("prompt or passage", name, (record.id for record in records))


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each the number of characters up to its end, which never falls."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, ends = list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
    else:  # no offsets: the lengths of the decoded beginnings
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        starts = (ids[: k + 1] for k in range(len(ids)))
        sizes = (len(tokenizer.decode(start, skip_special_tokens=True)) for start in starts)
        ends = [min(len(text), size) for size in sizes]
    return ids, list(accumulate(ends, max))  # a special token is at no character


def first_tokens(ends: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    """For each offset in characters the first token that has a character from there on."""
    return tuple(next(k for k, end in enumerate(ends) if end > offset) for offset in offsets)
