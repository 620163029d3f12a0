"""The main job in process: resuming, interruption, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dart_llm.evaluation import perplexity as ppl_rows
from dart_llm.experiments.store import open_folder
from dart_llm.files import finite, write_json
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study as job_module
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import run_job
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def settings(gpt2: Path, folder: Path, **more: object) -> RunSettings:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    return RunSettings(
        model=str(gpt2),
        prompt="hello",
        generation=6,
        sparsity=0.5,
        method="griffin",
        eval_perplexity=True,
        ppl_datasets=str(text),
        ppl_prompt_tokens=32,
        ppl_scored_tokens=32,
        results_dir=str(folder / "results"),
        **more,
    )


def status(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["status"])


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")]
)
def test_an_interrupted_run_keeps_its_parts_and_resumes(
    gpt2, tmp_path, monkeypatch, error, expected
):
    wanted = settings(gpt2, tmp_path)
    whole = run_job(wanted, Ui(quiet=True), fresh=True)
    real, done = ppl_rows._score_one, []

    def stops(*arguments):
        if len(done) == 5:
            raise error
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(ppl_rows, "_score_one", stops)
    with pytest.raises(error):
        run_job(wanted, Ui(quiet=True), fresh=True)
    broken = max((tmp_path / "results" / wanted.experiment).iterdir())
    assert status(broken) == expected
    assert (broken / "generation.jsonl").exists()
    monkeypatch.setattr(ppl_rows, "_score_one", lambda *a: done.append(1) or real(*a))
    monkeypatch.setattr(job_module, "generate_texts", _counting(job_module.generate_texts, done))
    resumed = run_job(wanted, Ui(quiet=True))
    assert resumed.path == broken
    assert status(broken) == "complete"
    slices = whole.perplexity[0]["slices"]
    assert len(done) == 2 * slices + 1  # no slice twice; generate_texts finds its parts
    assert resumed.perplexity[0]["losses"] == whole.perplexity[0]["losses"]
    assert resumed.generations["pruned"]["text"] == whole.generations["pruned"]["text"]


def _counting(function, calls):
    def wrapped(*arguments):
        calls.append(1)
        return function(*arguments)

    return wrapped


def test_a_finished_run_is_not_resumed_and_other_settings_start_anew(gpt2, tmp_path):
    first = run_job(settings(gpt2, tmp_path), Ui(quiet=True))
    second = run_job(settings(gpt2, tmp_path), Ui(quiet=True))
    assert first.path != second.path
    interrupted = open_folder(tmp_path / "r", "x", {"a": 1})
    write_json(interrupted.path / "config.json", {"status": "interrupted", "settings": {"a": 1}})
    interrupted.release()
    assert open_folder(tmp_path / "r", "x", {"a": 1}).path == interrupted.path
    assert open_folder(tmp_path / "r", "x", {"a": 2}).path != interrupted.path
    assert open_folder(tmp_path / "r", "x", {"a": 1}, fresh=True).path != interrupted.path


def test_json_never_holds_numbers_that_are_not_finite():
    assert finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}
