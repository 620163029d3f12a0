"""scripts/check_docs.py: what it generates is current, and it notices what is not."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

import pytest

from published import scripts
from scripts_of import script
from shells import ROOT, SCRIPTS

PAGES = ("docs/cli.md", "docs/scripts.md")
CHECKER = tuple(
    f"scripts/{name}.py" for name in ("check_docs", "doc_links", "doc_mentions", "hand_tables")
)


def check(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr, without a process of its own."""
    said = io.StringIO()
    with patch.dict(os.environ), scripts(), redirect_stderr(said):
        try:
            code = script("check_docs").main(folder, arguments)
        except SystemExit as end:  # as the interpreter does with a text
            return 1, str(end).splitlines()
    return code, said.getvalue().splitlines()


def named(folder: Path) -> set[str]:
    """What the copied pages link to or name."""
    links, mentions = script("doc_links"), script("doc_mentions")
    found = set()
    for page in PAGES:
        text = (folder / page).read_text()
        near = {link.partition("#")[0] for link in links.links(text) if ":" not in link}
        found |= {f"docs/{name}" for name in near if name} | set(mentions.SPAN.findall(text))
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project of two generated pages and two short ones, all as they should be."""
    for name in ("docs", "scripts"):
        (tmp_path / name).mkdir()
    for name in (*PAGES, *SCRIPTS, *CHECKER):
        shutil.copy(ROOT / name, tmp_path / name)
    others = [name for name in named(tmp_path) if not (tmp_path / name).exists()]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Elsewhere\n")
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n\nSee [the start](README.md#top).\n")
    (tmp_path / "README.md").write_text("# Top\n\n## Use `it`, twice!\n\n[here](#use-it-twice)\n")
    index = "[cli](cli.md): every flag. [scripts](scripts.md#the-variables): variables.\n"
    index += "".join(f"[other]({name[5:]})\n" for name in others if name[:5] == "docs/")
    (tmp_path / "docs/README.md").write_text(f"# Pages\n\n{index}")
    return tmp_path


def test_generated_parts_are_current(copy: Path) -> None:
    command = [sys.executable, str(copy / "scripts/check_docs.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert check(copy) == (0, [])


def test_write_regenerates_and_changes_nothing_else(copy: Path) -> None:
    for name in PAGES:
        text = (copy / name).read_text()
        head, _, rest = text.partition("<!-- generated:")
        marker, _, tail = rest.partition("-->")
        end = tail[tail.index("<!-- end of") :]
        (copy / name).write_text(f"{head}<!-- generated:{marker}-->\n{end}")
    code, problems = check(copy)
    assert code == 1
    assert [line.split(" (")[0] for line in problems[:2]] == [f"{name} is stale" for name in PAGES]
    assert any("--masking-step is neither in docs/cli.md nor" in line for line in problems)
    assert check(copy, "--write") == (0, [])
    for name in PAGES:
        assert (copy / name).read_text() == (ROOT / name).read_text()


def test_a_changed_default_makes_the_table_stale(copy: Path) -> None:
    script = copy / SCRIPTS[0]
    script.write_text(script.read_text().replace("PERCENT:=50", "PERCENT:=40"))
    code, problems = check(copy)
    assert code == 1 and problems == [
        "docs/scripts.md is stale (variables): run python scripts/check_docs.py --write and commit "
        "the result"
    ]


def test_scripts_with_different_variables_are_noticed(copy: Path) -> None:
    script = copy / SCRIPTS[1]
    script.write_text(script.read_text().replace(': "${SEED:=0}"', ""))
    code, problems = check(copy)
    assert code == 1
    assert problems == ["run_experiment.sh and run_knowledge_drift.sh list different variables"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](docs/none.md)", "links to docs/none.md, which does not exist"),
        ("![a](docs/none.png 'title')", "links to docs/none.png, which does not exist"),
        ("[a](../outside.md)", "links to ../outside.md, which does not exist"),
        ("[a](#none)", "links to #none, but README.md has no such heading"),
        ("[a](docs/cli.md#none)", "links to docs/cli.md#none, but cli.md has no such heading"),
        ("[a][b]\n\n[b]: docs/none.md", "links to docs/none.md, which does not exist"),
        ('<a href="docs/none.md">a</a>', "links to docs/none.md, which does not exist"),
    ],
)
def test_broken_links_are_noticed(copy: Path, text: str, problem: str) -> None:
    with (copy / "README.md").open("a") as file:
        file.write(f"\n{text}\n")
    assert check(copy) == (1, [f"README.md {problem}"])


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/cli.md#dart-llm-run) [b](https://example.org/none#x) [c](mailto:a@example.org)",
        "`[a](none.md)` and ``[a](`none.md`)``",
        "```md\n[a](none.md)\n# Not a heading\n```",
        "<!-- [a](none.md) -->",
        "## Twice\n\n## Twice\n\n[a](#twice) [b](#twice-1)",
        '<a id="mark"></a> [a](#mark) [b](docs/) [c](run_experiment.sh)',
    ],
)
def test_sound_links_are_accepted(copy: Path, text: str) -> None:
    with (copy / "README.md").open("a") as file:
        file.write(f"\n{text}\n")
    assert check(copy) == (0, [])


def test_a_missing_page_is_noticed(copy: Path) -> None:
    (copy / "CONTRIBUTING.md").unlink()
    assert check(copy) == (1, ["CONTRIBUTING.md is missing"])


def test_a_page_that_the_index_forgets_is_noticed(copy: Path) -> None:
    (copy / "docs/new.md").write_text("# New\n")
    assert check(copy) == (
        1,
        ["docs/README.md does not link to new.md: add a line that says what it holds"],
    )


def test_a_missing_index_is_noticed(copy: Path) -> None:
    (copy / "docs/README.md").unlink()
    assert check(copy) == (1, ["docs/README.md is missing"])


def test_links_of_the_other_pages_are_checked(copy: Path) -> None:
    (copy / "THIRD_PARTY.md").write_text("[a](none.md)\n")
    assert check(copy) == (1, ["THIRD_PARTY.md links to none.md, which does not exist"])


def test_a_measured_table_that_differs_from_its_file_is_noticed(copy: Path) -> None:
    shutil.copytree(ROOT / "benchmarks/results", copy / "benchmarks/results")
    shutil.copy(ROOT / "benchmarks/tables.yaml", copy / "benchmarks")
    for path in (ROOT / "scripts").glob("*.py"):
        shutil.copy(path, copy / "scripts")
    for name in ("README.md", "docs/method.md", "docs/recipes.md"):
        shutil.copy(ROOT / name, copy / name)
    text = (ROOT / "docs/measurements.md").read_text()
    assert "| dense | 20.48 |" in text
    (copy / "docs/measurements.md").write_text(
        text.replace("| dense | 20.48 |", "| dense | 9.48 |")
    )
    problems = [line for line in check(copy)[1] if "stale" in line]
    assert [line.split(":")[0] for line in problems] == [
        "docs/measurements.md is stale (budgets-smollm2)"
    ]
