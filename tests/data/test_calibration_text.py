"""Calibration: which text is read, and how it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration_cases import WORDS, Letters
from dart_llm.data import datasets as hub_data
from dart_llm.data import documents as calibration_text
from dart_llm.data.documents import check_disjoint, documents, sequences, title
from dart_llm.errors import ConfigError, LoadError
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import check_calibration
from dart_llm.pruning.config import PruneConfig


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text(WORDS)
    return str(path)


def letters(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


def rows(path: Path, *given: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def test_text_files_and_rows(tmp_path: Path, text: str) -> None:
    assert list(documents(text)) == [WORDS]
    source = rows(
        tmp_path / "rows.jsonl",
        {"document": "first", "summary": "no"},
        {"text": "second", "document": "no"},
        {"document": "third"},
    )
    assert list(documents(source)) == ["first", "second", "third"]
    assert list(documents(f"{source}#1")) == ["second", "third"]
    assert title(f"{source}#1") == "rows.jsonl from row 1 on"
    assert title(source) == "rows.jsonl"
    odd = tmp_path / "odd#1"
    odd.write_text("a file may be called so")
    assert list(documents(str(odd))) == ["a file may be called so"]


@pytest.mark.parametrize(
    ("name", "content", "source", "words"),
    [
        ("a.jsonl", '{"document": "x"}\n', "a.jsonl#1", "has 1 rows: it cannot be read from row 1"),
        ("a.jsonl", '{"answer": "x"}\n', "a.jsonl", "line 1 of .* neither a text nor a document"),
        ("a.txt", "x", "a.txt#5", "only a JSONL file has rows"),
        ("a.txt", "x", "b.txt", 'no calibration text ".*b.txt": give a text of your own with'),
        ("a.txt", "\udcff", "a.txt", "cannot read the calibration text"),
    ],
)
def test_texts_that_cannot_be_used(
    tmp_path: Path, name: str, content: str, source: str, words: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        list(documents(str(tmp_path / source)))


def test_the_hub_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "calibration_text", lambda: "from afar")
    for source in (None, "c4", "c4_train"):
        assert list(documents(source)) == ["from afar"]
        assert title(source) == "C4 (English, training split)"

    def away() -> str:
        raise LoadError(f"C4 could not be fetched; {hub_data.INSTEAD['text']}")

    monkeypatch.setattr(hub_data, "calibration_text", away)
    with pytest.raises(LoadError, match=r"^C4 could not be fetched; give a text of your own with"):
        list(documents(None))


def test_evaluated_files_are_refused(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x")
    check_disjoint(text, {str(other): None, "embedded": None})
    check_disjoint(None, {text: None})
    with pytest.raises(ConfigError, match="is evaluated and cannot be the calibration text too"):
        check_disjoint(text, {str(tmp_path / "." / "calibration.txt"): None})
    source = rows(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    check_disjoint(f"{source}#1", {source: 1})
    with pytest.raises(ConfigError, match=r"another text, or start .*: .*rows\.jsonl#2$"):
        check_disjoint(f"{source}#1", {source: 2})
    with pytest.raises(ConfigError, match=r"another text$"):
        check_disjoint(f"{source}#1", {source: None})


def test_a_text_that_perplexity_spreads_over_is_refused_from_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slices lie all over the text, after that row too; so do documents without a limit."""
    few = MeasureOptions(limit=1)
    wanda = PruneConfig.build("wanda")
    source = rows(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    check_calibration(wanda, f"{source}#1", [f"summarize:{source}"], few)
    for options in (MeasureOptions(), MeasureOptions(limit=1, sample_seed=0)):
        with pytest.raises(ConfigError, match="is evaluated"):
            check_calibration(wanda, f"{source}#1", [f"summarize:{source}"], options)
    with pytest.raises(ConfigError, match=r"rows.jsonl is evaluated .*: give another text$"):
        check_calibration(wanda, f"{source}#1", [f"perplexity:{source}"], few)
    check_calibration(PruneConfig.build("griffin"), source, [f"perplexity:{source}"], few)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "plain.txt").write_text("x")
    with pytest.raises(ConfigError, match="is evaluated"):
        check_calibration(wanda, "datasets/plain.txt", ["perplexity:plain"], few)


def test_windows_are_cut_from_the_joined_texts() -> None:
    found = sequences(Letters(), ["abcd", "efg", "hij"], 3, 4)
    assert found.tolist() == [letters("abcd"), letters("\n\nef"), letters("g\n\nh")]
    assert sequences(Letters(), ["abcd", "efg"], 9, 4).shape == (2, 4)
    with pytest.raises(ConfigError, match="has 4 tokens and one sequence needs 5"):
        sequences(Letters(), ["abcd"], 1, 5)


def test_every_window_starts_as_the_tokenizer_starts_a_text() -> None:
    starting = Letters(bos=1, adds=True)
    assert sequences(starting, ["abcdef"], 9, 4).tolist() == [
        [1, *letters("abc")],
        [1, *letters("def")],
    ]
    assert sequences(Letters(bos=1), ["abcd"], 9, 4).tolist() == [letters("abcd")]


def test_no_more_text_is_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "PIECE", 8)

    def endless():
        while True:
            yield "abc" * 5

    found = sequences(Letters(), endless(), 3, 10)
    assert found.flatten().tolist() == letters("abc" * 5 + "\n\n" + "abc" * 5)[:30]
