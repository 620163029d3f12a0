"""Environment variables and flags that the project's files have, found without running them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FAMILY = re.compile(
    r"(?:DART|GOMP|HF|HUGGING|MLFLOW|OMP|RAY|TOKENIZERS|TRACKIO|TRANSFORMERS|WANDB|XDG)_[A-Za-z_]+"
)
"""Names that are variables wherever they stand alone in a string."""
READS = re.compile(r"os\.environ\.(?:get|setdefault|pop)|os\.environ|os\.getenv")


def read_by(code: str) -> set[str]:
    """Names of the environment variables that Python code reads or sets."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if FAMILY.fullmatch(node.value) else set()
        elif isinstance(node, ast.Call | ast.Subscript):
            asked = node.func if isinstance(node, ast.Call) else node.value
            key = (node.args or [None])[0] if isinstance(node, ast.Call) else node.slice
            if READS.fullmatch(ast.unparse(asked)) and isinstance(key, ast.Constant):
                found.add(str(key.value))
    return found


def read_by_shell(text: str) -> set[str]:
    """Variables with a default in a shell script or a Makefile, and those that it sets."""
    given = re.findall(r"\$\{([A-Z][A-Z_]+):?[-=]", text)
    made = re.findall(r"^([A-Z][A-Z_]+) *\?=", text, re.MULTILINE)
    words = re.findall(r"(?<![\w$])([A-Z][A-Z_]+)=(?=[\w'])", re.sub(r'"[^"]*"|#.*', "", text))
    return {*given, *made, *words}


def documented(page: str) -> set[str]:
    """The first cells of tables whose first column is ``variable``."""
    found: set[str] = set()
    for rows in re.findall(r"^\| variable \|.*\n\| ---.*\n((?:\|.*\n?)+)", page, re.MULTILINE):
        for row in rows.splitlines():
            found |= set(re.findall(r"`([^`]+)`", row.split("|")[1]))
    return found


def silent_flags(code: str) -> Iterator[str]:
    """Flags of an ``ArgumentParser`` without a help text."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            told = {word.arg: word.value for word in node.keywords}
            text = told.get("help")
            if not (isinstance(text, ast.JoinedStr) or getattr(text, "value", "")):
                yield str(getattr(node.args[0], "value", ast.unparse(node)))


def sections(page: Path) -> dict[str, str]:
    """The text below every heading of the second level."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def first_cells(text: str) -> set[str]:
    """Code spans that a table's row begins with."""
    return set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
