"""``dart-llm inspect``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dart_llm.options import Config, Fresh, Json
from dart_llm.settings_base import merge
from dart_llm.settings_inspect import TEXTS, InspectSettings

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar=f"[{'|'.join(TEXTS)}]...", help="What to look at (default: all the texts allow)."
    ),
]


def inspect(
    flags: dict[str, Any],
    what: What = None,
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Look into a model: its layers, weights and neurons, and what two texts make of them.

    Without a text: weights and neurons.  With text A also layers and activations; with A and B
    also overlap, ablation and space.

    Examples:

    dart-llm inspect weights neurons --top 10

    dart-llm inspect --prompt-file bees.txt --prompt-b-file loans.txt

    dart-llm inspect overlap ablation --passage 01 --method griffin --sparsity 0.5

    dart-llm inspect space --runs results/a/20260101-120000,results/b/20260101-120000 --json
    """
    from dart_llm.inspect_job import document, run_inspect
    from dart_llm.results import finite
    from dart_llm.ui import Ui

    job = run_inspect(merge(InspectSettings, flags, config), what or (), Ui(quiet=as_json), fresh)
    if as_json:
        found = {"folder": str(job.path), **document(job), "timing": job.timing}
        typer.echo(json.dumps(finite(found)))
