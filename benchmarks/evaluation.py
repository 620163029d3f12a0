"""Gather the finished cells of one or several sweeps of the same model into one results file.

    dart-llm sweep benchmarks/evaluation_smollm2.yaml --experiment-name smollm2
    python benchmarks/evaluation.py smollm2 results/smollm2/*

Writes benchmarks/results/evaluation-NAME.jsonl, the cells with their items, and
evaluation-NAME.json, the comparison made from them, with provenance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, save

from dart_llm.evaluation.task_names import short
from dart_llm.experiments import comparison as compare
from dart_llm.experiments import comparison_report as compare_files
from dart_llm.files import write_lines
from dart_llm.studies.sweep.cells import read_results


def cells(folders: list[str]) -> list[dict[str, Any]]:
    """Finished cells by key, the newest folder first; folders' own names are left out."""
    found: dict[str, dict[str, Any]] = {}
    for folder in sorted(folders):
        for row in read_results(folder):
            if row["status"] == "done":
                found[row["key"]] = row
    return [json.loads(_bare(json.dumps(row))) for row in found.values()]


def _bare(text: str) -> str:
    """The JSON text with paths cut to file names."""
    data = json.loads(text)

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {cut(key): cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        if isinstance(value, str) and "/" in value and " " not in value:
            kind, colon, path = value.rpartition(":")
            plain = short(value)
            if plain != value:
                return plain
            is_path = value.startswith((".", "/")) or path.startswith((".", "/"))
            return f"{kind}{colon}{Path(path).name}" if is_path else value
        return value

    return json.dumps(cut(data))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", help="of the results file")
    options.add_argument("folders", nargs="+", help="results folders of sweeps")
    args = options.parse_args()
    found = cells(args.folders)
    rows = compare.rows(found)
    write_lines(RESULTS / f"evaluation-{args.name}.jsonl", found)
    times = {
        key: seconds
        for folder in sorted(args.folders)
        for key, seconds in _seconds(Path(folder)).items()
    }
    sweeps = [_sweep(Path(folder)) for folder in sorted(args.folders)]
    data = {"cells": len(found), **compare_files.document(rows), "seconds": times}
    data["sweeps"] = [sweep for sweep in sweeps if sweep]
    data["checkpoint_of_the_cells"] = dict(rows[0].checkpoint)
    print(save(f"evaluation-{args.name}", None, data))


def _sweep(folder: Path) -> dict[str, Any]:
    """Which code ran a sweep, and when."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    names = ("git", "versions", "machine", "started", "finished")
    return {name: found[name] for name in names if name in found}


def _seconds(folder: Path) -> dict[str, float]:
    """Time of each cell of one folder; the machine did other work beside it."""
    found = {}
    for path in sorted(folder.glob("cells/*/timing.json")):
        timing = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.name] = timing.get("measure_s") or timing.get("seconds")
    return found


if __name__ == "__main__":
    main()
