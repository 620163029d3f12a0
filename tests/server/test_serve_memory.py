"""Prompts of ever new lengths cost a bounded amount of memory, under what the command line sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dart_llm import __main__ as entry

LENGTHS = """
import re, sys
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
def test_new_lengths_do_not_cost_memory_for_ever() -> None:
    """Of 60 more lengths; some 130 MiB where oneDNN keeps the code for each."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    given = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS],
        env={**given, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 45  # MiB


def test_the_command_line_bounds_what_is_kept_for_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    entry.set_environment()
    assert [os.environ[name] for name in names] == [entry.KEPT_SHAPES] * 2
    monkeypatch.setenv(names[0], "7")
    entry.set_environment()
    assert os.environ[names[0]] == "7"
