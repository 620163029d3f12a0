"""A run in process: resuming, interruption, what is kept, perplexity as every other measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dart_llm.evaluation import perplexity
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import measure
from dart_llm.files import finite
from dart_llm.reporting.console import Ui
from dart_llm.session.prepare import MemoryStore, prepare
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy, run_job
from tiny_gpt2 import write_gpt2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(RunStudy, "figures", lambda study: [])


def settings(gpt2: Path, folder: Path, **more: object) -> RunSettings:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    given = {"model": str(gpt2), "prompt": "hello", "generation": 6, "sparsity": 0.5}
    evaluation = {"eval_perplexity": True, "ppl_datasets": str(text), "ppl_prompt_tokens": 32}
    own = {"method": "griffin", "results_dir": str(folder / "results"), "ppl_scored_tokens": 32}
    return RunSettings(**{**given, **evaluation, **own, **more})


def status(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["status"])


def test_perplexity_is_the_measurement_of_every_other_command(gpt2, tmp_path):
    wanted = settings(gpt2, tmp_path)
    study = run_job(wanted, Ui(quiet=True))
    options = MeasureOptions(prompt_tokens=32, scored_tokens=32)
    for label, config, row in zip(
        ("dense", "griffin@0.5"), (None, wanted.prune_config()), study.lines, strict=True
    ):
        candidate = prepare(study.model, study.tokenizer, config)
        task = f"perplexity:{wanted.ppl_datasets}"
        direct = measure(candidate, task, options, MemoryStore(), lambda count: None)
        assert row["label"] == label and row["measurement"] == finite(direct.to_dict())
        (document,) = study.perplexity
        published = next(one for one in document["rows"] if one["label"] == label)
        assert published["perplexity"] == pytest.approx(direct.metrics["perplexity"])
        assert document["losses"][label] == [sample["losses"] for sample in direct.samples]
    assert json.loads((study.path / "perplexity.json").read_text()) == finite(document)
    assert document["rows"][1]["interval"][0] < document["rows"][1]["ratio_to_dense"]


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")]
)
def test_an_interrupted_run_keeps_its_parts_and_resumes(
    gpt2, tmp_path, monkeypatch, error, expected
):
    wanted = settings(gpt2, tmp_path)
    whole = run_job(wanted, Ui(quiet=True), fresh=True)
    real, generate, done = perplexity.score_window, RunStudy._generate, []

    def stops(*arguments):
        if len(done) == 5:
            raise error
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(perplexity, "score_window", stops)
    ui = Ui(quiet=True)
    with pytest.raises(error):
        run_job(wanted, ui, fresh=True)
    broken = max((tmp_path / "results" / wanted.experiment).iterdir())
    assert status(broken) == expected and (broken / "generation.jsonl").exists()
    assert ui.log[-1] == f"what was finished is kept in {broken}; the same command resumes"
    texts = []
    monkeypatch.setattr(perplexity, "score_window", lambda *a: done.append(1) or real(*a))
    monkeypatch.setattr(RunStudy, "_generate", lambda *a: texts.append(1) or generate(*a))
    resumed = run_job(wanted, Ui(quiet=True))
    assert resumed.path == broken and status(broken) == "complete"
    assert len(done) == 2 * whole.perplexity[0]["slices"] and not texts  # nothing twice
    assert (broken / "perplexity.json").read_bytes() == (
        whole.path / "perplexity.json"
    ).read_bytes()
    assert resumed.generations["pruned"]["text"] == whole.generations["pruned"]["text"]


def test_a_finished_run_is_not_resumed(gpt2, tmp_path):
    wanted = settings(gpt2, tmp_path, generation=0)
    assert run_job(wanted, Ui(quiet=True)).path != run_job(wanted, Ui(quiet=True)).path


@pytest.mark.parametrize("change", ["table", "prompt"])
def test_changed_files_that_the_settings_name_are_another_run(gpt2, tmp_path, change):
    table, prompt = tmp_path / "table.txt", tmp_path / "prompt.txt"
    table.write_text("all:0.5")
    prompt.write_text("hello there")
    files = {"layer_topk": f"@{table}", "prompt": None, "prompt_file": str(prompt)}
    wanted = settings(gpt2, tmp_path, sparsity=None, **files)
    first = RunStudy(wanted, Ui(quiet=True)).identify()
    assert RunStudy(wanted, Ui(quiet=True)).identify() == first
    (table if change == "table" else prompt).write_text("0-3:0.5")
    second = RunStudy(wanted, Ui(quiet=True)).identify()
    assert first.pop("inputs") != second.pop("inputs") and first == second
