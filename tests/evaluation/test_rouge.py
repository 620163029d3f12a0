"""ROUGE: values worked out by hand, and the sentences that ROUGE-Lsum compares."""

from __future__ import annotations

import sys

import pytest

from dart_llm.errors import MissingExtra
from dart_llm.evaluation import encoders as rouge__encoders
from dart_llm.evaluation import text_metrics as rouge


def test_equal_texts_score_one_and_disjoint_texts_score_zero():
    text = "The cat sat on the mat. It was happy."
    assert rouge.rouge_scores(text, text) == {name: pytest.approx(1.0) for name in rouge.METRICS}
    assert rouge.rouge_scores("Nothing in common", text) == dict.fromkeys(rouge.METRICS, 0.0)


def test_an_empty_prediction_scores_zero():
    assert rouge.rouge_scores("", "The cat sat.") == dict.fromkeys(rouge.METRICS, 0.0)
    assert rouge.rouge_scores(" \n", "The cat sat.") == dict.fromkeys(rouge.METRICS, 0.0)


def test_f_measures_by_hand():
    """Prediction of 6 words, reference of 3: all 3 are found, in order, with 1 of 2 bigrams."""
    found = rouge.rouge_scores("the black cat sat down again", "the cat sat")
    recall, precision = 3 / 3, 3 / 6
    expected = 2 * recall * precision / (recall + precision)
    assert found["rouge1"] == pytest.approx(expected)
    assert found["rougeL"] == pytest.approx(expected)
    recall, precision = 1 / 2, 1 / 5
    assert found["rouge2"] == pytest.approx(2 * recall * precision / (recall + precision))


def test_words_are_stemmed():
    assert rouge.rouge_scores("running dogs", "run dog")["rouge2"] == pytest.approx(1.0)


def test_rouge_lsum_ignores_the_order_of_sentences_and_rouge_l_does_not():
    first, second = "The cat sat on the mat.", "Dogs were barking all night."
    found = rouge.rouge_scores(f"{second} {first}", f"{first} {second}")
    assert found["rougeLsum"] == pytest.approx(1.0)
    assert found["rougeL"] == pytest.approx(6 / 11)


def test_line_breaks_make_no_difference_to_rouge_lsum():
    reference = "Dogs barked. The cat sat."
    joined = rouge.rouge_scores("The cat sat. Dogs barked.", reference)
    assert joined == rouge.rouge_scores("The cat sat.\n\nDogs barked.\n", reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said: "No." She left.', ['He said: "No."', "She left."]),
        ("Mr. Smith met J. K. Brown. They left.", ["Mr. Smith met J. K. Brown.", "They left."]),
        ("The U.S. Army came. So did Dr. Who.", ["The U.S. Army came.", "So did Dr. Who."]),
        ("It cost 3.5m. 20 people paid.", ["It cost 3.5m.", "20 people paid."]),
        ("no capital. no split", ["no capital. no split"]),
        ("a line\n\n  another  \n", ["a line", "another"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert rouge__encoders.sentences(text) == expected


def test_the_missing_package_is_named_with_its_extra(monkeypatch):
    rouge.rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtra, match=r"rouge-score.*dart-llm\[eval\]"):
        rouge.rouge_scorer()
    monkeypatch.undo()
    assert rouge.rouge_scorer() is rouge.rouge_scorer()
