"""``dart-llm serve`` as a process: what it says, refuses, how it ends, and what it costs."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from engine_cases import tokenizer
from lm_cases import refusal
from serve_cases import serving, until
from tiny import tiny


def test_what_cannot_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("serve", "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said
    assert "--port 0 takes a free port" in said


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_an_extra_that_is_missing(package):
    script = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['dart-llm', 'serve', '--port', "
        "'0']; from dart_llm.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert f"this needs {package.replace('_', '-')}, which is not installed: pip install " in line


@pytest.fixture
def process(tmp_path, monkeypatch):
    program, seen = tmp_path / "browser", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" >{seen}.part && mv {seen}.part {seen}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    flags = ("--method", "griffin", "--grace", 1, "--max-tokens", 400, "--open")
    with serving("--model", tmp_path / "model", *flags) as found:
        yield found


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_opens_the_page_and_ends(process, tmp_path, end):
    with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
        body = {"prompt": "abc", "max_tokens": 3, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] <= 3
        until((tmp_path / "seen").exists)
        assert (tmp_path / "seen").read_text().rstrip("/") == process.url
        process.end(end)  # while a connection is still open


def test_what_torch_keeps_for_lengths_of_prompts_is_bounded():
    """Or oneDNN keeps some 3 MiB of code for every length that a server has seen."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    script = "import os; from dart_llm.__main__ import set_environment; set_environment(); "
    script += f"print(*(os.environ[name] for name in {names}))"
    for given, wanted in (({}, "64 64"), ({names[0]: "9"}, "9 64")):
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command, how = [sys.executable, "-c", script], {"capture_output": True, "text": True}
        done = subprocess.run(command, env=environment | given, **how)
        assert done.stdout.split() == wanted.split(), done.stderr
