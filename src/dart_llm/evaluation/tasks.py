"""One door to everything that can be measured: perplexity, summaries, lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from dart_llm.data import documents
from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.task_names import split
from dart_llm.models.describe import context_length
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import PreparedMethod, UnitStore


def measure(
    candidate: PreparedMethod,
    task: str,
    options: MeasureOptions,
    parts: UnitStore,
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
        documents.check_disjoint(source, {name: options.limit if first else None})


def check_task(task: str, options: MeasureOptions) -> None:
    """Raise ``ConfigError`` for an lm-eval task or documents that do not exist.

    Loads neither model nor data.  Names of texts are checked where settings are read.
    """
    kind, name = split(task)
    if kind == "summarize":
        documents.check(name)
    elif kind == "lm-eval":
        _module(task).check(name, options.include_path)


def count(task: str, options: MeasureOptions, tokenizer: Any, model: Any = None) -> int:
    """Items that ``measure`` will go through; ``model``: its context bounds windows."""
    kind, name = split(task)
    if kind == "perplexity":
        longest = None if model is None else context_length(model)
        return int(_module(task).count(name, options, tokenizer, longest))
    return int(_module(task).count(name, options))


def _module(task: str) -> Any:
    """What measures the task; imported late, for it needs optional packages."""
    modules = {"perplexity": "perplexity", "summarize": "summarization", "lm-eval": "lm_eval"}
    return import_module(f"dart_llm.evaluation.{modules[split(task)[0]]}")
