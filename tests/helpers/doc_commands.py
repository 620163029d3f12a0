"""Every command and Python block of the documentation, as it stands there.

Pages: README.md, CONTRIBUTING.md, THIRD_PARTY.md, docs/*.md, benchmarks/README.md; the examples in
every command's ``--help`` (docs/cli.md holds them); the comments of recipes and examples.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = "docs/cli.md"
"""Its text is every command's ``--help``."""

_FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_SHELL = ("sh", "bash", "console")
_PROGRAM = (
    r"(?:dart-llm|python3?|pip|make|curl|ruff|mypy|pytest|\./run_\w+\.sh|\.venv/bin/\S+"
    r"|scripts/\w+\.sh|\.ci/run)"
)
_CALL = re.compile(rf"(?:[A-Z_]+=(?:'[^']*'|\"[^\"]*\"|\S)+ +)*{_PROGRAM}(?=\s|$)")
_BARE = re.compile(
    r"dart-llm(?: [a-z]+){0,2}|python3?|make|\./run_\w+\.sh|scripts/\w+\.sh|\.ci/run"
)
_LINES_TOGETHER = re.compile(r"(?:[A-Z_]+=\S*|(?:set|cd|export|source|\.)\s.*)$")


@dataclass(frozen=True)
class Command:
    """One command line, a block whose lines depend on each other, or a Python block."""

    text: str
    page: str
    line: int
    kind: str
    """``shell`` or ``python``."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Shown:
    """An output block, and the command that stands before it ("" where there is none)."""

    text: str
    page: str
    line: int
    after: str


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files of the documentation."""
    names = ("README.md", "CONTRIBUTING.md", "THIRD_PARTY.md", "benchmarks/README.md")
    return [*(root / name for name in names), *sorted((root / "docs").glob("*.md"))]


def commands(root: Path = ROOT) -> list[Command]:
    """All commands, each text once, where it stands first; bare names of commands are left out."""
    found: dict[str, Command] = {}
    for command in _all(root):
        if not (command.kind == "inline" and _BARE.fullmatch(command.text)):
            found.setdefault(command.text, command)
    return list(found.values())


def names(root: Path = ROOT) -> list[Command]:
    """Commands that are named in a sentence, without arguments."""
    every = (one for one in _all(root) if one.kind == "inline" and _BARE.fullmatch(one.text))
    return list({one.text: one for one in every}.values())


def shown(root: Path = ROOT) -> list[Shown]:
    """All output blocks but those of the generated page."""
    found = []
    for page in pages(root):
        name, last = page.relative_to(root).as_posix(), ""
        for language, line, body in blocks(page.read_text(encoding="utf-8")):
            if language in _SHELL or language == "python":
                last = [one.text for one in _block(name, line, language, body)][-1]
            elif language in ("text", "json") and name != GENERATED:
                found.append(Shown(body, name, line, last))
    return found


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Language, line of the first row inside, and content of every fenced block."""
    for match in _FENCE.finditer(text):
        yield match[3].strip(), text[: match.start(4)].count("\n") + 1, textwrap.dedent(match[4])


def _all(root: Path) -> Iterator[Command]:
    for page in pages(root):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        for language, line, body in blocks(text):
            yield from _block(name, line, language, body)
        if name == GENERATED:
            yield from _help(name, text)
        else:
            yield from _inline(name, text)
    for path in sorted([*(root / "recipes").glob("*.yaml"), *(root / "examples").glob("*.py")]):
        yield from _comments(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))


def _block(page: str, line: int, language: str, body: str) -> Iterator[Command]:
    if language == "python":
        yield Command(body.strip(), page, line, "python")
    elif language in _SHELL:
        if language == "console":
            body = "\n".join(row[2:] for row in body.splitlines() if row.startswith("$ "))
        lines = list(logical_lines(body))
        if any(_LINES_TOGETHER.match(text) for _, text in lines):
            yield Command("\n".join(text for _, text in lines), page, line, "shell")
        else:
            yield from (Command(text, page, line + at, "shell") for at, text in lines)


def logical_lines(body: str) -> Iterator[tuple[int, str]]:
    """Row and text of every command: continued and quoted rows are joined, comments cut."""
    start, held = 0, ""
    for at, row in enumerate(body.splitlines()):
        start = start if held else at
        held += row + "\n"
        bare, is_open = uncommented(held)
        if is_open or bare.rstrip().endswith("\\"):
            continue
        if text := re.sub(r"\s*\\\n\s*", " ", bare).strip():
            yield start, text
        held = ""
    assert not held, f"an unfinished command: {held}"


def uncommented(text: str) -> tuple[str, bool]:
    """The text without shell comments, and whether a quotation is still open at its end."""
    kept, quote, comment = "", "", False
    for at, char in enumerate(text):
        if comment:
            comment = char != "\n"
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and (at == 0 or text[at - 1].isspace()):
            comment = True
        kept += "" if comment else char
    return kept, bool(quote)


def _inline(page: str, text: str) -> Iterator[Command]:
    """Code spans of the prose that call a program."""
    prose = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        span = " ".join(match[1].split()).replace(r"\|", "|")
        if _CALL.match(span) and "…" not in span and "\n\n" not in match[1]:
            yield Command(span, page, prose[: match.start()].count("\n") + 1, "inline")


def _help(page: str, text: str) -> Iterator[Command]:
    """The examples in the docstrings of all commands, which the page holds."""
    import typer

    from dart_llm.cli.app import app

    waiting = [typer.main.get_command(app)]
    while waiting:
        command = waiting.pop(0)
        waiting += getattr(command, "commands", {}).values()
        for row in (command.help or "").splitlines():
            example = row.strip().removeprefix("Example: ")
            if _CALL.match(example) or example.startswith("echo "):
                at = text.index(example[:60])
                yield Command(example, page, text[:at].count("\n") + 1, "shell")


def _comments(page: str, text: str) -> Iterator[Command]:
    """Commands in the comments of a file: rows that are indented behind their ``#``."""
    rows = [row[4:] if row.startswith("#   ") else "" for row in text.splitlines()]
    for at, command in logical_lines("\n".join(rows)):
        yield Command(command, page, 1 + at, "shell")
