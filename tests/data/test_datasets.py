"""Data sets of the hub: the table, references, MMLU, and what a fake ``datasets`` library gives."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dart_llm.data.datasets import (
    DATA_SETS,
    MMLU_SUBJECTS,
    USES,
    Document,
    documents,
    get,
    hub_text,
    mmlu_questions,
    names,
    reference,
    rows,
)
from dart_llm.errors import ConfigError, LoadError
from fake_hub import install_datasets
from steps import refused

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
def test_the_table_is_complete_and_what_calibrates_is_not_scored(snapshot):
    assert {use: names(use) for use in USES if use != "eval"} == {
        "perplexity": ("c4", "wikitext2"),
        "calibration": ("c4_train",),
        "summarize": ("cnn_dailymail", "gov_report", "multi_news", "xsum"),
        "prompts": ("mmlu",),
    }
    assert names() == tuple(sorted(DATA_SETS))
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
    assert refused(get, ["xsumm"]) | refused(names, ["sum"]) == snapshot


class Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without their functions."""


Loader.add_multi_constructor("!", lambda *_arguments: None)


def settings(path):
    found = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    above = found.get("include")
    return {**settings(path.parent / above), **found} if above else found


def test_the_ids_are_those_of_the_installed_tasks():
    library = Path(pytest.importorskip("lm_eval").__file__).parent
    folders = "arc glue/rte gpqa/n_shot hellaswag medmcqa mmlu/default openbookqa super_glue/boolq"
    tasks = {}
    for folder in f"{folders} winogrande".split():
        found = map(settings, (library / "tasks" / folder).glob("*.yaml"))
        tasks.update({one["task"]: one for one in found if isinstance(one.get("task"), str)})
    for data in DATA_SETS.values():
        for task in data.tasks:
            own = tasks[f"mmlu_{data.config}" if task == "mmlu" else task]
            known = (own["dataset_path"], own.get("dataset_name"))
            split = own.get("test_split") or own["validation_split"]
            assert (*known, split) == (data.hub_id, data.config, data.split)


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
    found = mmlu_questions("astronomy")
    assert found == [{**shown, "question": text} for text in ("q0", "q1")]
    assert hub.calls == calls
    assert [row["answer"] for row in mmlu_questions("astronomy", answers=True)] == [2, 3]
    folder = Path("datasets/mmlu")  # local files replace the hub
    write(folder / "astronomy_dev.jsonl", question("one\u2028line"))
    write(folder / "astronomy_validation.jsonl", question("two"))
    write(folder / "astronomy_test.jsonl", question("hidden"))
    write(folder / "virology_dev.jsonl", question("local"))
    hub.calls.clear()
    found = mmlu_questions("astronomy") + mmlu_questions("virology")
    assert [row["question"] for row in found] == ["one\u2028line", "two", "local"]
    assert all(set(row) == {"subject", "question", "choices"} for row in found)
    assert hub.calls == []


def test_local_questions_that_cannot_be_used_are_named(tmp_path, monkeypatch, snapshot):
    monkeypatch.chdir(tmp_path)
    subjects = refused(mmlu_questions, ["colege_bio"])
    path = Path("datasets/mmlu/virology_dev.jsonl")
    path.parent.mkdir(parents=True)

    def read(text):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        mmlu_questions("virology", answers=True)

    wrong = [json.dumps(question("q", answer=answer)) for answer in (None, 4, -1, "E", True)]
    texts = ['{"question": "q"}\n', '{"question": "q", "choices": []}\n']
    texts += ['\n{"question": \n', "\udcff\n", *wrong]
    assert subjects | refused(read, texts) == snapshot


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
    assert hub_text("wikitext2") == "\n\n = Title = \n\n\n Some text . \n"
    hub.read = 0
    assert hub_text("c4").split() == [f"d{i}" for i in range(1100)]
    assert hub_text("c4_train").startswith("d0\n\nd1\n\nd2")
    assert hub.read == 1100 + 512  # streamed: no more than is needed
    assert hub_text("hub:a/b:test:body") == "one\n\n\n\ntwo"
    assert hub_text("hub:a/b/en:dev[:2]:body") == "d0\n\nd1"
    assert hub.calls == [wikitext, *c4, whole, part]


MALFORMED = (
    *("hub:", "hub:b:test:text", "hub:a/b:test", "hub:a/b:test:text:summary"),
    *("hub:a/b:test[:0]:text", "hub:a/b:test[5:]:text", "hub:a/b::text", "hub:a/b/:test:text"),
    *("hub:a /b:test:text", "wikitext"),
)


