"""Messages from a terminal or a pipe: lines that go on, blocks, what was typed before."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from dart_llm.errors import ConfigError

FENCE = "```"
PROMPT, MORE = "> ", ". "
LINES = 1000
"""Lines that the history holds."""

ReadLine = Callable[[str], str]
"""Called with what to show before the line; raises ``EOFError`` at the end."""


def read_message(read: ReadLine) -> str:
    """The next message.

    A line that ends with a backslash goes on in the next one; a line that begins with three
    backticks opens a block, which the next such line closes.  Raises ``EOFError`` when nothing
    comes any more.
    """
    lines: list[str] = []
    fenced = False
    while True:
        try:
            line = read(MORE if lines else PROMPT)
        except EOFError:
            if not lines:
                raise
            return "\n".join(lines)
        if line.lstrip().startswith(FENCE):
            fenced = not fenced
        if fenced:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def own_path(text: str) -> Path:
    """``text`` as a path, ``~`` read; raises ``ConfigError`` for the home of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: there is no such user, so no such folder") from None


def readable(text: str) -> str:
    """Bytes that the locale could not read, as UTF-8; what is none becomes a replacement mark."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def piped(prompt: str) -> str:
    """A line of standard input that nobody types; raises ``EOFError`` at the end."""
    line = sys.stdin.readline() if sys.stdin else ""  # None: it was closed before we began
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


@contextlib.contextmanager
def typed(history: str | None) -> Iterator[ReadLine]:
    """Lines of a terminal, with editing; ``history``: a file that outlives the program.

    Raises ``ConfigError`` for a history that cannot be read or written.
    """
    readline, path = _readline(), None if history is None else own_path(history)
    if readline is None or path is None:
        yield input
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what is typed may be private
        readline.read_history_file(path)
    except OSError as error:
        raise ConfigError(f"cannot use {path} as history: {error.strerror or error}") from None
    readline.set_history_length(LINES)
    try:
        yield input
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """What is typed inside is not shown; it waits, and is the beginning of the next line."""
    try:
        import termios

        file = sys.stdin.fileno()
        before = termios.tcgetattr(file)
    except Exception:  # no termios here, or a standard input that is no terminal
        yield
        return
    flags = list(before)
    flags[3] &= ~termios.ECHO
    termios.tcsetattr(file, termios.TCSADRAIN, flags)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _readline() -> ModuleType | None:
    """Line editing, where this Python has it."""
    try:
        import readline
    except ImportError:
        return None
    return readline
