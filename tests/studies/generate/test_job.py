"""A run in process: resuming, interruption, what is kept, perplexity as every other measurement."""

import json

import pytest

from dart_llm.evaluation import perplexity
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import measure
from dart_llm.files import finite
from dart_llm.reporting.console import Ui
from dart_llm.session.prepare import MemoryStore, prepare
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy, run_job

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(gpt2, folder, **more):
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    given = {"model": str(gpt2), "prompt": "hello", "generation": 6, "sparsity": 0.5}
    evaluation = {"eval_perplexity": True, "ppl_datasets": str(text), "ppl_prompt_tokens": 32}
    own = {"method": "griffin", "results_dir": str(folder / "results"), "ppl_scored_tokens": 32}
    return RunSettings(**{**given, **evaluation, **own, **more})


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
    accounting = study.generations["pruned"]["accounting"]
    assert study.timing["bytes_limit"] == accounting["bytes_limit"]
    assert study.summary == {"accounting": accounting}


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_run_scores_no_slice_twice(gpt2, tmp_path, monkeypatch, lost):
    wanted = settings(gpt2, tmp_path)
    whole = run_job(wanted, Ui(quiet=True), fresh=True)
    real, generate, done, texts = perplexity.score_window, RunStudy._generate, [], []

    def stops(*arguments):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(perplexity, "score_window", stops)
    with pytest.raises(KeyboardInterrupt):
        run_job(wanted, Ui(quiet=True), fresh=True)
    broken = max((tmp_path / "results" / wanted.experiment).iterdir())
    if lost:  # a pruned text whose masks are gone is made again
        (broken / "masks.safetensors").unlink()
    monkeypatch.setattr(perplexity, "score_window", lambda *a: done.append(1) or real(*a))
    monkeypatch.setattr(RunStudy, "_generate", lambda *a: texts.append(a[1]) or generate(*a))
    resumed = run_job(wanted, Ui(quiet=True))
    assert resumed.path == broken and len(done) == 2 * whole.perplexity[0]["slices"]
    assert texts == (["pruned"] if lost else [])
    assert resumed.perplexity == whole.perplexity
    assert resumed.generations["pruned"]["text"] == whole.generations["pruned"]["text"]


def test_changed_files_that_the_settings_name_are_another_run(gpt2, tmp_path):
    table, prompt = tmp_path / "table.txt", tmp_path / "prompt.txt"
    table.write_text("all:0.5")
    prompt.write_text("hello there")
    files = {"layer_topk": f"@{table}", "prompt": None, "prompt_file": str(prompt)}
    wanted = settings(gpt2, tmp_path, sparsity=None, **files)
    before = RunStudy(wanted, Ui(quiet=True)).identify()
    assert RunStudy(wanted, Ui(quiet=True)).identify() == before
    for file in (table, prompt):
        file.write_text("0-3:0.5")
        after = RunStudy(wanted, Ui(quiet=True)).identify()
        assert before["inputs"] != after["inputs"]
        assert {**before, "inputs": None} == {**after, "inputs": None}
        before = after
