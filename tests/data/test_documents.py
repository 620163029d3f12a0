"""Documents for summarisation: from the hub (a fake ``datasets``, and the real one), and JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dart_llm.data import datasets as cleaning
from dart_llm.data.datasets import documents, perplexity_text, positions
from dart_llm.data.documents import Document, check, load_documents, read_documents
from dart_llm.errors import ConfigError, LoadError, UnknownName
from fake_datasets import Call, FakeDatasets, install


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A fake ``datasets`` module, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return install(monkeypatch)


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


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_jsonl_file_with_each_kind_of_column(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"document": " A\u2028long text. ", "summary": "Short."},
        {"text": "t", "summary": ["One.", "Two."], "id": 7},
        {"article": "a", "highlights": "[\"it's\", 'x']", "id": "x"},
        {"report": "r", "summary": "[1] is a footnote [2]", "document": "first of them"},
    )
    path.write_text("\ufeff\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_documents(path) == [
        Document("2", "A\u2028long text.", "Short."),
        Document("7", "t", "One.\nTwo."),
        Document("x", "a", "it's\nx"),
        Document("5", "first of them", "[1] is a footnote [2]"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", r"d\.jsonl holds no documents: add lines such as \{\"document\""),
        ('{"document": "a"}\n', r"line 1 of .* has no summary \(or highlights\) but document: w"),
        ('{"a": 1, "b": 2}\n', r"line 1 .* no document \(or text, article, report\) but a, b: wr"),
        ("{}\n", r"line 1 of .*d\.jsonl has no document .* but nothing: write"),
        ('\n{"document": "a", "summary": " "}\n', r"the summary in line 2 of .* is empty or no te"),
        ('{"document": 3, "summary": "a"}\n', r"the document in line 1 of .* is empty or no text"),
        ('{"document": "a", "summary": []}\n', r"the summary in line 1 of .* is empty or no text"),
        (
            '{"document": "a", "summary": "s"}\n[]\n',
            r"line 2 .* needs a JSON object, and holds a l",
        ),
        (
            '{"document": "a \\ud83d b", "summary": "s"}\n',
            r"line 1 of .* half a character, .ud83d:",
        ),
        ('{"document": \n', r"line 1 of .*d\.jsonl is not JSON"),
        (
            '{"document": "a", "summary": "s", "id": 2}\n{"document": "a", "summary": "s"}\n',
            r'lines 1 and 2 of .* have the same id "2": give each document its own',
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_documents(path)


def test_a_character_written_in_two_halves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"document": "a \\ud83d\\ude00", "summary": "\\\\ud83d"}\n', encoding="utf-8")
    assert read_documents(path) == [Document("1", "a \U0001f600", "\\ud83d")]


def test_load_documents_takes_names_references_and_files(hub: FakeDatasets) -> None:
    hub.rows = {
        ("EdinburghNLP/xsum", None, "test", True): [{"id": 5, "document": "d", "summary": "s"}],
        ("a/b", None, "test", False): [{"x": "d", "y": "s"}],
    }
    assert load_documents("xsum", 1) == [Document("5", "d", "s")]
    assert load_documents("hub:a/b:test:x:y") == [Document("0", "d", "s")]
    rows = [{"document": f"d{i}", "summary": "s"} for i in range(20)]
    path = str(write(Path("mine.jsonl"), *rows))
    assert [found.id for found in load_documents(path, 3)] == ["1", "2", "3"]
    sampled = load_documents(path, 3, seed=1)
    assert [int(found.id) - 1 for found in sampled] == positions(20, 3, 1)
    assert len(load_documents(path)) == 20


def test_a_wrong_name_is_refused_without_the_hub(hub: FakeDatasets) -> None:
    for name in ("xsum", "gov_report", "hub:a/b:test:x:y", str(write(Path("m.jsonl"), {}))):
        check(name)
    with pytest.raises(
        ConfigError, match=r'no documents "xsun" .* \(did you mean xsum\?\): use cnn'
    ):
        load_documents("xsun")
    with pytest.raises(ConfigError, match=r"e\.g\. hub:EdinburghNLP/xsum:test:document:summary"):
        check("hub:a/b:test:x")
    assert hub.calls == []


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
    assert cleaning.reference(value) == text


def test_the_real_library_on_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library takes a folder ./owner/name for the repository of that name.
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "tldr": ["1", "2", "3"]})
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"owner/name/data/{split}-00000-of-00001.parquet")
    assert perplexity_text("hub:owner/name:test:body") == "one\n\ntwo\n\nthree"
    assert perplexity_text("hub:owner/name:train[:2]:body") == "one\n\ntwo"
    found = documents("hub:owner/name/default:test:body:tldr", 1)
    assert found == [{"id": "0", "document": "one", "summary": "1"}]
    for name, message in {
        "hub:owner/name:test:text": "has no column text: its columns are body, tldr;",
        "hub:owner/name:dev:body": r'\(Unknown split "dev". Should be one of .*train.*test',
        "hub:owner/name/en:test:body": r"\(BuilderConfig 'en' not found. Available: \['default'",
    }.items():
        with pytest.raises(LoadError, match=message):
            perplexity_text(name)
    (tmp_path / "owner/name/name.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(LoadError, match=r"\(Dataset scripts are no longer supported, but found"):
        perplexity_text("hub:owner/name:test:body")
