"""``dart-llm drift``."""

from __future__ import annotations

import json
from typing import Any

import typer

from dart_llm.options import Config, Fresh, Json


def drift(
    flags: dict[str, Any],
    config: Config = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Study a change of topic: methods side by side on prompts or on given passages; resumable.

    Examples:

    dart-llm drift --passages shipped --sparsity 0.5

    dart-llm drift --prompts shipped --limit 40 --methods dense,never,dart --generation 300

    dart-llm drift --prompt "Write about bees, and then about mortgages." --temperature 0.8

    dart-llm drift --passages shipped --methods never,fresh:1,fresh:16,decay:32 --json
    """
    from dart_llm.drift_job import document, run_drift
    from dart_llm.errors import CellsFailed
    from dart_llm.results import finite
    from dart_llm.settings_drift import collect
    from dart_llm.ui import Ui

    try:
        job = run_drift(collect(flags, config), Ui(quiet=as_json), fresh)
    except CellsFailed as failed:
        if as_json:  # what was measured is still told; the exit code says that some was not
            typer.echo(json.dumps(finite(failed.document)))
        raise
    if as_json:
        typer.echo(json.dumps(document(job)))
