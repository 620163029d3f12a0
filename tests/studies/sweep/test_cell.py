"""Cells: their keys, their digests, and the order in which they are computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.studies.sweep.grid import collect, expand
from dart_llm.studies.sweep.study import execution_order
from tiny_gpt2 import write_gpt2

TASK = "perplexity:embedded"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


def cells(**data: Any) -> tuple[Cell, ...]:
    return expand(collect({"tasks": TASK, **data}))


def test_a_cell_travels_as_data() -> None:
    for cell in cells(sparsities="0.3", options={"limit": 3}, overrides={"budget": "uniform"}):
        back = Cell.from_dict(json.loads(json.dumps(cell.to_dict())))
        assert back == cell and back.key == cell.key
        assert isinstance(back.options, MeasureOptions)


def test_the_key_follows_what_decides_the_result(tmp_path: Path) -> None:
    (base,) = cells(methods="griffin", sparsities="0.5")
    changed = [
        {"sparsities": "0.4"},
        {"seeds": "1"},
        {"dtype": "float32"},
        {"device": "cpu"},
        {"protocols": "full"},
        {"options": {"limit": 9}},
        {"overrides": {"compensation": True}},
        {"models": "some/model"},
        {"revision": "abc"},
    ]
    keys = [cells(**{"methods": "griffin", "sparsities": "0.5", **c})[0].key for c in changed]
    assert len({base.key, *keys}) == len(changed) + 1
    (elsewhere,) = cells(methods="griffin", sparsities="0.5", cache_dir=str(tmp_path))
    assert elsewhere.key == base.key
    assert base.key.startswith("smollm2-135m-griffin@0.5-perplexity-embedded-decode-")


def test_a_changed_file_is_another_cell(gpt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one", encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "mine.yaml"
    task.write_text("task: mine\n", encoding="utf-8")
    data = {
        "models": str(gpt2),
        "methods": "dense",
        "tasks": f"perplexity:{text},mine",
        "options": {"include_path": str(tmp_path / "tasks")},
    }
    before = cells(**data)
    model = ["model", "model_files"]
    assert [sorted(c.inputs) for c in before] == [[*model, "text"], [*model, "tasks"]]
    assert [c.key for c in cells(**data)] == [c.key for c in before]
    text.write_text("two", encoding="utf-8")
    task.write_text("task: mine\nnum_fewshot: 1\n", encoding="utf-8")
    assert {c.key for c in cells(**data)}.isdisjoint(c.key for c in before)


def test_changed_data_of_a_task_file_is_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndoc_to_text: !function utils.text\n"
        "dataset_kwargs: {data_files: {test: questions.jsonl, dev: [a.jsonl]}}\n"
    )
    asked = {"methods": "dense", "tasks": "mine", "options": {"include_path": "tasks"}}
    keys = [cells(**asked)[0].key]
    for name, text in (("questions.jsonl", "1"), ("questions.jsonl", "2"), ("a.jsonl", "1")):
        (tmp_path / name).write_text(text)
        keys.append(cells(**asked)[0].key)
    (tmp_path / "other.jsonl").write_text("not named by the task")
    assert len(set(keys)) == 4 and cells(**asked)[0].key == keys[-1]


def test_changed_local_mmlu_questions_are_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"methods": "dense", "tasks": "mmlu,mmlu:anatomy,perplexity:mmlu-answers,arc_easy"}
    bare = [cell.key for cell in cells(**asked)]
    file = tmp_path / "datasets" / "mmlu" / "anatomy_dev.jsonl"
    file.parent.mkdir(parents=True)
    keys = []
    for text in ("one", "two"):
        file.write_text(text, encoding="utf-8")
        keys.append([cell.key for cell in cells(**asked)])
    for one, two, without in list(zip(*keys, bare, strict=True))[:3]:
        assert len({one, two, without}) == 3
    assert keys[0][3] == keys[1][3] == bare[3]


def test_a_calibration_file_may_name_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    digests = [
        Digests().of(Cell("smollm2-135m", "wanda", TASK, calibration=name))["calibration"]
        for name in (str(path), f"{path}#100")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 64


def test_the_order_of_execution_loads_a_model_once() -> None:
    found = cells(
        models="a/a,b/b", methods="dense,griffin", sparsities="0.5", tasks="x,y", seeds="0,1"
    )
    order = execution_order([*found[::2], *found[1::2]])
    assert sorted(c.key for c in order) == sorted(c.key for c in found)
    models = [c.model for c in order]
    assert models == sorted(models)
    ways = [(c.model, c.label, c.seed) for c in order]
    assert sum(a != b for a, b in zip(ways, ways[1:], strict=False)) == len(set(ways)) - 1
