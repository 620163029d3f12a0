"""A conversation without a terminal."""

from __future__ import annotations

from typing import Any

from dart_llm.cli.chat import Chat, talk
from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge


def settings(**changes: Any) -> ChatSettings:
    return merge(ChatSettings, {"method": "griffin", "sparsity": 0.5, "max_tokens": 8} | changes)


def say(chat: Chat, *lines: str, person: bool = False) -> Ui:
    """Talk; a line that is an exception is raised while that line is read."""
    given = iter(lines)

    def read(prompt: str) -> str:
        line = next(given, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    ui = Ui()
    talk(chat, ui, read, person)
    return ui
