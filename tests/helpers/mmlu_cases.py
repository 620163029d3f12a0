"""Questions in the form of MMLU's files."""

from __future__ import annotations


def mmlu_row(number: int) -> dict[str, object]:
    choices = [f"{letter} {number}" for letter in "pqrs"]
    return {"question": f"what is {number} of the body", "choices": choices, "answer": number % 4}
