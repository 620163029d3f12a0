"""``dart-llm bench``: fixed, documented measures of the methods."""

from __future__ import annotations

import json
from typing import Any

import typer

from dart_llm.options import Config, Fresh, Json, with_settings
from dart_llm.settings_base import merge
from dart_llm.settings_quality import QualitySettings


def register(app: typer.Typer) -> None:
    """Add ``bench`` with its commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Fixed measures of the methods: quality.")
    group.callback()(lambda: None)  # a group also while it has one command alone
    group.command(name="quality")(with_settings(quality, QualitySettings))
    app.add_typer(group, name="bench")


def quality(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """How much of GRIFFIN's gap to dense a method closes, at equal sparsity and at equal bytes.

    Perplexity where a text goes on and where its topic changes, on slices of texts of which one
    half is for choosing and the other for reporting; paired intervals; resumable.  docs/quality.md
    has the formulas.

    Examples:

    dart-llm bench quality

    dart-llm bench quality --text wiki.txt --text news.jsonl --text code.jsonl:source --slices 16

    dart-llm bench quality --set choose --methods dart --variants ablation.yaml --sparsities 0.5

    dart-llm bench quality --model smollm2-135m --model Qwen/Qwen2.5-0.5B-Instruct --json
    """
    from dart_llm.quality_job import document, run_quality
    from dart_llm.results import finite
    from dart_llm.ui import Ui

    given = {name: value for name, value in flags.items() if value != []}
    job = run_quality(merge(QualitySettings, given, config), Ui(quiet=as_json), fresh)
    if as_json:
        typer.echo(json.dumps(finite(document(job))))
