"""``dart-llm sweep`` and ``dart-llm compare``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dart_llm.options import Json
from dart_llm.settings_base import check_folder
from dart_llm.settings_sweep import SweepFlags

GridFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="A YAML file with the grid.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Print cells, downloads, disk, time; run nothing."),
]
Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Compute every cell anew.")]

COMPARED = {"methods": "dense,griffin,dart", "sparsities": "0.5"}


def sweep(
    flags: dict[str, Any],
    file: GridFile = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a grid of models, methods, sparsities, layers, tasks and seeds; resumable.

    Examples:

    dart-llm sweep grid.yaml --dry-run

    dart-llm sweep --methods dense,griffin,dart --sparsities 0.3,0.5 --tasks perplexity:embedded

    dart-llm sweep --methods griffin --layers each --keep 0.5 --tasks perplexity:embedded

    dart-llm sweep grid.yaml --engine ray --workers 4
    """
    _run("sweep", flags, {}, file, dry_run, fresh, as_json)


def compare(
    flags: dict[str, Any],
    file: GridFile = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Methods against dense and GRIFFIN on the same items, with paired intervals and a plot.

    Without flags: dense, griffin and dart at sparsity 0.5.

    Examples:

    dart-llm compare --tasks perplexity:embedded --limit 8

    dart-llm compare --methods griffin,flap,dart --sparsities 0.3,0.5 --tasks arc_easy --limit 200

    dart-llm compare --tasks mmlu --methods griffin,dart,dense-8bit --json
    """
    _run("compare", flags, COMPARED, file, dry_run, fresh, as_json)


def _run(
    kind: str,
    flags: dict[str, Any],
    defaults: dict[str, str],
    file: Path | None,
    dry_run: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    from dart_llm import compare_job
    from dart_llm.errors import CellsFailed
    from dart_llm.results import finite
    from dart_llm.ui import Ui

    given = SweepFlags(**{k: v for k, v in flags.items() if v is not None})
    root = given.results_dir if flags.get("results_dir") else os.environ.get("DART_RESULTS_DIR")
    request = compare_job.SweepRequest(
        kind,
        compare_job.grid(given.grid_flags(), None, defaults, file),
        Path(root or given.results_dir),
        check_folder(given.experiment_name) or (file.stem if file else kind),
        fresh,
        given.engine,
        given.workers,
        given.tracker,
    )
    ui = Ui(quiet=as_json)
    try:
        if dry_run:
            document = compare_job.dry_run(request, ui).to_dict()
        else:
            document = compare_job.run(request, ui)
    except CellsFailed as failed:
        if as_json:  # what was measured is still told; the exit code says that some was not
            typer.echo(json.dumps(finite(failed.document)))
        raise
    if as_json:
        typer.echo(json.dumps(finite(document)))
