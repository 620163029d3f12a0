"""tests/warm_cli.py: a command that it runs behaves like one that was started by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import warm_cli
from serve_cases import until

WARM = str(Path(warm_cli.__file__))
SHOWS = """\
import os, sys
print(sys.argv, os.getcwd(), os.environ["WORD"], sys.stdin.read(), __name__)
print("to stderr", file=sys.stderr)
sys.exit(7)
"""
WAITS = """\
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(9))
with open("pid", "w") as file:
    file.write(str(os.getpid()))
for _ in range(600):
    time.sleep(0.1)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a client of a server that imported nothing."""
    address = tmp_path / "warm"
    server = subprocess.Popen([sys.executable, WARM, "serve", str(address)])
    until(address.exists)

    def client(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-S", WARM, "run", str(address), "python", *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        where = {"cwd": tmp_path, "env": {**os.environ, **variables}}
        return subprocess.Popen(command, text=True, **pipes, **where)  # type: ignore[call-overload]

    try:
        yield client
    finally:
        server.terminate()
        server.wait(20)


def test_arguments_folder_environment_streams_and_exit_code(start: Start, tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text(SHOWS)
    client = start("shows.py", "a b", WORD="hello")
    out, error = client.communicate("typed", timeout=60)
    assert out == f"['shows.py', 'a b'] {tmp_path} hello typed __main__\n"
    assert error == "to stderr\n"
    assert client.returncode == 7


def test_an_exception_is_shown_and_one_command_knows_nothing_of_another(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "sets.py").write_text("import sys\nsys.mark = 1\n1 / 0\n")
    (tmp_path / "looks.py").write_text("import sys\nprint(hasattr(sys, 'mark'))\n")
    first = start("sets.py")
    assert "ZeroDivisionError" in first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert start("looks.py").communicate(timeout=60)[0] == "False\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 9), (signal.SIGKILL, -9)])
def test_signals_arrive_and_a_command_ends_with_its_client(
    start: Start, tmp_path: Path, number: int, code: int
) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    client = start("waits.py")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 60)
    child = int((tmp_path / "pid").read_text())
    client.send_signal(number)
    assert client.wait(60) == code
    until(lambda: not Path(f"/proc/{child}").exists(), 60)
