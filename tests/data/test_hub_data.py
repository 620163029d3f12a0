"""Hub data sets through a fake ``datasets`` module, and local MMLU files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dart_llm.data.datasets import (
    MMLU_SUBJECTS,
    documents,
    hub_text,
    mmlu_questions,
    positions,
    reference,
)
from dart_llm.errors import ConfigError, LoadError, MissingExtra, UnknownName
from fake_datasets import Call, FakeDatasets, install


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install(monkeypatch)


def question(text: str) -> dict[str, Any]:
    return {"question": text, "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x"}


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def test_there_are_57_subjects_in_order() -> None:
    assert len(MMLU_SUBJECTS) == len(set(MMLU_SUBJECTS)) == 57
    assert list(MMLU_SUBJECTS) == sorted(MMLU_SUBJECTS)


def test_hub_questions_are_dev_then_validation_without_answers(hub: FakeDatasets) -> None:
    calls: list[Call] = [("cais/mmlu", "astronomy", s, False) for s in ("dev", "validation")]
    hub.rows = {calls[0]: [question("q0"), question("q1")], calls[1]: [question("q2")]}
    expected = [
        {"subject": "astronomy", "question": text, "choices": ["a", "b", "c", "d"]}
        for text in ("q0", "q1", "q2")
    ]
    assert mmlu_questions("astronomy") == expected
    assert hub.calls == calls


def test_a_local_folder_replaces_the_hub(hub: FakeDatasets, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder / "astronomy_dev.jsonl", question("one\u2028line"))
    write(folder / "astronomy_validation.jsonl", question("two"))
    write(folder / "astronomy_test.jsonl", question("hidden"))
    found = mmlu_questions("astronomy", folder)
    assert [row["question"] for row in found] == ["one\u2028line", "two"]
    assert all(set(row) == {"subject", "question", "choices"} for row in found)
    assert hub.calls == []


def test_the_folder_in_the_current_folder_comes_before_the_hub(hub: FakeDatasets) -> None:
    write(Path("datasets/mmlu/virology_dev.jsonl"), question("local"))
    assert [row["question"] for row in mmlu_questions("virology")] == ["local"]
    assert hub.calls == []


def test_local_files_that_cannot_be_used_are_named(hub: FakeDatasets, tmp_path: Path) -> None:
    path = tmp_path / "virology_dev.jsonl"
    with pytest.raises(ConfigError, match=r"holds no virology_dev\.jsonl: put it there"):
        mmlu_questions("virology", tmp_path)
    contents = {
        "\n": r"virology_dev\.jsonl holds no questions",
        '{"question": "q"}\n': r'line 1 of .*_dev\.jsonl needs "question" \(text\) and "choices"',
        '{"question": "q", "choices": ["a"]}\n[1]\n': r"line 2 of .*_dev\.jsonl needs",
        '\n{"question": \n': r"line 2 of .*_dev\.jsonl is not JSON",
    }
    for text, message in contents.items():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            mmlu_questions("virology", tmp_path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"virology_dev\.jsonl cannot be read as UTF-8"):
        mmlu_questions("virology", tmp_path)


def test_an_unknown_subject_names_the_near_ones(hub: FakeDatasets, tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(UnknownName, match="'colege_physics'; did you mean college_physics"):
            mmlu_questions("colege_physics", folder)
    assert hub.calls == []


def test_wikitext2_is_the_raw_test_split(hub: FakeDatasets) -> None:
    call: Call = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)
    hub.rows = {call: [{"text": ""}, {"text": " = Title = \n"}, {"text": " Some text . \n"}]}
    assert hub_text("wikitext2") == "\n\n = Title = \n\n\n Some text . \n"
    assert hub.calls == [call]


def test_c4_streams_only_the_first_documents(hub: FakeDatasets) -> None:
    call: Call = ("allenai/c4", "en", "validation", True)
    hub.rows = {call: ({"text": f"document {i}"} for i in range(1000))}
    assert hub_text("c4", documents=3) == "document 0 document 1 document 2"
    assert hub.calls == [call]
    assert hub.read == 3


def test_c4_is_1100_documents_and_calibration_is_the_training_split(hub: FakeDatasets) -> None:
    calls: list[Call] = [("allenai/c4", "en", s, True) for s in ("validation", "train")]
    hub.rows = {call: ({"text": f"d{i}"} for i in range(2000)) for call in calls}
    assert hub_text("c4").split() == [f"d{i}" for i in range(1100)]
    assert hub_text("c4_train", 3) == "d0\n\nd1\n\nd2"
    assert hub.calls == calls
    assert hub.read == 1103
    with pytest.raises(ConfigError, match="must be 1 or more, not 0"):
        hub_text("c4_train", 0)


def test_mmlu_answers_only_when_asked(hub: FakeDatasets, tmp_path: Path) -> None:
    calls: list[Call] = [("cais/mmlu", "virology", s, False) for s in ("dev", "validation")]
    hub.rows = {calls[0]: [question("q0")], calls[1]: [question("q1") | {"answer": "D"}]}
    found = mmlu_questions("virology", answers=True)
    assert [(row["question"], row["answer"]) for row in found] == [("q0", 2), ("q1", 3)]
    for wrong in (None, 4, -1, "E", True):
        write(tmp_path / "virology_dev.jsonl", question("q") | {"answer": wrong})
        with pytest.raises(ConfigError, match=r'line 1 of .*_dev.jsonl needs "answer", the pos'):
            mmlu_questions("virology", tmp_path, answers=True)


def test_any_column_of_the_hub(hub: FakeDatasets) -> None:
    whole: Call = ("a/b", None, "test", False)
    part: Call = ("a/b", "en", "dev", True)
    hub.rows = {
        whole: [{"body": "one"}, {"body": ""}, {"body": "two"}],
        part: ({"body": f"d{i}", "n": i} for i in range(9)),
    }
    assert hub_text("hub:a/b:test:body") == "one\n\n\n\ntwo"
    assert hub_text("hub:a/b/en:dev[:2]:body") == "d0\n\nd1"
    assert hub.calls == [whole, part]


UNUSABLE: dict[str, tuple[list[Any], str]] = {
    "empty": ([], r"a/b \(test\) is empty; use the embedded text or a text file"),
    "another column": (
        [{"text": "x", "id": 1}],
        r"a/b \(test\) has no column body: its columns are text, id; use the embedded",
    ),
    "numbers": (
        [{"body": 3, "text": "x"}],
        r"column body of a/b \(test\) holds int, not text; name another of body, text",
    ),
    "blank": ([{"body": " "}, {"body": ""}], r"column body of a/b \(test\) holds no text; use"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_data_set_that_cannot_be_used_is_never_empty_text(hub: FakeDatasets, case: str) -> None:
    rows, message = UNUSABLE[case]
    hub.rows = {("a/b", None, "test", False): rows}
    with pytest.raises(LoadError, match=message):
        hub_text("hub:a/b:test:body")


MALFORMED = (
    *("hub:", "hub:b:test:text", "hub:a/b:test", "hub:a/b:test:text:summary"),
    *("hub:a/b:test[:0]:text", "hub:a/b:test[5:]:text", "hub:a/b::text", "hub:a/b/:test:text"),
    "hub:a /b:test:text",
)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reference_shows_an_example(hub: FakeDatasets, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hub_text(name)
    assert str(caught.value) == (
        f'"{name}" is not a data set of the hub with a column for the text: write '
        "hub:owner/name[/configuration]:split:text-column, e.g. "
        "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text"
    )
    assert hub.calls == []


def test_an_unknown_text_or_number_is_refused(hub: FakeDatasets) -> None:
    with pytest.raises(UnknownName, match="unknown data set 'wikitext'; did you mean wikitext2"):
        hub_text("wikitext")
    with pytest.raises(ConfigError, match="must be 1 or more, not 0"):
        hub_text("c4", documents=0)
    assert hub.calls == []


READERS: dict[str, tuple[Callable[[], Any], str]] = {
    "xsum": (
        lambda: documents("xsum", 3),
        "EdinburghNLP/xsum (test) could not be fetched from the hub (no route to host); "
        'give a JSONL file instead, one {"document": ..., "summary": ...} a line',
    ),
    "mmlu": (
        lambda: mmlu_questions("anatomy"),
        "cais/mmlu (anatomy, dev) could not be fetched from the hub (no route to host); "
        "to work without it put anatomy_dev.jsonl into datasets/mmlu/",
    ),
    "c4": (
        lambda: hub_text("c4"),
        "allenai/c4 (en, validation) could not be fetched from the hub (no route to host); "
        "use the embedded text or a text file of your own instead",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_hub_that_cannot_be_reached_is_one_sentence(hub: FakeDatasets, name: str) -> None:
    hub.error = ConnectionError("no route\n  to host.\n")
    read, sentence = READERS[name]
    with pytest.raises(LoadError) as caught:
        read()
    assert str(caught.value) == f"the data set {sentence}"
    assert caught.value.__cause__ is hub.error


def test_a_stream_that_breaks_is_the_same_error(hub: FakeDatasets) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise TimeoutError

    hub.rows = {("allenai/c4", "en", "validation", True): broken()}
    with pytest.raises(LoadError, match=r"allenai/c4 \(en, validation\) .* \(TimeoutError\);"):
        hub_text("c4")


@pytest.mark.parametrize("module", [None, ModuleType("datasets")])
def test_a_missing_library_gives_the_pip_command(
    hub: FakeDatasets, monkeypatch: pytest.MonkeyPatch, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", module)  # a folder datasets/ imports as empty
    with pytest.raises(MissingExtra, match=r"needs datasets, .* pip install 'dart-llm\[eval\]'"):
        hub_text("c4")


def test_an_error_tells_no_token_and_the_true_cause(
    hub: FakeDatasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    generation = type("DatasetGenerationError", (Exception,), {})
    hub.error = generation("An error occurred while generating the dataset")
    hub.error.__cause__ = ValueError("no column in https://me:pass@host, token secret-of-mine")
    with pytest.raises(LoadError, match=r"\(no column in https://\*\*\*@host, token \*\*\*\); use"):
        hub_text("c4")
    hub.error = ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")
    with pytest.raises(LoadError, match=r"\(it is not in the cache and HF_HUB_OFFLINE is set\);"):
        hub_text("hub:a/b:test:text")


def test_documents_are_cleaned(hub: FakeDatasets) -> None:
    news: Call = ("Awesome075/multi_news_parquet", None, "test", True)
    report: Call = ("ccdv/govreport-summarization", "document", "test", True)
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
    }
    assert documents("multi_news", 2) == [
        {"id": "0", "document": "One.\n Two.\n\nThree.", "summary": "Short |||"},
        {"id": "2", "document": "Four.", "summary": "Long."},
    ]
    assert hub.read == 3
    assert documents("gov_report", 2) == [
        {"id": "0", "document": "A.", "summary": "B.\nC's."},
        {"id": "1", "document": "D", "summary": "E\nF"},
    ]
    assert hub.calls == [news, report]


def test_documents_keep_their_ids_and_a_seed_samples_them(hub: FakeDatasets) -> None:
    call: Call = ("EdinburghNLP/xsum", None, "test", False)
    hub.rows = {call: [{"id": 100 + i, "document": f"d{i}", "summary": f"s{i}"} for i in range(50)]}
    whole = documents("xsum")
    assert whole[7] == {"id": "107", "document": "d7", "summary": "s7"}
    assert hub.revisions == ["refs/convert/parquet"]
    small, large = documents("xsum", 5, seed=3), documents("xsum", 20, seed=3)
    assert [row["id"] for row in small] == sorted(row["id"] for row in small)
    assert [row for row in large if row in small] == small
    assert len(large) == 20
    assert documents("xsum", 5, seed=4) != small != documents("xsum")[:5]
    assert documents("xsum", 99, seed=4) == whole
    assert hub.calls == [call] * 6


def test_documents_of_any_data_set(hub: FakeDatasets) -> None:
    call: Call = ("a/b", "en", "test", False)
    hub.rows = {call: [{"body": "d", "abstract": "s"}, {"body": None, "abstract": "s"}]}
    assert documents("hub:a/b/en:test:body:abstract") == [
        {"id": "0", "document": "d", "summary": "s"}
    ]
    hub.rows = {call: [{"body": "d", "abstract": None}]}
    with pytest.raises(LoadError, match=r"a/b \(en, test\) holds no row with both a document and"):
        documents("hub:a/b/en:test:body:abstract")
    with pytest.raises(ConfigError, match="a column for the document and one for the summary"):
        documents("hub:a/b/en:test:body")
    with pytest.raises(ConfigError, match="must be 1 or more, not 0"):
        documents("xsum", 0)
    with pytest.raises(UnknownName, match="'xsumm'; did you mean xsum"):
        documents("xsumm")


def test_positions_are_nested_sorted_and_seeded() -> None:
    assert positions(5, None, None) == positions(5, 9, 1) == [0, 1, 2, 3, 4]
    assert positions(5, 2, None) == [0, 1]
    chosen = [positions(1000, n, 0) for n in (10, 100, 500)]
    assert chosen[0] == sorted(chosen[0])
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
    assert chosen[0] == positions(1000, 10, 0) != positions(1000, 10, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("['One.', 'Two.']", "One.\nTwo."),
        (["One.", " ", ["Two."]], "One.\nTwo."),
        ("[]", ""),
        (None, ""),
        (3, ""),
        ("[1, 2]", "[1, 2]"),
        ("['open", "['open"),
        ("[sic] a plain summary [sic]", "[sic] a plain summary [sic]"),
    ],
)
def test_a_reference_is_text_never_a_printed_list(value: Any, text: str) -> None:
    assert reference(value) == text


def test_the_real_library_on_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library takes a folder ./owner/name for the repository of that name.
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "tldr": ["1", "2", "3"]})
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"owner/name/data/{split}-00000-of-00001.parquet")
    assert hub_text("hub:owner/name:test:body") == "one\n\ntwo\n\nthree"
    assert hub_text("hub:owner/name:train[:2]:body") == "one\n\ntwo"
    found = documents("hub:owner/name/default:test:body:tldr", 1)
    assert found == [{"id": "0", "document": "one", "summary": "1"}]
    for name, message in {
        "hub:owner/name:test:text": "has no column text: its columns are body, tldr;",
        "hub:owner/name:dev:body": r'\(Unknown split "dev". Should be one of .*train.*test',
        "hub:owner/name/en:test:body": r"\(BuilderConfig 'en' not found. Available: \['default'",
    }.items():
        with pytest.raises(LoadError, match=message):
            hub_text(name)
    (tmp_path / "owner/name/name.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(LoadError, match=r"\(Dataset scripts are no longer supported, but found"):
        hub_text("hub:owner/name:test:body")
