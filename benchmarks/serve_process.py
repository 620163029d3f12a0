"""A server in a separate process, for the benchmarks of ``dart-llm serve``."""

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
"""Seconds that loading and calibration may take."""


@dataclass
class Server:
    """A running ``dart-llm serve``."""

    url: str
    pid: int

    def rss(self) -> int:
        """Resident memory of the process in bytes (Linux)."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident
        return 1024 * int(resident[1])


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Start ``dart-llm serve --port 0`` with ``arguments``; end it by SIGTERM after the block."""
    command = [sys.executable, "-m", "dart_llm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    output: list[str] = []

    def read() -> None:
        assert process.stderr
        for line in process.stderr:
            output.append(line)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield Server(_link(process, output), process.pid)
    finally:
        process.terminate()
        try:
            code = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit("the server did not end within 30 s") from None
    if code != 0:
        raise SystemExit(f"the server ended with exit code {code}: {''.join(output[-5:])}")


def _link(process: subprocess.Popen[str], output: list[str]) -> str:
    end = time.monotonic() + STARTS_IN
    while time.monotonic() < end and process.poll() is None:
        link = re.search(r"at (http://\S+?)/ \(Ctrl-C", "".join(output))
        if link:
            return link[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start: {''.join(output[-5:])}")
