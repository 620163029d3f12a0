"""Data sets of the hub, and the local files that stand in for them.

The only file that imports the ``datasets`` library, and only when a hub data set is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, LoadError, MissingExtra, UnknownName

__all__ = ["HUB_TEXTS", "LOCAL_MMLU", "MMLU_SUBJECTS", "mmlu_questions", "perplexity_text"]

MMLU_SUBJECTS: tuple[str, ...] = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)

HUB_TEXTS: tuple[str, ...] = ("c4", "wikitext2")
LOCAL_MMLU = Path("datasets/mmlu")  # in the current folder; read instead of the hub
SPLITS = ("dev", "validation")  # never "test": those questions are scored


def mmlu_questions(subject: str, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """The MMLU questions of a subject that are not scored: ``dev``, then ``validation``.

    Each is ``{"subject", "question", "choices"}``; the answer is dropped here, so no prompt that
    is built from them can show it.  ``folder`` holds ``<subject>_dev.jsonl`` (and, if there is
    one, ``<subject>_validation.jsonl``); without it ``datasets/mmlu`` in the current folder is
    tried, and then the hub's ``cais/mmlu``.

    Raises ``UnknownName``, ``ConfigError`` (a local file is missing or malformed),
    ``MissingExtra`` (no ``datasets`` library) or ``LoadError`` (the hub cannot be reached).
    """
    if subject not in MMLU_SUBJECTS:
        raise UnknownName("MMLU subject", subject, MMLU_SUBJECTS)
    if folder is None and (LOCAL_MMLU / f"{subject}_dev.jsonl").is_file():
        folder = LOCAL_MMLU
    if folder is not None:
        return _local_questions(subject, Path(folder))
    instead = f"to work without it put {subject}_dev.jsonl into {LOCAL_MMLU.as_posix()}/"
    questions = []
    for split in SPLITS:
        where = f"cais/mmlu ({subject}, {split})"
        for row in _fetch("cais/mmlu", subject, split, instead):
            questions.append(_without_answer(subject, row, where))
    return questions


def perplexity_text(name: str, documents: int = 1100) -> str:
    """The text of a hub data set that perplexity is usually measured on.

    ``wikitext2``: the test split of WikiText-2 (raw), lines joined by blank lines.  ``c4``: the
    first ``documents`` documents of C4's English validation split, streamed, joined by spaces.
    Both are the joins that the pruning literature uses.

    Raises ``UnknownName``, ``ConfigError``, ``MissingExtra`` or ``LoadError``.
    """
    if name not in HUB_TEXTS:
        raise UnknownName("hub data set", name, HUB_TEXTS)
    if documents < 1:
        raise ConfigError(f"the number of documents must be 1 or more, not {documents}")
    instead = "use the embedded text or a text file of your own instead"
    if name == "wikitext2":
        rows = _fetch("Salesforce/wikitext", "wikitext-2-raw-v1", "test", instead)
        return "\n\n".join(row["text"] for row in rows)
    rows = _fetch("allenai/c4", "en", "validation", instead, first=documents)
    return " ".join(row["text"] for row in rows)


def _local_questions(subject: str, folder: Path) -> list[dict[str, Any]]:
    required, *optional = (folder / f"{subject}_{split}.jsonl" for split in SPLITS)
    if not required.is_file():
        raise ConfigError(
            f"the folder {folder} holds no {required.name}: put it there, one JSON object a line "
            'with "question" and "choices"'
        )
    questions: list[dict[str, Any]] = []
    for path in (required, *(path for path in optional if path.is_file())):
        questions += _read_jsonl(subject, path)
    if not questions:
        raise ConfigError(f"the file {required} holds no questions: add one JSON object a line")
    return questions


def _read_jsonl(subject: str, path: Path) -> list[dict[str, Any]]:
    questions = []
    try:
        # Not splitlines(): a JSON string may hold U+2028, which that takes for a line break.
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = json.loads(line)
                questions.append(_without_answer(subject, row, f"line {number} of {path}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {path} cannot be read as UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"line {number} of {path} is not JSON: {error}") from error
    return questions


def _without_answer(subject: str, row: Any, where: str) -> dict[str, Any]:
    question = row.get("question") if isinstance(row, dict) else None
    choices = row.get("choices") if isinstance(row, dict) else None
    if not isinstance(question, str) or not isinstance(choices, list) or not choices:
        raise ConfigError(f'{where} needs "question" (text) and "choices" (a list): complete it')
    return {"subject": subject, "question": question, "choices": [str(c) for c in choices]}


def _fetch(
    path: str, config: str, split: str, instead: str, first: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a split; only the ``first`` ones, streamed, when that is given."""
    load_dataset = _load_dataset()
    try:
        rows = load_dataset(path, config, split=split, streaming=first is not None)
        return list(islice(rows, first))
    # The hub's clients share no base class for "cannot be reached", and streaming fails late.
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .")
        raise LoadError(
            f"the data set {path} ({config}, {split}) could not be fetched from the hub "
            f"({reason}); {instead}"
        ) from error


def _load_dataset() -> Callable[..., Any]:
    # A plain folder named datasets/ in the current directory imports as an empty package:
    # without load_dataset the library is as missing as without the module.
    try:
        load_dataset: Callable[..., Any] = import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:
        raise MissingExtra("datasets", "eval") from error
    return load_dataset
