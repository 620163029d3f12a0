"""Long passages whose topic changes at known places, for study with a given text.

The package's own are under ``texts/drift/passages``: one text file each, and ``index.jsonl`` with
topics and changes.  In a JSONL file of one's own a line holds ``id``, ``text``, ``topics`` (a list
of ``{"name", "domain"}``) and ``changes`` (see ``Passage``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.jsonl import read_rows

SHIPPED = "shipped"
"""Where a file could stand: the package's own."""

BREAK = "\n\n"
"""What stands between two paragraphs."""


@dataclass(frozen=True)
class Topic:
    """What a part of a passage is about, and the domain that this belongs to."""

    name: str
    domain: str


@dataclass(frozen=True)
class Segment:
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

    id: str
    text: str
    topics: tuple[Topic, ...]
    changes: tuple[int, ...]

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
        topics = [asdict(topic) for topic in self.topics]
        return {"id": self.id, "text": self.text, "topics": topics, "changes": list(self.changes)}


def shipped() -> list[Passage]:
    """The passages in the package, in the order of their ids."""
    with resources.as_file(resources.files("dart_llm.texts") / "drift" / "passages") as folder:
        return [
            _passage(
                {**row, "text": _text(folder / f"{row['id']}.txt")}, f"line {number} of index.jsonl"
            )
            for number, row in read_rows(folder / "index.jsonl")
        ]


def passages(source: str | None) -> list[Passage]:
    """Those of a JSONL file, or the package's (``SHIPPED``, no name).

    Raises ``ConfigError`` where there is no such file, or as ``read_passages``.
    """
    if not source or source == SHIPPED:  # "" is how a script says that nothing is given
        return shipped()
    return read_passages(existing("passages", source))


def existing(option: str, source: str) -> Path:
    """The file of ``--passages`` or ``--prompts``; raises ``ConfigError`` where there is none."""
    path = Path(source)
    if not path.exists():
        raise ConfigError(
            f"--{option} {source}: there is no such file; --{option} {SHIPPED} takes the package's "
            "own"
        )
    return path


def read_passages(path: str | Path) -> list[Passage]:
    """The passages in a JSONL file; the module's docstring describes its lines.

    Raises ``ConfigError``, with the line's number, for a line that does not fit, and for an id
    that occurs twice or a file without passages.
    """
    found = dict[str, Passage]()
    for number, row in read_rows(Path(path)):
        passage = _passage(row, f"line {number} of {path}")
        if passage.id in found:
            raise ConfigError(
                f'the id "{passage.id}" in line {number} of {path} is taken: give each passage '
                "its own"
            )
        found[passage.id] = passage
    if not found:
        raise ConfigError(f"the file {path} holds no passages")
    return list(found.values())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").removesuffix("\n")


def _passage(row: dict[str, Any], where: str) -> Passage:
    name, text, topics, changes = (row.get(key) for key in ("id", "text", "topics", "changes"))
    if not (isinstance(name, str) and isinstance(text, str) and name and text):
        raise ConfigError(f"{where} needs an id and a text")
    if not isinstance(topics, list) or not all(map(_is_topic, topics)):
        raise ConfigError(
            f'{where} needs topics: write [{{"name": "bees", "domain": "zoology"}}, ...]'
        )
    if not isinstance(changes, list) or not all(type(offset) is int for offset in changes):
        raise ConfigError(f"{where} needs changes: a list of offsets in characters")
    return Passage(name, text, _topics(topics), tuple(changes))


def _topics(rows: Sequence[dict[str, str]]) -> tuple[Topic, ...]:
    return tuple(Topic(row["name"], row["domain"]) for row in rows)


def _is_topic(row: Any) -> bool:
    keys = ("name", "domain")
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
