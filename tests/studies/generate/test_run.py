"""A run in process: its texts and lines, resuming, and what is refused before weights are read."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dart_llm.errors import ConfigError
from dart_llm.models.loading import _Builder
from dart_llm.reporting.console import Ui
from dart_llm.session.trace import read_trace
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.generate.study import RunStudy, run_job
from tiny_gpt2 import CONTEXT

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(gpt2, folder, **more):
    given = {"model": str(gpt2), "prompt": "hello", "generation": 6, "sparsity": 0.5}
    given |= {"method": "griffin", "results_dir": str(folder / "results")}
    return RunSettings(**{**given, **more})


def test_two_texts_their_accounting_and_their_files(gpt2, tmp_path):
    trace = tmp_path / "neurons.safetensors"
    study = run_job(settings(gpt2, tmp_path, trace=str(trace)), Ui(quiet=True))
    texts = (study.path / "generation.jsonl").read_text(encoding="utf-8").splitlines()
    dense, pruned = map(json.loads, texts)
    assert (dense["variant"], pruned["variant"]) == ("dense", "pruned")
    assert (pruned["method"], pruned["sparsity"], dense["accounting"]) == ("griffin", 0.5, None)
    assert pruned["accounting"]["achieved_sparsity"] == 0.5
    files = {path.name for path in study.path.iterdir()}
    assert {"masks.json", "masks.safetensors", "drift.csv", "report.html"} <= files
    assert len(read_trace(trace).arrays["token_id"]) > 0
    assert study.summary == {"accounting": study.generations["pruned"]["accounting"]}
    limit, speed_up = study.timing["bytes_limit"], study.timing["speed_up"]
    assert limit == study.summary["accounting"]["bytes_limit"]
    assert speed_up is None or speed_up <= limit
    lines = [json.loads(line) for line in (study.path / "rows.jsonl").read_text().splitlines()]
    assert [(line["label"], line["metric"]) for line in lines] == [
        ("dense", "seconds_per_token"),
        ("griffin 50 %", "seconds_per_token"),
        ("griffin 50 %", "speed_up"),
    ]
    assert [line["value"] for line in lines[:2]] == [*study.timing["seconds_per_token"].values()]
    assert [line["achieved"] for line in lines] == [None, 0.5, 0.5]
    assert lines[2]["value"] == speed_up and lines[2]["error"] == study.timing["disturbed"]


def test_a_setting_that_may_be_none_keeps_it():
    """The demo asks for the chat template only of models that have one."""
    assert RunSettings(chat=None).chat is None and RunSettings(results_dir=None).chat is False
    assert collect({"chat": None}, environment={}).chat is False


def test_a_dense_run_has_one_text(gpt2, tmp_path):
    study = run_job(settings(gpt2, tmp_path, method="dense", sparsity=None), Ui(quiet=True))
    assert list(study.generations) == ["dense"] == list(study.timing["seconds_per_token"])
    assert "speed_up" not in study.timing and study.tables() == study.sentences() == []


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_run_makes_no_text_twice(gpt2, tmp_path, monkeypatch, lost):
    wanted = settings(gpt2, tmp_path)
    whole = run_job(wanted, Ui(quiet=True), fresh=True)
    generate, texts = RunStudy._generate, []
    with monkeypatch.context() as patch:
        patch.setattr(RunStudy, "_time", lambda study: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(wanted, Ui(quiet=True), fresh=True)
    broken = max((tmp_path / "results" / wanted.experiment).iterdir())
    if lost:  # a pruned text whose masks are gone is made again
        (broken / "masks.safetensors").unlink()
    monkeypatch.setattr(RunStudy, "_generate", lambda *a: texts.append(a[1]) or generate(*a))
    resumed = run_job(wanted, Ui(quiet=True))
    assert resumed.path == broken and texts == (["pruned"] if lost else [])
    for file in ("masks.json", "drift.csv"):
        assert (resumed.path / file).read_bytes() == (whole.path / file).read_bytes()
    again, once = (load_file(run.path / "masks.safetensors") for run in (resumed, whole))
    assert again.keys() == once.keys() and all(torch.equal(again[n], once[n]) for n in once)
    assert [text["text"] for text in resumed.generations.values()] == [
        text["text"] for text in whole.generations.values()
    ]


def test_changed_files_that_the_settings_name_are_another_run(gpt2, tmp_path):
    table, prompt = tmp_path / "table.txt", tmp_path / "prompt.txt"
    table.write_text("0-3:0.6")
    prompt.write_text("hello")
    files = {"layer_topk": f"@{table}", "prompt_file": str(prompt), "prompt": None}
    wanted = settings(gpt2, tmp_path, sparsity=None, **files)
    before = RunStudy(wanted, Ui(quiet=True)).identify()
    assert RunStudy(wanted, Ui(quiet=True)).identify() == before
    for file in (table, prompt):
        file.write_text("0-3:0.5")
        after = RunStudy(wanted, Ui(quiet=True)).identify()
        assert before["inputs"] != after["inputs"]
        assert {**before, "inputs": None} == {**after, "inputs": None}
        before = after


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prompt": "a" * 1100}, "the prompt has 1100 tokens and 6 are to be generated"),
        ({"prompt": "hi", "generation": CONTEXT}, "and 1024 are to be generated"),
        ({"prompt": "hi", "chat": True}, "no chat template"),
    ],
)
def test_what_the_context_cannot_hold_is_refused_before_weights_are_read(
    gpt2, tmp_path, monkeypatch, caplog, given, sentence
):
    monkeypatch.setattr(_Builder, "_model", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=sentence):
        run_job(settings(gpt2, tmp_path, **given), Ui(quiet=True))
    assert "indexing errors" not in caplog.text
    assert list((tmp_path / "results").iterdir()) == []  # nor is there a folder
