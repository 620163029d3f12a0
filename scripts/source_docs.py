"""Reads the package's source: where a public name is defined, how it is called, what it says.

The source, not the imported objects: signatures stand as they were written, so that no release of
Python or pydantic changes them, and strings after fields are documentation too.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """A definition, what it says of itself ("" for nothing), and the lines of its file."""

    name: str
    node: Definition
    doc: str
    lines: Sequence[str]

    def source(self, first: int, last: int) -> str:
        """Lines ``first`` to ``last``, counted from 1, moved to the left."""
        return textwrap.dedent("\n".join(self.lines[first - 1 : last]))


@cache
def module(package: Path, name: str) -> tuple[ast.Module, tuple[str, ...]]:
    """A module of the package by its dotted name: parsed, and its lines."""
    path = package.parent / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    return ast.parse(text), tuple(text.splitlines())


def find(package: Path, place: str, name: str) -> Found:
    """The definition of ``name`` in the module ``place``, through however many imports."""
    tree, lines = module(package, place)
    for found in definitions(tree.body, lines):
        if found.name == name:
            return found
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(package, node.module, alias.name)
    raise SystemExit(f"{place} holds no {name}")


def definitions(body: Sequence[ast.stmt], lines: Sequence[str]) -> Iterator[Found]:
    """Functions, classes and variables of a module or a class, with their documentation."""
    for place, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield Found(node.name, node, ast.get_docstring(node) or "", lines)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name):
                yield Found(target.id, node, _string(body[place + 1 : place + 2]), lines)


def _string(following: Sequence[ast.stmt]) -> str:
    """The string that follows a variable and documents it."""
    for node in following:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    return ""


def heading(found: Found) -> str:
    """Decorators and the lines from ``def`` or ``class`` to the colon, as they were written."""
    node = found.node
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
    return found.source(first, node.body[0].lineno - 1).rstrip().removesuffix(":")


def statement(found: Found) -> str:
    """A variable as it was written; of one with a type, no value that is longer than a line."""
    node = found.node
    last = node.end_lineno or node.lineno
    if isinstance(node, ast.AnnAssign) and last > node.lineno:
        return f"{found.name}: {ast.get_source_segment(chr(10).join(found.lines), node.annotation)}"
    return found.source(node.lineno, last)


def members(found: Found) -> tuple[list[Found], list[Found]]:
    """Public fields and public methods of a class, ``__init__`` and ``__call__`` among these."""
    assert isinstance(found.node, ast.ClassDef)
    inside = list(definitions(found.node.body, found.lines))
    public = [one for one in inside if not one.name.startswith("_")]
    special = [one for one in inside if one.name in ("__init__", "__call__")]
    fields = [one for one in public if isinstance(one.node, ast.AnnAssign)]
    return fields, [*special, *(one for one in public if isinstance(one.node, ast.FunctionDef))]


def markdown(text: str) -> str:
    """A docstring as Markdown: code spans, examples as blocks, mentions of pages as links."""
    blocks = []
    for block in cleandoc(text).split("\n\n"):
        if block.startswith(">>> "):
            lines = [re.sub(r"^(>>>|\.\.\.) |\s*# doctest:.*$", "", x) for x in block.split("\n")]
            blocks.append("```py\n" + "\n".join(lines) + "\n```")
            continue
        block = re.sub(r"``(.+?)``", r"`\1`", block, flags=re.DOTALL)
        block = re.sub(r'docs/([a-z-]+)\.md(?:,\s+"([\w -]+)")?', _link, block)
        blocks.append(re.sub(r"(?<=\S)  +", " ", block))
    return "\n\n".join(blocks)


def _link(match: re.Match[str]) -> str:
    page, part = match.groups()
    anchor = f"#{part.lower().replace(' ', '-')}" if part else ""
    return f"[{page}.md]({page}.md{anchor})"
