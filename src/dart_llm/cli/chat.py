"""``dart-llm chat``: its settings, the conversation, slash commands, and the input loop."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from dart_llm.data.texts import chat_ids, chat_text
from dart_llm.engine.requests import GenerationRequest, GenerationResult, Sampling
from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.files import write_text
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import BaseSettings, setting

if TYPE_CHECKING:
    from dart_llm.engine.engine import Engine
    from dart_llm.engine.requests import Record
    from dart_llm.reporting.console import Ui

NAME, PANEL = "chat", "Chat"
"""``NAME``: the conversation's name in the engine.  ``PANEL``: the settings' panel in the help."""


class ChatSettings(BaseSettings):
    """Settings of ``dart-llm chat``: the model, its pruning, and how it answers."""

    UNUSED: ClassVar = ("masks", "save_layer_topk", "experiment_name", "results_dir", "style")

    system: str | None = setting(PANEL, "Begin with this system message (default: the template's).")
    max_tokens: int = setting(PANEL, "Maximum number of tokens per answer.", 512)
    temperature: float = setting(PANEL, "Sample at this temperature; 0 is greedy.", 0.0)
    top_p: float = setting(
        PANEL, "Sample from the likeliest tokens with this total probability.", 1.0
    )
    calibration: str | None = setting(
        PANEL, "Calibrate methods such as wanda on this text (default: c4 from the hub)."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> ChatSettings:
        if self.masks is not None:
            raise ConfigError("chat selects masks itself: leave out --masks")
        self.sampling()
        return self

    def sampling(self) -> Sampling:
        """Sampling settings of every answer; the same prompt and seed give the same answer."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.seed)

    def served(self) -> PruneConfig | None:
        """The pruning configuration of the answers; None selects the dense model."""
        config = self.prune_config()
        return config if config.method != "dense" or config.screens else None

    def changed(self, **changes: Any) -> ChatSettings:
        """A copy of these settings with ``changes``; raises ``ConfigError`` if it is invalid."""
        values = {name: getattr(self, name) for name in self.model_fields_set} | changes
        return type(self).model_validate(values)


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str
    result: GenerationResult


class Chat:
    """A conversation: its messages and settings.  Every prompt contains all earlier messages."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ChatSettings) -> None:
        self.engine, self.settings = engine, settings
        self.turns: list[Turn] = []
        self._tokenizer = tokenizer
        engine.prepare(settings.served())

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if there is one, followed by the questions and answers."""
        system = self.settings.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(
        self, question: str, emit: Callable[[Record], None], cancelled: Callable[[], bool]
    ) -> Turn:
        """Answer ``question``; raises ``ConfigError`` if the conversation exceeds the context.

        ``emit`` is called with the engine's records, such as tokens.  When ``cancelled`` returns
        True, generation stops; the answer so far stays in the conversation.
        """
        settings = self.settings
        ids = chat_ids(self._tokenizer, [*self.messages, {"role": "user", "content": question}])
        request = GenerationRequest(ids, settings.sampling(), settings.served(), NAME)
        result = self.engine.run(request, emit, cancelled)
        turn = Turn(question, result.texts[0], result)
        if any(result.tokens):
            self.turns.append(turn)
        return turn

    def change(self, **changes: Any) -> None:
        """Change settings from the next answer on; after an error, the old settings stay."""
        settings = self.settings.changed(**changes)
        self.engine.prepare(settings.served())
        self.settings = settings

    def reset(self) -> None:
        """Forget all messages."""
        self.turns.clear()
        self.engine.forget(NAME)

    def save(self, path: Path) -> None:
        """Write the conversation as Markdown."""
        text = "\n".join(f"**{m['role']}**\n\n{m['content']}\n" for m in self.messages)
        write_text(path, text, mode=0o600)  # only the owner can read it, because it may be private


# Lines about settings and answers.


def settings_line(settings: ChatSettings) -> str:
    """The settings in one line: "dart: 50% of the FFN neurons removed, drift rule dart"."""
    config = settings.served()
    if config is None:
        return "dense: no neurons are removed"
    head = ", output head screened" if config.screens else ""
    amount = f"{config.target:.0%} of the FFN neurons removed"
    return f"{config.method}: {amount}, drift rule {config.drift.rule}{head}"


def turn_line(turn: Turn, max_tokens: int) -> str:
    """One line about an answer: its timings, the sparsity and the number of re-masks."""
    report, timings = turn.result.report, turn.result.timings.to_dict()
    parts = [f"{turn.result.usage.completion_tokens} tokens"]
    if per_second := timings["predicted_per_second"]:
        parts.append(f"{timings['predicted_per_token_ms']:.1f} ms each ({per_second:.0f}/s)")
    parts.append(f"{timings['prompt_n']} prompt tokens in {timings['prompt_ms']:.0f} ms")
    parts.append(report.method)
    if report.requested_sparsity:
        parts[-1] += (
            f": {report.achieved_sparsity:.1%} removed of {report.requested_sparsity:.0%}, "
            f"{report.dense_token_share:.0%} of the tokens dense, re-masks: {report.remasks}"
        )
    ends = {"length": f"stopped at {max_tokens} tokens (--max-tokens)", "cancelled": "stopped"}
    return "; ".join(filter(None, [*parts, ends.get(turn.result.finish[0])]))


# Commands.

HELP = {
    "/sparsity X": "remove this fraction of the FFN neurons from now on, e.g. 0.7 or 70%",
    "/method NAME": "prune by this method, e.g. griffin; dense prunes nothing",
    "/stats": "show the accounting of the last answer, and one line per answer",
    "/save FILE": "write the conversation as Markdown",
    "/reset": "forget the conversation",
    "/help": "show this list",
    "/quit": "leave the chat, as Ctrl-D does",
}

