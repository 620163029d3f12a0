"""scripts/doc_links.py and doc_mentions.py: what a file names without a link must be there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts_of import script
from shells import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project of two pages, a source file and a notebook."""
    for name in ("docs", "src/dart_llm", "examples", "recipes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Top\n\n`src/dart_llm/a.py` and `src/their.py`\n")
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n")
    (tmp_path / "docs/README.md").write_text("# Pages\n\n[a](a.md)\n")
    (tmp_path / "docs/a.md").write_text("# A\n\n## Some part\n")
    source = '"""Words (docs/a.md, "Some part")."""\n\nA = f"see docs/a.md#some-part"\n'
    (tmp_path / "src/dart_llm/a.py").write_text(source)
    cells = [
        {"cell_type": "markdown", "source": ["see [a](../docs/a.md#some-part)\n", "and more"]},
        {"cell_type": "code", "source": ["x = '[a](none.md)'"]},
    ]
    (tmp_path / "examples/a.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path


def problems(root: Path) -> list[str]:
    found = script("doc_mentions").broken_mentions(root)
    return [*script("doc_links").broken_links(root), *found]


def test_the_project_itself() -> None:
    assert problems(ROOT) == []
    names = {path.relative_to(ROOT).as_posix() for path in script("doc_mentions").sources(ROOT)}
    assert {"Makefile", "run_experiment.sh", "recipes/small.yaml", "src/dart_llm/cli.py"} <= names


def test_what_is_there_is_accepted(copy: Path) -> None:
    assert problems(copy) == []


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("src/dart_llm/a.py", 'A = "see docs/b.md"', "names docs/b.md, which does not exist"),
        (
            "src/dart_llm/a.py",
            'A = "see docs/a.md#none"',
            "names docs/a.md#none, but there is no such heading",
        ),
        (
            "src/dart_llm/a.py",
            '"""What it is (docs/a.md,\n"Another part")."""',
            'names "Another part" of docs/a.md, which has no such heading',
        ),
        (
            "src/dart_llm/a.py",
            'A = (\n    "this needs more: docs/"\n    "b.md"\n)',
            "names docs/b.md, which does not exist",
        ),
        ("recipes/a.yaml", "# docs/b.md has more\n", "names docs/b.md, which does not exist"),
        ("docs/a.md", "`benchmarks/none.py`\n", "names benchmarks/none.py, which does not exist"),
        ("CHANGELOG.md", "[a](docs/b.md)\n", "links to docs/b.md, which does not exist"),
    ],
)
def test_what_is_not_is_noticed(copy: Path, file: str, text: str, problem: str) -> None:
    if file == "docs/a.md":
        text += "# A\n\n## Some part\n"
    (copy / file).write_text(text)
    assert problems(copy) == [f"{file} {problem}"]


def test_links_of_a_notebook_are_checked(copy: Path) -> None:
    cell = {"cell_type": "markdown", "source": ["[a](none.md) [b](../docs/a.md#none)"]}
    (copy / "examples/a.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert problems(copy) == [
        "examples/a.ipynb links to none.md, which does not exist",
        "examples/a.ipynb links to ../docs/a.md#none, but a.md has no such heading",
    ]
