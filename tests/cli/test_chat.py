"""``dart-llm chat``: messages, commands, interruptions, what is said and saved."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chat_cases import say, settings
from dart_llm.cli.chat import (
    HELP,
    MORE,
    PROMPT,
    Chat,
    Commands,
    Wrapped,
    interruptible,
    loop_line,
    read_message,
    settings_line,
    turn_line,
)
from dart_llm.data.prompts import chat_ids, chat_text
from dart_llm.engine.engine import Engine
from dart_llm.engine.events import Token
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.reporting.console import Ui
from engine_cases import ask, half, own_model, tokenizer
from steps import Same


@pytest.fixture
def chat() -> Iterator[Chat]:
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        yield Chat(engine, tokenizer(), settings())


def test_a_conversation(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    ui = say(chat, "Why?", "", "   ", "And now?")
    first, second = chat.turns
    assert capsys.readouterr().out == f"{first.answer}\n{second.answer}\n"
    told = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "And now?"},
    ]
    assert chat.messages == [*told, {"role": "assistant", "content": second.answer}]
    ids = chat_ids(tokenizer(), told)
    assert second.result.usage.prompt_tokens == len(ids)
    assert second.result.usage.cached_tokens > len(chat_ids(tokenizer(), told[:1]))
    assert ui.log[1] == turn_line(first, 8)
    assert turn_line(first, 8).startswith("8 tokens; ")
    assert "griffin: 50.0% removed of 50%, 0% of the tokens dense, 0 re-masks" in ui.log[1]
    assert ui.log[1].endswith("stopped at 8 tokens (--max-tokens)")


def test_settings_change_while_talking(chat: Chat) -> None:
    first = ("Why?", "/sparsity 0.25", "And?", "/sparsity 75%", "And?", "/method dense", "And?")
    say(chat, *first, "/method dart-prompt", "And?")
    shares = [(turn.settings["method"], turn.settings["sparsity"]) for turn in chat.turns]
    assert shares == [
        ("griffin", 0.5),
        ("griffin", 0.25),
        ("griffin", 0.75),
        ("dense", 0.0),
        ("dart-prompt", 0.75),
    ]
    assert [turn.result.report.method for turn in chat.turns] == [method for method, _ in shares]
    fourth = chat.turns[3]
    assert fourth.result.usage.cached_tokens == 0  # read anew under other settings
    ids = chat_ids(tokenizer(), [*chat.messages[:6], {"role": "user", "content": "And?"}])
    assert ask(chat.engine, None, ids, 8)[0].tokens == fourth.result.tokens


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("/sparsty 0.5", "UnknownName", "did you mean /sparsity or"),
        ("/sparsity much", "ConfigError", 'sparsity "much" is no number: write 0.7 or 70%'),
        ("/sparsity 1", "ConfigError", r"must lie in [0, 1)"),
        ("/method drat", "UnknownName", "did you mean dart"),
        ("/method dense-4bit", "ConfigError", "weights of 4 bits"),
        ("/drift never", "UnknownName", "unknown command '/drift'"),
        ("/stats", "ConfigError", "there is no answer yet"),
        ("/save", "ConfigError", "name a file"),
        ("/save /nowhere/at/all.md", "ConfigError", "cannot write /nowhere/at/all.md: No such"),
        ("/save ~no-such-user/a.md", "ConfigError", "~no-such-user/a.md: there is no such user"),
        ("/save a\0b", "ConfigError", "cannot write 'a\\x00b': embedded null"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(chat: Chat, line: str, kind: str, words: str) -> None:
    before = chat.settings
    ui = say(chat, line)
    assert len(ui.log) == 1 and ui.log[0].startswith(f"{kind}: ") and words in ui.log[0]
    assert chat.settings == before
    say(chat, "Why?")
    assert len(chat.turns) == 1


def test_the_sparsity_is_remembered_while_the_method_is_dense(chat: Chat) -> None:
    ui = say(chat, "/method dense", "/sparsity 0.5", "/method griffin")
    assert ui.log == [
        "dense: nothing is removed",
        "ConfigError: method dense removes nothing: choose another one by /method",
        "griffin: 50% of the FFN neurons removed, drift rule never",
    ]
    ui = say(chat, "/sparsity 0", "/method dense", "/method griffin")
    assert ui.log[-1] == "griffin: 0% of the FFN neurons removed, drift rule never"


def test_help_and_leaving(chat: Chat) -> None:
    told = say(chat, "/help", "/quit", "Why?").log
    names = ["/sparsity", "/method", "/stats", "/save", "/reset", "/help", "/quit"]
    assert [line.split()[0] for line in told[: len(HELP)]] == names
    assert not chat.turns


def test_stats(chat: Chat) -> None:
    text = "\n".join(say(chat, "Why?", "/method dense", "And?", "/stats").log)
    assert "dense: accounting of the generated text" in text
    assert "answers of this conversation" in text
    rows = [line for line in text.splitlines() if re.match(r"\d\. ", line)]
    assert [row[:3] for row in rows] == ["1. ", "2. "]
    assert "griffin: 50.0% removed of 50%" in rows[0] and "; dense" in rows[1]


def test_stats_on_a_narrow_screen(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "46")
    ui = Ui()
    ui.err = Console(file=io.StringIO(), width=46)
    commands = Commands(chat, ui)
    say(chat, "Why?")
    commands.run("/stats")
    shown = ui.err.file.getvalue()
    assert "\u2026" not in shown  # nothing was cut
    assert "1. 8 tokens; " in shown


def test_save(chat: Chat, tmp_path: Path) -> None:
    say(chat, "Why?", f"/save {tmp_path}/talk.json", f"/save {tmp_path}/talk.md")
    turn = chat.turns[0]
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert saved["messages"] == chat.messages
    assert saved["settings"]["sparsity"] == 0.5
    assert saved["turns"][0]["report"]["achieved_sparsity"] == 0.5
    assert saved["turns"][0]["timings"]["predicted_n"] == 7
    text = (tmp_path / "talk.md").read_text("utf-8")
    assert text == f"**user**\n\nWhy?\n\n**assistant**\n\n{turn.answer}\n"
    for name in ("talk.json", "talk.md"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_reset(chat: Chat) -> None:
    say(chat, "Why?", "/reset", "Why?")
    assert len(chat.turns) == 1 and chat.turns[0].result.usage.cached_tokens == 0


def test_bytes_that_are_no_text(chat: Chat) -> None:
    """What a locale could not read is UTF-8, or a mark in its place."""
    bytes_of = "caf\u00e9".encode() + b" \xff?"
    say(chat, bytes_of.decode("ascii", "surrogateescape"))
    assert chat.turns[0].question == "caf\u00e9 \ufffd?"


def test_a_slash_can_be_said(chat: Chat) -> None:
    say(chat, "//etc is a folder")
    assert chat.messages[0]["content"] == "/etc is a folder"


def test_system_message(chat: Chat) -> None:
    spoken = Chat(chat.engine, tokenizer(), settings(system="Be short."))
    assert spoken.messages == [{"role": "system", "content": "Be short."}]
    say(spoken, "Why?")
    whole = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    assert spoken.turns[0].result.usage.prompt_tokens == len(chat_ids(tokenizer(), whole))


def test_interrupted(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.settings = chat.settings.changed(max_tokens=400)
    plain, told = chat.engine.run, []

    def slow(asked: Any, emit: Any, cancelled: Any) -> Any:
        def watch(record: Any) -> None:
            told.append(record)
            emit(record)
            if isinstance(record, Token) and record.index == 5:
                os.kill(os.getpid(), signal.SIGINT)

        return plain(asked, watch, cancelled)

    before = signal.getsignal(signal.SIGINT)
    chat.engine.run = slow  # type: ignore[method-assign]
    ui = say(chat, "^C", "Why?", "^C", "And?", person=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert [len(turn.result.tokens[0]) for turn in chat.turns] == [6, 6]
    assert ui.log[0] == "\n/quit or Ctrl-D leaves"
    assert ui.log[2].endswith("; stopped")
    cached = chat.turns[1].result.usage.cached_tokens
    assert cached >= chat.turns[0].result.usage.prompt_tokens
    with pytest.raises(KeyboardInterrupt):
        say(chat, "^C")


def test_interruptible_is_quiet_elsewhere() -> None:
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
    with interruptible() as stopped:
        assert not stopped()


def lines(*given: str) -> list[str]:
    """The messages that some lines are, and what was shown before every line."""
    rest, found = iter(given), []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    prompts: list[str] = []
    while True:
        try:
            found.append(read_message(read))
        except EOFError:
            assert set(prompts) <= {PROMPT, MORE}
            return found


def test_messages_of_several_lines() -> None:
    assert lines("a", "b") == ["a", "b"]
    assert lines("a\\", "b\\", "c", "d") == ["a\nb\nc", "d"]
    assert lines("```", "a\\", "", "b", "```", "c") == ["```\na\\\n\nb\n```", "c"]
    assert lines("```python", "x", "```\\", "why?") == ["```python\nx\n```\nwhy?"]
    assert lines("read:\\", "```", "x", "```") == ["read:\n```\nx\n```"]
    assert lines("```", "never closed") == ["```\nnever closed"]
    assert lines("a\\") == ["a"]
    assert lines() == []


def test_templates(chat: Chat) -> None:
    text = chat_text(tokenizer(), [{"role": "user", "content": "hi"}])
    assert text == "<s>user:hi</s><s>assistant:"
    assert tokenizer().decode(chat_ids(tokenizer(), [{"role": "user", "content": "hi"}])) == text
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ConfigError, match="no chat template"):
        chat_ids(bare, [])
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        Chat(chat.engine, bare, settings())


def test_a_conversation_that_is_too_long(chat: Chat) -> None:
    ui = say(chat, "Why?" * 200, "/reset", "Why?")
    assert ui.log[0].startswith("ConfigError: the prompt has 8")
    assert len(chat.turns) == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens 0"),
        ({"temperature": -1.0}, ConfigError, "temperature -1"),
        ({"top_p": 2.0}, ConfigError, "top_p 2"),
        ({"masks": "m.safetensors", "sparsity": None}, ConfigError, "chat chooses its own masks"),
        ({"method": "dense"}, ConfigError, "drop the sparsity"),
        ({"method": "grifin"}, UnknownName, "griffin"),
    ],
)
def test_settings_that_cannot_be(changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        settings(**changes)


def test_settings_lines() -> None:
    assert settings_line(settings()).startswith("griffin: 50% of the FFN neurons removed")
    table = settings(sparsity=None, layer_topk="all:#10")
    assert settings_line(table).startswith("griffin: as many FFN neurons removed as the method")
    assert settings(temperature=0.5, seed=3).sampling().seed == 3
    assert settings().changed(method="dart-prompt").served() == half("dart-prompt")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one two thr", "ee four"], "one two\nthree\nfour"),
        (["a", "bcd", "efgh", "ij kl"], "abcdefgh\nij kl"),  # as long as a line: not awaited
        (["x = 1\n", "    y\n\n", "don\u2019t b"], "x = 1\n    y\n\ndon\u2019t b"),
        (
            ["\u4f60\u597d\u4f60\u597d\u4f60"],
            "\u4f60\u597d\u4f60\u597d\n\u4f60",
        ),  # two columns each
        (["12345678", " 9"], "12345678\n9"),
    ],
)
def test_lines_end_between_words(pieces: list[str], shown: str) -> None:
    seen: list[str] = []
    text = Wrapped(seen.append, lambda: 8)
    for piece in pieces:
        text.add(piece)
    text.end()
    assert "".join(seen) == shown


def test_a_word_is_written_when_it_has_ended() -> None:
    seen: list[str] = []
    text = Wrapped(seen.append, lambda: 80)
    text.add("dens")
    assert seen == []
    text.add("e, and")
    assert seen == ["dense,"]


def test_an_answer_that_goes_round_in_circles(chat: Chat) -> None:
    chat.change(max_tokens=64)
    say(chat, "Why?")
    (turn,) = chat.turns
    round_ = (5, 6, 7, 8, 9)

    def hint(tokens: tuple[int, ...], finish: str = "length") -> str:
        return loop_line(
            replace(turn, result=replace(turn.result, tokens=(tokens,), finish=(finish,)))
        )

    told = "the answer repeats itself at 50% sparsity: try a lower /sparsity, or sampling"
    assert hint(tuple(range(20)) + round_ * 10).startswith(told)
    assert hint(round_ * 9) == ""  # 45 tokens may still be a list
    assert hint(round_ * 10, "stop") == ""
    assert hint(tuple(range(64)) * 2) == ""  # twice is no circle
    assert hint((*round_ * 10, 1)) == ""


def test_a_method_that_learns_says_so_the_first_time(chat: Chat) -> None:
    ui = say(chat, "/method glass", "/method griffin", "/method glass", "/method")
    told = [line for line in ui.log if "learns first" in line]
    assert told == [
        "glass learns first, unless an earlier time kept what it needs; Ctrl-C stops it"
    ]
    assert ui.log.index(told[0]) == 0
    assert [line for line in ui.log if line.startswith("glass: 50% of")] != []
