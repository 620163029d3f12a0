"""``dart-llm serve`` as a process: what it says, refuses, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lm_cases import call
from serve_cases import until


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dart_llm", "serve", *arguments]


def refused(*arguments: object) -> str:
    """What is said of a server that cannot start: one line, and exit code 2."""
    done = call("serve", *arguments)
    assert (done.code, done.out) == (2, ""), done.err
    (line,) = done.err.splitlines()
    return line


def test_an_address_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said
    assert "--port 0 takes a free port" in said
    said = refused("--host", "203.0.113.7", "--api-key", "a-good-long-key", "--port", 0)
    assert "cannot listen at 203.0.113.7" in said
    assert "a-good" not in said
    assert "give --api-key too" in refused("--host", "0.0.0.0", "--port", 0)
    monkeypatch.setenv("DART_API_KEY", "short")
    assert "8 or more plain characters" in refused("--port", 0)


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_an_extra_that_is_missing(package: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['dart-llm', 'serve', '--port', "
        "'0']; from dart_llm.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"this needs {package.replace('_', '-')}, which is not installed: pip install " in line


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """A folder with a tiny model and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tiny import tiny

    alphabet = pre_tokenizers.ByteLevel.alphabet()[:90]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tiny("llama").save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


class Process:
    """A server process; what it says is read as it comes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            command("--port", "0", *arguments), stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            until(lambda: "(Ctrl-C ends)" in self.said or self.process.poll() is not None, 120)
            found = re.search(r"serving (\S+) at (http://127\.0\.0\.1:\d+)/", self.said)
            assert found, self.said
        except AssertionError:
            self.process.kill()
            raise
        self.url = found[2]

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said += line

    def end(self, number: int) -> int:
        """The exit code after a signal; it must come within ten seconds."""
        self.process.send_signal(number)
        return self.process.wait(10)


@pytest.fixture
def process(tiny_model: str) -> Iterator[Process]:
    found = Process(
        "--model", tiny_model, "--method", "griffin", "--grace", "1", "--max-tokens", "400"
    )
    yield found
    if found.process.poll() is None:
        found.process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends(process: Process, number: int) -> None:
    body = {"prompt": "abc", "max_tokens": 3, "temperature": 0}
    with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] <= 3
        assert client.get("/").status_code == 200
        assert process.end(number) == 0  # while a connection is still open
    until(lambda: process.said.endswith("ended\n"))
    assert "Traceback" not in process.said


def test_it_ends_while_it_answers(process: Process) -> None:
    body = {"prompt": "abc", "max_tokens": 400, "stream": True, "dart": {"sparsity": 0.5}}
    lines: list[Any] = []

    def read() -> None:
        client = httpx.Client(base_url=process.url, timeout=60, trust_env=False)
        with client, client.stream("POST", "/v1/completions", json=body) as response:
            lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert process.end(signal.SIGTERM) == 0
    thread.join(10)
    last = lines[-1].removeprefix("data: ")
    assert last == "[DONE]" or json.loads(last)["error"]["code"] == "shutting_down"
    assert "Traceback" not in process.said


def test_the_page_is_opened_when_asked(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, seen = tmp_path / "browser", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" >{seen}.part && mv {seen}.part {seen}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    process = Process("--model", tiny_model, "--method", "griffin", "--grace", "1", "--open")
    try:
        until(seen.exists)
        assert seen.read_text() == f"{process.url}/"
        with httpx.Client(timeout=60, trust_env=False) as client:
            assert client.get(seen.read_text()).status_code == 200
        assert process.end(signal.SIGTERM) == 0
    finally:
        if process.process.poll() is None:
            process.process.kill()
