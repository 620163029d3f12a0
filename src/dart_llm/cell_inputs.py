"""Digests of the files that a cell only points at: a changed file makes another cell."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dart_llm import ppl_texts
from dart_llm.cache import file_sha256
from dart_llm.cell import Cell
from dart_llm.errors import ConfigError
from dart_llm.model_facts import model_digest

TASK_FILES = (".yaml", ".yml", ".py")
"""The files of an lm-eval task folder that say what a task is."""


class Digests:
    """sha256 of local models, texts, data and task folders, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str | None] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """By name of the input; what is no local file has no entry.

        Raises ``ConfigError`` when a file cannot be read.
        """
        kind, _, data = cell.task.partition(":")
        asked = {"model": cell.model, "calibration": cell.calibration or ""}
        if kind == "perplexity":
            asked["text"] = data
        elif kind == "summarize":
            asked["data"] = data
        else:
            asked["tasks"] = cell.options.include_path or ""
        found = {name: self._digest(name, value) for name, value in asked.items() if value}
        return {name: digest for name, digest in found.items() if digest}

    def _digest(self, name: str, value: str) -> str | None:
        if (name, value) not in self._known:
            try:
                self._known[name, value] = _read(name, value)
            except OSError as error:
                raise ConfigError(f"cannot read {value}: {error.strerror or error}") from None
        return self._known[name, value]


def _read(name: str, value: str) -> str | None:
    if name == "model":
        return model_digest(value)
    if name == "tasks":
        return _folder(Path(value))
    if name == "text":  # raises for a name that is nothing: a sweep says so at once
        known = not ppl_texts.is_file(value)
        return None if known else hashlib.sha256(ppl_texts.read(value).encode()).hexdigest()
    if name == "calibration" and not Path(value).exists():
        value = value.rpartition("#")[0] or value  # FILE#100: from row 100
    for path in (Path(value), Path("datasets") / value, Path("datasets") / f"{value}.txt"):
        if path.is_file():
            return file_sha256(path)
    return None


def _folder(folder: Path) -> str | None:
    if not folder.is_dir():
        raise ConfigError(f"the task folder {folder} does not exist: correct include_path")
    files = sorted(path for path in folder.rglob("*") if path.suffix in TASK_FILES)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None
