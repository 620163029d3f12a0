"""Sentences say what the rows say, and nothing that was not measured."""

import pytest

from dart_llm.experiments.artifacts import drift_sentence
from dart_llm.experiments.stats import SpeedUp, pace
from dart_llm.reporting import words
from dart_llm.studies.generate import report
from fake_results import accounting, drift_checks, kept_counts, remasks

TUNE = "dart-llm tune --quick."
PRUNE = "On this model griffin 50 % gains {} and multiplies perplexity by 2.1; on yours run "


@pytest.mark.parametrize(
    ("speed_up", "limit", "sentence"),
    [
        (1.04, 1.05, "On this model pruning gains 4 %: use it dense; on yours run "),
        (None, 1.05, "On this model pruning gains 5 % at most: use it dense; on yours run "),
        (0.9, 1.05, "On this model pruning is not faster: use it dense; on yours run "),
        (1.31, 1.42, PRUNE.format("31 %")),
        (None, 1.42, PRUNE.format("42 % at most")),
    ],
)
def test_the_verdict_of_a_demo(speed_up, limit, sentence):
    counted = {**accounting("griffin", 0.5, 0.5, 0.0), "bytes_limit": limit}
    timing = {"speed_up": speed_up}
    assert report.verdict(timing, 2.1, counted, is_default=True) == sentence + TUNE
    other = sentence.replace("on yours run", "other settings are measured by")
    assert report.verdict(timing, 2.1, counted, is_default=False) == other + TUNE


def test_sentences_of_what_was_measured(snapshot):
    half = accounting("dart", 0.5, 0.5, 0.0)
    own = {**accounting("x", 0.4, 0.4, 0.0), "requested_sparsity": None}
    assert [
        words.bytes_sentence(accounting("dart", 0.5, 0.4375, 0.125)),
        words.bytes_sentence(own),
        words.bytes_sentence({**half, "executor": "masked"}),
        words.bytes_sentence(accounting("x", 0.0, 0.0, 0.0)),
        pace(SpeedUp(1.25, 1.42, 0.01).to_dict()),
        pace(SpeedUp(0.8, 1.42).to_dict()),
        pace(SpeedUp(None, 1.42).to_dict()),
    ] == snapshot


def test_drift_sentence_counts_windows_triggers_and_masks(snapshot):
    masks = [{"cause": mask.cause, "row": None} for mask in remasks(kept_counts())]
    assert [
        drift_sentence(drift_checks(), masks),
        drift_sentence(drift_checks(), masks[:1]),
    ] == snapshot
