"""``dart-llm chat``: the conversation, its commands, and its terminal or pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dart_llm.cli.chat_settings import ChatSettings
from dart_llm.data.texts import chat_ids, chat_text
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest, GenerationResult, Record, Token
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.experiments.study import load_model
from dart_llm.files import write_text
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting.console import Ui

NAME = "chat"
"""The conversation's name in the engine."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer, with the settings that were in force."""

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
        self.turns: list[Turn] = []
        self._tokenizer = tokenizer
        self.prepared = {settings.method}
        """Methods that have learned what they need."""
        engine.prepare(settings.served())

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if there is one, questions and answers."""
        system = self.settings.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(
        self, question: str, emit: Callable[[Record], None], cancelled: Callable[[], bool]
    ) -> Turn:
        """Answer ``question``; the text of a cancelled answer stays in the conversation.

        Raises ``ConfigError`` when the conversation no longer fits into the model's context.
        """
        settings = self.settings
        config = settings.served()
        ids = chat_ids(self._tokenizer, [*self.messages, {"role": "user", "content": question}])
        request = GenerationRequest(ids, settings.sampling(), config, NAME)
        result = self.engine.run(request, emit, cancelled)
        shown: dict[str, Any] = {"method": "dense", "sparsity": 0.0}
        if config is not None:
            shown = {"method": config.method, "sparsity": config.target, "drift": config.drift.rule}
        turn = Turn(question, result.texts[0], shown, result)
        if any(result.tokens):
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

    def save(self, path: Path) -> None:
        """Write a JSON file with all accounting, or, by the path's suffix, Markdown."""
        if path.suffix.lower() == ".json":
            document = {
                "model": self.settings.model,
                "settings": self.settings.model_dump(mode="json"),
                "messages": self.messages,
                "turns": [turn.to_dict() for turn in self.turns],
            }
            text = json.dumps(document, indent=1) + "\n"
        else:
            text = "\n".join(f"**{one['role']}**\n\n{one['content']}\n" for one in self.messages)
        write_text(path, text, mode=0o600)  # for its owner alone: it may be private


# messages: continued lines, blocks, history


FENCE = "```"
PROMPT, CONTINUED = "> ", ". "
HISTORY_LINES = 1000

ReadLine = Callable[[str], str]
"""Called with the prompt to show; raises ``EOFError`` at the end."""


def read_message(read: ReadLine) -> str:
    """The next message.

    A line that ends with a backslash continues in the next one; a line that begins with three
    backticks opens a block, which the next such line closes.  Raises ``EOFError`` at the end.
    """
    lines: list[str] = []
    fenced = False
    while True:
        try:
            line = read(CONTINUED if lines else PROMPT)
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
            # bytes that the locale could not read are read as UTF-8
            text = "\n".join([*lines, line]).encode("utf-8", "surrogateescape")
            return text.decode("utf-8", "replace")


