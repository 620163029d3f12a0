"""A conversation without a terminal."""

from __future__ import annotations

from typing import Any

from dart_llm.chat import Chat
from dart_llm.chat_terminal import talk
from dart_llm.settings_base import merge
from dart_llm.settings_chat import ChatSettings
from dart_llm.ui import Ui


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
