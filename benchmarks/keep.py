"""Keep finished runs of dart-llm as one results file under benchmarks/results.

    dart-llm bench quality --text wiki.txt --experiment-name mine
    python benchmarks/keep.py quality-mine results/mine/TIME

The kind of the runs says what is kept: of ``sweep`` and ``compare`` the finished cells and the
comparison made from them, of ``bench quality`` one document over all models, of ``bench speed`` the
rows of every run, of ``tune`` its document, of ``drift`` and ``detect`` the summary.  NAME.json has
it with command, versions and machine; NAME.jsonl what was measured on each item, with its id and
never its text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, command, read, save

from dart_llm.evaluation.tasks import short
from dart_llm.experiments import comparison, comparison_report
from dart_llm.files import write_json, write_lines
from dart_llm.studies.drift.summary import losses
from dart_llm.studies.quality.gaps import summarise
from dart_llm.studies.sweep.cells import read_results

Row = Mapping[str, Any]

ABOUT = ("versions", "machine", "git", "started", "finished")
TIMES = ("load_s", "total_s", "variants_s", "phases_s", "methods_s", "peak_memory_bytes")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("name", help="of the results file, without suffix")
    options.add_argument("folders", type=Path, nargs="+", help="results folders of finished runs")
    options.add_argument(
        "--pair", action="append", default=[], help="drift: LABEL:LABEL, compared by passage"
    )
    args = options.parse_args()
    folders = sorted(args.folders)
    kind = read(folders[0] / "config.json")["kind"]
    if kind in ("sweep", "compare"):
        print(keep_sweeps(args.name, folders))
        return
    items: list[dict[str, Any]] = []
    if kind == "quality":
        data = gather_quality(folders)
        items = quality_items(lines(*folders))
    elif kind == "speed":
        data = gather_speed(folders)
    elif kind == "tune":
        data = gather_tune(folders[0])
    else:
        data = gather_drift(folders[0])
        if args.pair:
            data["pairs"] = [compared(folders[0], pair) for pair in args.pair]
        items = (detection_items if kind == "detect" else drift_items)(lines(folders[0]))
    write_json(RESULTS / f"{args.name}.json", data)
    if items:
        write_lines(RESULTS / f"{args.name}.jsonl", items)
    print(RESULTS / f"{args.name}.json")


def about(folder: Path, kinds: Sequence[str], kept: Sequence[str] = ABOUT) -> dict[str, Any]:
    """The command of a run and what is kept of its config.json; ``SystemExit``: not complete."""
    config = read(folder / "config.json")
    if config["kind"] not in kinds or config["status"] != "complete":
        raise SystemExit(f"{folder} is no finished run of {' or '.join(kinds)}: finish it first")
    return {"command": command(config["command"]), **{name: config.get(name) for name in kept}}


def times(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in read(folder / "timing.json").items() if k in TIMES}


def lines(*folders: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl of all folders."""
    texts = [(folder / "results.jsonl").read_text(encoding="utf-8") for folder in folders]
    return [json.loads(line) for text in texts for line in text.splitlines()]


# Sweeps and comparisons.


def keep_sweeps(name: str, folders: Sequence[Path]) -> Path:
    """The finished cells of several sweeps of one model, and the comparison made from them."""
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    sweeps = []
    for folder in folders:
        found |= {row["key"]: row for row in read_results(folder) if row["status"] == "done"}
        for path in sorted(folder.glob("cells/*/timing.json")):
            timing = read(path)
            seconds[path.parent.name] = timing.get("measure_s") or timing.get("seconds")
        config = read(folder / "config.json")
        sweeps.append({key: config[key] for key in ABOUT if key in config})
    cells = [file_names(row) for row in found.values()]
    rows = comparison.rows(cells)
    write_lines(RESULTS / f"{name}.jsonl", cells)
    data = {"cells": len(cells), **comparison_report.document(rows), "seconds": seconds}
    return save(name, None, {**data, "sweeps": sweeps,
                             "checkpoint_of_the_cells": dict(rows[0].checkpoint)})  # fmt: skip


