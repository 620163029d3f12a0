"""Keep the summary of one ``dart-llm drift`` or ``dart-llm detect`` run as a results file.

    dart-llm drift --passages shipped --experiment-name forced-smollm2
    python benchmarks/drift.py drift-forced-smollm2 results/forced-smollm2/TIME

Writes benchmarks/results/NAME.json: the summary (or the detection table with its curves), the time
by phase and method, and what the run's config.json says of command, checkpoint, versions, machine.
NAME.jsonl holds what was measured on every passage or prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import items
from common import RESULTS, command, read

from dart_llm.files import write_json
from dart_llm.studies.drift.summary import losses

KEPT = ("command", "versions", "machine", "git", "seed", "started", "finished")
TIMES = ("load_s", "total_s", "phases_s", "methods_s", "peak_memory_bytes")


def gather(folder: Path) -> dict[str, Any]:
    """What is kept of a run's folder; raises ``SystemExit`` when it is not complete."""
    config = read(folder / "config.json")
    if config["status"] != "complete":
        raise SystemExit(f"{folder} is {config['status']}: finish it with the same command first")
    source = "detection.json" if config["kind"] == "detect" else "summary.json"
    found = read(folder / source)
    checkpoint = {k: v for k, v in config["checkpoint"].items() if k != "path"}
    times = {k: v for k, v in read(folder / "timing.json").items() if k in TIMES}
    kept = {name: config.get(name) for name in KEPT}
    kept["command"] = command(config["command"])
    own = {k: v for k, v in found.items() if k not in ("checkpoint", "settings", "model")}
    return {"kind": config["kind"], **kept, "checkpoint": checkpoint, "times": times, **own}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The cells of a run, or its passages."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def against(folder: Path, pair: str) -> dict[str, Any]:
    """Mean loss after the changes of the first label minus that of the second, by passage."""
    rows = [row for row in read_lines(folder) if row["status"] == "done"]
    first, _, second = pair.rpartition(":")  # interval:64@0.5 has one of its own
    own, other = ([row for row in rows if row["label"] == name] for name in (first, second))
    if not own or not other:
        raise SystemExit(f"no finished cells of {first} or {second} in {folder}")
    found = losses(own, [], other)
    return {"label": first, "other": second, "after": found["after_minus_never"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", help="of the results file, without suffix")
    options.add_argument("folder", type=Path, help="results folder of one run")
    options.add_argument(
        "--pair", action="append", default=[], help="LABEL:LABEL, losses compared by passage"
    )
    args = options.parse_args()
    path = RESULTS / f"{args.name}.json"
    pairs = [against(args.folder, pair) for pair in args.pair]
    found = gather(args.folder)
    write_json(path, {**found, "pairs": pairs} if pairs else found)
    shorten = items.detection if found["kind"] == "detect" else items.drift
    print(path, items.write(path.stem, shorten(read_lines(args.folder))))


if __name__ == "__main__":
    main()
