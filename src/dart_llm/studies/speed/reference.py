"""llama.cpp beside our rows: its own ``llama-bench``, run as a program on the same GGUF files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.cache import cache_folder
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.bundled import MEMBER, default_folder
from dart_llm.models.gguf import read_header
from dart_llm.models.loading import is_default
from dart_llm.models.packed_loading import read_tensors
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.cases import LLAMA_CPP, Case
from dart_llm.studies.speed.model import Held
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.summary import WARM
from dart_llm.studies.speed.timing import Sample

PROGRAM, VARIABLE = "llama-bench", "LLAMA_BENCH"

CACHE_BYTES = 2
"""Bytes of a number in llama.cpp's key-value cache, float16."""

OURS = ("OMP_", "GOMP_", "KMP_")
"""Variables that are set for PyTorch's threads: llama.cpp runs without, as its users run it."""


def find_bench() -> str:
    """The program: ``LLAMA_BENCH``, else on PATH; raises ``ConfigError`` where it is not."""
    asked = os.environ.get(VARIABLE)
    found = shutil.which(asked or PROGRAM)
    if found is None:
        where = f"{VARIABLE}={asked} is no program" if asked else f"{PROGRAM} is not on PATH"
        raise ConfigError(
            f"--reference {LLAMA_CPP} needs llama.cpp's own benchmark, and {where}: build "
            f"llama.cpp and name its {PROGRAM} in {VARIABLE}"
        )
    return found


@dataclass(frozen=True)
class ReferenceFile:
    """A GGUF file: ``kind``, such as Q4_K_M; ``bytes`` of the tensors that a token reads."""

    path: Path
    kind: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> ReferenceFile:
        """Raises ``LoadError`` for what is no GGUF file."""
        _, tensors = read_tensors(path)
        header = read_header(path)
        held = {name: tensor.size for name, tensor in tensors.items()}
        looked_up = held.get("token_embd.weight", 0) if "output.weight" in held else 0
        return cls(path, header.file_type or header.quantisation, sum(held.values()) - looked_up)


def own_file(settings: SpeedSettings, ui: Ui) -> Path | None:
    """The model's own GGUF file, if it is one; the default's lies in the cache."""
    if settings.is_random:
        return None
    if is_default(settings.model):
        cache = cache_folder(settings.cache_dir)
        return default_folder(cache, packed=True, progress=ui.say) / Path(MEMBER).name
    path = Path(settings.model).expanduser()
    return path if path.is_file() else None


def reference_files(settings: SpeedSettings, ui: Ui) -> list[ReferenceFile]:
    """What was asked for, else the model's own file and those of ``--weights``.

    Raises ``ConfigError`` where there is none, ``LoadError`` for what is no GGUF file.
    """
    own = None if settings.reference_file else own_file(settings, ui)
    given = [Path(name).expanduser() for name in settings.reference_file or ()]
    formats = [one.file for one in settings.format_list()]
    asked: list[Path | None] = [*given] or [own, *formats]
    paths = [one for one in asked if one is not None]
    if not paths:
        raise ConfigError(
            f"{settings.name} is no GGUF file, which {LLAMA_CPP} reads: give --reference-file FILE"
        )
    return [ReferenceFile.of(path) for path in dict.fromkeys(paths)]


def reference_cases(files: Sequence[ReferenceFile]) -> dict[str, ReferenceFile]:
    """Files by their rows' labels: of their kinds, or of their names where kinds are alike."""
    kinds = [one.kind for one in files]
    return {
        f"{LLAMA_CPP} {one.kind if kinds.count(one.kind) == 1 else one.path.stem}": one
        for one in files
    }


def case_of(label: str, file: ReferenceFile) -> Case:
    """The row of a file."""
    return Case(label, file=file.path)


def turn(bench: str, file: Path, threads: int, settings: SpeedSettings) -> Sample:
    """One turn of llama-bench, as ``timing.repetition`` gives one: the mean step stands for all.

    It generates as many tokens after as many as our timed ones; ``build`` says what ran.
    """
    prompts = dict.fromkeys(size for size in (settings.prompt_tokens, settings.prefill) if size)
    read = _bench(bench, file, threads, "-p", ",".join(map(str, prompts)), "-n", "0")
    depth = settings.prompt_tokens + WARM
    (generated,) = _bench(
        bench, file, threads, "-p", "0", "-n", str(settings.tokens), "-d", str(depth)
    )
    seconds = {one["n_prompt"]: one["avg_ns"] / 1e9 for one in read}
    names = ("build_commit", "build_number", "backends", "model_type", "type_k", "n_threads")
    found = {
        "first_token_s": seconds[settings.prompt_tokens],
        "warm_s": [],
        "steps_s": [generated["avg_ns"] / 1e9 / settings.tokens],
        "build": {name: generated.get(name) for name in names},
    }
    return found | ({"prefill_s": seconds[settings.prefill]} if settings.prefill else {})


def _bench(bench: str, file: Path, threads: int, *asked: str) -> list[dict[str, Any]]:
    """Its report; raises ``DartError`` where it fails."""
    command = [bench, "-m", str(file), "-t", str(threads), "-r", "1", "-o", "json", *asked]
    environment = _environment(os.environ, bench)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        found = None
    if not found or not all("avg_ns" in one and "n_prompt" in one for one in found):
        told = " ".join((done.stderr.strip() or done.stdout.strip() or "it said nothing").split())
        raise DartError(
            f"{PROGRAM} failed on {file.name} (exit code {done.returncode}): {told[-300:]}"
        )
    return list(found)


def _environment(given: Mapping[str, str], bench: str) -> dict[str, str]:
    """Without what is set for PyTorch's threads; libraries may lie beside the program."""
    kept = {name: value for name, value in given.items() if not name.startswith(OURS)}
    places = [str(Path(bench).resolve().parent), kept.get("LD_LIBRARY_PATH", "")]
    return {**kept, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, places))}


def same_weights(
    file: ReferenceFile, own: Mapping[str, Held], settings: SpeedSettings, ui: Ui
) -> str | None:
    """The format of ours that a file's row is compared with: that file, else one of its kind."""
    model = own_file(settings, ui)
    for name, held in own.items():
        path = held.form.file or (model if name == "file" else None)
        if path is not None and path.resolve() == file.path.resolve():
            return name
    return {held.kind: name for name, held in own.items()}.get(file.kind)
