"""MMLU: its subjects, and the questions that are not scored, from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.jsonl import read_rows

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

LOCAL_MMLU = Path("datasets/mmlu")  # in the current folder; read instead of the hub
SPLITS = ("dev", "validation")  # never "test": those questions are scored
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def local_subjects() -> tuple[str, ...]:
    """The subjects whose ``<subject>_dev.jsonl`` lies in ``LOCAL_MMLU``, in the usual order."""
    return tuple(s for s in MMLU_SUBJECTS if (LOCAL_MMLU / f"{s}_dev.jsonl").is_file())


def local_questions(subject: str, folder: Path, *, answers: bool = False) -> list[dict[str, Any]]:
    """The questions in ``<subject>_dev.jsonl`` and, if it is there, ``<subject>_validation.jsonl``.

    Each is what ``question`` returns.  Raises ``ConfigError`` for a missing or malformed file.
    """
    required, *optional = (folder / f"{subject}_{split}.jsonl" for split in SPLITS)
    if not required.is_file():
        raise ConfigError(
            f"the folder {folder} holds no {required.name}: put it there, one JSON object a line "
            'with "question" and "choices"'
        )
    paths = [required, *(path for path in optional if path.is_file())]
    found = [
        question(subject, row, f"line {number} of {path}", answers=answers)
        for path in paths
        for number, row in read_rows(path)
    ]
    if not found:
        raise ConfigError(f"the file {required} holds no questions: add one JSON object a line")
    return found


def question(subject: str, row: Any, where: str, *, answers: bool = False) -> dict[str, Any]:
    """``{"subject", "question", "choices"}`` of a row, with ``"answer"`` only if ``answers``.

    The answer is a position in ``choices``.  ``where`` names the row in the ``ConfigError`` for a
    row that lacks something.
    """
    text = row.get("question") if isinstance(row, dict) else None
    choices = row.get("choices") if isinstance(row, dict) else None
    if not isinstance(text, str) or not isinstance(choices, list) or not choices:
        raise ConfigError(f'{where} needs "question" (text) and "choices" (a list): complete it')
    found = {"subject": subject, "question": text, "choices": [str(c) for c in choices]}
    return {**found, "answer": _answer(row, len(choices), where)} if answers else found


def text(row: dict[str, Any]) -> str:
    """A question as perplexity reads it: alone, or with its choices and answer if it has one."""
    if "answer" not in row:
        return str(row["question"])
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(row["choices"])]
    return "\n".join([row["question"].strip(), *choices, f"Answer: {LETTERS[row['answer']]}"])


def _answer(row: dict[str, Any], choices: int, where: str) -> int:
    answer = row.get("answer")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if (
        isinstance(answer, bool)
        or not isinstance(answer, int)
        or not 0 <= answer < min(choices, len(LETTERS))
    ):
        raise ConfigError(f'{where} needs "answer", the position of a choice from 0: complete it')
    return answer
