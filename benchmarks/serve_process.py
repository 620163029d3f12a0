"""A server of its own process, for the benchmarks of ``dart-llm serve``."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTS_IN = 300.0
"""Seconds that loading and learning may take."""


@dataclass
class Server:
    """A running ``dart-llm serve``."""

    url: str
    pid: int

    def rss(self) -> int:
        """Bytes of memory that it holds now (Linux)."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return 1024 * int(found[1])


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Start ``dart-llm serve --port 0`` with ``arguments`` and end it by SIGTERM afterwards."""
    command = [sys.executable, "-m", "dart_llm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said: list[str] = []

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            said.append(line)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield Server(_link(process, said), process.pid)
    finally:
        process.terminate()
        try:
            code = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit("the server did not end within 30 s") from None
    if code != 0:
        raise SystemExit(f"the server ended with {code}: {''.join(said[-5:])}")


def _link(process: subprocess.Popen[str], said: list[str]) -> str:
    end = time.monotonic() + STARTS_IN
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"at (http://\S+?)/ \(Ctrl-C", "".join(said))
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start: {''.join(said[-5:])}")
