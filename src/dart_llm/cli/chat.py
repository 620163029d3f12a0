"""``dart-llm chat``: the conversation, its commands, and its terminal or pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.data.prompts import chat_ids, chat_text
from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Record, Token
from dart_llm.engine.requests import GenerationRequest, GenerationResult
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.experiments.study import load_model
from dart_llm.files import write_text
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting.console import Ui
from dart_llm.reporting.table import TerminalTable
from dart_llm.studies.generate.report import accounting_table

# the conversation: its messages, its settings, its answers


NAME = "chat"
"""The conversation's name in the engine."""


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, under the settings of then."""

    question: str
    answer: str
    settings: dict[str, Any]
    result: GenerationResult

    @property
    def finish(self) -> str:
        """Why the answer ended: ``stop``, ``length`` or ``cancelled``."""
        return self.result.finish[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "question": self.question,
            "answer": self.answer,
            "settings": self.settings,
            "finish": self.finish,
            "usage": asdict(self.result.usage),
            "timings": self.result.timings.to_dict(),
            "report": self.result.report.to_dict(),
        }


class Chat:
    """Messages and settings; every answer sees all messages before it."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ChatSettings) -> None:
        self.engine, self.settings = engine, settings
        self.turns: list[Exchange] = []
        self._tokenizer = tokenizer
        self.prepared = {settings.method}
        """Methods that have learnt what they need."""
        engine.prepare(settings.served())

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if one was given, questions and answers."""
        system = self.settings.system
        found = [] if system is None else [{"role": "system", "content": system}]
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return found

    def _ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return chat_ids(self._tokenizer, messages)

    def ask(
        self, question: str, emit: Callable[[Record], None], cancelled: Callable[[], bool]
    ) -> Exchange:
        """Answer ``question``; what was said of a cancelled answer stays in the conversation.

        Raises ``ConfigError`` when the conversation no longer fits into the model's context.
        """
        ids = self._ids([*self.messages, {"role": "user", "content": question}])
        settings = self.settings
        asked = GenerationRequest(ids, settings.sampling(), settings.served(), NAME)
        answer = self.engine.run(asked, emit, cancelled)
        turn = Exchange(question, answer.texts[0], _shown(settings), answer)
        if any(answer.tokens):
            self.turns.append(turn)
        return turn

    def change(self, **changes: Any) -> None:
        """Other settings from the next answer on; raises ``ConfigError`` and keeps the old ones.

        Learns what a method needs.
        """
        settings = self.settings.changed(**changes)
        self.engine.prepare(settings.served())
        self.prepared.add(settings.method)
        self.settings = settings

    def reset(self) -> None:
        """Forget all messages."""
        self.turns.clear()
        self.engine.forget(NAME)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was said, and what it cost; JSON-able."""
        return {
            "model": self.settings.model,
            "settings": self.settings.model_dump(mode="json"),
            "messages": self.messages,
            "turns": [turn.to_dict() for turn in self.turns],
        }

    def to_text(self) -> str:
        """What was said, as Markdown."""
        return "\n".join(f"**{one['role']}**\n\n{one['content']}\n" for one in self.messages)


def _shown(settings: ChatSettings) -> dict[str, Any]:
    config: PruneConfig | None = settings.served()
    if config is None:
        return {"method": "dense", "sparsity": 0.0}
    return {"method": config.method, "sparsity": config.target, "drift": config.drift.rule}


# messages: lines that go on, blocks, what was typed before


FENCE = "```"
PROMPT, MORE = "> ", ". "
LINES = 1000  # lines that the history holds

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
    try:
        import readline
    except ImportError:  # this Python has no line editing
        history = None
    if history is None:
        yield input
        return
    path = own_path(history)
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


# what is said of settings and answers


def settings_line(settings: ChatSettings) -> str:
    """dart, 50% of the FFN neurons removed."""
    config = settings.served()
    if config is None:
        return "dense: nothing is removed"
    head = ", output head screened" if config.screens else ""
    if config.method == "dense":
        return f"dense: no neuron is removed{head}"
    fixed = config.budget.table is not None or config.score.strategy == "auto"
    amount = "as many FFN neurons removed as the method says"
    if not (fixed and config.sparsity is None):
        amount = f"{config.target:.0%} of the FFN neurons removed"
    return f"{config.method}: {amount}, drift rule {config.drift.rule}{head}"


