"""llama.cpp beside our rows: its own ``llama-bench``, run as a program on the same GGUF files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dart_llm.cache import cache_folder
from dart_llm.errors import ConfigError
from dart_llm.experiments import llama_bench
from dart_llm.experiments.llama_bench import LLAMA_CPP, PROGRAM, VARIABLE, ReferenceFile
from dart_llm.models.bundled import MEMBER, default_folder
from dart_llm.models.loading import is_default
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.cases import Case
from dart_llm.studies.speed.model import Held
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.summary import WARM
from dart_llm.studies.speed.timing import Sample

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
    sizes = dict.fromkeys(size for size in (settings.prompt_tokens, settings.prefill) if size)
    read = llama_bench.prompt_rows(bench, file, threads, list(sizes))
    depth = settings.prompt_tokens + WARM
    generated = llama_bench.decode_row(bench, file, threads, settings.tokens, depth)
    seconds = {one["n_prompt"]: one["avg_ns"] / 1e9 for one in read}
    names = ("build_commit", "build_number", "backends", "model_type", "type_k", "n_threads")
    found = {
        "first_token_s": seconds[settings.prompt_tokens],
        "warm_s": [],
        "steps_s": [generated["avg_ns"] / 1e9 / settings.tokens],
        "build": {name: generated.get(name) for name in names},
    }
    return found | ({"prefill_s": seconds[settings.prefill]} if settings.prefill else {})


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
