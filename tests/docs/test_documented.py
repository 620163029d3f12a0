"""The checker of results files notices what the docs lack, and what they have too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from documented import Check, Docs, fits, paths_in, read

PAGE = """# Files

| file | of | holds |
| --- | --- | --- |
| [`a.json`](#ajson) | every command | numbers |
| [`lines-<n>.jsonl`](#lines) `plots/*.png` | `one`, `two` | lines |
| `said.log` | `one` | words |

```md
| file | of | holds |
| --- | --- | --- |
| `no.json` | `one` | an example |
```

## a.json

| key | meaning |
| --- | --- |
| `size` `metrics.<name>` | numbers |
| [`rows`](#lines) | rows |

### lines

| column | meaning |
| --- | --- |
| `id` | a row |
| `deep.<anything>` | whatever |
| [`next`](#lines) | the next one |
"""


@pytest.fixture
def docs(tmp_path: Path) -> Docs:
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return read(tmp_path, ["page.md"])


def test_what_the_docs_say(docs: Docs) -> None:
    assert [file.name for file in docs.files] == [
        "a.json",
        "lines-<n>.jsonl",
        "plots/*.png",
        "said.log",
    ]
    assert {section: [key.name for key in keys] for section, keys in docs.keys.items()} == {
        "page.md#ajson": ["size", "metrics.<name>", "rows"],
        "page.md#lines": ["id", "deep.<anything>", "next"],
    }
    found = [".".join(path) for path, _ in docs.entries("page.md#ajson")]
    row = ["id", "deep.<anything>", "next"]  # a row may hold one of its own kind, once
    rows = [f"rows.{name}" for name in (*row, *(f"next.{name}" for name in row))]
    assert found == ["size", "metrics.<name>", "rows", *rows]
    assert [file.name for file in docs.of("three")] == ["a.json"]


def test_paths_of_every_kind_of_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "a.json").write_text(json.dumps({"a": [{"b": 1}, {"c": {}}], "d": None}))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": [2]}\n')
    (tmp_path / "a.csv").write_text('a.b,"c"\n1,2\n')
    (tmp_path / "a.txt").write_text("{}")
    save_file({"k@0.5-x.layer1.kept": torch.zeros(1)}, tmp_path / "a.safetensors", {"m": "1"})
    assert {file.suffix: paths_in(file) for file in tmp_path.iterdir()} == {
        ".json": [("a",), ("a", "b"), ("a", "c"), ("d",)],
        ".jsonl": [("a",), ("b",)],
        ".csv": [("a", "b"), ("c",)],
        ".txt": [],
        ".safetensors": [("k@0.5-x", "layer1", "kept"), ("metadata", "m")],
    }


def test_what_is_documented_is_accepted(docs: Docs) -> None:
    check = Check(docs)
    paths = [("size",), ("metrics",), ("metrics", "a.b"), ("rows",), ("rows", "id")]
    assert check.file("one", "a.json", paths) == []
    assert check.file("two", "lines-7.jsonl", [("id",), ("deep",), ("deep", "x", "y")]) == []
    assert check.file("one", "said.log", []) == []
    assert check.unseen_keys() == ["page.md#lines: next"]
    assert check.unseen_files("one") == ["lines-<n>.jsonl", "plots/*.png"]
    assert check.unseen_files("two") == ["a.json", "plots/*.png"]


@pytest.mark.parametrize(
    ("command", "name", "paths", "problem"),
    [
        ("one", "b.json", [], "one: the file b.json is not documented"),
        ("three", "said.log", [], "three: the file said.log is not documented"),
        ("one", "a.json", [("new",)], "one: a.json has new, which page.md#ajson lacks"),
        ("one", "a.json", [("size", "x")], "one: a.json has size.x, which page.md#ajson lacks"),
        (
            "one",
            "a.json",
            [("metrics", "x", "mean")],
            "one: a.json has metrics.x.mean, which page.md#ajson lacks",
        ),
        ("one", "a.json", [("rows", "no")], "one: a.json has rows.no, which page.md#ajson lacks"),
        ("one", "said.log", [("key",)], "one: said.log has key, which the docs lacks"),
    ],
)
def test_what_is_not_is_noticed(
    docs: Docs, command: str, name: str, paths: list[tuple[str, ...]], problem: str
) -> None:
    assert Check(docs).file(command, name, paths) == [problem]


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("remask<i>.ids", "remask12.ids", True),
        ("remask<i>.ids", "remask.ids", False),
        ("a.json", "a_json", False),
        ("<x>", "anything at all", True),
    ],
)
def test_names_with_open_parts(name: str, given: str, wanted: bool) -> None:
    assert fits(name, given) is wanted
