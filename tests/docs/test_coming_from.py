"""docs/coming-from-scripts.md: every variable has a row, and what it points to exists."""

from __future__ import annotations

import re

from shells import ROOT, SCRIPTS

PAGE = (ROOT / "docs/coming-from-scripts.md").read_text(encoding="utf-8")
ROWS = [tuple(row) for row in re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)]
OURS = " ".join(right for left, right in ROWS if left not in ("published", "---"))


def docs(*names: str) -> str:
    return "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in names)


def test_every_variable_of_the_scripts_is_named() -> None:
    script = (ROOT / SCRIPTS[0]).read_text(encoding="utf-8")
    variables = re.findall(r'^: "\$\{([A-Z_]+):=', script, re.MULTILINE)
    missing = [name for name in variables if not re.search(rf"\b{name}\b", PAGE)]
    assert len(variables) > 30 and missing == []


def test_every_flag_that_it_points_to_exists() -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", OURS))
    cli = docs("cli")
    assert len(flags) > 10
    assert [flag for flag in sorted(flags) if not re.search(rf"{flag}(?![\w-])", cli)] == []


def test_every_command_that_it_points_to_exists() -> None:
    commands = set(re.findall(r"`dart-llm ([a-z]+(?: (?:quality|speed|generate|list))?)", OURS))
    cli = docs("cli")
    assert len(commands) > 10
    assert [name for name in sorted(commands) if f"## dart-llm {name}\n" not in cli] == []


def test_every_file_that_it_points_to_is_documented() -> None:
    files = re.findall(r"`([a-z_/-]+\.(?:json|jsonl|csv|safetensors|html|png))`", OURS)
    known = docs("results", "results-drift", "results-inspect", "drift", "inspect")
    absent = [name for name in files if name.rpartition("/")[2] not in known]
    assert len(files) > 10
    # written as `..._samples.jsonl` there
    assert [name for name in absent if not name.endswith("_samples.jsonl")] == []
