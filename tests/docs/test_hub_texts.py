"""scripts/hub_texts.py: rows of the hub become the files that the tables were made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from published import ROOT, scripts

with scripts():
    import reproduce
    from hub_texts import fetch, row_id
    from reproduce_inputs import sha256
    from table_registry import Registry, Table, registry

QUESTIONS = [
    {"question": q, "choices": {"text": ["x", "y"], "label": list(labels)}, "answerKey": key}
    for q, labels, key in (("one?", "AB", "B"), ("two?", "12", "1"), ("three?", "AB", "A"))
]


def project(root: Path, name: str, texts: Iterable[str]) -> Path:
    folder = root / "benchmarks/row_ids"
    folder.mkdir(parents=True)
    (folder / f"{name}.ids").write_text("\n".join(map(row_id, texts)) + "\n")
    return root


def test_blank_lines_come_back(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": " = Bees = \n"}, {"text": ""}]
    hub = {"id": "x/w", "splits": ["validation"], "form": "joined"}
    fetch("w.txt", hub, tmp_path, tmp_path / "out", lambda where: rows)
    assert (tmp_path / "out/w.txt").read_text() == " \n = Bees = \n \n"


def test_the_rows_of_the_ids_are_written_in_their_order(tmp_path: Path) -> None:
    """From whichever split has them, with the answer as an index."""
    splits = {"test": QUESTIONS[:1], "train": QUESTIONS[1:]}
    seen = []

    def load(where: Mapping[str, Any]) -> list[dict[str, Any]]:
        seen.append((where["id"], where["config"]))
        return splits[where["split"]]

    root = project(tmp_path, "arc", ["two?", "one?"])
    hub = {"id": "x/arc", "config": "E", "splits": ["test", "train"], "form": "choice"}
    fetch("arc.jsonl", hub, root, tmp_path / "out", load)
    assert seen == [("x/arc", "E")] * 2
    assert (tmp_path / "out/arc.jsonl").read_text().splitlines() == [
        '{"question": "two?", "choices": ["x", "y"], "answer": 0}',
        '{"question": "one?", "choices": ["x", "y"], "answer": 1}',
    ]


def test_summaries_keep_their_two_columns(tmp_path: Path) -> None:
    rows = [{"document": "Größe", "summary": "s", "id": "7"}]
    root = project(tmp_path, "xsum", ["Größe"])
    hub = {"id": "x", "splits": ["test"], "form": "summary"}
    fetch("xsum.jsonl", hub, root, tmp_path / "out", lambda where: rows)
    text = (tmp_path / "out/xsum.jsonl").read_text(encoding="utf-8")
    assert text == '{"document": "Größe", "summary": "s"}\n'


def test_mmlu_is_a_folder_of_subjects(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "no"}
    hub = {"id": "x", "form": "mmlu", "configs": ["law"]}
    fetch("mmlu", hub, tmp_path, tmp_path, lambda where: [row] if where["split"] == "dev" else [])
    assert json.loads((tmp_path / "mmlu/law_dev.jsonl").read_text()) == {**row, "subject": "law"}
    assert (tmp_path / "mmlu/law_test.jsonl").read_text() == ""


def test_only_what_lacks_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TEXTS=hub keeps what has the right checksum, and asks for nothing that the hub lacks."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "from_hub", lambda where: [{"text": "a\n"}])
    (tmp_path / "a.txt").write_text("a\n")
    hub = {"id": "x/w", "splits": ["test"], "form": "joined"}
    known = reproduce.registry(ROOT).inputs["gsm8k.jsonl"]
    own = type(known)("a.txt", sha256(tmp_path / "a.txt"), "x/w", hub=hub)
    found = Registry({"a.txt": own, "gsm8k.jsonl": known}, {}, {})
    monkeypatch.setattr(reproduce, "registry", lambda root: found)
    table = Table("t", ("python x",), inputs=("a.txt", "gsm8k.jsonl"))
    folder = reproduce.fetched([table])
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt"]
    monkeypatch.setattr(reproduce, "from_hub", lambda where: pytest.fail("asked the hub again"))
    assert reproduce.fetched([table]) == folder


def test_ids_are_hashes_and_no_text() -> None:
    for name, count in (("xsum", 200), ("arc_easy", 1200)):
        ids = (ROOT / f"benchmarks/row_ids/{name}.ids").read_text().split()
        assert len(set(ids)) == count
        assert all(len(one) == 12 and int(one, 16) >= 0 for one in ids)


def test_the_task_files_are_those_of_the_registry() -> None:
    known = registry(ROOT).inputs["tasks"]
    assert sha256(ROOT / "benchmarks/tasks", known.files) == known.sha256
