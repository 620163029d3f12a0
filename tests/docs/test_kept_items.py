"""benchmarks/results: item ids and losses are committed and agree with the tables, never text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from published import ROOT, scripts

with scripts():
    from table_registry import registry

RESULTS = ROOT / "benchmarks/results"
FILES = sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")])
OF_QUALITY = (
    "quality-",
    "evaluation-",
    "drift-",
    "detection-",
    "budgets-",
    "topic-shift",
    "harness",
)
OWN_WORDS = ("command", "note", "notes", "what", "definitions", "conclusion", "conclusions",
             "sentence", "failures", "columns", "error")  # fmt: skip
"""Keys whose values this project writes about a run."""
LONGEST = 200
KNOWN = (
    "Homarus gammarus",  # WikiText-2
    "Prison Link Cymru",  # XSum
    "Boarden",  # GSM8K
    "photosynthesis is the foundation",  # ARC
    "type-Ia",  # MMLU
)


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string, keys among them, with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, name
            yield from strings(item, key if key in OWN_WORDS else name)


def documents(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(text)]
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_results_file_holds_text_of_a_data_set(path: Path) -> None:
    found = [pair for document in documents(path) for pair in strings(document)]
    assert [text for key, text in found if len(text) > LONGEST and key not in OWN_WORDS] == []
    assert [word for word in KNOWN for _, text in found if word in text] == []


def test_a_text_would_be_found() -> None:
    row = {"items": [{"id": 3, "text": "x" * 201}], "notes": ["y" * 300]}
    long = [key for key, text in strings(row) if len(text) > LONGEST and key not in OWN_WORDS]
    assert long == ["text"]


def has_items(name: str) -> bool:
    """Whether items lie beside the file, or losses of slices or passages in its rows."""
    rows = json.loads((RESULTS / f"{name}.json").read_text("utf-8")).get("rows")
    own = isinstance(rows, list) and any(
        re.search("(slice|passage)_losses", key) for key in rows[0]
    )
    return own or (RESULTS / f"{name}.jsonl").is_file()


def of_quality() -> list[str]:
    files = (path.stem for path in RESULTS.glob("*.json"))
    return sorted(name for name in files if name.startswith(OF_QUALITY))


@pytest.mark.parametrize("name", of_quality())
def test_items_are_kept_or_the_registry_says_that_they_are_not(name: str) -> None:
    note = registry(ROOT).tables[name].items
    assert has_items(name) == (note is None), "add or drop items: in benchmarks/tables.yaml"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality-*.jsonl")), ids=lambda p: p.stem)
def test_losses_of_slices_make_the_perplexities_of_the_table(path: Path) -> None:
    cells = json.loads(path.with_suffix(".json").read_text("utf-8"))["cells"]
    found = {
        (row["model"], row["cell"], row["variant"], row["sparsity"]): row["losses"]
        for row in documents(path)
    }
    assert len(cells) > 3
    for cell in cells:
        own = (cell["model"], cell["cell"])
        for variant, sparsity, name in (
            (cell["variant"], cell["sparsity"], "perplexity"),
            ("dense", 0.0, "dense_perplexity"),
        ):
            losses = found[(*own, variant, sparsity)].values()
            assert len(losses) == cell["slices"]
            mean = math.fsum(losses) / len(losses)
            assert math.exp(mean) == pytest.approx(cell[name], rel=1e-6)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("evaluation-*.jsonl")), ids=lambda p: p.stem)
def test_items_of_evaluations_make_the_accuracies_of_the_table(path: Path) -> None:
    data = json.loads(path.with_suffix(".json").read_text("utf-8"))
    rows = [row for row in data["rows"] if row["metric"] == "acc"]
    cells = {
        (cell["label"], cell["measurement"]["task"], cell["measurement"]["protocol"]): cell
        for cell in documents(path)
    }
    assert len(rows) > 5 or path.stem == "evaluation-recipe-small"  # which asks no questions
    for row in rows:
        items = cells[row["label"], row["task"], row["protocol"]]["measurement"]["items"]
        assert len({item["id"] for item in items}) == len(items) == row["items"]
        mean = sum(item["acc"] for item in items) / len(items)
        assert mean == pytest.approx(row["value"])
