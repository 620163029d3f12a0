"""Keep finished runs of ``dart-llm bench speed`` as one results file.

    dart-llm bench speed --dtype bfloat16 --experiment-name speed-smollm2
    python benchmarks/speed.py smollm2 results/speed-smollm2/TIME

Writes benchmarks/results/speed-NAME.json: speed.json of every folder, and what config.json says of
command, versions and machine.  Times of several folders stand side by side, not joined.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS, finished, read

from dart_llm.files import write_json

KEPT = ("git", "started", "finished")


def run(folder: Path) -> dict[str, Any]:
    """What is kept of one run; raises ``SystemExit`` when it is not complete."""
    kept = finished(folder, "speed", KEPT)
    times = read(folder / "timing.json")
    return {
        **kept,
        "times": times,
        **read(folder / "speed.json"),
    }


def gather(folders: list[Path]) -> dict[str, Any]:
    """One document over all folders."""
    return {"kind": "speed", "runs": [run(folder) for folder in folders]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", help="of the results file, without speed- and suffix")
    options.add_argument("folders", type=Path, nargs="+", help="results folders of finished runs")
    args = options.parse_args()
    path = RESULTS / f"speed-{args.name}.json"
    write_json(path, gather(args.folders))
    print(path)


if __name__ == "__main__":
    main()
