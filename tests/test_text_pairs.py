"""Texts are paired by the id in their line, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.text_pairs import Pair, read_pairs


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(name: str, method: str, seed: int = 0, **more: object) -> dict:
    key = f"free/{name}/{method}/{seed}"
    row = {
        "key": key,
        "id": name,
        "method": method,
        "seed": seed,
        "text": f"{method} {name} {seed}",
    }
    return {**row, **more}


def test_pairs_follow_id_and_seed_not_place(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "texts.jsonl",
        text("b", "dart"),
        text("a", "dense", 1),
        text("a", "dart", 1),
        text("a", "dense"),
        text("b", "dense"),
        text("a", "dart"),
    )
    found = read_pairs(path)
    assert found.problems == ()
    assert found.pairs == (
        Pair("free/b/dart/0", "b", "dart", 0, "dart b 0", "dense b 0"),
        Pair("free/a/dart/1", "a", "dart", 1, "dart a 1", "dense a 1"),
        Pair("free/a/dart/0", "a", "dart", 0, "dart a 0", "dense a 0"),
    )


def test_markers_and_log_lines_inside_a_text_are_text(tmp_path: Path) -> None:
    """The published scripts cut texts out of logs by markers."""
    content = "=== Generated text ===\n[INFO] done\n</s>\u2028 after the end"
    path = lines(tmp_path / "t.jsonl", text("a", "dense"), text("a", "dart", text=content))
    assert read_pairs(path).pairs[0].candidate == content


def test_texts_without_dense_counterpart_are_said(tmp_path: Path) -> None:
    rows = [text("a", "dense"), text("a", "dart"), text("a", "dart", 1)]
    rows += [text(str(number), "dart") for number in range(6)]
    found = read_pairs(lines(tmp_path / "t.jsonl", *rows))
    assert [pair.key for pair in found.pairs] == ["free/a/dart/0"]
    assert found.problems == (
        "no dense text of the same id and seed for free/a/dart/1, free/0/dart/0, free/1/dart/0, "
        "free/2/dart/0, free/3/dart/0 and 2 more",
    )


def test_an_empty_text_is_a_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", text("a", "dense", text=""), text("a", "dart"))
    assert read_pairs(path).pairs[0].reference == ""


def test_given_references_serve_all_methods(tmp_path: Path) -> None:
    texts = lines(tmp_path / "t.jsonl", text("a", "dense"), text("a", "dart"), text("c", "dart"))
    references = lines(tmp_path / "gold.jsonl", {"id": "b", "text": "B"}, {"id": "a", "text": "A"})
    found = read_pairs(texts, references)
    assert [(pair.method, pair.reference) for pair in found.pairs] == [
        ("dense", "A"),
        ("dart", "A"),
    ]
    assert found.problems == (
        "no reference in gold.jsonl for free/c/dart/0",
        "no text in t.jsonl for the reference b",
    )


def test_two_plain_files(tmp_path: Path) -> None:
    texts = lines(tmp_path / "t.jsonl", {"id": 7, "text": "x"}, {"id": 8, "text": "y"})
    references = lines(tmp_path / "r.jsonl", {"id": "8", "text": "Y"}, {"id": "7", "text": "X"})
    found = read_pairs(texts, references)
    assert [(pair.id, pair.candidate, pair.reference) for pair in found.pairs] == [
        ("7", "x", "X"),
        ("8", "y", "Y"),
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": "a"}], 'line 1 of .* needs "id" and "text"'),
        ([text("a", "dense"), {"text": "no id"}], 'line 2 of .* needs "id" and "text"'),
        ([text("a", "dart"), text("a", "dart")], "line 2 of .* repeats free/a/dart/0: keep one"),
        (
            [text("a", "dense"), text("a", "dense", key="other")],
            "line 2 of .* repeats other: keep one",
        ),
        ([text("a", "dart", seed="x")], "line 1 of .* has the seed 'x': write a number"),
        ([text("a", "dense")], "nothing in .* can be compared, for it holds no text of a pruned"),
        ([text("a", "dart")], "nothing in .* can be compared: no dense text of the same id"),
        ([], "nothing in .* can be compared, for it holds no text"),
    ],
)
def test_files_that_cannot_be_paired(tmp_path: Path, rows: list[dict], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_pairs(lines(tmp_path / "t.jsonl", *rows))


def test_a_repeated_reference_and_a_missing_file(tmp_path: Path) -> None:
    texts = lines(tmp_path / "t.jsonl", text("a", "dart"))
    row = {"id": "a", "text": "A"}
    with pytest.raises(ConfigError, match=r"line 2 of .* repeats the id a: keep one reference"):
        read_pairs(texts, lines(tmp_path / "r.jsonl", row, row))
    with pytest.raises(ConfigError, match=r"there is no file .*none\.jsonl: give an"):
        read_pairs(tmp_path / "none.jsonl")
