"""A run in process: its texts and lines, resuming, and what is refused before weights are read."""

import pytest
import torch
from safetensors.torch import load_file

from dart_llm.errors import ConfigError
from dart_llm.experiments.study import run_study
from dart_llm.models.loading import _Builder
from dart_llm.reporting.console import Ui
from dart_llm.session.trace import read_trace
from dart_llm.studies.generate.settings import RunSettings, collect
from dart_llm.studies.generate.study import RunStudy
from tiny_gpt2 import CONTEXT
from written import lines

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_two_texts_their_accounting_and_their_files(settings, tmp_path):
    trace = tmp_path / "neurons.safetensors"
    study = run_study(RunStudy(settings(trace=str(trace)), Ui(quiet=True)))
    dense, pruned = lines(study.path / "generation.jsonl")
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
    rows = lines(study.path / "rows.jsonl")
    assert [(row["label"], row["metric"], row["achieved"]) for row in rows] == [
        ("dense", "seconds_per_token", None),
        ("griffin 50 %", "seconds_per_token", 0.5),
        ("griffin 50 %", "speed_up", 0.5),
    ]
    assert [row["value"] for row in rows[:2]] == [*study.timing["seconds_per_token"].values()]
    assert rows[2]["value"] == speed_up and rows[2]["error"] == study.timing["disturbed"]


def test_a_setting_that_may_be_none_keeps_it():
    """The demo asks for the chat template only of models that have one."""
    assert RunSettings(chat=None).chat is None and RunSettings(results_dir=None).chat is False
    assert collect({"chat": None}, environment={}).chat is False


def test_a_dense_run_has_one_text(settings):
    study = run_study(RunStudy(settings(method="dense", sparsity=None), Ui(quiet=True)))
    assert list(study.generations) == ["dense"] == list(study.timing["seconds_per_token"])
    assert "speed_up" not in study.timing and study.tables() == study.sentences() == []


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_run_makes_no_text_twice(settings, monkeypatch, lost):
    whole = run_study(RunStudy(settings(), Ui(quiet=True)), fresh=True)
    generate, texts = RunStudy._generate, []
    with monkeypatch.context() as patch:
        patch.setattr(RunStudy, "_time", lambda study: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_study(RunStudy(settings(), Ui(quiet=True)), fresh=True)
    broken = max(whole.path.parent.iterdir())
    if lost:  # a pruned text whose masks are missing is made again
        (broken / "masks.safetensors").unlink()
    monkeypatch.setattr(RunStudy, "_generate", lambda *a: texts.append(a[1]) or generate(*a))
    resumed = run_study(RunStudy(settings(), Ui(quiet=True)))
    assert resumed.path == broken and texts == (["pruned"] if lost else [])
    for file in ("masks.json", "drift.csv"):
        assert (resumed.path / file).read_bytes() == (whole.path / file).read_bytes()
    again, once = (load_file(run.path / "masks.safetensors") for run in (resumed, whole))
    assert again.keys() == once.keys() and all(torch.equal(again[n], once[n]) for n in once)
    for name, text in whole.generations.items():
        assert resumed.generations[name]["text"] == text["text"]


def test_changed_files_that_the_settings_name_are_another_run(settings, tmp_path):
    table, prompt = tmp_path / "table.txt", tmp_path / "prompt.txt"
    table.write_text("0-3:0.6")
    prompt.write_text("hello")
    files = {"layer_topk": f"@{table}", "prompt_file": str(prompt), "prompt": None}

    def identify(seed=0):
        return RunStudy(settings(sparsity=None, seed=seed, **files), Ui(quiet=True)).identify()

    before = identify()
    assert identify() == before != identify(seed=1)
    for file in (table, prompt):
        file.write_text("0-3:0.5")
        after = identify()
        assert before["inputs"] != after["inputs"]
        assert {**before, "inputs": None} == {**after, "inputs": None}
        before = after


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a" * 1100}, "the prompt has 1100 tokens and 6 are to be generated"),
        ({"prompt": "hi", "generation": CONTEXT}, "and 1024 are to be generated"),
        ({"prompt": "hi", "chat": True}, "no chat template"),
    ],
)
def test_what_the_context_cannot_hold_is_refused_before_weights_are_read(
    settings, tmp_path, monkeypatch, caplog, changes, sentence
):
    monkeypatch.setattr(_Builder, "_model", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=sentence):
        run_study(RunStudy(settings(**changes), Ui(quiet=True)))
    assert "indexing errors" not in caplog.text
    assert list((tmp_path / "results").iterdir()) == []  # nor is there a folder