NOTE = (
    "A line that ends with \\ continues on the next line; to begin a message with /, type //; "
    "Ctrl-C stops an answer."
)


class Commands:
    """Runs the slash commands of a chat; ``quit`` is True after ``/quit``."""

    def __init__(self, chat: Chat, ui: Ui) -> None:
        self.chat, self.ui, self.quit = chat, ui, False

    def run(self, line: str) -> None:
        """Run the command ``/name value``; raises ``DartError`` if it fails."""
        name, _, value = line.partition(" ")
        names = [word.split()[0] for word in HELP]
        if name not in names:
            raise UnknownName("command", name, names)
        getattr(self, f"_{name[1:]}")(value.strip())

    def _quit(self, value: str) -> None:
        self.quit = True

    def _reset(self, value: str) -> None:
        self.chat.reset()
        self.ui.say("the conversation is forgotten")

    def _help(self, value: str) -> None:
        for line in (*(f"{word:14} {text}" for word, text in HELP.items()), NOTE):
            self.ui.say(line)

    def _sparsity(self, value: str) -> None:
        if value:
            self.chat.change(sparsity=_parse_fraction(value), total_prune_percent=None)
        self.ui.say(settings_line(self.chat.settings))

    def _method(self, value: str) -> None:
        if value and METHODS.get(value).sparsity == 0:  # dense, for which no sparsity can be set
            self.chat.change(method=value, sparsity=None, total_prune_percent=None)
        elif value:
            self.chat.change(method=value)
        self.ui.say(settings_line(self.chat.settings))

    def _stats(self, value: str) -> None:
        turns = self.chat.turns
        if not turns:
            raise ConfigError("there is no answer yet: ask a question first")
        self.ui.say(str(turns[-1].result.report))
        for number, turn in enumerate(turns, 1):
            self.ui.say(f"{number}. {turn_line(turn, self.chat.settings.max_tokens)}")

    def _save(self, value: str) -> None:
        if not value:
            raise ConfigError("name a file: /save talk.md")
        try:
            path = Path(value).expanduser()
            self.chat.save(path)
        except (RuntimeError, ValueError) as error:  # unknown user after ~; invalid characters
            raise ConfigError(f"cannot write {value!r}: {error}") from None
        self.ui.say(f"saved {len(self.chat.turns)} answers to {path}")


def _parse_fraction(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f'sparsity "{text}" is not a number: write 0.7 or 70%') from None


# The program.

ReadLine = Callable[[str], str]
"""A function that shows a prompt and reads a line; raises ``EOFError`` at the end of the input."""


def read_message(read: ReadLine) -> str:
    """Read the next message; a line that ends with a backslash continues on the next line.

    Raises ``EOFError`` at the end of the input.
    """
    line = read("> ")
    lines = [line]
    while line.endswith("\\"):
        lines[-1] = line[:-1]
        try:
            line = read(". ")
        except EOFError:
            break
        lines.append(line)
    return "\n".join(lines)


def check_chat_template(tokenizer: Any, config: Any) -> None:
    """Raise ``ConfigError`` if there is no chat template; called before the weights are loaded."""
    instead = 'use dart-llm run --prompt "...", or a model tuned for chat'
    chat_text(tokenizer, [{"role": "user", "content": "?"}], instead)


def run_chat(settings: ChatSettings, ui: Ui) -> None:
    """Load the model and answer until ``/quit`` or the end of the input."""
    from dart_llm.engine.engine import Engine
    from dart_llm.experiments.study import load_model

    model, tokenizer, _ = load_model(settings, ui, check_chat_template)
    options: dict[str, Any] = {"calibration": settings.calibration, "cache_dir": settings.cache_dir}
    with Engine(model, tokenizer, **options, say=ui.say) as engine:
        chat = Chat(engine, tokenizer, settings)
        ui.say(settings_line(settings))
        if not sys.stdin or not sys.stdin.isatty():
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
                talk(chat, ui, lambda prompt: input())
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # makes typed lines editable
        ui.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves the chat")
        # SIGTERM is a KeyboardInterrupt elsewhere, which does not end a chat; here it ends it
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        talk(chat, ui, input, interactive=True)


def talk(chat: Chat, ui: Ui, read: ReadLine, interactive: bool = False) -> None:
    """Process all messages and commands; if ``interactive``, Ctrl-C does not end the chat."""
    commands = Commands(chat, ui)
    while not commands.quit:
        try:
            message = read_message(read)
            if message.startswith("/") and not message.startswith("//"):
                commands.run(message)
            elif message.strip():
                _answer(chat, ui, message.removeprefix("/"))
        except EOFError:
            return
        except DartError as error:
            ui.end_line()
            ui.say(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:  # while a line is typed or a method calibrates
            if not interactive:
                raise
            ui.say("\n/quit or Ctrl-D leaves the chat")


def _answer(chat: Chat, ui: Ui, question: str) -> None:
    from dart_llm.engine.requests import Token

    def show(record: Record) -> None:
        if isinstance(record, Token) and record.text:
            ui.token(record.text)

    with ui.working("reading the conversation"), interruptible() as stopped:
        turn = chat.ask(question, show, stopped)
    ui.end_text(turn.answer)
    ui.say(turn_line(turn, chat.settings.max_tokens))


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C end only the answer; yield a function that tells whether Ctrl-C was pressed."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