def turn_line(turn: Exchange, max_tokens: int) -> str:
    """Timings and accounting of one answer, in one short line."""
    result, report = turn.result, turn.result.report
    usage, timings = result.usage, result.timings.to_dict()
    parts = [f"{usage.completion_tokens} tokens"]
    if timings["predicted_per_second"]:
        each = timings["predicted_per_token_ms"]
        parts.append(f"{each:.1f} ms each ({timings['predicted_per_second']:.0f}/s)")
    known = f" of {usage.prompt_tokens}" if usage.cached_tokens else ""
    parts.append(f"{timings['prompt_n']}{known} read in {timings['prompt_ms']:.0f} ms")
    if report.method == "dense" or not report.requested_sparsity:
        parts.append(str(report.method) + (", nothing removed" if report.method != "dense" else ""))
    else:
        parts.append(
            f"{report.method}: {report.achieved_sparsity:.1%} removed of "
            f"{report.requested_sparsity:.0%}, {report.dense_token_share:.0%} of the tokens dense, "
            f"{report.remasks} re-mask{'' if report.remasks == 1 else 's'}"
        )
    if turn.finish == "length":
        parts.append(f"stopped at {max_tokens} tokens (--max-tokens)")
    elif turn.finish == "cancelled":
        parts.append("stopped")
    return "; ".join(parts)


SHORT_LOOP, LONGEST_PERIOD = 48, 64
"""Tokens that must repeat before an answer is called a loop, and those of one round."""


def loop_line(turn: Exchange) -> str:
    """What to do about an answer that went round in circles to its end; "" for any other."""
    tokens = turn.result.tokens[0]
    if turn.finish != "length" or not loops(tokens):
        return ""
    asked = turn.result.report.requested_sparsity
    less = f" at {asked:.0%} sparsity: try a lower /sparsity, or" if asked else ": try"
    return f"the answer repeats itself{less} sampling (--temperature 0.7)"


def loops(tokens: Sequence[int]) -> bool:
    """Whether the end is one round of up to ``LONGEST_PERIOD`` tokens, three times or more."""
    return any(
        len(tokens) >= length and tokens[-length:-period] == tokens[-length + period :]
        for period in range(1, LONGEST_PERIOD + 1)
        for length in [max(SHORT_LOOP, 3 * period)]
    )


def last_table(turns: Sequence[Exchange]) -> TerminalTable:
    """The last answer's accounting."""
    last = turns[-1].result
    each = last.timings.to_dict()["predicted_per_token_ms"]
    timing = {"seconds_per_token": {"answer": each / 1e3}} if each else {}
    report = replace(last.report, sequences=())
    return accounting_table({"answer": report.to_dict()}, timing).rich()


HELP = {
    "/sparsity X": "remove this fraction of the FFN neurons from now on, e.g. 0.7 or 70%",
    "/method NAME": "prune by this method, e.g. griffin; dense prunes nothing",
    "/stats": "accounting of the last answer and of the conversation",
    "/save FILE": "write the conversation: .json with all accounting, else Markdown",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}

NOTES = (
    "A line that ends with \\ goes on in the next one; ``` opens and closes a block of lines.",
    "Ctrl-C stops an answer. // at the beginning of a message stands for one slash.",
    "After a change of settings the next answer reads the whole conversation again.",
)


