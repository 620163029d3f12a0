"""``dart-llm chat``: messages, commands, interruptions, what is said and saved."""

import os
import signal

import pytest

from dart_llm.cli import chat as chat_cli
from dart_llm.cli.chat import Chat, check_chat_template, read_message, talk, turn_line
from dart_llm.data.texts import chat_ids
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import Token
from dart_llm.errors import ConfigError
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from engine_cases import ask, own_model, tokenizer
from steps import Same


def settings(**changes):
    usual = {"method": "griffin", "sparsity": 0.5, "max_tokens": 8}
    return merge(chat_cli.ChatSettings, usual | changes)


def say(chat, *lines, interactive=False):
    """Talk; what was said beside the answers.  ^C: an interrupt while that line is read."""
    given = iter(lines)

    def read(prompt):
        line = next(given, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    ui = Ui()
    talk(chat, ui, read, interactive)
    return ui.log


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def chat():
    with Same(own_model()), Engine(own_model(), tokenizer()) as engine:
        yield Chat(engine, tokenizer(), settings())


def test_a_conversation(chat, tmp_path, capsys):
    log = say(chat, "Why?", "", "   ", "And now?", f"/save {tmp_path}/talk.md")
    first, second = chat.turns
    assert capsys.readouterr().out == f"{first.answer}\n{second.answer}\n"
    messages = [user("Why?"), {"role": "assistant", "content": first.answer}, user("And now?")]
    assert chat.messages == [*messages, {"role": "assistant", "content": second.answer}]
    assert second.result.usage.prompt_tokens == len(chat_ids(tokenizer(), messages))
    assert second.result.usage.cached_tokens > len(chat_ids(tokenizer(), messages[:1]))
    assert log[1] == turn_line(first, 8) and log[1].startswith("8 tokens; ")
    assert "griffin: 50.0% removed of 50%, 0% of the tokens dense, re-masks: 0" in log[1]
    assert log[1].endswith("stopped at 8 tokens (--max-tokens)")
    text = (tmp_path / "talk.md").read_text("utf-8")
    assert text.startswith(f"**user**\n\nWhy?\n\n**assistant**\n\n{first.answer}\n\n**user**")
    assert (tmp_path / "talk.md").stat().st_mode & 0o777 == 0o600
    say(chat, "/reset", "//etc is a folder")  # a slash can be said
    assert chat.messages[0] == user("/etc is a folder")
    assert chat.turns[0].result.usage.cached_tokens == 0
    spoken = Chat(chat.engine, tokenizer(), settings(system="Be short."))
    say(spoken, "Why?")
    whole = [{"role": "system", "content": "Be short."}, user("Why?")]
    assert spoken.messages[:2] == whole
    assert spoken.turns[0].result.usage.prompt_tokens == len(chat_ids(tokenizer(), whole))


def test_settings_change_while_talking(chat):
    first = ("Why?", "/sparsity 0.25", "And?", "/sparsity 75%", "And?", "/method dense", "And?")
    say(chat, *first, "/method dart-prompt", "And?")
    reports = [turn.result.report for turn in chat.turns]
    shares = [(report.method, report.requested_sparsity or 0.0) for report in reports]
    griffin = [("griffin", share) for share in (0.5, 0.25, 0.75)]
    assert shares == [*griffin, ("dense", 0.0), ("dart-prompt", 0.3)]
    fourth = chat.turns[3]
    assert fourth.result.usage.cached_tokens == 0  # read anew under other settings
    ids = chat_ids(tokenizer(), [*chat.messages[:6], user("And?")])
    assert ask(chat.engine, None, ids, 8)[0].tokens == fourth.result.tokens
    assert say(chat, "/method dense", "/sparsity 0.5", "/method griffin") == [
        "dense: no neurons are removed",
        "ConfigError: method dense removes nothing: drop the sparsity",
        "griffin: 30% of the FFN neurons removed, drift rule never",
    ]
    log = say(chat, "/stats")
    assert log[0] == str(chat.turns[-1].result.report)
    assert log[1:] == [f"{i}. {turn_line(turn, 8)}" for i, turn in enumerate(chat.turns, 1)]
    log = say(chat, "/help", "/quit", "Why?")[: len(chat_cli.HELP)]
    names = "/sparsity /method /stats /save /reset /help /quit".split()
    assert [line.split()[0] for line in log] == names and len(chat.turns) == 5


def test_what_cannot_be_done_is_one_sentence(chat):
    before = chat.settings
    for line, kind, words in [
        ("/sparsty 0.5", "UnknownName", "did you mean /sparsity or"),
        ("/sparsity much", "ConfigError", 'sparsity "much" is not a number: write 0.7 or 70%'),
        ("/sparsity 1", "ConfigError", r"must lie in [0, 1)"),
        ("/method drat", "UnknownName", "did you mean dart"),
        ("/stats", "ConfigError", "there is no answer yet"),
        ("/save", "ConfigError", "name a file"),
        ("/save /nowhere/at/all.md", "ResultsError", "cannot write /nowhere/at/all.md: No such"),
        ("Why?" * 200, "ConfigError", "the prompt has 8"),
    ]:
        (said,) = say(chat, line)
        assert said.startswith(f"{kind}: ") and words in said
    assert chat.settings == before
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ConfigError, match="no chat template: use dart-llm run --prompt"):
        check_chat_template(bare, None)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="rejects these messages: roles must alternate"):
        check_chat_template(bare, None)


def test_interrupted(chat):
    chat.settings = chat.settings.changed(max_tokens=400)
    plain = chat.engine.run

    def slow(asked, emit, cancelled):
        def watch(record):
            emit(record)
            if isinstance(record, Token) and record.index == 5:
                os.kill(os.getpid(), signal.SIGINT)

        return plain(asked, watch, cancelled)

    before = signal.getsignal(signal.SIGINT)
    chat.engine.run = slow
    log = say(chat, "^C", "Why?", "^C", "And?", interactive=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert [len(turn.result.tokens[0]) for turn in chat.turns] == [6, 6]
    assert log[0] == "\n/quit or Ctrl-D leaves the chat" and log[2].endswith("; stopped")
    with pytest.raises(KeyboardInterrupt):
        say(chat, "^C")
    with chat_cli.interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()


def test_messages_of_several_lines():
    for given, messages in (
        (["a", "b"], ["a", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (["a\\"], ["a"]),
    ):
        rest = iter(given)

        def read(prompt, rest=rest):
            assert prompt in ("> ", ". ")
            for line in rest:
                return line
            raise EOFError

        assert [read_message(read) for _ in messages] == messages
        with pytest.raises(EOFError):
            read_message(read)
