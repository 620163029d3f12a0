"""llama.cpp's own ``llama-bench``, run as a program on a GGUF file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import DartError
from dart_llm.models.gguf_file import read_gguf

LLAMA_CPP = "llama.cpp"

PROGRAM, VARIABLE = "llama-bench", "LLAMA_BENCH"

OURS = ("OMP_", "GOMP_", "KMP_")
"""Variables that are set for PyTorch's threads: llama.cpp runs without, as its users run it."""


def find_bench() -> str | None:
    """The program: ``LLAMA_BENCH``, else on PATH; None where it is not."""
    return shutil.which(os.environ.get(VARIABLE) or PROGRAM)


@dataclass(frozen=True)
class ReferenceFile:
    """A GGUF file: ``kind``, such as Q4_K_M; ``bytes`` of the tensors that a token reads."""

    path: Path
    kind: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> ReferenceFile:
        """Raises ``LoadError`` for what is no GGUF file."""
        file = read_gguf(path)
        held = {name: tensor.size for name, tensor in file.tensors.items()}
        looked_up = held.get("token_embd.weight", 0) if "output.weight" in held else 0
        return cls(path, file.file_type or file.quantisation, sum(held.values()) - looked_up)


def prompt_rows(bench: str, file: Path, threads: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Its rows for prompts of ``sizes`` tokens: ``n_prompt`` and ``avg_ns`` of the whole."""
    return _run(bench, file, threads, "-p", ",".join(map(str, sizes)), "-n", "0")


def decode_row(bench: str, file: Path, threads: int, tokens: int, depth: int) -> dict[str, Any]:
    """Its row for ``tokens`` that are generated behind ``depth`` others: ``avg_ns`` of all."""
    return _run(bench, file, threads, "-p", "0", "-n", str(tokens), "-d", str(depth))[0]


def _run(bench: str, file: Path, threads: int, *asked: str) -> list[dict[str, Any]]:
    """Its report; raises ``DartError`` where it fails."""
    command = [bench, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", *asked]
    environment = program_environment(os.environ, bench)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise DartError(f"{PROGRAM} at {bench} could not be run: {error}") from error
    try:
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        found = None
    rows = found if isinstance(found, list) else []
    if not rows or not all(
        isinstance(one, dict) and "avg_ns" in one and "n_prompt" in one for one in rows
    ):
        told = " ".join((done.stderr.strip() or done.stdout.strip() or "it said nothing").split())
        raise DartError(
            f"{PROGRAM} failed on {file.name} (exit code {done.returncode}): {told[-300:]}"
        )
    return rows


def program_environment(given: Mapping[str, str], bench: str) -> dict[str, str]:
    """Without what is set for PyTorch's threads; libraries may lie beside the program."""
    kept = {name: value for name, value in given.items() if not name.startswith(OURS)}
    places = [str(Path(bench).resolve().parent), kept.get("LD_LIBRARY_PATH", "")]
    return {**kept, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, places))}
