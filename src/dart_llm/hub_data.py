"""Data sets of the hub: what ``catalogue.py`` lists, and any other by ``hub_reference.py``.

The only file that imports the ``datasets`` library, and only when a hub data set is asked for.
A data set that cannot be fetched, is empty or lacks a column is an error, never an empty result.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from dart_llm import catalogue, cleaning, hub_reference, mmlu
from dart_llm.catalogue import DataSet
from dart_llm.errors import ConfigError, LoadError, MissingExtra, UnknownName
from dart_llm.mmlu import LOCAL_MMLU, MMLU_SUBJECTS

__all__ = [
    "HUB_TEXTS",
    "LOCAL_MMLU",
    "MMLU_SUBJECTS",
    "calibration_text",
    "documents",
    "mmlu_questions",
    "perplexity_text",
    "positions",
    "rows",
]

HUB_TEXTS: tuple[str, ...] = catalogue.names("perplexity")
INSTEAD = {
    "text": "use the embedded text or a text file of your own instead",
    "documents": 'give a JSONL file instead, one {"document": ..., "summary": ...} a line',
}
"""What to do without the hub."""


def mmlu_questions(
    subject: str, folder: str | Path | None = None, *, answers: bool = False
) -> list[dict[str, Any]]:
    """The MMLU questions of a subject that are not scored: ``dev``, then ``validation``.

    Each is ``{"subject", "question", "choices"}``; the answer is dropped here unless ``answers``,
    so no prompt that is built from them can show it.  ``folder`` holds ``<subject>_dev.jsonl``
    (and, if there is one, ``<subject>_validation.jsonl``); without it ``datasets/mmlu`` in the
    current folder is tried, and then the hub's ``cais/mmlu``.

    Raises ``UnknownName``, ``ConfigError`` (a local file is missing or malformed),
    ``MissingExtra`` (no ``datasets`` library) or ``LoadError`` (the hub cannot be reached).
    """
    if subject not in MMLU_SUBJECTS:
        raise UnknownName("MMLU subject", subject, MMLU_SUBJECTS)
    if folder is None and subject in mmlu.local_subjects():
        folder = LOCAL_MMLU
    if folder is not None:
        return mmlu.local_questions(subject, Path(folder), answers=answers)
    instead = f"to work without it put {subject}_dev.jsonl into {LOCAL_MMLU.as_posix()}/"
    found = []
    for split in mmlu.SPLITS:
        source = replace(catalogue.get("mmlu"), config=subject, split=split)
        found += [
            mmlu.question(subject, row, source.where, answers=answers)
            for row in rows(source, instead)
        ]
    return found


def perplexity_text(name: str, documents: int | None = None) -> str:
    """The text of a hub data set that perplexity is measured on.

    ``wikitext2``: the test split of WikiText-2 (raw), lines joined by blank lines.  ``c4``: the
    first 1,100 documents of C4's English validation split, streamed, joined by spaces.  Both are
    the joins that the pruning literature uses.  ``hub:...``: a column of any data set (syntax in
    ``hub_reference.py``), rows joined by blank lines.  ``documents``: other than the usual number.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    if hub_reference.is_reference(name):
        source = hub_reference.parse(name)
    elif name in HUB_TEXTS:
        source = catalogue.get(name)
    else:
        raise UnknownName("hub data set", name, HUB_TEXTS)
    return (" " if name == "c4" else "\n\n").join(_texts(source, documents))


def calibration_text(documents: int = 512) -> str:
    """The first ``documents`` documents of C4's English training split, joined by blank lines.

    No evaluation scores the training split, so what it calibrates has seen no evaluated item.
    Raises ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    return "\n\n".join(_texts(catalogue.get("c4_train"), documents))


def documents(name: str, limit: int | None = None, seed: int | None = None) -> list[dict[str, str]]:
    """Documents with reference summaries: ``{"id", "document", "summary"}``, in their order.

    name: a data set of the catalogue that serves ``summarize``, or ``hub:...`` with the columns
    of the document and the summary.  The first ``limit`` documents (streamed), or with ``seed`` a
    random sample of that many; ``None`` is all.  Rows without a document or a summary are left
    out.  The id is the data set's own, or the row's position from 0.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    if hub_reference.is_reference(name):
        source = hub_reference.parse(name, ("document", "summary"))
    else:
        source = catalogue.get(name, "summarize")
    _check_limit(limit)
    stream = limit is not None and seed is None
    found = _documents(source, rows(source, INSTEAD["documents"], stream=stream))
    if stream:
        chosen = list(islice(found, limit))
    else:
        every = list(found)
        chosen = [every[index] for index in positions(len(every), limit, seed)]
    if not chosen:
        raise LoadError(
            f"the data set {source.where} holds no row with both a document and a summary; "
            + INSTEAD["documents"]
        )
    return chosen