class Commands:
    """Runs commands on a chat.  ``left``: whether to leave."""

    def __init__(self, chat: Chat, ui: Ui) -> None:
        self.chat, self.ui = chat, ui
        self.left = False
        self._last: float | None = None
        """The sparsity before the method was dense."""

    def run(self, line: str) -> None:
        """Run ``/name value``; raises ``ConfigError`` for what cannot be done."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/sparsity":
                self._sparsity(value)
            case "/method":
                self._method(value)
            case "/stats":
                self._stats()
            case "/save":
                self._save(value)
            case "/reset":
                self.chat.reset()
                self.ui.say("the conversation is forgotten")
            case "/help":
                for word, text in HELP.items():
                    self.ui.say(f"{word:14} {text}")
                for note in NOTES:
                    self.ui.say(note)
            case "/quit":
                self.left = True
            case _:
                raise UnknownName("command", name, [word.split()[0] for word in HELP])

    def _sparsity(self, value: str) -> None:
        if value:
            if self.chat.settings.served() is None:
                raise ConfigError("method dense removes nothing: choose another one by /method")
            self.chat.change(sparsity=_fraction(value), total_prune_percent=None)
        self._say_settings()

    def _method(self, value: str) -> None:
        settings = self.chat.settings
        config = METHODS.get(value or settings.method)
        learns = config.prior is not None or config.calibration is not None
        if value and learns and value not in self.chat.prepared:
            self.ui.say(
                f"{value} learns first, unless an earlier time kept what it needs; Ctrl-C stops it"
            )
        if value and config.sparsity == 0:  # dense: nothing is removed
            known = settings.target_sparsity()
            self._last = self._last if known is None else known
            self.chat.change(method=value, sparsity=None, total_prune_percent=None)
        elif value and settings.served() is None:
            self.chat.change(method=value, sparsity=self._last)
        elif value:
            self.chat.change(method=value)
        self._say_settings()

    def _say_settings(self) -> None:
        self.ui.say(settings_line(self.chat.settings))

    def _stats(self) -> None:
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
            write_text(path, text, mode=0o600)  # for its owner alone: it may be private
        except ValueError as error:  # a character that no file's name can have
            raise ConfigError(f"cannot write {value!r}: {error}") from None
        self.ui.say(f"saved {len(self.chat.turns)} answers to {path}")


def _fraction(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f'sparsity "{text}" is no number: write 0.7 or 70%') from None


# an answer while it is written


PIECES = re.compile(r"\n|\s|[^\s\u2e80-\uffef\U00020000-\U0003ffff]+|.")
"""Line breaks, spaces, words; a letter that needs no space beside it (Chinese, ...) is a word."""


class Wrapped:
    """Takes a text in pieces; a word is written when it has ended.

    ``write`` gets what to show; ``width``: columns of the terminal, asked for with every word.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int]) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._gap = self._word = ""

    def add(self, text: str) -> None:
        """More of the text."""
        pieces = PIECES.findall(self._word + text)
        self._word = ""
        last = pieces.pop() if pieces and self._goes_on(pieces[-1]) else ""
        for piece in pieces:
            self._piece(piece)
        self._word = last

    def end(self) -> None:
        """Nothing more comes."""
        word, self._word = self._word, ""
        if word:
            self._piece(word)

    def _goes_on(self, piece: str) -> bool:
        """Whether the next text may belong to this piece; one that fills a line is not awaited."""
        return not piece.isspace() and cell_len(piece) < self._width()

    def _piece(self, piece: str) -> None:
        if piece == "\n":
            self._write("\n")
            self._column, self._gap = 0, ""
        elif piece.isspace():
            self._gap += piece
        else:
            self._place(piece)

    def _place(self, word: str) -> None:
        size = cell_len(self._gap + word)
        if self._column and self._column + size > self._width():
            self._write("\n")
            self._column, self._gap, size = 0, "", cell_len(word)
        self._write(self._gap + word)
        self._column += size
        if self._column > self._width():  # a word longer than a line, which the terminal broke
            self._column %= self._width()
        self._gap = ""


# the program


TERMINATED = 143


def check_chats(tokenizer: Any, config: Any) -> None:
    """Raise ``ConfigError`` where no conversation can be written, before weights are read."""
    instead = 'use dart-llm run --prompt "...", or a model that was tuned for chats'
    chat_text(tokenizer, [{"role": "user", "content": "?"}], instead)


def run_chat(settings: ChatSettings, ui: Ui) -> None:
    """Load the model and talk until ``/quit`` or the end of the input."""
    model, tokenizer, _ = load_model(settings, ui, check_chats)
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
        # a polite end leaves the program, where Ctrl-C alone would not
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
        with typed(settings.history) as read:
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
            ui.end_line()
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

    text = Wrapped(ui.token, _columns)

    def show(record: Record) -> None:
        if isinstance(record, Token) and record.text:
            text.add(record.text)

    try:
        with ui.working("reading what was said"), interruptible() as stopped:
            turn = chat.ask(message, show, stopped)
    finally:
        text.end()
    ui.end_text(turn.answer)
    ui.aside(turn_line(turn, chat.settings.max_tokens))
    if hint := loop_line(turn):
        ui.aside(hint)


def _columns() -> int:
    """Of the terminal; lines that go elsewhere are as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside says no more than that the answer shall end; yields whether it was pressed."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
