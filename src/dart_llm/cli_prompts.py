"""``dart-llm prompts``: two-topic prompts and passages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dart_llm.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from dart_llm.drift_passages import Passage
    from dart_llm.drift_prompts import DriftPrompt

Record = TypeVar("Record", "DriftPrompt", "Passage")

File = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A JSONL file instead of the package's own.")
]
ROWS = 20
"""Rows of a table without ``--limit``."""


def register(app: typer.Typer) -> None:
    """Add ``prompts`` with its commands to the application."""
    group = typer.Typer(
        no_args_is_help=True, help="Two-topic prompts and passages: make, list, show."
    )
    group.command(name="generate")(generate)
    group.command(name="list")(list_)
    group.command(name="show")(show)
    app.add_typer(group, name="prompts")


def generate(
    count: Annotated[int, typer.Argument(metavar="COUNT", help="How many prompts to make.")],
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the choice.")] = 0,
    ontology: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file with domains of your own (docs/drift.md)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSONL here (default: to stdout).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make prompts that change from one topic to another of a different domain.

    The same count, seed and ontology give the same prompts everywhere; fewer are the first of more.

    Examples:

    dart-llm prompts generate 40 --seed 1 --out prompts.jsonl

    dart-llm prompts generate 50 --ontology my_domains.yaml --json
    """
    from dart_llm.drift_ontology import load_ontology
    from dart_llm.drift_prompts import generate as make
    from dart_llm.drift_prompts import maximum
    from dart_llm.results import write_lines
    from dart_llm.ui import Ui

    source = load_ontology(ontology)
    rows = [prompt.to_dict() for prompt in make(count, seed, source)]
    if out is not None:
        write_lines(out, rows)
        Ui(quiet=as_json).say(f"wrote {count} of {maximum(source):,} possible prompts to {out}")
    if as_json:
        facts = {"seed": seed, "ontology": _text(ontology), "file": _text(out)}
        typer.echo(json.dumps({**facts, "possible": maximum(source), "prompts": rows}))
    elif out is None:
        for row in rows:
            typer.echo(json.dumps(row))


def list_(
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="With this domain on either side.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompts made from this template.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"The first N (default: {ROWS} in a table, all in JSON)."),
    ] = None,
    passages: Annotated[
        bool, typer.Option("--passages", metavar="", help="The long passages instead.")
    ] = False,
    file: File = None,
    as_json: Json = False,
) -> None:
    """List the package's two-topic prompts, or its passages.

    Examples:

    dart-llm prompts list --domain astronomy --template letter

    dart-llm prompts list --passages

    dart-llm prompts list --file prompts.jsonl --limit 5 --json
    """
    from dart_llm import drift_listing as listing
    from dart_llm.errors import ConfigError

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} is too small: give 1 or more, or leave it out")
    if passages and template is not None:
        raise ConfigError("passages have no template: leave out --template or --passages")
    if passages:
        long = listing.in_domain(listing.passages(file), domain)
        _print_list("passages", long, listing.passage_table, limit, as_json)
    else:
        short = listing.choose(listing.prompts(file), domain, template)
        _print_list("prompts", short, listing.prompt_table, limit, as_json)


def _print_list(
    kind: str,
    records: Sequence[Record],
    table: Callable[[Sequence[Record]], Table],
    limit: int | None,
    as_json: bool,
) -> None:
    from dart_llm.ui import Ui

    if as_json:
        rows = [record.to_dict() for record in records[:limit]]
        typer.echo(json.dumps({"total": len(records), kind: rows}))
        return
    if not records:
        typer.echo(f"no {kind} match")
        return
    ui, shown = Ui(), records[: limit or ROWS]
    ui.out.print(table(shown))
    if len(shown) < len(records):
        ui.say(f"{len(shown)} of {len(records)} {kind}; --limit {len(records)} shows all")


def show(
    name: Annotated[
        str,
        typer.Argument(metavar="ID", help="A prompt or a passage; the beginning of an id will do."),
    ],
    file: File = None,
    as_json: Json = False,
) -> None:
    """Show one prompt with its slots, or one passage with its topics marked.

    Examples:

    dart-llm prompts show 01-bees-to-mortgages

    dart-llm prompts show letter-608b476da0 --json
    """
    from dart_llm import drift_listing as listing
    from dart_llm.drift_prompts import DriftPrompt
    from dart_llm.ui import Ui

    record = listing.find(listing.everything(file), name)
    if as_json:
        typer.echo(json.dumps(record.to_dict()))
    elif isinstance(record, DriftPrompt):
        listing.print_prompt(record, Ui().out)
    else:
        listing.print_passage(record, Ui().out)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
