"""Passages about bees and loans, and the tiny GPT-2 (a token a character) that reads them."""

import functools
import tempfile
from pathlib import Path

from dart_llm.data.passages import Passage, Topic
from quality_cases import BEES, LOANS
from tiny_gpt2 import write_gpt2


@functools.cache
def folder():
    return write_gpt2(Path(tempfile.mkdtemp()) / "model")


def passage(number, bees=6, loans=5):
    first = "".join(BEES.format(n * number + n) for n in range(bees)).strip()
    second = "".join(LOANS.format(n * number) for n in range(loans)).strip()
    return Passage(
        f"p{number}",
        f"{first}\n\n{second}",
        (Topic("bees", "zoology"), Topic("loans", "finance")),
        (len(first) + 2,),
    )
