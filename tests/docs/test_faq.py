"""docs/faq.md quotes messages; each must still be one that the program can say."""

from __future__ import annotations

import pytest

from scripts_of import FOLDER, script

ROOT = FOLDER.parent
messages = script("messages")
QUOTED = messages.quoted((ROOT / "docs/faq.md").read_text(encoding="utf-8"))
STRINGS = messages.strings(ROOT / "src/dart_llm")


def test_there_are_messages() -> None:
    assert len(QUOTED) > 40 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_exists(quoted: str) -> None:
    pieces = messages.pieces(quoted)
    assert pieces
    assert any(messages.holds(string, pieces) for string in STRINGS), pieces


def test_a_message_that_does_not_exist_is_noticed() -> None:
    assert not any(messages.holds(string, ["no neuron was ever", "unhappy"]) for string in STRINGS)
