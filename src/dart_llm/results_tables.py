"""Runs as tables for the terminal, and what one run holds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dart_llm.compare_row import Row
from dart_llm.results_info import RunInfo
from dart_llm.results_records import MOST, own_rows, remarks, result, results
from dart_llm.results_view import mapping


def table(runs: Sequence[RunInfo], long: bool = False) -> Table:
    """Each run on the left, what it measured on the right.

    Short: without dense rows, unless there are only those, and without details where there are
    many; ``long``: every row.
    """
    found = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("run", overflow="fold", min_width=17)
    found.add_column("method", overflow="fold")
    for name in ("asked", "achieved", "dense\ntokens", "re-\nmasks"):
        found.add_column(name, justify="right")
    found.add_column("result", overflow="fold", min_width=14)
    for run in runs:
        lines = list(zip_longest(_place(run), _measured(run, long), fillvalue=None))
        for number, (place, cells) in enumerate(lines):
            texts = [place or "", *(cells or [""] * 6)]
            # Text, because names may hold the square brackets of rich's markup
            found.add_row(*map(Text, texts), end_section=number == len(lines) - 1)
    return found


def _place(run: RunInfo) -> list[str]:
    return [
        run.experiment,
        f"{run.time} {run.kind}, {run.status}",
        *_model(run.models, run.quantisations, run.dtypes),
    ]


def _measured(run: RunInfo, long: bool) -> list[list[str]]:
    rows = list(run.rows) if long else own_rows(run)
    if not long and len(rows) > MOST:
        rows = []
        texts = results(run)
    else:
        texts = remarks(run)
    several = len({row.model for row in rows}) > 1
    return [*(_cells(row, several) for row in rows), *([*[""] * 5, text] for text in texts)]


def _cells(row: Row, several_models: bool) -> list[str]:
    method = row.label if row.layers else row.method
    return [
        f"{row.model} {method}" if several_models else method,
        _number(row.asked, "{:.0%}"),
        _number(row.achieved, "{:.1%}"),
        _number(row.dense_share, "{:.1%}"),
        _number(row.remasks, "{:.0f}"),
        result(row),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _model(names: Sequence[str], files: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    formats = ", ".join(value for value in (*files, *dtypes) if value != "none")
    return [*names, *([formats] if formats else [])]


def show(run: RunInfo) -> Table:
    """What one run is and where it comes from; ``table([run], long=True)`` has its numbers."""
    config = mapping(run.config)
    known, git = mapping(config.get("checkpoint")), mapping(config.get("git"))
    command = config.get("command")
    packages = mapping(config.get("versions")).items()
    facts = {
        "status": run.status,
        "kind": run.kind,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}",
        "took": "" if run.seconds is None else f"{run.seconds:.0f} s",
        "model": "\n".join(_model(run.models, run.quantisations, run.dtypes)),
        "source": " ".join(str(known[key]) for key in ("source", "revision") if known.get(key)),
        "sha256": str(known.get("sha256") or ""),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
        "versions": ", ".join(f"{name} {version}" for name, version in packages if version),
        "git": f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else "",
        "problems": "\n".join(run.problems),
        "files": "\n".join(_files(run)),
    }
    found = Table(title=Text(str(run.path)), title_justify="left", show_header=False)
    for name, value in facts.items():
        if value:
            found.add_row(name, Text(value))
    return found


def _files(run: RunInfo) -> list[str]:
    try:
        files = sorted(path for path in run.path.iterdir() if path.is_file())
        return [f"{path.name} ({path.stat().st_size / 1024:.1f} KiB)" for path in files]
    except OSError:
        return []
