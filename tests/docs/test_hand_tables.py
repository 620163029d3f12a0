"""scripts/hand_tables.py: which tables count as measured by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from published import scripts

with scripts():
    from hand_tables import hand_written, problems

HEAD = "# Speed\n\n| what | value |\n| --- | --- |\n"


@pytest.mark.parametrize(
    "cell", ["1.27 x", "about 3.5 ms", "12 %", "12%", "129 us", "31 s", "2 GB"]
)
def test_numbers_in_a_hand_written_table_are_found_once(cell: str) -> None:
    text = f"{HEAD}| a | {cell} |\n| b | {cell} |\n"
    assert list(hand_written(text)) == [("Speed", f"| a | {cell} |")]


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}| a | 12 tokens |\n",
        f"{HEAD}| a | `0.5` |\n",
        f"{HEAD}| a | [b](page.md#about-1.5) |\n",
        f"{HEAD}| a | GRIFFIN (arXiv 2404.01365) |\n",
        f"<!-- generated: x -->\n{HEAD}| a | 1.5 |\n<!-- end of generated: x -->\n",
        f"```text\n{HEAD}| a | 1.5 |\n```\n",
        "It took 1.5 seconds, 12 % of all.\n",
    ],
)
def test_what_is_no_hand_written_measurement(text: str) -> None:
    assert list(hand_written(text)) == []


def test_a_problem_names_page_heading_and_table(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{HEAD}| a | 1.5 |\n\n## Next\n\n| b | c |\n| --- | --- |\n| d | 3 % |\n")
    found = list(problems(tmp_path, [page]))
    assert [sentence.split(" (")[0] for sentence in found] == [
        'README.md has a hand-written table with numbers under "Speed"',
        'README.md has a hand-written table with numbers under "Next"',
    ]


def test_allowed_places_are_not_reported(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/recipes.md"
    page.write_text("## What each needs\n\n| a | 1.3 GB |\n\n## Other\n\n| a | 1.3 GB |\n")
    (sentence,) = problems(tmp_path, [page])
    assert '"Other"' in sentence


def test_pages_of_keys_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / f"docs/{name}.md" for name in ("results", "results-drift", "resulting")]
    for page in pages:
        page.write_text("## Keys\n\n| `interval` | of 95 % |\n")
    (sentence,) = problems(tmp_path, pages)
    assert sentence.startswith("docs/resulting.md has")
