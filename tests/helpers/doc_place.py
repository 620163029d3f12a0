"""A clone as a reader would have it, with small models and the files that the commands name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import checkpoints
from dart_llm.cache import cache_folder
from dart_llm.models.bundled import embedder_folder
from doc_commands import ROOT
from doc_files import write_files
from doc_models import CONTEXT, NAMES, stand_in, write_model

TESTS = Path(__file__).parent
CLONED = ("README.md", "pyproject.toml", "Makefile", "run_experiment.sh", "run_knowledge_drift.sh")
CLONED += ("scripts", "recipes", "examples", "docs", "src", ".ci")
WARM_SECONDS = 300.0
OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""With these an inner make would print the folders that it enters."""


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed on stdout and stderr."""

    code: int
    printed: str


@dataclass
class Place:
    """The clone, its environment, and the process that is ``dart-llm`` and ``python``."""

    root: Path
    environment: dict[str, str]
    warm: subprocess.Popen[bytes]

    def bash(self, text: str, seconds: float, stdin: str = "", **variables: str) -> Done:
        """Run lines of bash in the clone; all that they started ends after ``seconds``."""
        process = self._start(text, subprocess.PIPE, subprocess.PIPE, variables)
        try:
            printed, _ = process.communicate(stdin.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
        return Done(process.returncode, printed.decode(errors="replace"))

    def start(self, text: str, log: Path) -> subprocess.Popen[bytes]:
        """Start lines of bash in a process group of their own; what they print goes to ``log``."""
        with log.open("wb") as file:
            return self._start(text, subprocess.DEVNULL, file, {})

    def _start(
        self, text: str, stdin: int, stdout: int | IO[bytes], variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.root,
            env={**self.environment, **variables},
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def close(self) -> None:
        self.warm.terminate()
        self.warm.wait(20)


def make_place(folder: Path) -> Place:
    """Everything that the commands find: programs, models, texts, settings."""
    root = folder / "clone"
    root.mkdir()
    for name in CLONED:
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")  # results are written there
    model = write_model(folder / "model")
    stand_in(folder / "cache", model)
    for name in NAMES:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copytree(model, root / name)
    _write_gguf(root / "qwen2.5-coder-0.5b-instruct.gguf")
    write_files(root, folder / "shared")
    socket = folder / "warm"
    programs = _write_programs(folder / "bin", socket)
    _write_venv(root, programs)
    environment = _environment(folder, programs)
    warm = subprocess.Popen(
        [sys.executable, str(TESTS / "warm_cli.py"), "serve", str(socket), "doc_data"],
        env={**environment, "PYTHONPATH": f"{TESTS}:{environment.get('PYTHONPATH', '')}"},
        cwd=root,
    )
    deadline = time.monotonic() + WARM_SECONDS
    while not socket.exists():
        assert warm.poll() is None and time.monotonic() < deadline, "the warm process never came up"
        time.sleep(0.05)
    return Place(root, environment, warm)


def _environment(folder: Path, programs: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k[:5] != "DART_" and k not in OF_MAKE}
    kernels = cache_folder() / "native"  # compiled once, not for every test
    kernels.mkdir(parents=True, exist_ok=True)
    for path in (kernels, embedder_folder(cache_folder())):
        (folder / "cache/dart-llm" / path.name).symlink_to(path)
    return {
        **kept,
        "PATH": f"{programs}:/usr/bin:/bin",
        "DART_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
        "BROWSER": "true",
    }


def _write_programs(folder: Path, socket: Path) -> Path:
    folder.mkdir()
    warm = f"exec {sys.executable} -S -E {TESTS / 'warm_cli.py'} run {socket}"
    lines = {name: f"{warm} {name}" for name in ("dart-llm", "python")}
    lines["pip"] = f"exec {sys.executable} -m pip"
    for name, line in lines.items():
        (folder / name).write_text(f'#!/bin/sh\n{line} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def _write_venv(root: Path, programs: Path) -> None:
    """What ``make setup`` leaves behind, so that it has nothing to do."""
    venv = root / ".venv"
    (venv / "bin").mkdir(parents=True)
    python = f'[ "$1" != -c ] || exec {sys.executable} "$@"\nexec {programs / "python"} "$@"\n'
    (venv / "bin/python").write_text(f"#!/bin/sh\n{python}", encoding="utf-8")
    (venv / "bin/python").chmod(0o755)
    (venv / "bin/dart-llm").symlink_to(programs / "dart-llm")
    with (root / "pyproject.toml").open("rb") as file:
        sums = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True)
    stamp = f"{sums.stdout.strip()} {root} {venv}\n"
    (venv / ".dart-llm-all").write_text(stamp, encoding="utf-8")


def _write_gguf(path: Path) -> None:
    before, checkpoints.CONTEXT = checkpoints.CONTEXT, CONTEXT
    try:
        checkpoints.write_gguf(path)
    finally:
        checkpoints.CONTEXT = before
