"""Checks the documentation against the program; ``--write`` regenerates the generated parts.

Usage: python scripts/check_docs.py [--write]

- docs/cli.md holds the ``--help`` of every command, docs/scripts.md the table of variables.
- docs/measurements.md, method.md, performance.md, claims.md and README.md hold tables of
  benchmarks/results.
- docs/data.md holds the catalogue of data sets, docs/api*.md the docstrings of what is public,
  docs/models.md the checkpoints and model types that are tested, docs/errors.md the messages.
- Every flag of ``dart-llm run`` is in one of the two.
- Every relative link and anchor of the Markdown pages and of the examples' notebooks leads
  somewhere (doc_links.py), and so does every file that a page, a source file, an error message or
  a recipe names (doc_mentions.py).
- docs/README.md links to every other page of docs/.
- Tables with numbers are generated (scripts/hand_tables.py lists the exceptions).

Prints one sentence per problem and exits with 1 if there is one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import hand_tables  # beside this file
from doc_links import INDEX, broken_links, links, pages  # beside this file
from doc_mentions import broken_mentions

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "",
    "run",
    "chat",
    "eval",
    "perplexity",
    "summarize",
    "compare",
    "sweep",
    "drift",
    "detect",
    "inspect",
    "bench quality",
    "bench speed",
    "serve",
    "replay",
    "results",
    "prompts generate",
    "prompts list",
    "prompts show",
    "demo",
    "methods",
    "doctor",
)
SCRIPTS = ("run_experiment.sh", "run_knowledge_drift.sh")
VARIABLE = re.compile(r'^: "\$\{([A-Z_]+):=(.*)\}"', re.MULTILINE)
WIDTH = "100"


def plain_environment() -> None:
    """Make help texts independent of the terminal; before typer is imported."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
        os.environ.pop(name, None)
    os.environ.update(COLUMNS=WIDTH, NO_COLOR="1", TERM="dumb")


@cache
def help_pages() -> str:
    """The ``--help`` of every command, as Markdown."""
    from typer.testing import CliRunner

    from dart_llm.cli.app import app

    pages = []
    for command in COMMANDS:
        arguments = [*command.split(), "--help"]
        result = CliRunner().invoke(app, arguments, prog_name="dart-llm")
        if result.exit_code != 0:
            raise SystemExit(f"dart-llm {' '.join(arguments)} failed: {result.exception}")
        lines = [line.rstrip() for line in result.stdout.strip("\n").splitlines()]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        pages.append(f"## {f'dart-llm {command}'.strip()}\n\n```text\n{text}\n```")
    return "\n\n".join(pages)


def script_defaults(root: Path, script: str) -> dict[str, str]:
    """The variables that ``script`` lists, with their defaults, in order."""
    return dict(VARIABLE.findall((root / script).read_text(encoding="utf-8")))


def variable_table(root: Path) -> str:
    """The table of the scripts' variables, as Markdown; defaults from the scripts."""
    from dart_llm.studies.generate.settings import RunSettings

    first, second = (script_defaults(root, script) for script in SCRIPTS)
    if list(first) != list(second):
        raise SystemExit(f"{SCRIPTS[0]} and {SCRIPTS[1]} list different variables")
    lines = ["| variable | flag | default | meaning |", "| --- | --- | --- | --- |"]
    for name, default in first.items():
        if name.lower() not in RunSettings.model_fields:
            raise SystemExit(f"{name} in {SCRIPTS[0]} is no setting of dart-llm run")
        meaning = RunSettings.model_fields[name.lower()].description or ""
        if default:  # the script's default, which may be another one than the flag's
            meaning = re.sub(r" \(default: [^)]*\)", "", meaning)
        meaning = meaning.replace("|", r"\|").replace("<", "&lt;")
        shown = _code(default)
        if second[name] != default:
            shown = f"{shown}; {_code(second[name])} in `{SCRIPTS[1]}`"
        lines.append(f"| `{name}` | `{_flag(name)}` | {shown} | {meaning} |")
    return "\n".join(lines)


