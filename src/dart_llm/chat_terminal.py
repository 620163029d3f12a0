"""``dart-llm chat`` in a terminal, or in a pipe: reads messages, streams answers."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dart_llm.chat import Chat
from dart_llm.chat_commands import Commands
from dart_llm.chat_input import ReadLine, piped, read_message, readable, typed, unseen
from dart_llm.chat_lines import loop_line, settings_line, turn_line
from dart_llm.chat_stream import Wrapped
from dart_llm.engine import Engine, Record
from dart_llm.engine_records import Token
from dart_llm.errors import DartError
from dart_llm.job_common import load_model
from dart_llm.settings_chat import ChatSettings
from dart_llm.ui import Ui

TERMINATED = 143


def run_chat(settings: ChatSettings, ui: Ui) -> None:
    """Load the model and talk until ``/quit`` or the end of the input."""
    model, tokenizer, _ = load_model(settings, ui)
    with Engine(
        model,
        tokenizer,
        calibration=settings.calibration,
        cache_dir=settings.cache_dir,
        say=ui.say,
    ) as engine:
        chat = Chat(engine, tokenizer, settings)
        ui.say(settings_line(settings))
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # see readable
        if not sys.stdin or not sys.stdin.isatty():
            talk(chat, ui, piped)
            return
        ui.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        with typed(settings.history) as read, _leaving():
            talk(chat, ui, read, person=True)


def talk(chat: Chat, ui: Ui, read: ReadLine, person: bool = False) -> None:
    """Messages and commands until the end; one sentence for each that cannot be.

    ``person``: somebody sits there, whose Ctrl-C is no reason to leave.
    """
    commands = Commands(chat, ui)
    while not commands.left:
        try:
            message = readable(read_message(read))
        except EOFError:
            if person:
                ui.say("")
            return
        except KeyboardInterrupt:
            if not person:
                raise
            ui.say("\n/quit or Ctrl-D leaves")
            continue
        try:
            with unseen():
                _answer(chat, ui, commands, message)
        except DartError as error:
            ui.say(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:  # while something was learnt
            if not person:
                raise
            ui.say("\nstopped")


def _answer(chat: Chat, ui: Ui, commands: Commands, message: str) -> None:
    if message.startswith("/") and not message.startswith("//"):
        commands.run(message)
        return
    message = message[1:] if message.startswith("//") else message
    if not message.strip():
        return

    text = Wrapped(_write, _columns)

    def show(record: Record) -> None:
        if isinstance(record, Token) and record.text:
            text.add(record.text)

    try:
        with interruptible() as stopped:
            turn = chat.ask(message, show, stopped)
    finally:
        text.end()
    ui.end_text(turn.answer)
    ui.aside(turn_line(turn, chat.settings.max_tokens))
    if hint := loop_line(turn):
        ui.aside(hint)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _columns() -> int:
    """Of the terminal; lines that go elsewhere are as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside says no more than that the answer shall end; yields whether it was pressed."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """A polite end (SIGTERM) leaves the program, where Ctrl-C alone would not."""

    def leave(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
