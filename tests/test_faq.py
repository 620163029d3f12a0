"""docs/faq.md quotes messages; each must still be one that the program can say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOLE = "\0"
QUOTED = re.findall(
    r"^### `(.+?)`(?:, and .+)?$", (ROOT / "docs/faq.md").read_text(encoding="utf-8"), re.MULTILINE
)


def _strings() -> list[str]:
    """Every string of the package; what an f-string fills in is a hole."""
    found = []
    for path in sorted((ROOT / "src/dart_llm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


STRINGS = _strings()


def _says(string: str, pieces: list[str]) -> bool:
    """Whether ``string`` holds the pieces in this order."""
    return re.search(".*".join(map(re.escape, pieces)), string, re.DOTALL) is not None


def _spelled_out(quoted: str) -> list[str]:
    """The fixed pieces of a quoted message."""
    return [piece.strip() for piece in quoted.split("…") if len(piece.strip()) > 3]


def test_there_are_messages() -> None:
    assert len(QUOTED) > 40 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_exists(quoted: str) -> None:
    pieces = _spelled_out(quoted)
    assert pieces
    assert any(_says(string, pieces) for string in STRINGS), pieces


def test_a_message_that_does_not_exist_is_noticed() -> None:
    assert not any(_says(string, ["no neuron was ever", "unhappy"]) for string in STRINGS)
