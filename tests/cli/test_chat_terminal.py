"""``dart-llm chat`` as a program: in a pipe, and in a terminal where somebody presses keys."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_cases import tokenizer
from tiny import tiny

pty = pytest.importorskip("pty", reason="a terminal is tested where Python has pty")

LONG = 100_000
"""Tokens of an answer that nobody waits for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = tiny()
    model.config.max_position_embeddings = 2 * LONG
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def command(folder: Path, *flags: str) -> list[str]:
    chat = [sys.executable, "-m", "dart_llm", "chat", "--model", str(folder), "--device", "cpu"]
    return [*chat, "--method", "griffin", "--sparsity", "0.5", *flags]


def test_no_input_at_all(folder: Path) -> None:
    """A standard input that was closed has ended."""
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_piped(folder: Path, tmp_path: Path) -> None:
    """Answers alone on stdout; an error is one sentence, and the next line goes on."""
    lines = f"Why?\\\nand how?\n/sparsity 2\nAnd?\n/save {tmp_path}/talk.md\n/quit\nNo?\n"
    done = subprocess.run(
        command(folder, "--max-tokens", "6"),
        input=lines,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 2 and all(answers)
    text = (tmp_path / "talk.md").read_text("utf-8")
    parts = [("user", "Why?\nand how?"), ("assistant", answers[0])]
    parts += [("user", "And?"), ("assistant", answers[1])]
    assert text == "\n".join(f"**{role}**\n\n{said}\n" for role, said in parts)
    assert "ConfigError: sparsity 2 must lie in [0, 1)" in done.stderr
    assert done.stderr.count("6 tokens; ") == 2 and "Traceback" not in done.stderr


def test_settings_that_cannot_be(folder: Path) -> None:
    for flags, words in (
        (("--max-tokens", "0"), "ConfigError: max_tokens 0 must be 1 or more"),
        (("--executor", "native"), "ConfigError: "),
    ):
        done = subprocess.run(
            command(folder, *flags),
            input="",
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | {"DART_NATIVE": "0"},
        )
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:  # the child: nothing but the program
            os.environ.update(TERM="dumb", HOME=str(home))
            os.execv(arguments[0], arguments)
        self.seen = ""

    def press(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def wait_for(self, text: str, looks: int = 240) -> str:
        """What comes before ``text``; waits for so many seconds in which nothing comes."""
        while text not in self.seen:
            if select.select([self.file], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.file, 65536).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert text in self.seen, self.seen[-2000:]
                continue
            looks -= 1  # a clock would also count the time in which nobody runs
            assert looks, f"no {text!r} in {self.seen[-2000:]!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self) -> int:
        """How the program ended, -1 when it had to be stopped."""
        for _ in range(600):
            with contextlib.suppress(OSError):
                if select.select([self.file], [], [], 0.1)[0]:
                    os.read(self.file, 65536)
            time.sleep(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.file)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        return -1


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    kept = str(tmp_path / "kept" / "lines")
    made = Terminal(command(folder, "--max-tokens", str(LONG), "--history", kept), tmp_path)
    yield made
    with contextlib.suppress(OSError):
        os.kill(made.pid, 9)
        os.waitpid(made.pid, 0)


def test_keys(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.wait_for("> ")
    terminal.press("first question\n")
    terminal.wait_for("first question")
    time.sleep(1)
    terminal.press("\x03")  # stops the answer
    terminal.wait_for("; stopped")
    terminal.wait_for("> ")
    time.sleep(1)  # the prompt is shown a moment before keys are read
    terminal.press("half a line\x03")  # drops the line
    terminal.wait_for("/quit or Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.press("/sparsity 0.25\n")
    terminal.wait_for("griffin: 25% of the FFN neurons removed")
    terminal.wait_for("> ")
    terminal.press("\x04")  # Ctrl-D
    assert terminal.end() == 0
    kept = tmp_path / "kept" / "lines"
    if kept.read_text("utf-8"):  # a Python without readline keeps none
        assert "first question\n" in kept.read_text("utf-8")
    assert kept.stat().st_mode & 0o077 == 0


def test_what_is_typed_during_an_answer_is_not_shown_in_it(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.wait_for("> ")
    terminal.press("first question\n")
    terminal.wait_for("first question")
    time.sleep(1)
    terminal.press("typed meanwhile")
    time.sleep(1)
    terminal.press("\x03")
    assert "typed meanwhile" not in terminal.wait_for("; stopped")
    terminal.wait_for("> ")
    time.sleep(1)
    terminal.press("/sparsity 0.25\n")  # shown again
    terminal.wait_for("/sparsity 0.25")
    terminal.wait_for("griffin: 25% of the FFN neurons removed")


def test_a_polite_end(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.press("question\n")
    terminal.wait_for("question")
    time.sleep(1)
    os.kill(terminal.pid, 15)
    assert terminal.end() == 143
