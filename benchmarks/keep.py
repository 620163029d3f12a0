"""Save finished runs of dart-llm as benchmarks/results/NAME.json and NAME.md.

    dart-llm bench quality --text wiki.txt --experiment-name mine
    python benchmarks/keep.py mine results/mine/TIME

NAME.json has each run's summary with its command, versions, machine and checkpoint; NAME.md has the
commands, model and machine, and the tables that the runs wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, command, read

from dart_llm.files import write_json

KEPT = ("kind", "versions", "machine", "git", "checkpoint", "seed", "started", "finished")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("name", help="name of the results files, without suffix")
    options.add_argument("folders", type=Path, nargs="+", help="results folders of finished runs")
    args = options.parse_args()
    print(keep(args.name, args.folders))


def keep(name: str, folders: Sequence[Path]) -> Path:
    """Write NAME.json and NAME.md of finished runs; return the path of NAME.json."""
    runs = [load_run(folder) for folder in folders]
    documents = [read(summary_file(folder)) for folder in folders]
    tables = [summary_file(folder).with_suffix(".md").read_text("utf-8") for folder in folders]
    path = RESULTS / f"{name}.json"
    write_json(path, {"runs": [{**r, **d} for r, d in zip(runs, documents, strict=True)]})
    path.with_suffix(".md").write_text(page(name, runs, tables), encoding="utf-8")
    return path


def load_run(folder: Path) -> dict[str, Any]:
    """A run's command and the saved keys of its config.json; ``SystemExit`` if not complete."""
    config = read(folder / "config.json")
    if config["status"] != "complete":
        raise SystemExit(f"{folder} is {config['status']}: finish the run first")
    (config.get("checkpoint") or {}).pop("path", None)
    return {"command": command(config["command"]), **{name: config.get(name) for name in KEPT}}


def summary_file(folder: Path) -> Path:
    """The summary that a study wrote: the JSON file that has a Markdown file beside it."""
    files = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".md").is_file()]
    if len(files) != 1:
        raise SystemExit(f"{folder} has {len(files)} summaries with tables, not one")
    return files[0]


def page(name: str, runs: Sequence[dict[str, Any]], tables: Sequence[str]) -> str:
    """The text of NAME.md, in the layout that tables.py reads."""
    commands = "\n".join(run["command"] for run in runs)
    where = " ".join(dict.fromkeys(provenance(run) for run in runs))
    body = "\n\n".join(text.strip() for text in tables)
    head = f"# {name}\n\n```sh\n{commands}\n```\n\n"
    return f"{head}{where} File: [{name}.json]({name}.json).\n\n{body}\n"


def provenance(run: dict[str, Any]) -> str:
    """Checkpoint, quantisation, dtype, machine and commit in a sentence."""
    facts, machine = run["checkpoint"] or {}, run["machine"]
    model = (
        f"{facts['name']} (file quantisation {facts['file_quantisation'] or 'none'}, "
        f"{facts['dtype']}), "
        if facts
        else ""
    )
    commit = str(run["git"].get("commit") or "unknown")[:7]
    count = machine["threads"]
    where = f"{count} thread{'s' * (count != 1)} of {machine['processor']}"
    return f"{model}{where}; commit {commit} ({str(run['finished'])[:10]})."


if __name__ == "__main__":
    main()
