"""Data sets on the hub: those in ``catalogue.yaml``, ``hub:`` references, and MMLU.

This is the only file that imports the ``datasets`` library, and only when a data set is needed.  A
data set that cannot be fetched, is empty or lacks a column raises an error.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, TypeAdapter
from pydantic.dataclasses import dataclass

from dart_llm.errors import ConfigError, LoadError, MissingExtra, check_name
from dart_llm.files import read_rows

LAST_RUN: str | None = None
"""The date when ``make test-online`` last passed; None if it has not been run yet."""

USE_FILE = 'use a local file instead: text, or JSONL such as {"document": "...", "summary": "..."}'

Column = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A split of a data set on the hub.

    ``columns``: column names by role (text, document, summary, question, choices, answer, id, ...).
    ``separator``: a string inserted between the rows of a text.  ``uses``: perplexity, calibration,
    summarize, prompts (questions that no task scores) or eval.  ``tasks``: the lm-eval tasks that
    score this split.  ``first``: if set, only this many rows are streamed, from the start; None
    means all rows.  ``megabytes``: the approximate download size.
    """

    name: str
    hub_id: str
    config: str | None = None
    split: str
    columns: Mapping[str, Column]
    separator: str = "\n\n"
    uses: tuple[str, ...] = ("eval",)
    licence: str = "unknown"
    licence_page: str = ""
    megabytes: int | None = None
    tasks: tuple[str, ...] = ()
    revision: str | None = None
    first: int | None = None
    gated: bool = False

    @property
    def where(self) -> str:
        """The hub id, configuration and split as text: ``allenai/c4 (en, validation)``."""
        return f"{self.hub_id} ({', '.join(part for part in (self.config, self.split) if part)})"


_CATALOGUE: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8")
)

DATA_SETS: Mapping[str, DataSet] = TypeAdapter(dict[str, DataSet]).validate_python(
    {name: {"name": name, **fields} for name, fields in _CATALOGUE["data_sets"].items()}
)

MMLU_SUBJECTS: tuple[str, ...] = tuple(_CATALOGUE["mmlu_subjects"])


def names(use: str) -> tuple[str, ...]:
    """The sorted names of the data sets that list ``use`` in ``uses``."""
    return tuple(sorted(name for name, data in DATA_SETS.items() if use in data.uses))


def get(name: str) -> DataSet:
    """The catalogue's data set ``name``; raises ``UnknownName``."""
    check_name("data set", name, DATA_SETS)
    return DATA_SETS[name]


# References to any data set on the hub: ``hub:owner/name[/configuration]:split[[:N]]:columns``.

PREFIX = "hub:"
"""Every reference begins with this prefix, and no other name or path does."""

EXAMPLES = {
    ("text",): "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
    ("document", "summary"): "hub:EdinburghNLP/xsum:test:document:summary",
}
"""Maps the roles of the columns to an example of a reference."""

_PART = r"[^/:\[\]\s]+"

_PATTERN = re.compile(
    rf"hub:(?P<id>{_PART}/{_PART})(?:/(?P<config>[^:]+))?"
    rf":(?P<split>{_PART})(?:\[:(?P<first>\d+)\])?(?P<columns>(?::[^:#]+)+)"
)


