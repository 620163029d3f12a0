"""Fetch the texts of published tables from the hub: the same rows in the same format.

``benchmarks/row_ids/NAME.ids`` lists the rows of a file in order, each by the first 12 hex digits
of the sha256 of its text column; it never contains the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Load = Callable[[Mapping[str, Any]], Iterable[Row]]
"""Loads the rows of a split, given its ``id``, ``config``, ``split`` and ``revision``."""


def row_id(text: str) -> str:
    """The id of a row with this text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_hub(where: Mapping[str, Any]) -> Iterable[Row]:
    """The rows of a split, loaded by the library datasets."""
    from datasets import load_dataset

    rows: Iterable[Row] = load_dataset(
        where["id"], where.get("config"), split=where["split"], revision=where.get("revision")
    )
    return rows


def joined(rows: Iterable[Row]) -> str:
    """The lines of the original file, whose blank lines are empty strings on the hub."""
    return "".join(row["text"] or " \n" for row in rows)


def summary(row: Row) -> tuple[str, dict[str, Any]]:
    """For a document with a summary: the text that identifies it, and the row to write."""
    return row["document"], {"document": row["document"], "summary": row["summary"]}


def choice(row: Row) -> tuple[str, dict[str, Any]]:
    """The same for a question with labelled choices."""
    choices = row["choices"]
    written = {"question": row["question"], "choices": list(choices["text"])}
    return row["question"], {**written, "answer": choices["label"].index(row["answerKey"])}


def lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def chosen(
    rows: Iterable[Row], form: Callable[[Row], tuple[str, dict[str, Any]]], ids: list[str]
) -> str:
    """The rows with these ids, in this order; rows that the hub lacks are left out."""
    by_id: dict[str, dict[str, Any]] = {}
    for text, row in map(form, rows):
        by_id.setdefault(row_id(text), row)
    return lines(by_id[key] for key in ids if key in by_id)


FORMS = {"summary": summary, "choice": choice}


def fetch(name: str, hub: Mapping[str, Any], root: Path, folder: Path, load: Load) -> None:
    """Write the input ``name`` below ``folder``; ``hub`` describes its source in inputs.yaml."""
    form = hub["form"]
    if form == "mmlu":
        for subject in hub["configs"]:
            for split in ("dev", "test"):
                rows = load({"id": hub["id"], "config": subject, "split": split})
                written = (
                    {"subject": subject, **{k: r[k] for k in ("question", "choices", "answer")}}
                    for r in rows
                )
                _write(folder / name / f"{subject}_{split}.jsonl", lines(written))
        return
    rows = [row for split in hub["splits"] for row in load({**hub, "split": split})]
    if form == "joined":
        _write(folder / name, joined(rows))
        return
    ids = (root / f"benchmarks/row_ids/{Path(name).stem}.ids").read_text("utf-8").split()
    _write(folder / name, chosen(rows, FORMS[form], ids))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
