"""``dart-llm results``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Text = Annotated[str | None, typer.Option(metavar="TEXT", help="Runs whose name holds this.")]


def results(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="All results, one experiment or one run.")
    ] = Path("results"),
    model: Text = None,
    method: Text = None,
    task: Text = None,
    experiment: Text = None,
    status: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="complete, running, interrupted, failed, stopped."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Runs from this day on, e.g. 2026-01-31.")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", metavar="", help="One row per task and method.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON document on stdout only.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Comma-separated.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", metavar="", help="A Markdown table.")
    ] = False,
) -> None:
    """List, filter and tabulate the runs in a folder.

    Examples:

    dart-llm results

    dart-llm results results --method dart --task mmlu --long

    dart-llm results results/my-sweep --long --csv > table.csv
    """
    from dart_llm import results_list, results_records, results_tables
    from dart_llm.ui import Ui

    runs = results_list.filter(
        results_list.find(folder),
        model=model,
        method=method,
        task=task,
        status=status,
        experiment=experiment,
        since=since,
    )
    if as_json:
        typer.echo(results_records.to_json(runs).rstrip("\n"))
    elif as_csv:
        typer.echo(results_records.to_csv(runs, long).rstrip("\n"))
    elif as_markdown:
        typer.echo(results_records.to_markdown(runs, long).rstrip("\n"))
    elif not runs:
        typer.echo("no run matches")
    else:
        out = Ui().out
        if len(runs) == 1 and (folder / "config.json").is_file():
            out.print(results_tables.show(runs[0]))
            long = True
        out.print(results_tables.table(runs, long))