def parse(name: str, roles: tuple[str, ...] = ("text",)) -> DataSet:
    """The data set that ``name`` refers to, with one column for each of ``roles``.

    ``hub:owner/name/en:validation[:500]:text`` means configuration ``en``, split ``validation``,
    its first 500 rows, column ``text``.  The split and the columns are required.  Raises
    ``ConfigError``, with an example, for an invalid reference.
    """
    match = _PATTERN.fullmatch(name)
    columns = match["columns"][1:].split(":") if match else []
    if not match or len(columns) != len(roles) or match["first"] == "0":
        raise ConfigError(
            f'"{name}" is not a data set on the hub with columns for {" and ".join(roles)}: write '
            f"hub:owner/name[/configuration]:split:{':'.join(f'{role}-column' for role in roles)}, "
            f"e.g. {EXAMPLES[roles]}"
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


# MMLU: the questions that no task scores.

LOCAL_MMLU = Path("datasets/mmlu")  # in the current folder; read instead of the hub

SPLITS = ("dev", "validation")  # never "test": those questions are scored

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def mmlu_questions(subject: str) -> list[dict[str, Any]]:
    """A subject's MMLU questions that no task scores: the splits ``dev``, then ``validation``.

    Each question is a mapping with ``subject``, ``question`` and ``choices``; the answer is
    dropped, so no prompt can reveal it.  If ``LOCAL_MMLU`` has a file ``<subject>_dev.jsonl``, the
    hub is not used.  Raises ``UnknownName``, ``ConfigError`` for a malformed file, and
    ``MissingExtra`` or ``LoadError`` if the hub's data cannot be loaded.
    """
    check_name("MMLU subject", subject, MMLU_SUBJECTS)
    questions: list[dict[str, Any]] = []
    for where, row in _mmlu_rows(subject):
        text, choices = row.get("question"), row.get("choices")
        if not isinstance(text, str) or not isinstance(choices, list) or not choices:
            raise ConfigError(f'{where} needs "question" (text) and "choices" (a list): add them')
        questions.append({"subject": subject, "question": text, "choices": [*map(str, choices)]})
    return questions


def _mmlu_rows(subject: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (description of where the row was read, row) for each row of a subject."""
    for split in SPLITS:
        path = LOCAL_MMLU / f"{subject}_{split}.jsonl"
        if path.is_file():
            yield from ((f"line {number} of {path}", row) for number, row in read_rows(path))
        elif subject not in local_subjects():
            source = replace(get("mmlu"), config=subject, split=split)
            yield from ((source.where, row) for row in rows(source, f"write {path} instead"))


def local_subjects() -> tuple[str, ...]:
    """The subjects with a file ``<subject>_dev.jsonl`` in ``LOCAL_MMLU``, in catalogue order."""
    return tuple(s for s in MMLU_SUBJECTS if (LOCAL_MMLU / f"{s}_dev.jsonl").is_file())


def with_choices(row: Mapping[str, Any]) -> str:
    """A question and its lettered choices, one per line, without the answer."""
    choices = zip(LETTERS, row["choices"], strict=False)
    lines = [f"{letter}. {choice.strip()}" for letter, choice in choices]
    return "\n".join([row["question"].strip(), *lines])


# Rows of any data set.


def positions(total: int, limit: int | None, seed: int | None) -> list[int]:
    """Choose ``limit`` of ``total`` positions: the first or, with ``seed``, a random sample.

    The positions are returned in ascending order; a ``limit`` of None means all.  With the same
    seed, a smaller sample is a subset of a larger one.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of documents must be 1 or more, not {limit}")
    order = list(range(total))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return sorted(order[:limit])


def rows(
    source: DataSet, instead: str = USE_FILE, *, stream: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of ``source``.

    Rows are streamed if ``stream`` or ``source.first`` is set; otherwise the split is downloaded
    once and then read from the cache.  ``instead``: the alternative that error messages suggest.
    Raises ``MissingExtra``, or ``LoadError`` if there are no rows or a column is missing.
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
    from dart_llm.hub import redact

    try:
        load_dataset = import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:  # a folder datasets/ is importable
        raise MissingExtra("datasets", "eval") from error
    revision = {"revision": source.revision} if source.revision else {}
    try:
        options = {"split": source.split, "streaming": stream, **revision}
        yield from islice(load_dataset(source.hub_id, source.config, **options), source.first)
    # Network errors of the hub's clients share no base class, and streaming raises them late.
    except Exception as error:
        # a DatasetGenerationError says little; its cause has the reason
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error
        reason = redact(" ".join(str(cause).split()) or type(cause).__name__)[:200].rstrip(" .")
        if source.gated:
            instead = f"accept its conditions on the hub and set HF_TOKEN, or {instead}"
        raise LoadError(
            f"the data set {source.where} could not be fetched from the hub ({reason}); {instead}"
        ) from error


def no_bars() -> None:
    """Disable the progress bars of ``datasets``, because dart-llm draws its own."""
    with contextlib.suppress(ImportError, AttributeError):
        import_module("datasets").disable_progress_bars()
