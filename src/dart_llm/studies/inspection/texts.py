"""The texts that ``dart-llm inspect`` looks at: none, A, or A and B."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.data.prompts import given_prompt, read_prompt_file
from dart_llm.data.texts import prompt_names
from dart_llm.errors import ConfigError
from dart_llm.experiments.store import read
from dart_llm.studies.inspection.settings import InspectSettings

LONGEST_NAME = 48
"""Characters of a text that stand for it where it has no name."""


@dataclass(frozen=True)
class InspectText:
    """``label``: A or B; ``name``: what tables call it."""

    label: str
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def title(self) -> str:
        """ "A (how bees dance)"."""
        return f"{self.label} ({self.name})"


def inspect_texts(settings: InspectSettings) -> tuple[InspectText, ...]:
    """The texts; ``ConfigError`` or ``ResultsError`` for what cannot be read or is empty."""
    if settings.passage:
        found = _passage(settings.passage)
    elif settings.runs:
        found = _runs(settings.runs)
    else:
        a, b = (settings.prompt, settings.prompt_file), (settings.prompt_b, settings.prompt_b_file)
        found = [_prompt(text, file) for text, file in (a, b) if text is not None or file]
    texts = tuple(InspectText(label, *part) for label, part in zip("AB", found, strict=False))
    for text in texts:
        if not text.text.strip():
            raise ConfigError(f"text {text.title} is empty: give at least one word")
    return texts


def _prompt(text: str | None, file: str | None) -> tuple[str, str]:
    if text is not None:
        name = text if text in prompt_names() else " ".join(text.split())
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"
        return short, given_prompt(text)
    return "stdin" if file == "-" else Path(str(file)).name, read_prompt_file(str(file))


def _passage(name: str) -> list[tuple[str, str]]:
    from dart_llm.data.passages import Passage, find, shipped

    passage = find(shipped(), name)
    assert isinstance(passage, Passage)
    return [(part.topic.name, part.text) for part in passage.segments()[:2]]


def _runs(folders: str) -> list[tuple[str, str]]:
    """The pruned texts of two runs, or the dense and the pruned text of one."""
    paths = [Path(part.strip()) for part in folders.split(",") if part.strip()]
    if len(paths) not in (1, 2):
        raise ConfigError(f"--runs takes one results folder or two, not {len(paths)}")
    found = [_generated(path) for path in paths]
    if len(found) == 2:
        return [(f"{p.parent.name}/{p.name}", t[-1][1]) for p, t in zip(paths, found, strict=True)]
    if len(found[0]) < 2:
        raise ConfigError(
            f"{paths[0]} holds one text, of the untouched model: give a second run to compare with"
        )
    return [(f"{name} text of {paths[0].name}", text) for name, text in found[0]]


def _generated(path: Path) -> list[tuple[str, str]]:
    """Variant and text of a run, dense first."""
    rows: list[dict[str, Any]] = [row for row in read(path).generations if row.get("text")]
    if not rows:
        raise ConfigError(
            f"{path} holds no generated text: give the folder of a run that wrote one"
        )
    rows.sort(key=lambda row: row.get("variant") != "dense")
    return [(str(row.get("variant")), str(row["text"])) for row in rows[:2]]
