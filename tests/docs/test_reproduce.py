"""benchmarks/reproduce.py: inputs by checksum, what would run, which numbers agree."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import docs_hooks
import pytest
import reproduce
import yaml
from hub_texts import FORMS, chosen, joined, row_id
from reproduce import Job, item_values, items_again, look, sha256
from reproduce_compare import compare, numbers

KNOWN = docs_hooks.registry()
RESULTS = docs_hooks.RESULTS
TIMED = ("serve-", "interrupts", "kills", "sanitized", "agreement", "revisions")


def of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_inputs_are_told_by_their_checksum(tmp_path: Path) -> None:
    facts = {"sha256": of("one"), "get": "hub data set x/y"}
    wanted = f"Expected: sha256 {of('one')}. Where to get it: hub data set x/y. Put it into"
    missing = look("a.txt", facts, tmp_path)
    assert missing.path is None and (missing.problem or "").startswith(
        f"a.txt is missing in {tmp_path}. {wanted}"
    )
    (tmp_path / "a.txt").write_text("two")
    assert f"its sha256 is {of('two')}. {wanted}" in (look("a.txt", facts, tmp_path).problem or "")
    (tmp_path / "a.txt").write_text("one")
    assert look("a.txt", facts, tmp_path) == reproduce.Found("a.txt", tmp_path / "a.txt", None)
    for name in ("b.yaml", "a.yaml", "other.txt"):
        (tmp_path / name).write_text(name)
    both = of(f"{of('a.yaml')}  a.yaml\n{of('b.yaml')}  b.yaml\n")
    assert sha256(tmp_path, ("*.yaml",)) == both


@pytest.mark.parametrize(
    ("row", "again", "agrees"),
    [
        ({"value": 0.5, "interval": {"low": 0.4, "high": 0.6}}, 0.6, True),
        ({"value": 0.5, "interval": {"low": 0.4, "high": 0.6}}, 0.61, False),
        ({"value": 0.7, "interval": {"low": 0.4, "high": 0.6}}, 0.5, False),  # not its own result
        ({"perplexity": 20.0}, 20.3, True),
        ({"perplexity": 20.0}, 20.5, False),
        ({"remasks": 5}, 7, True),
        ({"remasks": 5}, 8, False),
        ({"remasks": 100}, 110, True),
        ({"remasks": 100}, 111, False),
        ({"dense_token_share": 0.0}, 0.019, True),
        ({"dense_token_share": 0.0}, 0.021, False),
        ({"achieved": 0.0}, 0.001, False),
    ],
)
def test_which_numbers_agree(row: dict[str, Any], again: float, agrees: bool) -> None:
    key = next(iter(row))
    named = {"label": "dart@0.5", **row}
    data = {"rows": [named], "renamed": {"dart": "dart-prompt"}}
    (pair,) = compare(data, {"rows": [{**row, "label": "dart-prompt@0.5", key: again}]})
    assert (pair.name, pair.agrees) == (f"dart-prompt@0.5 {key}", agrees)


def test_a_row_that_is_missing_does_not_agree() -> None:
    (pair,) = compare({"rows": [{"task": "arc", "perplexity": 2.0}]}, {"rows": []})
    assert (pair.again, pair.agrees) == (None, False)


@pytest.mark.parametrize("name", [n for n in KNOWN["results"] if not n.startswith(TIMED)])
def test_every_file_agrees_with_itself(name: str) -> None:
    data = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    assert len(numbers(data)) >= 3 and all(pair.agrees for pair in compare(data, data))


@pytest.mark.parametrize(
    ("name", "rows", "key"),
    [
        ("evaluation-smollm2", "rows", "achieved"),
        ("drift-forced-smollm2", "rows", "achieved_sparsity"),
        ("quality-token", "cells", "perplexity"),
        ("detection-smollm2", "rows", "rate"),
    ],
)
def test_a_number_that_was_changed_by_hand_does_not_come_again(
    name: str, rows: str, key: str
) -> None:
    data = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    changed = copy.deepcopy(data)
    changed[rows][-1][key] += 1.0
    assert len([pair for pair in compare(changed, data) if not pair.agrees]) == 1


def test_items_that_both_files_hold_are_compared(tmp_path: Path) -> None:
    def cell(*items: dict[str, Any]) -> str:
        found = {"task": "t", "protocol": "decode", "items": items}
        return json.dumps({"label": "dart@0.5", "measurement": found})

    old, new, drift = (tmp_path / f"{name}.jsonl" for name in ("old", "new", "drift"))
    old.write_text(cell({"id": 0, "acc": 1.0, "tokens": 9}, {"id": 1, "acc": 0.0}))
    new.write_text(cell({"id": 1, "acc": 0.25}, {"id": 0, "acc": 1.0}, {"id": 5, "acc": 1.0}))
    assert items_again(old, new) == (
        "items: 1 of 2 values that both files hold are the same, the largest difference is 0.25"
    )
    assert items_again(old, tmp_path / "none") == "items: none that both files hold"
    topics = [{"topic": 0, "mean_loss": 3.5}, {"topic": 1, "mean_loss": None}]
    row = {"label": "never@0.5", "source": "p", "seed": 0, "loss": {"topics": topics}}
    drift.write_text(json.dumps(row))
    assert item_values(drift) == {("never@0.5", "p", "0", "0"): 3.5}


def test_a_job_has_folders_of_its_own_and_keeps_what_is_finished(tmp_path: Path) -> None:
    job = Job("quality-token", KNOWN["results"]["quality-token"], tmp_path / "job", False)
    first, second = job.commands()
    assert first[-4:] == ["--experiment-name", "1", "--results-dir", "../runs"]
    assert second[second.index("--model") + 1] == "qwen2.5-coder-0.5b-instruct.gguf"
    assert job.keeping()[:3] == ["python", "benchmarks/keep.py", "quality-token"]
    (tmp_path / "w.txt").write_text("w")
    job.lay_out({"w.txt": tmp_path / "w.txt", "m.gguf": tmp_path / "w.txt", "tasks": tmp_path})
    assert (job.clone / "../shared/data/w.txt").read_text() == "w"
    assert (job.clone / "m.gguf").is_file() and (job.clone / "benchmarks/keep.py").is_file()
    for time, status in (("t1", "complete"), ("t2", "interrupted")):
        folder = job.folder / "runs/1" / time
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"status": status}))
        assert job.is_finished(1) is (status == "complete")
    assert not job.is_finished(2) and str(job.folder / "runs/1/t2") in job.keeping()


def test_the_short_form_of_a_sweep_is_a_smaller_grid(tmp_path: Path) -> None:
    job = Job("evaluation-leak", KNOWN["results"]["evaluation-leak"], tmp_path / "job", True)
    job.lay_out({})
    assert job.commands()[0][:3] == ["dart-llm", "sweep", "short.yaml"]
    grid = yaml.safe_load((job.clone / "short.yaml").read_text())
    assert grid["methods"] == ["dense", "griffin"]
    assert {facts["limit"] for facts in grid["task_options"].values()} == {2}


def test_every_name_can_be_shown_and_all_scripts_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [*KNOWN["results"], *KNOWN["blocks"]]
    assert reproduce.main([*names, "--dry-run", "--texts", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name, facts in KNOWN["results"].items():
        assert f"\n{name}: " in f"\n{shown}"
        for run in [*facts["run"], facts.get("keep", "dart-llm")]:
            script = run.split()[1] if run.startswith("python") else "README.md"
            assert (docs_hooks.ROOT / script).is_file()
    assert reproduce.main(["budgets-smollm2", "--texts", str(tmp_path)]) == 2
    assert reproduce.main(["quality-tokn"]) == 2
    assert "did you mean quality-token?" in capsys.readouterr().err


def test_texts_of_the_hub_take_the_form_of_the_files() -> None:
    assert joined([{"text": "a\n"}, {"text": ""}]) == "a\n \n"
    rows = [{"document": d, "summary": "s", "id": 1} for d in ("x", "y", "z")]
    text = chosen(rows, FORMS["summary"], [row_id("z"), row_id("x"), row_id("none")])
    assert [json.loads(line)["document"] for line in text.splitlines()] == ["z", "x"]
    question = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    _, written = FORMS["choice"]({**question, "answerKey": "B"})
    assert written == {"question": "q", "choices": ["a", "b"], "answer": 1}