def data_table() -> str:
    """Every data set of the catalogue, and when they were last read, as Markdown."""
    from dart_llm.data.datasets import DATA_SETS, LAST_RUN, get

    lines = [
        "| name | on the hub | split | columns | used for | licence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for data in map(get, DATA_SETS):
        where = f"`{data.hub_id}`" + (f", `{data.config}`" if data.config else "")
        where += f" ({data.revision})" if data.revision else ""
        where += ", gated" if data.gated else ""
        columns = ", ".join(f"`{name}`" for names in data.columns.values() for name in names)
        licence = f"[{data.licence}]({data.licence_page})" if data.licence_page else data.licence
        uses = ", ".join([*data.uses, *(f"`{task}`" for task in data.tasks[:1])])
        lines.append(f"| `{data.name}` | {where} | {data.split} | {columns} | {uses} | {licence} |")
    lines += ["", f"`make test-online` last passed: {LAST_RUN}."]
    return "\n".join(lines)


def _code(default: str) -> str:
    return f"`{default}`" if default else "not given"


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def generated(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the file that holds it and what belongs between its markers."""
    blocks = {
        "help": (root / "docs/cli.md", help_pages()),
        "variables": (root / "docs/scripts.md", variable_table(root)),
    }
    if (root / "docs/data.md").is_file():
        blocks["data"] = (root / "docs/data.md", data_table())
    if (root / "docs/api.md").is_file():
        import api_pages  # beside this file

        blocks.update(api_pages.tables(root))
    if (root / "docs/models.md").is_file():
        import model_pages

        blocks.update(model_pages.tables(root))
    if (root / "docs/errors.md").is_file():
        import error_pages

        blocks.update(error_pages.tables(root))
    if (root / "benchmarks/results").is_dir():
        import measured_blocks

        blocks.update(measured_blocks.measured(root))
    return blocks


def _block(name: str) -> re.Pattern[str]:
    start, end = f"<!-- generated: {name} -->", f"<!-- end of generated: {name} -->"
    return re.compile(f"(?<={re.escape(start)}\n)(.*?)(?={re.escape(end)})", re.DOTALL)


def write(root: Path) -> None:
    """Regenerate every generated block."""
    for name, (path, content) in generated(root).items():
        text = path.read_text(encoding="utf-8")
        found = _block(name).search(text)
        if found is None:
            raise SystemExit(f"{path.name} lacks the markers around the generated part {name}")
        new = f"{text[: found.start()]}\n{content}\n\n{text[found.end() :]}"
        path.write_text(new, encoding="utf-8")


def stale_blocks(root: Path) -> Iterator[str]:
    """One sentence per generated block that no longer says what the program says."""
    for name, (path, content) in generated(root).items():
        found = _block(name).search(path.read_text(encoding="utf-8"))
        if found is None or _words(found[1]) != _words(content):
            page = path.relative_to(root).as_posix()
            yield (
                f"{page} is stale ({name}): run python scripts/check_docs.py --write and commit "
                "the result"
            )


def _words(text: str) -> list[str]:
    """The words alone: releases of typer differ in frames, column widths and value types."""
    return re.sub(r"[─│╭╮╰╯┌┐└┘]|<[a-z]+>", " ", text).split()


def missing_flags(root: Path) -> Iterator[str]:
    """One sentence per flag of ``dart-llm run`` that the two pages lack."""
    from dart_llm.studies.generate.settings import RunSettings

    pages = "".join((root / f"docs/{page}.md").read_text("utf-8") for page in ("cli", "scripts"))
    for name in RunSettings.model_fields:
        if not re.search(rf"(?<![\w-]){_flag(name)}(?![\w-])", pages):
            yield f"the flag {_flag(name)} is neither in docs/cli.md nor in docs/scripts.md"


def unlisted_pages(root: Path) -> Iterator[str]:
    """One sentence per page of docs/ that the index does not link to."""
    index = root / INDEX
    listed = {link.partition("#")[0] for link in links(index.read_text("utf-8"))}
    for page in sorted(index.parent.glob("*.md")):
        if page != index and page.name not in listed:
            yield f"{INDEX} does not link to {page.name}: add a line that says what it holds"


def found_problems(root: Path) -> list[str]:
    """One sentence per problem of the project at ``root``."""
    found = [*stale_blocks(root), *missing_flags(root), *broken_links(root)]
    found += broken_mentions(root)
    found += unlisted_pages(root) if (root / INDEX).is_file() else []
    there = [page for page in pages(root) if page.is_file()]
    return [*found, *hand_tables.problems(root, there)]


def main(root: Path, arguments: Sequence[str]) -> int:
    """Check, or write first; the number of problems decides the exit code."""
    plain_environment()
    if [*arguments] not in ([], ["--write"]):
        raise SystemExit(__doc__)
    if arguments:
        write(root)
        write(root)  # blocks that list which pages have which tables come second
    problems = found_problems(root)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(pages(root))} pages: generated parts, flags and links are up to date")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(ROOT, sys.argv[1:]))
