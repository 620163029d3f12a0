"""``dart-llm bench``: fixed, documented measures of the methods."""

from __future__ import annotations

import json
from typing import Any

import typer

from dart_llm.options import Config, Fresh, Json, with_settings
from dart_llm.settings_base import merge
from dart_llm.settings_quality import QualitySettings
from dart_llm.settings_speed import SpeedSettings


def register(app: typer.Typer) -> None:
    """Add ``bench`` with its commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Fixed measures of the methods: quality, speed.")
    group.command(name="quality")(with_settings(quality, QualitySettings))
    group.command(name="speed")(with_settings(speed, SpeedSettings))
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


def speed(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """How fast a model reads a prompt (pp) and generates (tg): dense, and pruned by each executor.

    Rows are interleaved in shuffled order, repetition by repetition.  Each is compared with plain
    transformers, with our own dense path, and with what the bytes allow; beside it what attaching,
    observing and re-masking cost.  The last line is one JSON document.  docs/performance.md has
    the definitions.

    Examples:

    dart-llm bench speed

    dart-llm bench speed --dtype bfloat16 --methods dart,griffin --sparsities 0.5 --executors slim

    dart-llm bench speed --model-config qwen2.5-1.5b/config.json --rebuild-every 64 --repeats 3

    dart-llm bench speed --variants never.yaml --prompt-tokens 512 --tokens 256 --threads 2 --json
    """
    from dart_llm.results import finite
    from dart_llm.speed_job import document, last_line, run_speed
    from dart_llm.ui import Ui

    given = {name: value for name, value in flags.items() if value != []}
    job = run_speed(merge(SpeedSettings, given, config), Ui(quiet=as_json), fresh)
    typer.echo(json.dumps(finite(document(job) if as_json else last_line(job))))
