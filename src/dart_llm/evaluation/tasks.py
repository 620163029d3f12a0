"""Tasks by name, and functions that check, count or measure any task.

A task is named ``KIND:NAME`` (``perplexity:embedded``), or as in lm-eval (``arc_easy``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dart_llm.data import documents
from dart_llm.data.datasets import LOCAL_MMLU, MMLU_SUBJECTS
from dart_llm.errors import ConfigError
from dart_llm.evaluation.measurement import PROTOCOLS, Measurement, MeasureOptions
from dart_llm.pruning.config import PruneConfig

if TYPE_CHECKING:
    from dart_llm.evaluation.parts import UnitStore
    from dart_llm.session.run import BoundMethod

# Tasks of lm-eval.

GENERAL_NLP = tuple("boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa".split())

SHORTCUTS: dict[str, tuple[str, ...]] = {
    "general-nlp": GENERAL_NLP,
    "gpqa": ("gpqa_main_n_shot",),
    "medmcqa": ("medmcqa",),
}
"""Maps a name to the lm-eval tasks that it stands for."""

FEWSHOT = {"gpqa_main_n_shot": 5, "medmcqa": 5}
"""Maps a task to its few-shot examples per question, if neither task nor user sets a number."""


def expand(names: Iterable[str]) -> list[str]:
    """Replace shortcuts by their tasks, and drop repeats; raises ``ConfigError`` without tasks."""
    tasks = list(dict.fromkeys(task for name in names for task in SHORTCUTS.get(name, (name,))))
    if not tasks:
        raise ConfigError("no task: give --tasks, e.g. arc_easy,mmlu or general-nlp")
    return tasks


def specifications(name: str) -> list[str | dict[str, Any]]:
    """lm-eval's arguments for a task name, such as ``mmlu`` or ``mmlu:astronomy+anatomy``.

    MMLU subjects with a file ``<subject>_test.jsonl`` in ``LOCAL_MMLU`` are read from there, all
    others from the hub.
    """
    kind, _, chosen = name.partition(":")
    if kind != "mmlu":
        return [name]
    local = [s for s in MMLU_SUBJECTS if (LOCAL_MMLU / f"{s}_test.jsonl").is_file()]
    if not chosen and not local:
        return ["mmlu"]
    subjects = chosen.split("+") if chosen else local
    return [_local(s) if s in local else f"mmlu_{s}" for s in subjects]


def _local(subject: str) -> dict[str, Any]:
    """lm-eval's configuration of an MMLU subject that is read from the files in ``LOCAL_MMLU``.

    Each line of such a file is a JSON object with ``question``, ``choices`` and ``answer``.
    """
    splits = {split: LOCAL_MMLU / f"{subject}_{split}.jsonl" for split in ("test", "dev")}
    files = {split: str(path) for split, path in splits.items() if path.is_file()}
    choices = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    config: dict[str, Any] = {
        "task": f"mmlu_{subject}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        "test_split": "test",
        "description": "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n",
        "doc_to_text": "{{question.strip()}}" + choices + "\nAnswer:",
        "doc_to_choice": list("ABCD"),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    if "dev" in files:
        config.update(fewshot_split="dev", fewshot_config={"sampler": "first_n"})
    return config


# Kinds of tasks.

CONTINUATION, SHIFT = SLICED = ("continuation", "shift")
"""Tasks that score slices of texts (``windows.py``), e.g. ``shift:wiki.txt+news.jsonl#report``."""

MODULES = {
    "perplexity": "perplexity",
    "summarize": "summarization",
    CONTINUATION: "perplexity",
    SHIFT: "perplexity",
    "lm-eval": "lm_eval",
}
"""Maps a kind of task to the module that measures it.

Modules are imported only when a task needs them, because some need optional packages.
"""


def split(task: str) -> tuple[str, str]:
    """Split a task into kind and name: (perplexity, embedded), or (lm-eval, arc_easy)."""
    kind, colon, name = task.partition(":")
    return (kind, name) if colon and kind in MODULES else ("lm-eval", task)


def protocols(task: str) -> tuple[str, ...]:
    """The protocols under which a task can run."""
    kind = split(task)[0]
    if kind in SLICED:
        return ("decode",)
    return (*PROTOCOLS, *(("standard",) if kind == "perplexity" else ()))


def slice_sources(name: str) -> tuple[list[str], str]:
    """Split ``a.txt+b.jsonl#report`` into the texts' names and the set (half of the documents)."""
    texts, _, which = name.rpartition("#")
    if which not in documents.SETS or not texts:
        texts, which = name, documents.REPORT
    return texts.split("+"), which


def short(task: str) -> str:
    """The task; a file's path is shortened to the file's name."""
    kind, colon, name = task.rpartition(":")
    return f"{kind}{colon}{name.rpartition('/')[2]}" if name.endswith((".txt", ".jsonl")) else task


def measure(
    candidate: BoundMethod,
    task: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None] = lambda items: None,
) -> Measurement:
    """Measure ``candidate`` on one task; ``advance(n)`` is called after every n finished items.

    Raises ``ConfigError``, ``LoadError`` or ``MissingExtra`` if the task cannot be run, and
    ``DartError`` if a loss is not finite.
    """
    return _module(task).measure(candidate, task, options, parts, advance)  # type: ignore[no-any-return]


def count(task: str, options: MeasureOptions, tokenizer: Any, model: Any = None) -> int:
    """The number of items that ``measure`` scores; ``model``, if given, limits window lengths."""
    return int(_module(task).count(task, options, tokenizer, model))


def _module(task: str) -> Any:
    return import_module(f"dart_llm.evaluation.{MODULES[split(task)[0]]}")


def check_task(task: str, options: MeasureOptions) -> None:
    """Raise ``ConfigError`` if an lm-eval task, a text or a data set does not exist.

    Loads no model.  The texts of ``perplexity`` are checked when the settings are read.
    """
    kind, name = split(task)
    if kind == "summarize":
        documents.check(name)
    elif kind in SLICED:
        documents.sources(slice_sources(name)[0])
    elif kind == "lm-eval":
        _module(task).check(name, options.include_path)


def check_calibration(config: PruneConfig, source: str | None, tasks: Iterable[str]) -> None:
    """Raise ``ConfigError`` if a task evaluates ``source``, the calibration text of ``config``."""
    calibration = config.calibration
    if calibration is None or calibration.source != "text":
        return
    for kind, name in map(split, tasks):
        documents.check_disjoint(source, slice_sources(name)[0] if kind in SLICED else [name])