def file_names(value: Any) -> Any:
    """The value with paths cut to file names."""
    if isinstance(value, dict):
        return {file_names(key): file_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [file_names(item) for item in value]
    if not isinstance(value, str) or "/" not in value or " " in value:
        return value
    if short(value) != value:
        return short(value)
    kind, colon, path = value.rpartition(":")
    is_path = value.startswith((".", "/")) or path.startswith((".", "/"))
    return f"{kind}{colon}{Path(path).name}" if is_path else value


# Benchmarks.


def gather_quality(folders: Sequence[Path]) -> dict[str, Any]:
    """One document over runs that differ in their models alone."""
    runs = [{**about(folder, ["quality"]), "times": times(folder)} for folder in folders]
    asked = joined([read(folder / "quality.json") for folder in folders])
    data = summarise(lines(*folders), asked)
    for facts in data["checkpoints"].values():
        facts.pop("path", None)
    return {"kind": "quality", "runs": runs, **data}


def gather_tune(folder: Path) -> dict[str, Any]:
    """The document of one run."""
    head = {"kind": "tune", **about(folder, ["tune"]), "times": times(folder)}
    return {**head, **read(folder / "tune.json")}


def joined(documents: Sequence[Row]) -> dict[str, Any]:
    """What the runs asked for; raises ``SystemExit`` where that was not the same."""
    made, by_model = (
        ("schema", "cells", "pooled", "notes", "definitions"),
        ("slices", "checkpoints"),
    )
    first, *others = [{k: v for k, v in one.items() if k not in made} for one in documents]
    for one in others:
        differing = [k for k in one if k not in by_model and one[k] != first.get(k)]
        twice = set(one["checkpoints"]) & set(first["checkpoints"])
        if differing or twice:
            what = f"differ in {', '.join(differing)}" if differing else "share a model"
            raise SystemExit(f"the runs {what}: join runs that differ in their models alone")
        first |= {name: {**first[name], **one[name]} for name in by_model}
    return first


def quality_items(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per model, cell, variant and sparsity: slices by name, and the mean loss of each."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = ("model", "cell", "variant", "sparsity")
    for row in rows:
        key = tuple(row[name] for name in names)
        line = found.setdefault(key, {**dict(zip(names, key, strict=True)), "losses": {}})
        line["losses"][row["slice"]] = row["loss"]
    return list(found.values())


def gather_speed(folders: Sequence[Path]) -> dict[str, Any]:
    """Runs side by side: times of several are not joined."""
    runs = [
        {
            **about(folder, ["speed"], ("git", "started", "finished")),
            "times": read(folder / "timing.json"),
            **read(folder / "speed.json"),
        }
        for folder in folders
    ]
    return {"kind": "speed", "runs": runs}


# Drift and detection.


def gather_drift(folder: Path) -> dict[str, Any]:
    """The summary of a drift study, or the table of a detection with its curves."""
    config = read(folder / "config.json")
    kept = about(folder, ["drift", "detect"], (*ABOUT, "seed"))
    source = "detection.json" if config["kind"] == "detect" else "summary.json"
    found = {k: v for k, v in read(folder / source).items()
             if k not in ("checkpoint", "settings", "model")}  # fmt: skip
    checkpoint = {k: v for k, v in config["checkpoint"].items() if k != "path"}
    facts = {"kind": config["kind"], **kept, "checkpoint": checkpoint, "times": times(folder)}
    return {**facts, **found}


def compared(folder: Path, pair: str) -> dict[str, Any]:
    """Mean loss after the changes of the first label minus that of the second, by passage."""
    rows = [row for row in lines(folder) if row["status"] == "done"]
    first, _, second = pair.rpartition(":")  # interval:64@0.5 has one of its own
    left, right = ([row for row in rows if row["label"] == name] for name in (first, second))
    if not left or not right:
        raise SystemExit(f"no finished cells of {first} or {second} in {folder}")
    after = losses(left, [], right)["after_minus_never"]
    return {"label": first, "other": second, "after": after}


def drift_items(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per method, source and seed: losses or metrics, and when masks were chosen anew."""
    return [
        {
            "label": row["label"],
            "source": row["cell"]["source"],
            "seed": row["cell"]["seed"],
            "decoded_tokens": row["decoded_tokens"],
            "remasks": [remask["step"] for remask in row["remasks"]],
            "loss": _by_topic(row["loss"]),
            "metrics": row["metrics"],
        }
        for row in rows
        if row["status"] == "done"
    ]


def _by_topic(loss: Row | None) -> dict[str, Any] | None:
    """Mean losses and tokens by topic, without their course over tokens."""
    if loss is None:
        return None
    topics = [{k: v for k, v in topic.items() if k != "first"} for topic in loss["topics"]]
    return {"topics": topics, "recovery": loss["recovery"]}


def detection_items(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per passage: its changes of topic, and where each rule fired."""
    return [
        {
            "passage": row["passage"]["id"],
            "changes": row["passage"]["changes"],
            "rules": row["rules"],
        }
        for row in rows
        if row["status"] == "done"
    ]


if __name__ == "__main__":
    main()
