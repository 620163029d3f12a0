"""ROUGE of a summary against its reference; the only file that imports ``rouge_score``.

F-measures with Porter stemming, as published tables give them.  ROUGE-L takes a text as one
sequence; ROUGE-Lsum compares sentence by sentence, so both texts are split into sentences here,
by rules that need no download (``sentences``).  The package's tokenizer keeps the letters a-z and
digits only: texts in other alphabets score 0.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from typing import Any

from dart_llm.errors import MissingExtra

METRICS: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?<![A-Za-z0-9.])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Rev|St|Jr|Sr|Sen|Rep|Gov"
    r"|Gen|Col|Lt|Sgt|Capt|Hon|vs|cf|al|approx|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec)$"
)


def score(prediction: str, reference: str) -> dict[str, float]:
    """F-measures in [0, 1] under the names of ``METRICS``; an empty prediction scores 0.

    Raises ``MissingExtra`` without the rouge-score package.
    """
    found = scorer().score(as_lines(reference), as_lines(prediction))
    return {name: float(found[name].fmeasure) for name in METRICS}


@cache
def scorer() -> Any:
    """The package's scorer; call it before a long run, for it raises ``MissingExtra``."""
    try:
        module = import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise MissingExtra("rouge-score", "eval") from error
    return module.RougeScorer(list(METRICS), use_stemmer=True)


def as_lines(text: str) -> str:
    """The text with one sentence a line, which is what ROUGE-Lsum reads."""
    return "\n".join(sentences(text))


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, stripped, none of them empty.

    A line break ends a sentence, and so does ``.``, ``!`` or ``?`` (closing quotes and brackets
    may follow) before white space and a capital or a digit, but not after an initial ("J. Smith"),
    dotted letters ("U.S. Army") or a common abbreviation ("Dr. Brown").
    """
    return [part for line in text.splitlines() for part in _split(line) if part]


def _split(line: str) -> list[str]:
    found, start = [], 0
    for match in _END.finditer(line):
        stop = match.group()[0] == "."
        if stop and _ABBREVIATION.search(line, start, match.start()):
            continue
        found.append(line[start : match.end()].strip())
        start = match.end()
    return [*found, line[start:].strip()]
