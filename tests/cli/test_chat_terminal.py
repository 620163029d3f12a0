"""``dart-llm chat`` as a program: in a pipe, and in a terminal where somebody presses keys."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from engine_cases import tokenizer
from lm_cases import call
from tiny import tiny

pty = pytest.importorskip("pty", reason="a terminal is tested where Python has pty")

LONG = 100_000
"""Tokens of an answer that nobody waits for."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of ``dart-llm chat`` on a tiny model."""
    path = str(tmp_path_factory.mktemp("model"))
    model = tiny()
    model.config.max_position_embeddings = 2 * LONG
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    chat = ["chat", "--model", path, "--device", "cpu"]
    return [*chat, "--method", "griffin", "--sparsity", "0.5"]


def test_piped(command, tmp_path, monkeypatch):
    """Only answers go to stdout; an error is one sentence, and the next line is still read."""
    lines = f"Why?\\\nand how?\n/sparsity 2\nAnd?\n/save {tmp_path}/talk.md\n/quit\nNo?\n"
    program = [sys.executable, "-m", "dart_llm", *command, "--max-tokens", "6"]
    done = subprocess.run(program, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 2 and all(answers)
    text = (tmp_path / "talk.md").read_text("utf-8")
    parts = [("user", "Why?\nand how?"), ("assistant", answers[0])]
    parts += [("user", "And?"), ("assistant", answers[1])]
    assert text == "\n".join(f"**{role}**\n\n{said}\n" for role, said in parts)
    assert "ConfigError: sparsity 2 must lie in [0, 1)" in done.stderr
    assert done.stderr.count("6 tokens; ") == 2 and "Traceback" not in done.stderr
    monkeypatch.setattr(sys, "stdin", None)  # as Python starts where standard input is closed
    closed = call(*command)
    assert (closed.code, closed.out) == (0, ""), closed.err
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    refused = call(*command, "--executor", "native")
    assert refused.code == 2 and refused.err.count("ConfigError: ") == 1


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments, home):
        self.pid, self.file = pty.fork()
        if self.pid == 0:  # the child: nothing but the program
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
            os.environ.update(TERM="dumb", HOME=str(home))
            os.execv(sys.executable, [sys.executable, "-m", "dart_llm", *arguments])
        self.seen = ""

    def press(self, keys):
        os.write(self.file, keys.encode())

    def wait_for(self, text, looks=240):
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

    def ask(self):
        """A question whose answer has begun."""
        self.wait_for("> ")
        self.press("first question\n")
        self.wait_for("first question")
        time.sleep(1)

    def end(self):
        """How the program ended; it reads what is still written."""
        late = time.monotonic() + 60
        while time.monotonic() < late:
            with contextlib.suppress(OSError):
                if select.select([self.file], [], [], 0.1)[0]:
                    os.read(self.file, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")


@pytest.fixture
def terminal(command, tmp_path):
    terminal = Terminal([*command, "--max-tokens", str(LONG)], tmp_path)
    yield terminal
    os.close(terminal.file)
    with contextlib.suppress(OSError):
        os.kill(terminal.pid, 9)
        os.waitpid(terminal.pid, 0)


def test_keys(terminal):
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.ask()
    terminal.press("\x03")  # stops the answer
    terminal.wait_for("; stopped")
    terminal.wait_for("> ")
    time.sleep(1)  # the prompt is shown a moment before keys are read
    terminal.press("half a line\x03")  # drops the line
    terminal.wait_for("/quit or Ctrl-D leaves the chat")
    terminal.wait_for("> ")
    terminal.press("/sparsity 0.25\n")
    terminal.wait_for("/sparsity 0.25")  # shown again
    terminal.wait_for("griffin: 25% of the FFN neurons removed")
    terminal.wait_for("> ")
    terminal.press("\x04")  # Ctrl-D
    assert terminal.end() == 0


def test_a_polite_end(terminal):
    terminal.ask()
    os.kill(terminal.pid, 15)
    assert terminal.end() == 143
