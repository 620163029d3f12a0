"""The items of two results files side by side: losses and scores of the same item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, ...]

SAME = 1e-4
"""Values closer than that are the same; printed digits are fewer."""
COUNTS = ("id", "tokens", "pruned_tokens")


@dataclass(frozen=True)
class Shared:
    """What both files hold of ``count`` values of items; ``same`` of them came again."""

    count: int
    same: int
    largest: float

    def __str__(self) -> str:
        if not self.count:
            return "items: none that both files hold"
        return (
            f"items: {self.same} of {self.count} values that both files hold are the same, the "
            f"largest difference is {self.largest:.2g}"
        )


def shared(published: Path, again: Path) -> Shared:
    """Compare the two files NAME.jsonl; a missing one holds nothing."""
    old, new = values(published), values(again)
    off = [abs(old[key] - new[key]) for key in old.keys() & new.keys()]
    return Shared(len(off), sum(one <= SAME for one in off), max(off, default=0.0))


def values(path: Path) -> dict[Key, float]:
    """Every loss and score of an item, by where it stands."""
    if not path.is_file():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {key: value for row in rows for key, value in _of(row)}


def _of(row: Mapping[str, Any]) -> Iterator[tuple[Key, float]]:
    if "measurement" in row:  # evaluation-*
        found = row["measurement"]
        where = (row["label"], found["task"], found["protocol"])
        for item in found["items"]:
            for name, value in item.items():
                if name not in COUNTS and isinstance(value, int | float):
                    yield (*where, str(item["id"]), name), float(value)
    elif row.get("loss"):  # drift-*, passages
        for topic in row["loss"]["topics"]:
            if topic["mean_loss"] is not None:
                place = (row["label"], row["source"], str(row["seed"]), str(topic["topic"]))
                yield place, topic["mean_loss"]
    elif row.get("metrics"):  # drift-*, prompts
        for name, value in row["metrics"].items():
            if value is not None:
                yield (row["label"], row["source"], str(row["seed"]), name), float(value)
