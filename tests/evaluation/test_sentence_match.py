"""Sentences of two texts: similarity, coverage and order, by hand and by scipy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dart_llm.evaluation.text_metrics import (
    THRESHOLD,
    match,
    match_cosines,
    matched_pairs,
    ordered_share,
)
from encoders import WordCounts

A, B, C = "The cat sat on a mat.", "Rain fell all night.", "Birds sang loudly today."

SAME = [
    ("The cat is sleeping on the sofa.", "A cat sleeps on the couch."),
    (
        "Farmers move their cattle to the hills.",
        "The farmers drive their cattle up into the hills.",
    ),
    (
        "The bank raised interest rates by a quarter point.",
        "Interest rates were increased 0.25 percent by the bank.",
    ),
    ("Water boils at 100 degrees Celsius.", "At one hundred degrees, water starts to boil."),
    (
        "The study found no effect of the drug.",
        "Researchers saw no difference between the drug and placebo.",
    ),
    ("He left early because he felt ill.", "Feeling sick, he went home before the end."),
]
OTHER = [
    "The cat chased a mouse in the kitchen.",
    "Farmers milk their cows before dawn.",
    "The bank closed forty branches this year.",
    "Ice melts when it is warm.",
    "The study enrolled 300 patients in two hospitals.",
    "He arrived late because of the traffic.",
]
"""About the topic of the pair of ``SAME`` at the same place, and something else."""


def found(candidate: str, reference: str, threshold: float = THRESHOLD):
    return match(candidate, reference, WordCounts(), threshold)


def test_equal_texts_give_one() -> None:
    same = found(f"{A} {B} {C}", f"{A}\n{B}\n\n{C}")
    assert (same.similarity, same.coverage, same.order) == (1.0, 1.0, 1.0)
    assert same.pairs == ((0, 0), (1, 1), (2, 2))


def test_repeated_sentences_meet_their_own_copy() -> None:
    looped = f"{A} {A} {B} {A} {B} {A}"
    assert found(looped, looped).pairs == tuple((i, i) for i in range(6))
    assert found(looped, looped).order == 1.0


def test_reversed_sentences_keep_all_but_their_order() -> None:
    turned = found(f"{C} {B} {A}", f"{A} {B} {C}")
    assert (turned.similarity, turned.coverage, turned.order) == (1.0, 1.0, 0.0)


def test_one_sentence_of_three_is_covered() -> None:
    one = found(B, f"{A} {B} {C}")
    assert one.coverage == pytest.approx(1 / 3)
    assert one.similarity == pytest.approx((1 / 3 + 1) / 2)
    assert one.order is None
    assert one.pairs == ((1, 0),)


def test_what_was_added_lowers_the_similarity_alone() -> None:
    more = found(f"{A} {B} {C}", A)
    assert (more.coverage, more.order) == (1.0, None)
    assert more.similarity == pytest.approx((1 + 1 / 3) / 2)


def test_one_sentence_each() -> None:
    same, other = found(A, A), found(A, B)
    assert (same.similarity, same.coverage, same.order) == (1.0, 1.0, None)
    assert (other.similarity, other.coverage, other.order) == (0.0, 0.0, None)


@pytest.mark.parametrize(("candidate", "reference"), [("", A), (A, ""), ("", ""), (" \n", A)])
def test_empty_texts(candidate: str, reference: str) -> None:
    nothing = found(candidate, reference)
    assert (nothing.similarity, nothing.coverage, nothing.order) == (0.0, 0.0, None)


def test_the_threshold_is_included() -> None:
    cosines = np.array([[0.7, 0.1], [0.2, 0.699]])
    assert match_cosines(cosines, 0.7).coverage == 0.5
    assert match_cosines(cosines, 0.699).coverage == 1.0
    assert match_cosines(cosines, 0.71).pairs == ()


def test_the_most_similar_pairs_are_matched_first() -> None:
    cosines = np.array([[0.8, 0.9], [0.75, 0.95]])
    assert matched_pairs(cosines, 0.7) == [(0, 0), (1, 1)]
    assert matched_pairs(np.array([[0.8, 0.95], [0.75, 0.9]]), 0.7) == [(0, 1), (1, 0)]
    assert matched_pairs(np.array([[0.8, 0.95], [0.6, 0.9]]), 0.7) == [(0, 1)]


def test_coverage_lets_one_sentence_cover_several() -> None:
    both = match_cosines(np.array([[0.9], [0.8]]), 0.7)
    assert (both.coverage, both.pairs, both.order) == (1.0, ((0, 0),), None)


def test_rounding_does_not_pull_equal_texts_apart() -> None:
    noisy = np.ones((3, 3)) - np.array([[2e-8, 0, 1e-8], [0, 3e-8, 0], [1e-8, 0, 2e-8]])
    assert match_cosines(noisy, 0.7).pairs == ((0, 0), (1, 1), (2, 2))


def test_order_is_kendalls_tau_on_another_scale() -> None:
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    draw = random.Random(0)
    for size in range(2, 12):
        places = draw.sample(range(40), size)
        expected = (1 + kendalltau(range(size), places).statistic) / 2
        assert ordered_share(places) == pytest.approx(expected)
    assert ordered_share([3]) is None
    assert ordered_share([]) is None


@pytest.mark.smollm2
def test_the_threshold_parts_paraphrases_from_the_same_topic() -> None:
    pytest.importorskip("sentence_transformers")
    from dart_llm.evaluation.encoders import cosine, load_embedder

    embedder = load_embedder()
    texts = [*(one for one, _ in SAME), *(two for _, two in SAME), *OTHER]
    first, same, other = np.split(embedder.embed(texts), 3)
    close = [cosine(a, b) for a, b in zip(first, same, strict=True)]
    far = [cosine(a, b) for a, b in zip(first, other, strict=True)]
    assert (round(min(close), 2), round(max(close), 2)) == (0.7, 0.91)
    assert (round(min(far), 2), round(max(far), 2)) == (0.15, 0.61)
    assert max(far) + 0.03 < THRESHOLD < min(close) - 0.03
