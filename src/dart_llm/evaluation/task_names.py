"""Tasks by name: shortcuts of groups of tasks, MMLU over local files, and what a name asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dart_llm.data.datasets import LOCAL_MMLU, MMLU_SUBJECTS
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.evaluation.measurement import PROTOCOLS

GENERAL_NLP = tuple("boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa".split())

SHORTCUTS: dict[str, tuple[str, ...]] = {
    "general-nlp": GENERAL_NLP,
    "gpqa": ("gpqa_main_n_shot",),
    "medmcqa": ("medmcqa",),
}
"""Names that stand for one or several lm-eval tasks; ``mmlu`` stands for itself."""

FEWSHOT = {"gpqa_main_n_shot": 5, "medmcqa": 5}
"""Examples before each question where neither the task nor the user says."""


def expand(names: str) -> list[str]:
    """Comma-separated tasks, shortcuts expanded, in order, each once."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise ConfigError("no task: give --tasks, e.g. arc_easy,mmlu or general-nlp")
    found = [task for name in given for task in SHORTCUTS.get(name, (name,))]
    return list(dict.fromkeys(found))


def mmlu_name(subjects: str) -> str:
    """The task of ``MMLU_DATASETS``: ``all``, subjects, or names of other tasks.

    ``mmlu`` for all, ``mmlu:astronomy+anatomy`` for some subjects.
    """
    given = [name.strip().removeprefix("mmlu_") for name in subjects.split(",") if name.strip()]
    if not given or given == ["all"]:
        return "mmlu"
    for subject in given:
        if subject not in MMLU_SUBJECTS:
            raise UnknownName("MMLU subject", subject, MMLU_SUBJECTS)
    return "mmlu:" + "+".join(given)


def specifications(name: str, folder: Path = LOCAL_MMLU) -> list[str | dict[str, Any]]:
    """What lm-eval is given for one task name.

    MMLU subjects whose ``<subject>_test.jsonl`` lies in ``folder`` (``datasets/mmlu`` in the
    current folder) are read from there, all others from the hub.
    """
    if name != "mmlu" and not name.startswith("mmlu:"):
        return [name]
    chosen = name.partition(":")[2]
    local = [s for s in MMLU_SUBJECTS if (folder / f"{s}_test.jsonl").is_file()]
    if not chosen and not local:
        return ["mmlu"]
    subjects = chosen.split("+") if chosen else local
    return [_local(s, folder) if s in local else f"mmlu_{s}" for s in subjects]


def _local(subject: str, folder: Path) -> dict[str, Any]:
    """lm-eval's MMLU format over JSON lines with ``question``, ``choices``, ``answer``."""
    files = {"test": str(folder / f"{subject}_test.jsonl")}
    if (folder / f"{subject}_dev.jsonl").is_file():
        files["dev"] = str(folder / f"{subject}_dev.jsonl")
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


# What a task name says: its kind, and the protocols that it can run under.

KINDS = ("perplexity", "summarize")
"""Task names that are no lm-eval task: ``perplexity:<text>``, ``summarize:<data>``."""


def split(task: str) -> tuple[str, str]:
    """``perplexity:embedded`` -> (perplexity, embedded); ``arc_easy`` -> (lm-eval, arc_easy)."""
    kind, colon, name = task.partition(":")
    return (kind, name) if colon and kind in KINDS else ("lm-eval", task)


def protocols(task: str) -> tuple[str, ...]:
    """The protocols that a task can run under."""
    own = ("standard",) if split(task)[0] == "perplexity" else ()
    return (*PROTOCOLS, *own)


def short(task: str) -> str:
    """The task with a file's folders left out."""
    kind, colon, name = task.rpartition(":")
    return f"{kind}{colon}{name.rpartition('/')[2]}" if name.endswith((".txt", ".jsonl")) else task
