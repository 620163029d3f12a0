"""Keep finished runs of ``dart-llm bench quality`` as one results file.

    dart-llm bench quality --text wiki.txt --text news.jsonl --experiment-name quality-smollm2
    python benchmarks/quality.py report results/quality-smollm2/TIME

Writes benchmarks/results/quality-NAME.json: quality.json, the times, and what config.json says of
command, versions and machine; quality-NAME.jsonl holds the loss of every slice.  Several folders of
runs that differ in their models alone become one document, with pooled rows over all models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import items
from common import RESULTS, finished, read

from dart_llm.errors import ConfigError
from dart_llm.files import write_json
from dart_llm.studies.quality.gaps import merge

KEPT = ("versions", "machine", "git", "started", "finished")
TIMES = ("load_s", "total_s", "variants_s", "peak_memory_bytes")


def run(folder: Path) -> dict[str, Any]:
    """What is kept of one run beside its numbers; raises ``SystemExit`` when it is not complete."""
    kept = finished(folder, "quality", KEPT)
    times = {k: v for k, v in read(folder / "timing.json").items() if k in TIMES}
    return {**kept, "times": times}


def read_lines(folders: list[Path]) -> list[dict[str, Any]]:
    """The measured slices of all folders."""
    return [
        json.loads(line)
        for folder in folders
        for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def gather(folders: list[Path]) -> dict[str, Any]:
    """One document over all folders."""
    runs, lines = [run(folder) for folder in folders], read_lines(folders)
    try:
        found = merge([read(folder / "quality.json") for folder in folders], lines)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    for facts in found["checkpoints"].values():
        facts.pop("path", None)
    return {"kind": "quality", "runs": runs, **found}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", help="of the results file, without quality- and suffix")
    options.add_argument("folders", type=Path, nargs="+", help="results folders of finished runs")
    args = options.parse_args()
    path = RESULTS / f"quality-{args.name}.json"
    write_json(path, gather(args.folders))
    print(path, items.write(path.stem, items.quality(read_lines(args.folders))))


if __name__ == "__main__":
    main()