def test_what_cannot_be_used_is_never_empty_text(hub, snapshot):
    def read(found):
        hub.rows = {("a/b", None, "test", False): found}
        hub_text("hub:a/b:test:body")

    rows = [], [{"text": "x", "id": 1}], [{"body": 3, "text": "x"}], [{"body": " "}, {"body": ""}]
    unusable = refused(read, rows, LoadError)
    hub.calls.clear()
    assert unusable | refused(hub_text, MALFORMED, ConfigError) == snapshot
    with pytest.raises(ConfigError, match="must be 1 or more, not 0"):
        documents("xsum", 0)
    assert hub.calls == []


def test_what_the_library_raises_is_one_sentence_without_a_token(hub, monkeypatch, snapshot):
    hub.error = ConnectionError("no route\n  to host.\n")
    said = refused(documents, ["xsum"]) | refused(mmlu_questions, ["anatomy"])
    with pytest.raises(
        LoadError, match="accept its conditions on the hub and set HF_TOKEN"
    ) as gated:
        next(rows(get("gpqa"), "choose another task"))
    assert said | {"gpqa": str(gated.value)} == snapshot and gated.value.__cause__ is hub.error
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    generation = type("DatasetGenerationError", (Exception,), {})("while generating the dataset")
    generation.__cause__ = ValueError("no column in https://me:pass@host, token secret-of-mine")
    offline = ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")
    for hub.error, words in (
        (generation, r"\(no column in https://\*\*\*@host, token \*\*\*\); use"),
        (offline, r"\(it is not in the cache and HF_HUB_OFFLINE is set\);"),
    ):
        with pytest.raises(LoadError, match=words):
            hub_text("c4")


def test_documents_are_cleaned(hub):
    news = ("Awesome075/multi_news_parquet", None, "test", True)
    report = ("ccdv/govreport-summarization", "document", "test", True)
    own = ("a/b", "en", "test", False)
    hub.rows = {
        news: [
            {"document": " One.NEWLINE_CHAR Two. ||||| Three. |||||", "summary": "– Short ||| "},
            {"document": "", "summary": "– Nothing to sum up."},
            {"document": "Four.", "summary": "– Long."},
            {"document": "Five.", "summary": "– Not wanted."},
        ],
        report: [
            {"report": " A. ", "summary": "['B.', \"C's.\"]"},
            {"report": "D", "summary": ["E", "F"]},
        ],
        own: [{"body": "d", "abstract": "s"}, {"body": None, "abstract": "s"}],
    }
    assert documents("multi_news", 2) == [
        Document("0", "One.\n Two.\n\nThree.", "Short |||"),
        Document("2", "Four.", "Long."),
    ]
    assert hub.read == 3
    assert documents("gov_report", 2) == [
        Document("0", "A.", "B.\nC's."),
        Document("1", "D", "E\nF"),
    ]
    name = "hub:a/b/en:test:body:abstract"
    assert documents(name) == [Document("0", "d", "s")]
    assert hub.calls == [news, report, own]
    assert reference(["One.", " ", ["Two."]]) == "One.\nTwo."


def test_documents_keep_their_ids_and_a_seed_samples_them(hub):
    call = ("EdinburghNLP/xsum", None, "test", False)
    hub.rows = {call: [{"id": 100 + i, "document": f"d{i}", "summary": f"s{i}"} for i in range(50)]}
    whole = documents("xsum")
    assert whole[7] == Document("107", "d7", "s7")
    assert hub.revisions == ["refs/convert/parquet"]
    small, large = documents("xsum", 5, seed=3), documents("xsum", 20, seed=3)
    assert [row.id for row in small] == sorted(row.id for row in small)
    assert [row for row in large if row in small] == small and len(large) == 20
    assert documents("xsum", 5, seed=4) != small != whole[:5]
    assert documents("xsum", 99, seed=4) == whole


def test_the_real_library_on_parquet_files(tmp_path, monkeypatch):
    # The library takes a folder ./owner/name for the repository of that name.
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "tldr": ["1", "2", "3"]})
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"owner/name/data/{split}-00000-of-00001.parquet")
    assert hub_text("hub:owner/name:train[:2]:body") == "one\n\ntwo"
    found = documents("hub:owner/name/default:test:body:tldr", 1)
    assert found == [Document("0", "one", "1")]
