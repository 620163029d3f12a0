"""The study of ``eval``, ``perplexity`` and ``summarize``: its files, resuming, failures."""

import json
from itertools import product
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.sweep.settings import EvalSettings, PerplexitySettings, SummarizeSettings
from dart_llm.studies.sweep.study import MeasureStudy
from lm_cases import LETTERS, QUESTIONS, candidate, measured, place
from summary_cases import write_documents
from written import lines


def settings(folder, tasks, **more):
    given = {"include_path": str(place() / "tasks"), "tasks": tasks, "method": "griffin", **more}
    return merged(folder, EvalSettings, **given)


def merged(folder, kind, **more):
    given = {"model": place() / "model", "results_dir": folder / "r", "cache_dir": folder / "cache"}
    given = {name: str(path) for name, path in given.items()}
    return merge(kind, {**given, "device": "cpu", "sparsity": 0.5, **more}, environment={})


def run(settings):
    return run_study(MeasureStudy(settings, Ui(quiet=True)))


def test_one_method_beside_dense_on_two_tasks(tmp_path):
    study = run(settings(tmp_path, "tiny_choice,tiny_group", dense=True))
    rows = lines(study.path / "results.jsonl")
    labels = [(row["label"], row["cell"]["task"]) for row in rows]
    assert labels == list(product(("dense", "griffin@0.5"), ("tiny_choice", "tiny_group")))
    for row in rows:
        method = candidate(None if row["label"] == "dense" else "griffin")
        direct = measured(method, row["cell"]["task"]).to_dict()
        assert row["measurement"] == json.loads(json.dumps(direct))
        assert (row["status"], row["cell"]["protocol"]) == ("done", "decode")
    assert rows[2]["cell"]["sparsity"] == 0.5 and rows[0]["cell"]["sparsity"] is None
    samples = lines(study.path / "samples.jsonl")
    assert len(samples) == 2 * (2 * len(QUESTIONS) + len(LETTERS))
    assert samples[0]["label"] == "dense" and len(samples[0]["answers"]) == 3
    assert study.path.parent.name == "eval-model-griffin-0.5"
    assert [len(table.rows) for table in study.tables()] == [2, 2]
    answer, metrics = study.answer(), [row["measurement"]["metrics"] for row in rows]
    assert answer["results"] == {"tiny_choice": metrics[2], "tiny_group": metrics[3]}
    assert answer["dense"]["tiny_choice"] == metrics[0]
    assert answer["accounting"]["decoded_tokens"] == 93 + 93 + len(LETTERS)
    assert answer["accounting"]["achieved_sparsity"] == pytest.approx(0.5)


def test_a_calibration_text_is_named_and_never_evaluated(tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    sentences = [
        f"the tide number {n * n} comes twice a day and goes by {n * 7}. " for n in range(40)
    ]
    text.write_text("".join(sentences), encoding="utf-8")
    other.write_text("".join(sentences)[::-1], encoding="utf-8")
    rows = Path(write_documents(tmp_path / "four.jsonl"))
    for kind, data in ((PerplexitySettings, text), (SummarizeSettings, rows)):
        flags = {"method": "wanda", "data": str(data), "calibration": str(data)}
        with pytest.raises(ConfigError, match=f"{data.name} is evaluated and cannot be the calib"):
            run(merged(tmp_path, kind, **flags))
    assert not (tmp_path / "r").exists()  # refused before anything is loaded or written
    flags = {"data": str(text), "prompt_tokens": 48, "scored_tokens": 24, "limit": 2}
    for method, calibration, note in (("griffin", text, ""), ("flap", other, "tokens) of other")):
        flags |= {"method": method, "calibration": str(calibration)}
        measurement = run(merged(tmp_path, PerplexitySettings, **flags)).lines[1]["measurement"]
        assert any(note in line for line in measurement["notes"]) or not note
        assert measurement["accounting"]["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"protocol": "ful"}, "did you mean full"),
        ({"protocol": "standard"}, "unknown protocol 'standard'"),
        ({"tasks": ""}, "--tasks"),
        ({"tasks": "tiny_letters,tiny_choyce"}, "tiny_choice"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        run(settings(tmp_path, **{"tasks": "tiny_choice", **given}))
    assert list(tmp_path.iterdir()) == []
