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

from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.timing import WARM, Sample
from dart_llm.models.gguf_file import read_gguf

LLAMA_CPP = "llama.cpp"

PROGRAM, VARIABLE = "llama-bench", "LLAMA_BENCH"

OURS = ("OMP_", "GOMP_", "KMP_")
"""Variables that are set for PyTorch's threads: llama.cpp runs without, as its users run it."""


def find_bench() -> str | None:
    """The program: ``LLAMA_BENCH``, else on PATH; None where there is none."""
    return shutil.which(os.environ.get(VARIABLE) or PROGRAM)


def require_bench() -> str:
    """The program; raises ``ConfigError`` where there is none."""
    if bench := find_bench():
        return bench
    path = os.environ.get(VARIABLE)
    where = f"{VARIABLE}={path} is not a program" if path else f"{PROGRAM} is not on PATH"
    raise ConfigError(
        f"--reference {LLAMA_CPP} needs llama.cpp's own benchmark, and {where}: build llama.cpp "
        f"and name its {PROGRAM} in {VARIABLE}"
    )


@dataclass(frozen=True)
class ReferenceFile:
    """A GGUF file: ``kind``, such as Q4_K_M; ``bytes`` of the tensors that a token reads."""

    path: Path
    kind: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> ReferenceFile:
        """Raises ``LoadError`` for what is not a GGUF file."""
        file = read_gguf(path)
        sizes = {name: tensor.size for name, tensor in file.tensors.items()}
        looked_up = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
        return cls(path, file.quantisation, sum(sizes.values()) - looked_up)


def reference_repetition(
    bench: str, file: Path, threads: int, prompt: int, tokens: int, long: int = 0
) -> Sample:
    """One repetition by llama-bench, as ``timing.repetition``: a mean step stands for all.

    It generates ``tokens`` after ``prompt`` others; ``long``: tokens of a longer prompt whose first
    token is timed too, 0: none.  ``build`` identifies the program.
    """
    sizes = ",".join(dict.fromkeys(str(size) for size in (prompt, long) if size))
    read = _run(bench, file, threads, "-p", sizes, "-n", "0")
    generated = decode_row(bench, file, threads, tokens, prompt + WARM)
    seconds = {row["n_prompt"]: row["avg_ns"] / 1e9 for row in read}
    names = ("build_commit", "build_number", "backends", "model_type", "type_k", "n_threads")
    sample = {
        "first_token_s": seconds[prompt],
        "warm_s": [],
        "steps_s": [generated["avg_ns"] / 1e9 / tokens],
        "build": {name: generated.get(name) for name in names},
    }
    return sample | ({"prefill_s": seconds[long]} if long else {})


def decode_row(bench: str, file: Path, threads: int, tokens: int, depth: int) -> dict[str, Any]:
    """Its row for ``tokens`` that are generated behind ``depth`` others: ``avg_ns`` of all."""
    return _run(bench, file, threads, "-p", "0", "-n", str(tokens), "-d", str(depth))[0]


def _run(bench: str, file: Path, threads: int, *flags: str) -> list[dict[str, Any]]:
    """Its report; raises ``DartError`` where it fails."""
    command = [bench, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", *flags]
    environment = program_environment(os.environ, bench)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise DartError(f"{PROGRAM} at {bench} could not be run: {error}") from error
    try:
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        if rows and all("avg_ns" in row and "n_prompt" in row for row in rows):
            return list(rows)
    except (ValueError, TypeError):  # not JSON, or not a list of rows
        pass
    output = " ".join((done.stderr.strip() or done.stdout.strip() or "no output").split())
    raise DartError(
        f"{PROGRAM} failed on {file.name} (exit code {done.returncode}): {output[-300:]}"
    )


def program_environment(environment: Mapping[str, str], bench: str) -> dict[str, str]:
    """Without what is set for PyTorch's threads; libraries may lie beside the program."""
    kept = {name: value for name, value in environment.items() if not name.startswith(OURS)}
    folders = [str(Path(bench).resolve().parent), kept.get("LD_LIBRARY_PATH", "")]
    return {**kept, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}
