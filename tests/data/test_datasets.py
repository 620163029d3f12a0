"""Data sets of the hub: the catalogue, references, MMLU, and a fake ``datasets`` library's rows."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dart_llm.data import documents
from dart_llm.data.datasets import DATA_SETS, MMLU_SUBJECTS, get, mmlu_questions, names, rows
from dart_llm.data.documents import Document, load_documents
from dart_llm.errors import ConfigError, LoadError, UnknownName
from fake_hub import install_datasets

ROLES = {
    "perplexity": {"text"},
    "calibration": {"text"},
    "summarize": {"document", "summary"},
    "prompts": {"question", "choices", "answer"},
    "eval": {"question", "answer"},
}
"""What a data set must have for a use."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install_datasets(monkeypatch)


@pytest.mark.contract("nothing evaluated calibrates")
def test_the_catalogue_is_complete_and_what_calibrates_is_not_scored():
    assert {use: names(use) for use in ROLES if use != "eval"} == {
        "perplexity": ("c4", "wikitext2"),
        "calibration": ("c4_train",),
        "summarize": ("cnn_dailymail", "gov_report", "multi_news", "xsum"),
        "prompts": ("mmlu",),
    }
    scored, unscored = set(), set()
    for name, data in DATA_SETS.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", data.hub_id)
        assert data.uses and all(ROLES[use] <= set(data.columns) for use in data.uses)
        assert data.licence_page.startswith("https://") and data.megabytes
        assert bool(data.tasks) == ("eval" in data.uses)
        assert data.gated == (name == "gpqa")
        split = (data.hub_id, data.config, data.split)
        (unscored if set(data.uses) <= {"calibration", "prompts"} else scored).add(split)
    assert len(unscored) == 2 and not unscored & scored
    with pytest.raises(UnknownName, match="did you mean xsum"):
        get("xsumm")


class Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without their functions."""


Loader.add_multi_constructor("!", lambda *_arguments: None)


def task_settings(path):
    settings = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    base = settings.get("include")
    return {**task_settings(path.parent / base), **settings} if base else settings


def test_the_ids_are_those_of_the_installed_tasks():
    library = Path(pytest.importorskip("lm_eval").__file__).parent
    folders = "arc glue/rte gpqa/n_shot hellaswag medmcqa mmlu/default openbookqa super_glue/boolq"
    tasks = {}
    for folder in f"{folders} winogrande".split():
        settings = map(task_settings, (library / "tasks" / folder).glob("*.yaml"))
        tasks.update({each["task"]: each for each in settings if isinstance(each.get("task"), str)})
    for data in DATA_SETS.values():
        for name in data.tasks:
            task = tasks[f"mmlu_{data.config}" if name == "mmlu" else name]
            split = task.get("test_split") or task["validation_split"]
            expected = (task["dataset_path"], task.get("dataset_name"), split)
            assert (data.hub_id, data.config, data.split) == expected


def question(text, **more):
    return {"question": text, "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x", **more}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), "utf-8")


def test_mmlu_questions_are_dev_then_validation_without_answers(hub):
    assert len(MMLU_SUBJECTS) == 57 and list(MMLU_SUBJECTS) == sorted(set(MMLU_SUBJECTS))
    calls = [("cais/mmlu", "astronomy", s, False) for s in ("dev", "validation")]
    hub.rows = {calls[0]: [question("q0")], calls[1]: [question("q1", answer="D")]}
    shown = {"subject": "astronomy", "choices": ["a", "b", "c", "d"]}
    assert mmlu_questions("astronomy") == [{**shown, "question": text} for text in ("q0", "q1")]
    assert hub.calls == calls
    folder = Path("datasets/mmlu")  # local files replace the hub
    write(folder / "astronomy_dev.jsonl", question("one\u2028line"))
    write(folder / "astronomy_validation.jsonl", question("two"))
    write(folder / "astronomy_test.jsonl", question("hidden"))
    write(folder / "virology_dev.jsonl", question("local"))
    hub.calls.clear()
    local = mmlu_questions("astronomy") + mmlu_questions("virology")
    assert [row["question"] for row in local] == ["one\u2028line", "two", "local"]
    assert all(set(row) == {"subject", "question", "choices"} for row in local)
    assert documents.read("mmlu:virology") == "local"
    assert documents.read("mmlu") == "one\u2028line\n\ntwo\n\nlocal"
    assert hub.calls == []
    for row in ({"question": "q"}, {"question": "q", "choices": []}):
        write(folder / "virology_dev.jsonl", row)
        with pytest.raises(ConfigError, match=r'line 1 of .*virology_dev\.jsonl needs "question"'):
            mmlu_questions("virology")


def test_texts_of_the_hub(hub):
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)
    c4 = [("allenai/c4", "en", s, True) for s in ("validation", "train")]
    whole = ("a/b", None, "test", False)
    part = ("a/b", "en", "dev", True)
    hub.rows = {
        wikitext: [{"text": ""}, {"text": " = Title = \n"}, {"text": " Some text . \n"}],
        **{call: ({"text": f"d{i}"} for i in range(2000)) for call in c4},
        whole: [{"body": "one"}, {"body": ""}, {"body": "two"}],
        part: ({"body": f"d{i}", "n": i} for i in range(9)),
    }
    assert documents.read("wikitext2") == "\n\n = Title = \n\n\n Some text . \n"
    hub.read = 0
    assert documents.read("c4").split() == [f"d{i}" for i in range(1100)]
    assert documents.read("c4_train").startswith("d0\n\nd1\n\nd2")
    assert hub.read == 1100 + 512  # streamed: no more than is needed
    assert documents.read("hub:a/b:test:body") == "one\n\n\n\ntwo"
    assert documents.read("hub:a/b/en:dev[:2]:body") == "d0\n\nd1"
    assert hub.calls == [wikitext, *c4, whole, part]


def test_what_cannot_be_used_is_never_empty_text(hub):
    for table in ([], [{"text": "x"}], [{"body": 3}], [{"body": " "}, {"body": ""}]):
        hub.rows = {("a/b", None, "test", False): table}
        with pytest.raises(LoadError, match=r"a/b \(test\)"):
            documents.read("hub:a/b:test:body")
    hub.calls.clear()
    ends = (
        *("", "b:test:text", "a/b:test", "a/b:test:text:summary", "a/b:test[:0]:text"),
        *("a/b:test[5:]:text", "a/b::text", "a/b/:test:text", "a /b:test:text"),
    )
    for end in ends:
        with pytest.raises(ConfigError, match="is not a data set on the hub with columns for text"):
            documents.read(f"hub:{end}")
    with pytest.raises(ConfigError, match="must be 1 or more, not 0"):
        load_documents("xsum", 0)
    assert hub.calls == []


def test_what_the_library_raises_is_one_sentence_without_a_token(hub, monkeypatch):
    hub.error = ConnectionError("no route\n  to host.\n")
    for read in (lambda: load_documents("xsum"), lambda: mmlu_questions("anatomy")):
        with pytest.raises(LoadError, match=r"from the hub \(no route to host\); "):
            read()
    with pytest.raises(LoadError, match=r"set HF_TOKEN, or wait$") as gated:
        next(rows(get("gpqa"), "wait"))
    assert gated.value.__cause__ is hub.error
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    hub.error = type("DatasetGenerationError", (Exception,), {})("while generating the dataset")
    hub.error.__cause__ = ValueError("no column in https://me:pass@host, token secret-of-mine")
    with pytest.raises(LoadError, match=r"\(no column in https://\*\*\*@host, token \*\*\*\); use"):
        documents.read("c4")


def test_documents_are_cleaned(hub):
    news = ("Awesome075/multi_news_parquet", None, "test", True)
    report = ("ccdv/govreport-summarization", "document", "test", True)
    referenced = ("a/b", "en", "test", False)
    hub.rows = {
        news: [
            {"document": " One.NEWLINE_CHAR Two. ||||| Three. |||||", "summary": "– Short ||| "},
            {"document": "", "summary": "– Nothing to sum up."},
            {"document": "Four.", "summary": "– Long."},
            {"document": "Five.", "summary": "– Not wanted."},
        ],
        report: [{"report": " A. ", "summary": "B."}, {"report": "D", "summary": ["E", "F"]}],
        referenced: [{"body": "d", "abstract": "s"}, {"body": None, "abstract": "s"}],
    }
    first = Document("0", "One.\n Two.\n\nThree.", "Short |||")
    assert load_documents("multi_news", 2) == [first, Document("2", "Four.", "Long.")]
    assert hub.read == 3
    reports = [Document("0", "A.", "B."), Document("1", "D", "E\nF")]
    assert load_documents("gov_report", 2) == reports
    assert load_documents("hub:a/b/en:test:body:abstract") == [Document("0", "d", "s")]
    assert hub.calls == [news, report, referenced]


def test_documents_keep_their_ids_and_a_seed_samples_them(hub):
    call = ("EdinburghNLP/xsum", None, "test", False)
    hub.rows = {call: [{"id": 100 + i, "document": f"d{i}", "summary": f"s{i}"} for i in range(50)]}
    whole = load_documents("xsum")
    assert whole[7] == Document("107", "d7", "s7")
    assert hub.revisions == ["refs/convert/parquet"]
    small, large = load_documents("xsum", 5, seed=3), load_documents("xsum", 20, seed=3)
    assert [row.id for row in small] == sorted(row.id for row in small)
    assert [row for row in large if row in small] == small and len(large) == 20
    assert load_documents("xsum", 5, seed=4) != small != whole[:5]
    assert load_documents("xsum", 99, seed=4) == whole


def test_the_real_library_on_parquet_files(tmp_path, monkeypatch):
    # The library takes a folder ./owner/name for the repository of that name.
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "tldr": ["1", "2", "3"]})
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"owner/name/data/{split}-00000-of-00001.parquet")
    assert documents.read("hub:owner/name:train[:2]:body") == "one\n\ntwo"
    name = "hub:owner/name/default:test:body:tldr"
    assert load_documents(name, 1) == [Document("0", "one", "1")]