def positions(total: int, limit: int | None, seed: int | None) -> list[int]:
    """``limit`` of ``total`` positions, ascending: the first, or with ``seed`` a random sample.

    With the same seed a smaller sample is a part of a larger one.  ``None`` is all of them.
    """
    _check_limit(limit)
    found = list(range(total))
    if seed is not None:
        random.Random(seed).shuffle(found)
    return sorted(found[:limit])


def rows(source: DataSet, instead: str, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of ``source``, which has at least one and every column that it names.

    Streamed when ``stream`` or when only its first rows are wanted; otherwise the split is
    fetched once and read from the cache afterwards.  ``instead``: what an error says to do.

    Raises ``MissingExtra`` or ``LoadError``.
    """
    found = _fetch(source, instead, stream=stream or source.first is not None)
    first = next(found, None)
    if first is None:
        raise LoadError(f"the data set {source.where} is empty; {instead}")
    missing = [name for names in source.columns.values() for name in names if name not in first]
    if missing:
        raise LoadError(
            f"the data set {source.where} has no column {' or '.join(missing)}: its columns are "
            f"{', '.join(first)}; {instead}"
        )
    return _chain(first, found)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _texts(source: DataSet, count: int | None) -> list[str]:
    if count is not None:
        if count < 1:
            raise ConfigError(f"the number of documents must be 1 or more, not {count}")
        source = replace(source, first=count)
    column = source.column("text")
    found = []
    for row in rows(source, INSTEAD["text"]):
        if not isinstance(row[column], str):
            raise LoadError(
                f"the column {column} of {source.where} holds {type(row[column]).__name__}, not "
                f"text; name another of {', '.join(row)}"
            )
        found.append(row[column])
    if not any(text.strip() for text in found):
        raise LoadError(f"the column {column} of {source.where} holds no text; {INSTEAD['text']}")
    return found


def _documents(source: DataSet, found: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for position, row in enumerate(found):
        text = str(row[source.column("document")] or "").strip()
        summary = cleaning.reference(row[source.column("summary")])
        if source.name == "multi_news":
            text, summary = cleaning.multi_news(text), cleaning.multi_news_summary(summary)
        if text and summary:
            own = row[source.column("id")] if "id" in source.columns else position
            yield {"id": str(own), "document": text, "summary": summary}


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of documents must be 1 or more, not {limit}")


def _fetch(source: DataSet, instead: str, *, stream: bool) -> Iterator[dict[str, Any]]:
    """The rows of ``source``; what the library raises, first or late, becomes ``LoadError``."""
    load_dataset = _load_dataset()
    branch = {"revision": source.revision} if source.revision else {}
    try:
        found = load_dataset(
            source.hub_id, source.config, split=source.split, streaming=stream, **branch
        )
        yield from islice(found, source.first)
    # The hub's clients share no base class for "cannot be reached", and streaming fails late.
    except Exception as error:
        raise LoadError(_sentence(source, error, instead)) from error


def _sentence(source: DataSet, error: BaseException, instead: str) -> str:
    from dart_llm.hub_errors import redact

    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__  # its own message says nothing
    reason = redact(" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .")
    if "OfflineModeIsEnabled" in reason:
        reason = "it is not in the cache and HF_HUB_OFFLINE is set"
    if source.gated:
        instead = f"accept its conditions on the hub and set HF_TOKEN, or {instead}"
    return f"the data set {source.where} could not be fetched from the hub ({reason}); {instead}"


def _load_dataset() -> Callable[..., Any]:
    # A plain folder named datasets/ in the current directory imports as an empty package:
    # without load_dataset the library is as missing as without the module.
    try:
        load_dataset: Callable[..., Any] = import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:
        raise MissingExtra("datasets", "eval") from error
    return load_dataset


def no_bars() -> None:
    """The library's own progress bars off; ours say how far a measurement is."""
    with contextlib.suppress(ImportError, AttributeError):
        import_module("datasets").disable_progress_bars()
