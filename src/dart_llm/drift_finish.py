"""What ends a drift study: summary, timing, pictures and the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm import drift_summary, drift_tables
from dart_llm.drift_files import StudyFiles
from dart_llm.errors import ConfigError, DartError
from dart_llm.results import write_csv, write_json, write_text
from dart_llm.settings_drift import DETECTION, FORCED
from dart_llm.ui import Ui


def write_summary(
    files: StudyFiles, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], ui: Ui
) -> dict[str, Any]:
    """summary.json, summary.md and summary.csv, and the table on the terminal."""
    summary = drift_summary.summarise(rows)
    summary["notes"] += [*notes, *_notes(rows)]
    title = _title(summary)
    write_json(files.path / "summary.json", summary)
    write_text(files.path / "summary.md", drift_tables.markdown(summary, title))
    write_csv(files.path / "summary.csv", *drift_tables.flat(summary))
    ui.table(drift_tables.table(summary, title))
    for line in (drift_tables.sentence(summary), *(f"note: {n}" for n in summary["notes"])):
        if line:
            ui.say(line)
    return summary


def _title(summary: Mapping[str, Any]) -> str:
    model = Path(str(summary["model"]).rstrip("/")).name
    what = "passages" if summary["mode"] == FORCED else "prompts"
    unit = ", losses in nats" if summary["mode"] == FORCED else ""
    return (
        f"drift, mode {summary['mode']}: {summary['sources']} {what}, {model} "
        f"({summary['dtype']}), means with 95 % intervals{unit}"
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cut = {row["cell"]["source"] for row in rows if row["finish"] == "length"}
    forced = any(row["cell"]["mode"] == FORCED for row in rows)
    found = []
    if forced and cut:
        found.append(f"{len(cut)} passages were cut where the model's context ends")
    pruned = [row for row in rows if row["accounting"] and row["cell"]["sparsity"]]
    unpruned = [row for row in pruned if not row["accounting"]["achieved_sparsity"]]
    if unpruned:
        found.append(
            f"{len(unpruned)} of {len(pruned)} pruned cells ended before a token ran pruned"
        )
    return found


def times(files: StudyFiles, timing: Mapping[str, Any]) -> dict[str, Any]:
    """timing.json: seconds of every phase, method and cell, earlier runs of the study included.

    ``timing``: what this run knows, ``load_s``, ``total_s`` and so on.
    """
    cells, metrics, methods = dict[str, float](), dict[str, float](), dict[str, float]()
    for cell in files.cells:
        part, judged = files.part(cell), files.metrics(cell)
        if part is not None:
            cells[cell.key] = part["seconds"]
            label = cell.method.label
            methods[label] = methods.get(label, 0.0) + part["seconds"]
        if judged is not None:
            metrics[cell.key] = judged["seconds"]
    phases = {
        "load": timing.get("load_s"),
        "cells": sum(cells.values()),
        "metrics": sum(metrics.values()),
        "pictures": timing.get("pictures_s"),
    }
    return {**timing, "phases_s": phases, "methods_s": methods, "cells": cells, "metrics": metrics}


def take_detection(source: str | None, path: Path) -> None:
    """Copy the detection table of another run into the study's folder; None: nothing."""
    if source is None:
        return
    try:
        text = (Path(source) / DETECTION).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {Path(source) / DETECTION}: {error}") from None
    write_text(path / DETECTION, text)


def write_pictures(path: Path, ui: Ui) -> None:
    """plots/*.png and report.html, as far as their packages are installed.

    What cannot be drawn is said; the numbers are written by then.
    """
    from dart_llm import drift_plots, report_drift

    try:
        drift_plots.write_all(path)
    except DartError as error:
        ui.say(f"no pictures: {error}")
    try:
        ui.say(f"report: {report_drift.write(path)}")
    except DartError as error:
        ui.say(f"no report: {error}")
