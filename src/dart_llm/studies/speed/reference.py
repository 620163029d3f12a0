"""llama.cpp beside our rows: its own ``llama-bench``, run as a program on the same GGUF files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dart_llm.errors import ConfigError
from dart_llm.experiments import llama_bench
from dart_llm.experiments.held import Held, own_file
from dart_llm.experiments.llama_bench import LLAMA_CPP, PROGRAM, VARIABLE, ReferenceFile
from dart_llm.experiments.timed_cases import Case
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.settings import SpeedSettings

CACHE_BYTES = 2
"""Bytes of a number in llama.cpp's key-value cache, float16."""


def require_bench() -> str:
    """llama.cpp's own benchmark; raises ``ConfigError`` where it is not at hand."""
    asked = os.environ.get(VARIABLE)
    found = llama_bench.find_bench()
    if found is None:
        where = f"{VARIABLE}={asked} is no program" if asked else f"{PROGRAM} is not on PATH"
        raise ConfigError(
            f"--reference {LLAMA_CPP} needs llama.cpp's own benchmark, and {where}: build "
            f"llama.cpp and name its {PROGRAM} in {VARIABLE}"
        )
    return found


def _own_file(settings: SpeedSettings, ui: Ui) -> Path | None:
    if settings.is_random:
        return None
    return own_file(settings.model, settings.cache_dir, ui.say)


def reference_files(settings: SpeedSettings, ui: Ui) -> list[ReferenceFile]:
    """What was asked for, else the model's own file and those of ``--weights``.

    Raises ``ConfigError`` where there is none, ``LoadError`` for what is no GGUF file.
    """
    own = None if settings.reference_file else _own_file(settings, ui)
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


def same_weights(
    file: ReferenceFile, own: Mapping[str, Held], settings: SpeedSettings, ui: Ui
) -> str | None:
    """The format of ours that a file's row is compared with: that file, else one of its kind."""
    model = _own_file(settings, ui)
    for name, held in own.items():
        path = held.form.file or (model if name == "file" else None)
        if path is not None and path.resolve() == file.path.resolve():
            return name
    return {held.kind: name for name, held in own.items()}.get(file.kind)
