"""Digests of the files that a cell or a run only points at: a changed file makes it another one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dart_llm import documents, ppl_texts
from dart_llm.cache import file_sha256
from dart_llm.cell import Cell
from dart_llm.errors import ConfigError
from dart_llm.measurement import MeasureOptions
from dart_llm.mmlu import LOCAL_MMLU
from dart_llm.model_facts import model_digests

TASK_FILES = (".yaml", ".yml", ".py")
"""The files of an lm-eval task folder that say what a task is."""

_NAMED = ("text", "data")
"""Inputs that a task names: an empty name is one that does not exist."""


class Digests:
    """sha256 of local models, texts, data and task folders, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str | None] = {}
        self._models: dict[str, dict[str, str]] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """By name of the input; what is no local file has no entry.

        Raises ``ConfigError`` when a file cannot be read.
        """
        kind, _, data = cell.task.partition(":")
        asked = {"calibration": cell.calibration or ""}
        if kind == "perplexity":
            asked["text"] = data
        elif kind == "summarize":
            asked["data"] = data
        else:
            asked["tasks"] = cell.options.include_path or ""
        if kind == "mmlu" or (kind == "perplexity" and data in ppl_texts.MMLU):
            asked["mmlu"] = LOCAL_MMLU.as_posix()
        found = {
            name: self._digest(name, value)
            for name, value in asked.items()
            if value or name in _NAMED
        }
        return {**self.of_model(cell.model), **{k: digest for k, digest in found.items() if digest}}

    def of_model(self, model: str) -> dict[str, str]:
        """Weights, configuration and tokenizer of a local model."""
        if model not in self._models:
            with _readable(model):
                self._models[model] = model_digests(model)
        return self._models[model]

    def of_settings(
        self, settings: Any, tasks: Iterable[tuple[str, MeasureOptions]] = ()
    ) -> dict[str, Any]:
        """What a run of ``settings`` reads: the model, given masks and table, each task's files."""
        calibration = getattr(settings, "calibration", None)
        cell = Cell(settings.model, settings.method, "", calibration=calibration)
        found: dict[str, Any] = {**self.of(cell)}
        for task, options in tasks:
            every = self.of(replace(cell, task=task, options=options))
            found[task] = {name: digest for name, digest in every.items() if name not in found}
        table = settings.layer_topk or ""
        files = {"masks": settings.masks, "layer_topk": table[1:] if table[:1] == "@" else None}
        for name, path in files.items():
            if path:
                with _readable(path):
                    found[name] = file_sha256(Path(path))
        return found

    def _digest(self, name: str, value: str) -> str | None:
        if (name, value) not in self._known:
            with _readable(value):
                self._known[name, value] = _read(name, value)
        return self._known[name, value]


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror or error}") from None


def _read(name: str, value: str) -> str | None:
    if name == "tasks":
        return _folder(Path(value))
    if name == "mmlu":  # read instead of the hub's where there are any
        return _sums(Path(value), Path(value).glob("*.jsonl"))
    if name == "text":  # raises for a name that is nothing: a sweep says so at once
        known = not ppl_texts.is_file(value)
        return None if known else hashlib.sha256(ppl_texts.read(value).encode()).hexdigest()
    if name == "data":
        documents.check(value)
    if name == "calibration" and not Path(value).exists():
        value = value.rpartition("#")[0] or value  # FILE#100: from row 100
    for path in (Path(value), Path("datasets") / value, Path("datasets") / f"{value}.txt"):
        if path.is_file():
            return file_sha256(path)
    return None


def _folder(folder: Path) -> str | None:
    if not folder.is_dir():
        raise ConfigError(f"the task folder {folder} does not exist: correct include_path")
    files = [path for path in folder.rglob("*") if path.suffix in TASK_FILES]
    data = sorted({one for path in files if path.suffix != ".py" for one in _data_files(path)})
    lines = [f"{file_sha256(path)}  {path.as_posix()}\n" for path in data]
    own = _sums(folder, files)
    return hashlib.sha256("".join([own, *lines]).encode()).hexdigest() if own and lines else own


def _data_files(task: Path) -> Iterator[Path]:
    """The local files under ``data_files`` of a task file, as ``datasets`` looks for them."""
    import yaml

    try:  # BaseLoader: the tags of lm-eval are of no interest here
        waiting = [(yaml.load(task.read_text(encoding="utf-8"), yaml.BaseLoader), False)]
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # lm-eval says what is wrong with it
    while waiting:
        node, inside = waiting.pop()
        if isinstance(node, dict):
            waiting += [(value, inside or key == "data_files") for key, value in node.items()]
        elif isinstance(node, list):
            waiting += [(value, inside) for value in node]
        elif inside and Path(node).is_file():
            yield Path(node)


def _sums(folder: Path, files: Iterable[Path]) -> str | None:
    """One digest of several files and of their names within ``folder``; None of none."""
    found = sorted(files)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None
