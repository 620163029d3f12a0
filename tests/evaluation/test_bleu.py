"""BLEU: by the formula, and defined for texts that are short, empty or equal."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest

from dart_llm.errors import MissingExtra
from dart_llm.evaluation import text_metrics as bleu

pytest.importorskip("sacrebleu")


@pytest.mark.parametrize("text", ["word", "two words", "The cat sat on the mat. It slept.", "! ?"])
def test_equal_texts_give_one(text: str) -> None:
    assert bleu.bleu_score(text, text) == 1.0
    assert bleu.bleu_score(text, f"  {text}\n") == 1.0


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [("", "a text"), ("a text", ""), ("", ""), ("all other words", "none is shared here")],
)
def test_nothing_shared_is_zero(candidate: str, reference: str) -> None:
    assert bleu.bleu_score(candidate, reference) == 0.0


def by_formula(candidate: list[str], reference: list[str]) -> float:
    """Papineni et al. 2002 on words, with 1/2, 1/4, ... in place of matches that are 0."""
    logs, zeros = [], 0
    for n in range(1, min(4, len(candidate)) + 1):
        written = Counter(zip(*(candidate[i:] for i in range(n)), strict=False))
        wanted = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
        matches: float = sum((written & wanted).values())
        if not matches:
            zeros += 1
            matches = 0.5**zeros
        logs.append(math.log(matches / sum(written.values())))
    brevity = min(1.0, math.exp(1 - len(reference) / len(candidate)))
    return brevity * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        ("the cat sat on a mat", "the cat sat on the mat today"),
        ("the the the the", "the cat sat on the mat"),
        ("the cat", "the cat sat on the mat"),
        ("a dog ran far away and the cat sat", "the cat sat"),
    ],
)
def test_against_the_formula(candidate: str, reference: str) -> None:
    expected = by_formula(candidate.split(), reference.split())
    assert bleu.bleu_score(candidate, reference) == pytest.approx(expected)


def test_line_breaks_make_no_difference() -> None:
    reference = "One sentence. Another one."
    assert bleu.bleu_score("One sentence.\n\nAnother one.", reference) == 1.0


def test_the_signature_names_settings_and_version() -> None:
    version = pytest.importorskip("sacrebleu").__version__
    expected = f"nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{version}"
    assert bleu.signature() == expected


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    bleu.bleu_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(MissingExtra, match=r"needs sacrebleu.*'dart-llm\[drift\]'"):
        bleu.bleu_scorer()
    monkeypatch.undo()
    assert bleu.bleu_scorer() is bleu.bleu_scorer()
