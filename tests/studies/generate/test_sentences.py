"""Sentences say what the rows say, and nothing that was not measured."""

import pytest

from dart_llm.experiments.line_plots import drift_sentence
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import words
from dart_llm.reporting.speed_up import SpeedUp
from dart_llm.studies.generate import report
from fake_results import accounting, drift_checks, kept_counts, remasks


def row(method, sparsity, ratio, **more):
    own = {"method": method, "sparsity": sparsity, "ratio_to_dense": ratio, "accounting": None}
    return {**own, "perplexity": 20 * ratio, **more}


DENSE = row("dense", 0.0, 1.0)


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


def test_conclusions_of_what_was_measured(snapshot):
    rows = [DENSE, row("dart", 0.3, 1.5), row("griffin", 0.7, 9.0)]
    half, each = accounting("dart", 0.5, 0.5, 0.0), "seconds_per_token"
    fast = {each: {"dense": 0.05, "pruned": 0.04}, **SpeedUp(1.25, 1.42, 0.01).to_dict()}
    own = {**accounting("x", 0.4, 0.4, 0.0), "requested_sparsity": None}
    assert [
        words.conclusion(rows, method="dart"),
        words.conclusion(rows),
        words.conclusion([], accounting=half),
        words.conclusion([row("dart", 0.5, 2.0, ratio_to_dense=None)]),
        words.conclusion([DENSE, row("dart", 0.5, 2.0, perplexity=None)]),
        words.bytes_sentence(accounting("dart", 0.5, 0.4375, 0.125)),
        words.bytes_sentence(own),
        words.bytes_sentence({**half, "executor": "masked"}),
        words.bytes_sentence(accounting("x", 0.0, 0.0, 0.0)),
        words.timing_sentence(fast),
        words.timing_sentence({**fast, **SpeedUp(0.8, 1.42).to_dict()}),
        words.timing_sentence({**fast, "dense_by": "our kernels"}),
        words.timing_sentence({**fast, **SpeedUp(None, 1.42).to_dict()}),
        words.timing_sentence({each: {"dense": 0.04}}),
    ] == snapshot


def test_drift_sentence_counts_windows_triggers_and_masks(snapshot):
    masks = [{"cause": mask.cause, "row": None} for mask in remasks(kept_counts())]
    arming = DriftCheck(0, 0, 10, 3, 1, 0.9, None, 0, False, "arming")
    rows = [DriftCheck(0, r, 30, 3, 3, 0.5, 0.8, 3, True, "armed") for r in range(4)]
    assert [
        drift_sentence(drift_checks(), masks),
        drift_sentence(drift_checks(), masks[:1]),
        drift_sentence([arming], []),
        drift_sentence(rows, [{"cause": "drift", "row": None}]),  # a shared batch counts once
        drift_sentence(rows, [{"cause": "drift", "row": r} for r in range(4)]),
    ] == snapshot
