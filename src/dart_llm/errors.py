"""The exceptions that dart_llm raises on purpose, and helpers that read the causes of an error.

::

    DartError                     base class of all; the command line exits with 2
    ├── ConfigError               a requested value cannot be used
    │   └── UnknownName           a name (method, score, model, prompt, ...) that does not exist
    ├── UnsupportedModel          the model's FFN is not one that can be pruned
    ├── AttachError               the model is already being pruned, or is not although it must be
    ├── LoadError                 a checkpoint could not be found, fetched, verified or read
    ├── MissingExtra              an optional dependency is not installed
    ├── ResultsError              a results folder cannot be written or read
    └── CellsFailed               some measurements (cells) of a study failed; the others are kept
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from typing import Any


class DartError(Exception):
    """Base class of all errors that dart_llm raises on purpose."""


class ConfigError(DartError):
    """A setting is out of range, contradicts another setting, or cannot be parsed."""


class UnknownName(ConfigError):
    """A name does not exist; the message lists similar names."""

    LISTED = 100
    """Maximum number of known names that the message lists."""

    def __init__(self, kind: str, name: str, known: Iterable[str], more: str = "") -> None:
        """``more``: a further hint, which the message adds in parentheses."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"known: {', '.join(names)}" if names else "none exists: leave it out"
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        elif len(names) > self.LISTED:
            hint = f"none of the {len(names)} known names is similar: check the spelling"
        super().__init__(f"unknown {kind} {name!r}; {hint}{more and f' ({more})'}")


def check_name(kind: str, name: str | None, known: Collection[str]) -> None:
    """Raise ``UnknownName`` unless ``name`` is one of ``known``, or None."""
    if name is not None and name not in known:
        raise UnknownName(kind, name, known)


class UnsupportedModel(DartError):
    """The model has a module that cannot be pruned; the message says which."""


class AttachError(DartError):
    """The model is already attached to a run, or is not attached although it must be."""


class LoadError(DartError):
    """A checkpoint could not be found, fetched, verified or read."""


class MissingExtra(DartError):
    """An optional dependency is missing; the message gives the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed: pip install 'dart-llm[{extra}]'"
        )


class ResultsError(DartError):
    """A results folder cannot be written, read or resumed."""


class CellsFailed(DartError):
    """Some measurements (cells) of a sweep or another study failed.

    ``document``: what the command prints with ``--json``, including the cells that succeeded.
    """

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and all its causes and contexts, outermost first."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__cause__, current.__context__]


def failure_text(error: BaseException) -> str:
    """Return an error's message, after the error's type unless that is a ``DartError``."""
    if isinstance(error, DartError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
