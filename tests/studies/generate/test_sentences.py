"""Sentences say what the rows say, and nothing that was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from dart_llm.experiments import drift_plot as sentences__drift_plot
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import words as sentences
from fake_results import FFN_SHARE, accounting, drift_checks, kept_counts, perplexity, remasks


def row(method: str, sparsity: float | None, ratio: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "perplexity": 20 * ratio,
        "ratio_to_dense": ratio,
        "accounting": None,
        **more,
    }


DENSE = row("dense", 0.0, 1.0)


def test_conclusion_of_the_demo() -> None:
    rows = [r for r in perplexity()["rows"] if r["method"] != "griffin"]
    assert sentences.conclusion(rows, FFN_SHARE) == (
        "50 % of the FFN neurons removed = 30 % fewer weight bytes read per token (at most 1.42 x "
        "faster); perplexity x 2.1 (17.6 to 37.0); for this model start at up to 20 %."
    )


@pytest.mark.parametrize(
    ("ratios", "advice"),
    [
        ({0.1: 1.03, 0.2: 1.09, 0.5: 2.1}, "for this model start at 10 to 20 %"),
        ({0.2: 1.0999, 0.5: 2.1}, "for this model start at up to 20 %"),
        (
            {0.2: 1.1, 0.5: 2.1},
            "try lower sparsities: nothing measured here stays within 10 % of dense",
        ),
        ({0.5: 1.02}, "for this model start at up to 50 %"),
        ({0.1: 1.03, 0.125: 1.04, 0.3: 1.2}, "for this model start at 10 to 12.5 %"),
    ],
)
def test_advice_comes_from_the_measured_rows(ratios: dict[float, float], advice: str) -> None:
    rows = [DENSE, *(row("dart", sparsity, ratio) for sparsity, ratio in ratios.items())]
    assert sentences.advice(rows, "dart") == advice


def test_advice_keeps_to_the_method_and_to_pruned_rows() -> None:
    rows = [DENSE, row("griffin", 0.3, 1.01), row("dart", 0.5, 2.0), row("dart", 0.0, 1.0)]
    assert sentences.advice(rows, "dart").startswith("try lower sparsities")
    assert sentences.advice(rows, "griffin") == "for this model start at up to 30 %"


def test_conclusion_speaks_of_the_runs_own_method() -> None:
    rows = [DENSE, row("dart", 0.3, 1.5), row("griffin", 0.7, 9.0)]
    assert "30 %" in sentences.conclusion(rows, method="dart")
    assert "x 9.0" in sentences.conclusion(rows)


def test_what_was_not_measured_is_not_said() -> None:
    counted = accounting("dart", 0.5, 0.5, 0.0)
    alone = sentences.conclusion([], accounting=counted)
    assert alone == (
        "50 % of the FFN neurons removed = 30 % fewer weight bytes read per token (at most 1.42 x "
        "faster)."
    )
    without_dense = sentences.conclusion([row("dart", 0.5, 2.0, ratio_to_dense=None)])
    assert without_dense == (
        "50 % of the FFN neurons removed; perplexity 40.0 (dense was not measured)."
    )
    assert sentences.conclusion([]) == "Nothing was measured."
    assert sentences.conclusion([DENSE, row("dart", 0.5, 2.0, perplexity=None)]) == (
        "Nothing was measured."
    )


def test_bytes_sentence_says_what_was_achieved() -> None:
    asked = sentences.bytes_sentence(accounting("dart", 0.5, 0.4375, 0.125))
    assert asked == (
        "50 % of the FFN neurons asked for, 43.8 % removed on average = 26 % fewer weight bytes "
        "read per token (at most 1.35 x faster)."
    )
    own = sentences.bytes_sentence({**accounting("x", 0.4, 0.4, 0.0), "requested_sparsity": None})
    assert own.startswith("40 % of the FFN neurons removed = 24 % fewer")


def test_masking_saves_nothing_and_says_so() -> None:
    masked = sentences.bytes_sentence(accounting("dart", 0.5, 0.5, 0.0, executor="masked"))
    assert masked == (
        "50 % of the FFN neurons removed, by masking, which skips no work (compact would allow "
        "30 % fewer weight bytes read per token: at most 1.42 x faster)."
    )
    nothing = sentences.bytes_sentence(accounting("dart", 0.0, 0.0, 0.0))
    assert nothing == "0 % of the FFN neurons removed."


def test_perplexity_sentence() -> None:
    assert sentences.perplexity_sentence(perplexity()) == (
        "dart 50 % on embedded: perplexity x 2.1 (17.6 to 37.0); for this model start at up to "
        "20 %."
    )
    only = {"text": "wikitext2", "rows": [DENSE]}
    assert sentences.perplexity_sentence(only) == "Only dense was measured on wikitext2."


def test_timing_sentences() -> None:
    faster = {"seconds_per_token": {"dense": 0.05, "pruned": 0.04}, "bytes_limit": 1.42}
    assert sentences.timing_sentence(faster) == (
        "Pruned 40.0 ms per token, dense 50.0: 1.25 x as fast as dense; the bytes read allow "
        "1.42 x."
    )
    slower = {"seconds_per_token": {"dense": 0.04, "pruned": 0.05}}
    assert sentences.timing_title(slower) == "Pruned decoding is 1.25 x slower than dense."
    assert sentences.timing_sentence({"seconds_per_token": {"dense": 0.04}}) == "40.0 ms per token."
    assert sentences.timing_sentence({}) == "No time was measured."


def test_layers_sentence() -> None:
    assert sentences.layers_sentence([90, 50, 10], [100, 100, 100]) == (
        "Layer 0 keeps the most neurons (90 %), layer 2 the fewest (10 %)."
    )
    assert sentences.layers_sentence([50, 50], [100, 100]) == (
        "Every layer keeps 50 % of its neurons."
    )


def test_drift_sentence_counts_windows_triggers_and_masks() -> None:
    masks = [{"cause": mask.cause, "row": None} for mask in remasks(kept_counts())]
    checks = drift_checks()
    assert sentences__drift_plot.drift_sentence(checks, masks) == (
        "7 of 29 windows fell below the threshold; 2 triggers led to 2 re-masks; the guards put "
        "off 1 trigger."
    )
    late = sentences__drift_plot.drift_sentence(checks, masks[:1])
    assert "2 triggers led to no re-masks before the end" in late
    quiet = [DriftCheck(0, 0, 10, 3, 1, 0.9, 0.8, 0, False, "armed")]
    assert sentences__drift_plot.drift_sentence(quiet, masks[:1]) == (
        "0 of 1 window fell below the threshold; nothing was re-masked."
    )
    arming = [DriftCheck(0, 0, 10, 3, 1, 0.9, None, 0, False, "arming")]
    assert (
        sentences__drift_plot.drift_sentence(arming, [])
        == "The drift detector did not arm within 1 window."
    )


def test_one_trigger_of_a_shared_batch_counts_once() -> None:
    rows = [DriftCheck(0, r, 30, 3, 3, 0.5, 0.8, 3, True, "armed") for r in range(4)]
    masks = [{"cause": "drift", "row": None}]
    assert "1 trigger led to 1 re-mask" in sentences__drift_plot.drift_sentence(rows, masks)
    own = [{"cause": "drift", "row": r} for r in range(4)]
    assert "4 triggers led to 4 re-masks" in sentences__drift_plot.drift_sentence(rows, own)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "50 %"),
        (0.4375, "43.8 %"),
        (0.1, "10 %"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (-1e-9, "0 %"),
    ],
)
def test_percent(value: float, text: str) -> None:
    assert sentences.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (17.62, "17.6"), (181.94, "181.9"), (1234.5, "1,234"), (7.0e6, "7.0e6")],
)
def test_figure(value: float, text: str) -> None:
    assert sentences.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.0"), (2.1, "2.1"), (1.08, "1.08"), (12.41, "12.4"), (150.2, "150")]
)
def test_times(value: float, text: str) -> None:
    assert sentences.times(value) == text
