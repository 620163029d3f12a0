"""MMLU, general NLP and summaries of the main job: their files, by flags and by the script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.evaluation import lm_eval as harness
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import asked
from lm_cases import (
    call,
    candidate,
    measured,
    options,
    place,
    write_rows,
)
from mmlu_cases import mmlu_row
from shells import EXPERIMENT, make_desk
from summary_cases import write_documents

FILES = ("mmlu.json", "general_nlp.json", "summarization.json")


def prepare_folder(folder: Path) -> None:
    """Local MMLU questions of anatomy, and four documents."""
    place()
    data = folder / "datasets/mmlu"
    data.mkdir(parents=True)
    for split in ("test", "dev"):
        write_rows(data / f"anatomy_{split}.jsonl", [mmlu_row(n) for n in range(5)])
    write_documents(folder / "four.jsonl")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    prepare_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    harness._load.cache_clear()
    yield tmp_path
    harness._load.cache_clear()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check(folder: Path) -> None:
    """What the three files hold after dense and griffin at 50 %."""
    for name, task, size in (
        ("mmlu.json", "mmlu:anatomy", 3),
        ("general_nlp.json", "tiny_choice", 2),
        ("general_nlp.json", "tiny_letters", 2),
        ("summarization.json", "summarize:four.jsonl", 2),
    ):
        rows = [row for row in read(folder / name)["rows"] if row["measurement"]["task"] == task]
        assert [row["label"] for row in rows] == ["dense", "griffin@0.5"]
        dense, pruned = (row["measurement"] for row in rows)
        assert [item["id"] for item in dense["items"]] == [item["id"] for item in pruned["items"]]
        assert len(dense["items"]) == size
        assert dense["accounting"] is None
        assert pruned["accounting"]["achieved_sparsity"] == pytest.approx(0.5)
        assert pruned["accounting"]["dense_token_share"] == 0.0
        samples = (folder / f"{name[:-5]}_samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert sum(json.loads(line)["task"] == task for line in samples) == 2 * size


COMMON = ["--method", "griffin", "--sparsity", "0.5", "--device", "cpu", "--json"]


def test_the_three_switches_write_their_files(here):
    done = call(
        *("run", "--model", place() / "model", *COMMON),
        *("--eval-mmlu", "--mmlu-datasets", "anatomy", "--mmlu-max-samples", 3),
        *("--mmlu-shots", 2, "--eval-general-nlp", "--general-nlp-max-samples", 2),
        *("--general-nlp-datasets", "tiny_choice,tiny_letters"),
        *("--include-path", place() / "tasks", "--eval-summarization"),
        *("--summarization-datasets", "four.jsonl", "--summarization-max-samples", 2),
        *("--summarization-max-output", 6),
    )
    assert (done.code, done.err) == (0, "")
    folder = here / done.json["folder"]
    check(folder)
    assert read(folder / "config.json")["status"] == "complete"
    assert not (folder / "parts.jsonl").exists()
    assert (folder / "report.html").is_file()
    for name in FILES:
        assert done.json[name[:-5]] == read(folder / name)["rows"]
    rows = {row["measurement"]["task"]: row["measurement"] for row in done.json["general_nlp"]}
    direct = measured(candidate("griffin"), "tiny_letters", options(limit=2))
    assert rows["tiny_letters"] == json.loads(json.dumps(direct.to_dict()))
    texts = (folder / "mmlu_samples.jsonl").read_text(encoding="utf-8").splitlines()
    context = json.loads(texts[0])["arguments"][0][0]
    assert context.count("Answer:") == 3  # two examples, from the dev file
    summary = done.json["summarization"][1]["measurement"]
    assert summary["accounting"]["decoded_tokens"] == 2 * 5


def test_defaults_are_the_published_ones():
    settings = RunSettings(eval_mmlu=True, eval_general_nlp=True, eval_summarization=True)
    mmlu, general, summaries = asked(settings)
    assert (mmlu.name, mmlu.tasks, mmlu.options.num_fewshot) == ("mmlu", ("mmlu",), 0)
    assert general.name == "general_nlp" and len(general.tasks) == 7
    assert general.options.num_fewshot is None
    assert (summaries.name, summaries.tasks) == ("summarization", ("summarize:xsum",))
    assert summaries.options.max_output == 256
    assert asked(RunSettings()) == []


def test_names_are_checked_before_a_model_is_loaded(here):
    with pytest.raises(UnknownName, match="astronomy"):
        asked(RunSettings(eval_mmlu=True, mmlu_datasets="astronmy"))
    done = call("run", "--model", "no/such", "--eval-mmlu", "--mmlu-datasets", "astronmy")
    assert done.code == 2 and "astronomy" in done.err
    assert done.err.count("\n") == 1


def test_a_calibration_text_is_never_evaluated(here):
    (here / "text.txt").write_text("the tide comes and goes. " * 99, encoding="utf-8")
    for data, more in (
        ("text.txt", {"eval_perplexity": True, "ppl_datasets": "embedded,text.txt"}),
        ("four.jsonl", {"eval_summarization": True, "summarization_datasets": "four.jsonl"}),
    ):
        given = {"method": "flap", "sparsity": 0.5, "calibration": data}
        with pytest.raises(ConfigError, match=f"{data} is evaluated"):
            asked(RunSettings(**given, **more))
        assert len(asked(RunSettings(**{**given, "method": "griffin"}, **more))) < 2
    assert asked(RunSettings(method="flap", calibration="text.txt", eval_perplexity=True)) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"eval_general_nlp": True, "general_nlp_datasets": "bolq"}, "did you mean boolq"),
        ({"eval_summarization": True, "summarization_datasets": "xsumm"}, "did you mean xsum"),
    ],
)
def test_names_are_checked_before_any_work(here, more, words):
    with pytest.raises(ConfigError, match=words):
        asked(RunSettings(**more))


def test_a_run_that_fails_keeps_the_evaluations_before(here):
    done = call(
        *("run", "--model", place() / "model", *COMMON, "--eval-mmlu"),
        *("--mmlu-datasets", "anatomy", "--include-path", place() / "tasks"),
        *("--eval-general-nlp", "--general-nlp-datasets", "tiny_lost"),
    )
    assert done.code == 2 and done.out == ""
    assert "tiny_lost" in done.err and done.err.count("\n") == 1
    (folder,) = (here / "results").glob("*/*")
    assert read(folder / "config.json")["status"] == "failed"
    assert len(read(folder / "mmlu.json")["rows"]) == 2
    assert not (folder / "general_nlp.json").exists()


def test_the_script_evaluates(tmp_path):
    desk = make_desk(tmp_path, real=True)
    prepare_folder(desk.root)
    done = desk.run(
        EXPERIMENT,
        "--include-path",
        str(place() / "tasks"),
        MODEL=str(place() / "model"),
        METHOD="griffin",
        DEVICE="cpu",
        EVAL_MMLU="true",
        MMLU_DATASETS="anatomy",
        MMLU_MAX_SAMPLES="3",
        EVAL_GENERAL_NLP="true",
        GENERAL_NLP_DATASETS="tiny_choice,tiny_letters",
        GENERAL_NLP_MAX_SAMPLES="2",
        EVAL_SUMMARIZATION="true",
        SUMMARIZATION_DATASETS="four.jsonl",
        SUMMARIZATION_MAX_SAMPLES="2",
        SUMMARIZATION_MAX_OUTPUT="6",
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = (desk.root / "results").glob("*/*")
    check(folder)
    assert desk.configs()[0]["settings"]["eval_mmlu"] is True
    for row in read(folder / "mmlu.json")["rows"]:
        value = row["measurement"]["metrics"]["acc"]
        assert value == sum(item["acc"] for item in row["measurement"]["items"]) / 3
