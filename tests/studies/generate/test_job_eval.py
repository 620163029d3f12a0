"""MMLU, general NLP and summaries of the main job: their files, by flags and by the script."""

import json

import pytest

from dart_llm.errors import ConfigError
from dart_llm.evaluation import lm_eval as harness
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import asked
from lm_cases import call, place, write_rows
from summary_cases import write_documents
from written import read


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Local MMLU questions of anatomy, and four documents."""
    data = tmp_path / "datasets/mmlu"
    data.mkdir(parents=True)
    for split in ("test", "dev"):
        rows = [
            {"question": f"what is {n} of the body", "choices": [*"pqrs"], "answer": n % 4}
            for n in range(5)
        ]
        write_rows(data / f"anatomy_{split}.jsonl", rows)
    write_documents(tmp_path / "four.jsonl")
    monkeypatch.chdir(tmp_path)
    harness._load.cache_clear()
    yield tmp_path
    harness._load.cache_clear()


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
        assert (len(dense["items"]), dense["accounting"]) == (size, None)
        assert pruned["accounting"]["achieved_sparsity"] == pytest.approx(0.5)
        assert pruned["accounting"]["dense_token_share"] == 0.0
        samples = (folder / f"{name[:-5]}_samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert sum(json.loads(line)["task"] == task for line in samples) == 2 * size
    for name in ("mmlu", "general_nlp", "summarization"):
        assert done.json[name] == read(folder / f"{name}.json")["rows"]


def test_defaults_are_the_published_ones():
    settings = RunSettings(eval_mmlu=True, eval_general_nlp=True, eval_summarization=True)
    mmlu, general, summaries = asked(settings)
    assert (mmlu.name, mmlu.tasks, mmlu.options.num_fewshot) == ("mmlu", ("mmlu",), 0)
    assert general.name == "general_nlp" and len(general.tasks) == 7
    assert general.options.num_fewshot is None
    assert (summaries.name, summaries.tasks) == ("summarization", ("summarize:xsum",))
    assert summaries.options.max_output == 256
    assert asked(RunSettings()) == []


def test_what_is_evaluated_is_checked_before_any_work(here):
    refused = [
        ({"eval_mmlu": True, "mmlu_datasets": "astronmy"}, "astronomy"),
        ({"eval_general_nlp": True, "general_nlp_datasets": "bolq"}, "did you mean boolq"),
        ({"eval_summarization": True, "summarization_datasets": "xsumm"}, "did you mean xsum"),
    ]
    (here / "text.txt").write_text("the tide comes and goes. " * 99, encoding="utf-8")
    for data, more in (  # a calibration text is never evaluated
        ("text.txt", {"eval_perplexity": True, "ppl_datasets": "embedded,text.txt"}),
        ("four.jsonl", {"eval_summarization": True, "summarization_datasets": "four.jsonl"}),
    ):
        given = {"method": "flap", "sparsity": 0.5, "calibration": data, **more}
        refused.append((given, f"{data} is evaluated"))
        assert len(asked(RunSettings(**{**given, "method": "griffin"}))) < 2
    for given, words in refused:
        with pytest.raises(ConfigError, match=words):
            asked(RunSettings(**given))
    assert asked(RunSettings(method="flap", calibration="text.txt", eval_perplexity=True)) == []
