"""The embedded texts: six subjects for perplexity, and a few prompts.

The texts were written for this project; each file is about 880 words of plain English.
"""

from __future__ import annotations

from importlib.resources import files

from dart_llm.errors import check_name

_SHIPPED = files("dart_llm.data") / "shipped"


def subjects() -> tuple[str, ...]:
    """The names of the embedded texts, sorted."""
    return _stems("texts")


def read(subject: str) -> str:
    """One embedded text: paragraphs joined by blank lines, without a final line break.

    Raises ``UnknownName`` with the near names.
    """
    return _read("texts", "embedded text", subject)


def all_text() -> str:
    """All embedded texts in the order of ``subjects()``, joined by blank lines."""
    return "\n\n".join(read(subject) for subject in subjects())


def openings() -> tuple[str, ...]:
    """The first sentences of texts of many kinds, for a model to continue; none is evaluated."""
    text = (_SHIPPED / "openings" / "openings.txt").read_text(encoding="utf-8")
    return tuple(text.rstrip("\n").split("\n---\n"))


def prompt_names() -> tuple[str, ...]:
    """The names of the shipped prompts, sorted."""
    return _stems("prompts")


def read_prompt(name: str) -> str:
    """One shipped prompt, without a final line break.  Raises ``UnknownName``."""
    return _read("prompts", "prompt", name)


def _stems(folder: str) -> tuple[str, ...]:
    files = (entry.name for entry in (_SHIPPED / folder).iterdir())
    return tuple(sorted(name[:-4] for name in files if name.endswith(".txt")))


def _read(folder: str, kind: str, name: str) -> str:
    # Checked against the list before it becomes a path, so "../x" can never be read.
    check_name(kind, name, _stems(folder))
    return (_SHIPPED / folder / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
