"""Prompts and passages for the terminal: which to show, as tables, and one in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dart_llm import drift_passages, drift_prompts
from dart_llm.drift_passages import Passage
from dart_llm.drift_prompts import DriftPrompt
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.jsonl import read_rows

Record = TypeVar("Record", DriftPrompt, Passage)
ARROW = " -> "


def prompts(file: Path | None = None) -> list[DriftPrompt]:
    """The package's prompts, or those in a JSONL file."""
    return drift_prompts.shipped() if file is None else drift_prompts.read_prompts(file)


def passages(file: Path | None = None) -> list[Passage]:
    """The package's passages, or those in a JSONL file."""
    return drift_passages.shipped() if file is None else drift_passages.read_passages(file)


def everything(file: Path | None = None) -> Sequence[DriftPrompt | Passage]:
    """The package's prompts and passages, or what a JSONL file holds: passages have ``changes``."""
    if file is None:
        return [*passages(), *prompts()]
    has_changes = any("changes" in row for _, row in read_rows(file))
    return passages(file) if has_changes else prompts(file)


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
    if name is not None and name not in known:
        raise UnknownName(kind, name, known)


def find(records: Sequence[DriftPrompt | Passage], name: str) -> DriftPrompt | Passage:
    """The record with this id, or the only one whose id begins so.

    Raises ``UnknownName``, and ``ConfigError`` when several ids begin so.
    """
    for record in records:
        if record.id == name:
            return record
    close = [record for record in records if name and record.id.startswith(name)]
    if len(close) > 1:
        raise ConfigError(
            f'{len(close)} ids begin with "{name}", such as {close[0].id} and {close[1].id}: '
            "write more of the one you mean"
        )
    if not close:
        raise UnknownName("prompt or passage", name, (record.id for record in records))
    return close[0]


def prompt_table(prompts: Sequence[DriftPrompt]) -> Table:
    """A row per prompt."""
    table = _table("id", "template", "domains", "first topic", "second topic")
    for prompt in prompts:
        topics = [prompt.slots.get(f"topic_{side}", "") for side in ("a", "b")]
        cells = (prompt.id, prompt.template, ARROW.join(prompt.domains), *topics)
        table.add_row(*map(Text, cells))  # Text: an ontology may hold rich's square brackets
    return table


def passage_table(passages: Sequence[Passage]) -> Table:
    """A row per topic of each passage, with its words and the character at which it begins."""
    table = _table("id", "domain", "topic")
    for name in ("words", "from character"):
        table.add_column(name, justify="right")
    for passage in passages:
        last = passage.segments()[-1]
        for segment in passage.segments():
            first = segment.start == 0
            table.add_row(
                Text(passage.id if first else ""),
                Text(segment.topic.domain),
                Text(segment.topic.name),
                f"{words(segment.text):,}",
                f"{segment.start:,}",
                end_section=segment is last,
            )
    return table


def print_prompt(prompt: DriftPrompt, out: Console) -> None:
    """Where the prompt comes from, and its text."""
    facts = {
        "id": prompt.id,
        "template": prompt.template,
        "domains": ARROW.join(prompt.domains),
        "seed": "" if prompt.seed is None else str(prompt.seed),
        **{f"slot {name}": value for name, value in prompt.slots.items()},
    }
    table = Table(show_header=False)
    for name, value in facts.items():
        if value:
            table.add_row(Text(name), Text(value))
    out.print(table)
    _print_text(prompt.text, out)


def print_passage(passage: Passage, out: Console) -> None:
    """The text, with a line before each topic that says what and where it is."""
    _print_text(passage.id, out)
    for number, segment in enumerate(passage.segments(), start=1):
        line = (
            f"--- topic {number} of {len(passage.topics)}: {segment.topic.name} "
            f"({segment.topic.domain}), characters {segment.start:,} to {segment.end:,}, "
            f"{words(segment.text):,} words ---"
        )
        out.print(Text(f"\n{line}\n", style="bold"), soft_wrap=not out.is_terminal)
        _print_text(segment.text, out)


def words(text: str) -> int:
    """Words between spaces."""
    return len(text.split())


def _print_text(text: str, out: Console) -> None:
    # Lines are broken for a reader, and left whole for a program or a file.
    out.print(Text(text), soft_wrap=not out.is_terminal)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
