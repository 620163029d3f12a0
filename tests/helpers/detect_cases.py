"""Passages about bees and loans, and the tiny GPT-2 (a token a character) that reads them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from dart_llm.data.passages import Passage, Topic
from quality_cases import BEES, LOANS
from tiny_gpt2 import write_gpt2


@functools.cache
def folder() -> Path:
    return write_gpt2(Path(tempfile.mkdtemp()) / "model")


def passage(number: int, bees: int = 6, loans: int = 5) -> Passage:
    first = "".join(BEES.format(n * number + n) for n in range(bees)).strip()
    second = "".join(LOANS.format(n * number) for n in range(loans)).strip()
    return Passage(
        f"p{number}",
        f"{first}\n\n{second}",
        (Topic("bees", "zoology"), Topic("loans", "finance")),
        (len(first) + 2,),
    )
