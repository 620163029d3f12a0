"""benchmarks/results: the rows of the tables follow from the items beside them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from dart_llm.evaluation.task_names import short
from dart_llm.experiments.comparison import Row, read_row
from published import ROOT

RESULTS = ROOT / "benchmarks/results"
NEAR = 1e-6


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def table(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text("utf-8"))


def differing(rows: list[Any], cells: list[Any]) -> list[str]:
    """Every number of an evaluation that the cell with its items does not give."""
    known: dict[Any, Row] = {}
    for row in map(read_row, cells):
        known[row.label, short(row.task), row.protocol, row.model] = row
    found = []
    for row in rows:
        cell = known[row["label"], short(row["task"]), row["protocol"], row["model"]]
        given = {
            "value": cell.scores.mean,
            "items": len(cell.scores.sample),
            "achieved": cell.achieved,
            "dense_share": cell.dense_share,
            "remasks": cell.remasks,
        }
        found += [
            f"{row['task']} {row['label']} {key}"
            for key, value in given.items()
            if value != pytest.approx(row[key], rel=NEAR)
        ]
        if row["interval"]["estimate"] != pytest.approx(row["value"], rel=NEAR):
            found.append(f"{row['task']} {row['label']} estimate")
    return found


@pytest.mark.parametrize("path", sorted(RESULTS.glob("evaluation-*.jsonl")), ids=lambda p: p.stem)
def test_items_make_the_rows_of_an_evaluation(path: Path) -> None:
    rows, cells = table(path)["rows"], lines(path)
    assert len(rows) == len(cells) > 5
    assert differing(rows, cells) == []


@pytest.mark.parametrize(
    ("key", "also"),
    [("value", ["estimate"]), ("achieved", []), ("dense_share", []), ("remasks", [])],
)
def test_a_changed_number_is_found(key: str, also: list[str]) -> None:
    path = RESULTS / "evaluation-recipe-small.jsonl"
    rows = table(path)["rows"]
    row = next(row for row in rows if row["label"] == "dart@0.5")
    row[key] *= 1.001
    where = f"{row['task']} {row['label']}"
    assert differing(rows, lines(path)) == [f"{where} {name}" for name in (key, *also)]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("drift-*.jsonl")), ids=lambda p: p.stem)
def test_losses_of_topics_make_the_losses_of_the_table(path: Path) -> None:
    """The mean over the tokens of all passages, those before and those after the change."""
    losses: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    remasks: dict[str, int] = defaultdict(int)
    for passage in lines(path):
        remasks[passage["label"]] += len(passage["remasks"])
        for place, topic in enumerate((passage["loss"] or {"topics": []})["topics"]):
            part = "after" if place else "before"
            losses[passage["label"], part].append((topic["mean_loss"], topic["tokens"]))
    rows = table(path)["rows"]
    assert len(rows) > 3
    for row in rows:
        assert remasks[row["label"]] == sum(row["remask_causes"].values())  # the first too
        for part in ("before", "after") if row["loss"] else ():  # free texts have none
            own = losses[row["label"], part]
            nats = math.fsum(loss * tokens for loss, tokens in own)
            mean = nats / sum(tokens for _, tokens in own)
            assert mean == pytest.approx(row["loss"][part]["mean"], rel=NEAR)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("detection-*.jsonl")), ids=lambda p: p.stem)
def test_triggers_of_passages_make_the_alarms_of_the_table(path: Path) -> None:
    alarms: dict[tuple[str, str], int] = defaultdict(int)
    for passage in lines(path):
        for rule in passage["rules"]:
            alarms[rule["signal"], rule["rule"]] += len(rule["triggers"])
    rows = table(path)["rows"]
    assert len(rows) > 3
    assert [alarms[row["signal"], row["rule"]] for row in rows] == [row["alarms"] for row in rows]
