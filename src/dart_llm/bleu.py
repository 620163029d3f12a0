"""BLEU of a text against a reference; the only file that imports ``sacrebleu``.

sacrebleu's score of one segment (Post, "A Call for Clarity in Reporting BLEU Scores", 2018),
divided by 100, so that it stands on the same scale as every other number here: 1 for equal texts.
The whole text is one segment, for the sentences of two generated texts do not correspond.  Orders
of n-grams that the text is too short for are left out ("effective order").
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from dart_llm.errors import MissingExtra


def score(candidate: str, reference: str) -> float:
    """BLEU in [0, 1]; 0 for an empty candidate or reference.

    White space is not compared.  Raises ``MissingExtra`` without the sacrebleu package.
    """
    found = scorer().sentence_score(_one_line(candidate), [_one_line(reference)])
    return min(1.0, float(found.score) / 100)  # equal texts: 100.00000000000004


@cache
def scorer() -> Any:
    """The package's scorer; call it before a long run, for it raises ``MissingExtra``."""
    try:
        module = import_module("sacrebleu.metrics")
    except ImportError as error:
        raise MissingExtra("sacrebleu", "drift") from error
    return module.BLEU(effective_order=True)


def signature() -> str:
    """sacrebleu's own description of the settings, with its version."""
    bleu = scorer()
    bleu.sentence_score("a", ["a"])  # the signature wants to know the number of references
    return str(bleu.get_signature())


def _one_line(text: str) -> str:
    return " ".join(text.split())
