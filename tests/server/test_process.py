"""``dart-llm serve`` as a process: what it says, refuses, how it ends, and what it costs."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from engine_cases import tokenizer
from lm_cases import call
from serve_cases import serving, until
from tiny import tiny


def refused(*arguments):
    """What is said of a server that cannot start: one line, and exit code 2."""
    done = call("serve", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    return done.err


def test_what_cannot_start(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", port)
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in said
    assert "--port 0 takes a free port" in said
    monkeypatch.setenv("DART_API_KEY", "short")
    assert "8 or more plain characters" in refused("--port", 0)


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_an_extra_that_is_missing(package):
    script = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['dart-llm', 'serve', '--port', "
        "'0']; from dart_llm.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    first, *_, line = done.stderr.splitlines()
    assert first == "starting (loading PyTorch)"
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


LENGTHS = """
import re
from pathlib import Path
from dart_llm.__main__ import set_environment
set_environment()
import torch
from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import GenerationRequest as Ask, Sampling
from engine_cases import tokenizer
from tiny import tiny

def held():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", status)[1]) / 1024

torch.set_num_threads(1)
with Engine(tiny(dtype=torch.bfloat16), tokenizer()) as engine:
    for length in range(1, 91):
        engine.run(Ask(tuple(3 + i % 90 for i in range(length)), Sampling(max_tokens=2)))
        if length == 30:
            first = held()
    print(held() - first)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_prompts_of_new_lengths_do_not_cost_memory_for_ever(monkeypatch):
    """Of 60 more lengths; some 130 MiB where oneDNN keeps the code for each."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LENGTHS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 45  # MiB
