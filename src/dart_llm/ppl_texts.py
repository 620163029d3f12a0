"""The texts that perplexity can be measured on, by name."""

from __future__ import annotations

from pathlib import Path

from dart_llm import texts
from dart_llm.errors import ConfigError
from dart_llm.hub_data import HUB_TEXTS, MMLU_SUBJECTS, mmlu_questions, perplexity_text

EMBEDDED = "embedded"
KNOWN = (EMBEDDED, "mmlu", *HUB_TEXTS)
"""Texts that are not files."""


def read(name: str, subjects: str | None = None) -> str:
    """The text called ``name``: embedded, wikitext2, c4, mmlu, or a text file.

    ``mmlu`` is the questions of ``subjects`` (comma-separated; default all), without answers.
    Raises ``ConfigError`` for a name that is neither known nor a file.
    """
    if name == EMBEDDED:
        return texts.all_text()
    if name in HUB_TEXTS:
        return perplexity_text(name)
    if name == "mmlu":
        wanted = [part.strip() for part in subjects.split(",")] if subjects else MMLU_SUBJECTS
        questions = [q for subject in wanted for q in mmlu_questions(subject)]
        return "\n\n".join(str(question["question"]) for question in questions)
    return _file(name)


def _file(name: str) -> str:
    for path in (Path(name), Path("datasets") / name, Path("datasets") / f"{name}.txt"):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read {path} as text: {error}") from None
    known = ", ".join([EMBEDDED, *HUB_TEXTS, "mmlu"])
    raise ConfigError(f'no text "{name}" for perplexity: use {known}, or the path of a text file')


def names(settings: str) -> list[str]:
    """Comma-separated names, checked as far as possible before a model is loaded."""
    found = [part.strip() for part in settings.split(",") if part.strip()]
    if not found:
        raise ConfigError("no text for perplexity: use embedded, or the path of a text file")
    for name in found:
        if name not in KNOWN:
            _file(name)
    return found
