"""The texts that perplexity can be measured on, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from dart_llm import hub_reference, mmlu, texts
from dart_llm.errors import ConfigError
from dart_llm.hub_data import HUB_TEXTS, calibration_text, mmlu_questions, perplexity_text
from dart_llm.jsonl import read_rows

EMBEDDED = "embedded"
MMLU = ("mmlu", "mmlu-answers")
"""The questions alone, or with their choices and answers."""

CALIBRATION = "c4_train"
"""Text that no evaluation scores; for calibration."""

KNOWN = (EMBEDDED, *MMLU, *HUB_TEXTS, CALIBRATION)
"""Texts that are not files."""


def read(name: str, subjects: str | None = None) -> str:
    """The text called ``name``, never empty.

    ``embedded``; ``wikitext2`` or ``c4``; ``c4_train``, for calibration; ``mmlu``, the questions
    of ``subjects`` (comma-separated; default: those in ``datasets/mmlu``, or else all 57), and
    ``mmlu-answers``, with choices and answers, neither from the scored test split; a data set of
    the hub (``hub_reference.py``); or a file: plain text, or JSONL with a ``text`` column.

    Raises ``ConfigError`` for a name that is none of these and for a file that cannot be used,
    and what ``hub_data.perplexity_text`` raises.
    """
    if name == EMBEDDED:
        return texts.all_text()
    if name in HUB_TEXTS or hub_reference.is_reference(name):
        return perplexity_text(name)
    if name == CALIBRATION:
        return calibration_text()
    if name in MMLU:
        wanted = [part.strip() for part in subjects.split(",") if part.strip()] if subjects else []
        found = [
            mmlu.text(question)
            for subject in wanted or mmlu.local_subjects() or mmlu.MMLU_SUBJECTS
            for question in mmlu_questions(subject, answers=name == "mmlu-answers")
        ]
        return "\n\n".join(found)
    return _file(name)


def is_file(name: str) -> bool:
    """Whether ``read`` would read a file of the user's, whose content a run should record."""
    return name not in KNOWN and not hub_reference.is_reference(name)


def names(settings: str) -> list[str]:
    """Comma-separated names, each once, checked as far as possible before a model is loaded."""
    found = list(dict.fromkeys(part.strip() for part in settings.split(",") if part.strip()))
    if not found:
        raise ConfigError("no text for perplexity: use embedded, or the path of a text file")
    for name in found:
        if hub_reference.is_reference(name):
            hub_reference.parse(name)
        elif is_file(name):
            _file(name)
    return found


def _file(name: str) -> str:
    local = Path("datasets")
    for path in (Path(name), local / name, local / f"{name}.txt"):
        if path.is_file():
            return _jsonl(path) if path.suffix == ".jsonl" else _plain(path)
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f'no text "{name}" for perplexity{hint}: use {", ".join(KNOWN)}, a data set of the hub '
        f"such as {hub_reference.EXAMPLES['text',]}, or the path of a text file"
    )


def _plain(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is not text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as text: {error}") from None
    return text


def _jsonl(path: Path) -> str:
    found = []
    for number, row in read_rows(path):
        if not isinstance(row.get("text"), str):
            raise ConfigError(
                f'line {number} of {path} needs "text" with a text in it and has '
                f"{', '.join(row) or 'nothing'}: name that column text"
            )
        found.append(row["text"])
    if not any(text.strip() for text in found):
        raise ConfigError(f'the file {path} holds no text: write {{"text": "..."}} a line')
    return "\n\n".join(found)
