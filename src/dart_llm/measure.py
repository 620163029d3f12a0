"""One door to everything that can be measured: perplexity, summaries, lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dart_llm.arch import context_length
from dart_llm.calibration_text import check_disjoint
from dart_llm.candidate import Candidate, Parts
from dart_llm.config import PruneConfig
from dart_llm.measurement import Measurement, MeasureOptions
from dart_llm.task_names import split


def measure(
    candidate: Candidate,
    task: str,
    options: MeasureOptions,
    parts: Parts,
    advance: Callable[[int], None] = lambda items: None,
) -> Measurement:
    """Measure ``candidate`` on one task; ``advance(n)`` is called as items finish.

    Raises ``ConfigError``, ``LoadError`` or ``MissingExtra`` for a task that cannot be run,
    ``DartError`` where a loss is not finite.
    """
    return _module(task).measure(candidate, split(task)[1], options, parts, advance)  # type: ignore[no-any-return]


def check_calibration(
    config: PruneConfig, source: str | None, tasks: Iterable[str], options: MeasureOptions
) -> None:
    """Raise ``ConfigError`` when the text that ``config`` calibrates on is evaluated by a task."""
    learns = config.calibration
    if learns is None or learns.source != "text":
        return
    for kind, name in map(split, tasks):
        first = kind == "summarize" and options.sample_seed is None  # else spread over the text
        check_disjoint(source, {name: options.limit if first else None})


def check_task(task: str, options: MeasureOptions) -> None:
    """Raise ``ConfigError`` for an lm-eval task or documents that do not exist.

    Loads neither model nor data.  Names of texts are checked where settings are read.
    """
    kind, name = split(task)
    if kind == "summarize":
        from dart_llm import documents

        documents.check(name)
    elif kind == "lm-eval":
        from dart_llm import harness

        harness.check(name, options.include_path)


def count(task: str, options: MeasureOptions, tokenizer: Any, model: Any = None) -> int:
    """Items that ``measure`` will go through; ``model``: its context bounds windows."""
    kind, name = split(task)
    if kind == "perplexity":
        longest = None if model is None else context_length(model)
        return int(_module(task).count(name, options, tokenizer, longest))
    return int(_module(task).count(name, options))


def _module(task: str) -> Any:
    kind, _ = split(task)
    if kind == "perplexity":
        from dart_llm import ppl_measure

        return ppl_measure
    if kind == "summarize":
        from dart_llm import summarize

        return summarize
    from dart_llm import harness

    return harness
