"""The embedded texts: six subjects for perplexity and topic shifts, and a few prompts.

The texts were written for this project; each file is about 880 words of plain English.  Nothing
here needs torch, a tokenizer or the internet.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from dart_llm.errors import ConfigError, UnknownName

_SHIPPED: Traversable = files("dart_llm.data") / "shipped"

_TEXTS: Traversable = _SHIPPED / "texts"

_PROMPTS: Traversable = _SHIPPED / "prompts"

_OPENINGS: Traversable = _SHIPPED / "openings" / "openings.txt"


def subjects() -> tuple[str, ...]:
    """The names of the embedded texts, sorted."""
    return tuple(sorted(_stems(_TEXTS)))


def read(subject: str) -> str:
    """One embedded text: paragraphs joined by blank lines, without a final line break.

    Raises ``UnknownName`` with the near names.
    """
    return _read(_TEXTS, "embedded text", subject, subjects())


def all_text() -> str:
    """All embedded texts in the order of ``subjects()``, joined by blank lines."""
    return "\n\n".join(read(subject) for subject in subjects())


def topic_shift(first: str, second: str) -> tuple[str, str]:
    """The texts of two different subjects: what is read before the shift, and what after it.

    Raises ``UnknownName``, and ``ConfigError`` when both are the same subject.
    """
    if first == second:
        raise ConfigError(f"a topic shift needs two different subjects, not {first!r} twice")
    return read(first), read(second)


def openings() -> tuple[str, ...]:
    """The first sentences of texts of many kinds, for a model to go on from; none is evaluated."""
    return tuple(_OPENINGS.read_text(encoding="utf-8").rstrip("\n").split("\n---\n"))


def prompt_names() -> tuple[str, ...]:
    """The names of the shipped prompts, sorted."""
    return tuple(sorted(_stems(_PROMPTS)))


def read_prompt(name: str) -> str:
    """One shipped prompt, without a final line break.  Raises ``UnknownName``."""
    return _read(_PROMPTS, "prompt", name, prompt_names())


def _stems(folder: Traversable) -> Iterator[str]:
    return (entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".txt"))


def _read(folder: Traversable, kind: str, name: str, known: tuple[str, ...]) -> str:
    # Checked against the list before it becomes a path, so "../x" can never be read.
    if name not in known:
        raise UnknownName(kind, name, known)
    return (folder / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
