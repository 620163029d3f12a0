"""What a line that begins with a slash does in ``dart-llm chat``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from dart_llm.chat import Chat
from dart_llm.chat_input import own_path
from dart_llm.chat_lines import last_table, settings_line, turn_line
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.registry import METHODS
from dart_llm.ui import Ui

HELP = {
    "/sparsity X": "remove this fraction of the FFN neurons from now on, e.g. 0.7 or 70%",
    "/method NAME": "prune by this method, e.g. griffin; dense prunes nothing",
    "/drift RULE": 'make masks anew by this rule, e.g. never or "interval 64"',
    "/stats": "accounting of the last answer and of the conversation",
    "/save FILE": "write the conversation: .json with all accounting, else Markdown",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave, as /exit and Ctrl-D do",
}
NOTES = (
    "A line that ends with \\ goes on in the next one; ``` opens and closes a block of lines.",
    "Ctrl-C stops an answer. // at the beginning of a message stands for one slash.",
    "After a change of settings the next answer reads the whole conversation again.",
)


LONG = 5.0
"""Seconds of learning that are worth a word."""


class Commands:
    """Runs commands on a chat.  ``left``: whether to leave."""

    def __init__(self, chat: Chat, ui: Ui) -> None:
        self.chat, self.ui = chat, ui
        self.left = False
        self._last: float | None = None
        """The sparsity before the method was dense."""
        self._known: dict[str, Callable[[str], None]] = {
            "sparsity": self._sparsity,
            "method": self._method,
            "drift": self._drift,
            "stats": self._stats,
            "save": self._save,
            "reset": self._reset,
            "help": self._help,
            "quit": self._quit,
            "exit": self._quit,
        }

    def run(self, line: str) -> None:
        """Run ``/name value``; raises ``ConfigError`` for what cannot be done."""
        name, _, value = line.removeprefix("/").partition(" ")
        if name not in self._known:
            raise UnknownName("command", f"/{name}", [f"/{one}" for one in self._known])
        self._known[name](value.strip())

    def _sparsity(self, value: str) -> None:
        if value:
            if self.chat.settings.served() is None:
                raise ConfigError("method dense removes nothing: choose another one by /method")
            self.chat.change(sparsity=_fraction(value), total_prune_percent=None)
        self._say_settings()

    def _method(self, value: str) -> None:
        settings = self.chat.settings
        if value and (seconds := self.chat.seconds_to_learn(value)) >= LONG:
            self.ui.say(
                f"{value} learns first, unless an earlier time kept what it needs: about "
                f"{_duration(seconds)} on this machine; Ctrl-C stops it"
            )
        if value and METHODS.get(value).sparsity == 0:  # dense: nothing is removed
            known = settings.target_sparsity()
            self._last = self._last if known is None else known
            self.chat.change(method=value, sparsity=None, total_prune_percent=None)
        elif value and settings.served() is None:
            self.chat.change(method=value, sparsity=self._last)
        elif value:
            self.chat.change(method=value)
        self._say_settings()

    def _drift(self, value: str) -> None:
        if value:
            self.chat.change(drift=value.strip('"'), knowledge_drift=None)
        self._say_settings()

    def _say_settings(self) -> None:
        self.ui.say(settings_line(self.chat.settings))

    def _stats(self, value: str) -> None:
        if not self.chat.turns:
            raise ConfigError("there is no answer yet: ask something first")
        self.ui.table(last_table(self.chat.turns))
        self.ui.say("answers of this conversation:")
        for number, turn in enumerate(self.chat.turns, 1):  # lines: a table needs a wide screen
            self.ui.say(f"{number}. {turn_line(turn, self.chat.settings.max_tokens)}")

    def _save(self, value: str) -> None:
        if not value:
            raise ConfigError("name a file: /save talk.md, or /save talk.json with all accounting")
        path = own_path(value)
        as_json = path.suffix.lower() == ".json"
        text = json.dumps(self.chat.to_dict(), indent=1) + "\n" if as_json else self.chat.to_text()
        try:
            with open(path, "w", encoding="utf-8", opener=_own) as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
        except ValueError as error:  # a character that no file's name can have
            raise ConfigError(f"cannot write {value!r}: {error}") from None
        self.ui.say(f"saved {len(self.chat.turns)} answers to {path}")

    def _reset(self, value: str) -> None:
        self.chat.reset()
        self.ui.say("the conversation is forgotten")

    def _help(self, value: str) -> None:
        for name, text in HELP.items():
            self.ui.say(f"{name:14} {text}")
        for note in NOTES:
            self.ui.say(note)

    def _quit(self, value: str) -> None:
        self.left = True


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _own(path: str, flags: int) -> int:
    """Opens a new file for its owner alone: what was said may be private."""
    return os.open(path, flags, 0o600)


def _fraction(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f'sparsity "{text}" is no number: write 0.7 or 70%') from None