def expand_home(text: str) -> Path:
    """``text`` as a path, with ``~`` expanded; raises ``ConfigError`` for an unknown user's."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: there is no such user, so no such folder") from None


def read_piped(prompt: str) -> str:
    """A line of standard input without a terminal; raises ``EOFError`` at the end."""
    line = sys.stdin.readline() if sys.stdin else ""  # None: it was closed before we began
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


@contextlib.contextmanager
def line_history(file: str | None) -> Iterator[None]:
    """Editing of typed lines, where Python has readline; ``file`` keeps them for the next time.

    Raises ``ConfigError`` for a file that cannot be read or written.
    """
    try:
        import readline
    except ImportError:
        file = None
    if file is None:
        yield
        return
    path = expand_home(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what is typed may be private
        readline.read_history_file(path)
    except OSError as error:
        raise ConfigError(f"cannot use {path} as history: {error.strerror or error}") from None
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


# lines about settings and answers


def settings_line(settings: ChatSettings) -> str:
    """Such as "dart: 50% of the FFN neurons removed, drift rule dart"."""
    config = settings.served()
    if config is None:
        return "dense: nothing is removed"
    head = ", output head screened" if config.screens else ""
    if config.method == "dense":
        return f"dense: no neuron is removed{head}"
    fixed = config.budget.table is not None or config.score.strategy == "auto"
    amount = f"{config.target:.0%} of the FFN neurons removed"
    if fixed and config.sparsity is None:
        amount = "the method sets how many FFN neurons are removed"
    return f"{config.method}: {amount}, drift rule {config.drift.rule}{head}"


def turn_line(turn: Turn, max_tokens: int) -> str:
    """Timings and accounting of one answer, in one short line."""
    report, usage = turn.result.report, turn.result.usage
    timings = turn.result.timings.to_dict()
    parts = [f"{usage.completion_tokens} tokens"]
    if timings["predicted_per_second"]:
        milliseconds = timings["predicted_per_token_ms"]
        parts.append(f"{milliseconds:.1f} ms each ({timings['predicted_per_second']:.0f}/s)")
    total = f" of {usage.prompt_tokens}" if usage.cached_tokens else ""
    parts.append(f"{timings['prompt_n']}{total} read in {timings['prompt_ms']:.0f} ms")
    if report.method == "dense":
        parts.append("dense")
    elif not report.requested_sparsity:
        parts.append(f"{report.method}, nothing removed")
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


HELP = {
    "/sparsity X": "remove this fraction of the FFN neurons from now on, e.g. 0.7 or 70%",
    "/method NAME": "prune by this method, e.g. griffin; dense prunes nothing",
    "/stats": "accounting of the last answer, and a line for every answer",
    "/save FILE": "write the conversation: .json with all accounting, else Markdown",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}

NOTES = (
    "A line that ends with \\ continues in the next one; ``` opens and closes a block of lines.",
    "Ctrl-C stops an answer. Write // for a message that begins with a slash.",
    "After a change of settings the next answer reads the whole conversation again.",
)


class Commands:
    """Runs commands on a chat.  ``quit``: whether to leave."""

    def __init__(self, chat: Chat, ui: Ui) -> None:
        self.chat, self.ui = chat, ui
        self.quit = False
        self._last_sparsity: float | None = None
        """The sparsity before the method was dense."""

    def run(self, line: str) -> None:
        """Run ``/name value``; raises ``ConfigError`` for what cannot be done."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/sparsity":
                self._set_sparsity(value)
            case "/method":
                self._set_method(value)
            case "/stats":
                self._print_stats()
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
                self.quit = True
            case _:
                raise UnknownName("command", name, [word.split()[0] for word in HELP])

    def _set_sparsity(self, value: str) -> None:
        if value:
            if self.chat.settings.served() is None:
                raise ConfigError("method dense removes nothing: choose another one by /method")
            self.chat.change(sparsity=_parse_fraction(value), total_prune_percent=None)
        self.ui.say(settings_line(self.chat.settings))

    def _set_method(self, value: str) -> None:
        settings = self.chat.settings
        config = METHODS.get(value or settings.method)
        learns = config.self_stats is not None or config.calibration is not None
        if value and learns and value not in self.chat.prepared:
            self.ui.say(
                f"{value} learns from the model first, unless that is cached; Ctrl-C stops it"
            )
        if value and config.sparsity == 0:  # dense: nothing is removed
            sparsity = settings.target_sparsity()
            self._last_sparsity = self._last_sparsity if sparsity is None else sparsity
            self.chat.change(method=value, sparsity=None, total_prune_percent=None)
        elif value and settings.served() is None:
            self.chat.change(method=value, sparsity=self._last_sparsity)
        elif value:
            self.chat.change(method=value)
        self.ui.say(settings_line(self.chat.settings))

    def _print_stats(self) -> None:
        turns = self.chat.turns
        if not turns:
            raise ConfigError("there is no answer yet: ask something first")
        self.ui.say(str(turns[-1].result.report))
        for number, turn in enumerate(turns, 1):
            self.ui.say(f"{number}. {turn_line(turn, self.chat.settings.max_tokens)}")

    def _save(self, value: str) -> None:
        if not value:
            raise ConfigError("name a file: /save talk.md, or /save talk.json with all accounting")
        path = expand_home(value)
        try:
            self.chat.save(path)
        except ValueError as error:  # a character that no file name can have
            raise ConfigError(f"cannot write {value!r}: {error}") from None
        self.ui.say(f"saved {len(self.chat.turns)} answers to {path}")


def _parse_fraction(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f'sparsity "{text}" is not a number: write 0.7 or 70%') from None


# the program


TERMINATED = 143


def check_chat_template(tokenizer: Any, config: Any) -> None:
    """Raise ``ConfigError``, before weights are read, if the model has no chat template."""
    instead = 'use dart-llm run --prompt "...", or a model that was tuned for chats'
    chat_text(tokenizer, [{"role": "user", "content": "?"}], instead)


def run_chat(settings: ChatSettings, ui: Ui) -> None:
    """Load the model and talk until ``/quit`` or the end of the input."""
    model, tokenizer, _ = load_model(settings, ui, check_chat_template)
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
            sys.stdin.reconfigure(errors="surrogateescape")  # see read_message
        if not sys.stdin or not sys.stdin.isatty():
            talk(chat, ui, read_piped)
            return
        ui.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        # SIGTERM ends the program, also where Ctrl-C alone would not
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
        with line_history(settings.history):
            talk(chat, ui, input, interactive=True)


def talk(chat: Chat, ui: Ui, read: ReadLine, interactive: bool = False) -> None:
    """Messages and commands until the end; an error is one sentence.

    ``interactive``: Ctrl-C cancels the answer instead of exiting.
    """
    commands = Commands(chat, ui)
    while not commands.quit:
        try:
            message = read_message(read)
        except EOFError:
            if interactive:
                ui.say("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            ui.say("\n/quit or Ctrl-D leaves")
            continue
        try:
            if message.startswith("/") and not message.startswith("//"):
                commands.run(message)
            elif message.strip():
                _answer(chat, ui, message.removeprefix("/"))
        except DartError as error:
            ui.end_line()
            ui.say(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:  # while a method was learning
            if not interactive:
                raise
            ui.say("\nstopped")


def _answer(chat: Chat, ui: Ui, question: str) -> None:
    def show(record: Record) -> None:
        if isinstance(record, Token) and record.text:
            ui.token(record.text)

    with ui.working("reading the conversation"), interruptible() as stopped:
        turn = chat.ask(question, show, stopped)
    ui.end_text(turn.answer)
    ui.say(turn_line(turn, chat.settings.max_tokens))


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only ends the answer; yields whether it was pressed."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
