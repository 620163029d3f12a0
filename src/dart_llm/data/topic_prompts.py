"""Two-topic prompts: each asks a model to write about one topic, then about one of another domain.

As JSONL, a prompt's line has ``id``, ``text``, ``template``, ``slots``, ``domains`` and ``seed``;
only ``text`` is required in a user's file.  ``benchmarks/make_prompts.py`` made the package's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dart_llm.errors import ConfigError
from dart_llm.files import read_rows

Record = TypeVar("Record", bound=Any)

REASONS = {
    "missing": "is missing",
    "string_type": "is VALUE, which is not text",
    "tuple_type": "must be a list",
}
"""What is wrong, in the words of a file, by pydantic's name of the problem."""


@dataclass(frozen=True)
class DriftPrompt:
    """A text that asks for two topics.

    ``id``: template and a hash of the text; ``slots``: what was put into the template;
    ``domains``: of both topics.  A prompt that was not generated has neither domains nor seed.
    """

    id: str
    text: str
    template: str = ""
    slots: Mapping[str, str] = Field(default_factory=dict)
    domains: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError(f'the prompt "{self.id}" has no text: write one')
        if self.domains and (len(self.domains) != 2 or self.domains[0] == self.domains[1]):
            raise ConfigError(
                f'the prompt "{self.id}" needs two different domains, not '
                f"{' and '.join(self.domains)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data, as in a file of prompts."""
        return {**asdict(self), "slots": dict(self.slots), "domains": list(self.domains)}


def shipped() -> list[DriftPrompt]:
    """The prompts in the package."""
    data = resources.files("dart_llm.data") / "shipped" / "drift" / "prompts.jsonl"
    with resources.as_file(data) as path:
        return read_prompts(path)


def read_prompts(path: str | Path) -> list[DriftPrompt]:
    """The prompts in a JSONL file; without an ``id`` a prompt's id is its line number.

    Raises as ``read_records``.
    """
    rows = (
        (number, {**row, "id": str(number if row.get("id") is None else row["id"])})
        for number, row in read_rows(Path(path))
    )
    return read_records(DriftPrompt, path, rows)


def read_records(
    kind: type[Record], path: str | Path, rows: Iterable[tuple[int, dict[str, Any]]]
) -> list[Record]:
    """The lines of a file, each with its number, as records with different ids.

    Raises ``ConfigError``, with the line's number, for a line that does not fit and an id that
    occurs twice, and for a file without records.
    """
    records = dict[str, Record]()
    for number, row in rows:
        record = _validated(kind, row, f"line {number} of {path}")
        if record.id in records:
            raise ConfigError(
                f'the id "{record.id}" in line {number} of {path} is taken: give each line its own'
            )
        records[record.id] = record
    if not records:
        raise ConfigError(f"the file {path} is empty: it has no prompts or passages")
    return list(records.values())


def _validated(kind: type[Record], row: dict[str, Any], where: str) -> Record:
    try:
        record: Record = TypeAdapter(kind).validate_python(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        reason = REASONS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        reason = reason.replace("VALUE", repr(problem["input"]))
        raise ConfigError(f"{', '.join(filter(None, (where, field)))}: {reason}") from None
    return record
