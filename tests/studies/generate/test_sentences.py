"""Sentences say what the rows say, and nothing that was not measured."""

from dart_llm.experiments.drift_plot import drift_sentence
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import words
from fake_results import accounting, drift_checks, kept_counts, perplexity, remasks


def row(method, sparsity, ratio, **more):
    own = {"method": method, "sparsity": sparsity, "ratio_to_dense": ratio, "accounting": None}
    return {**own, "perplexity": 20 * ratio, **more}


DENSE = row("dense", 0.0, 1.0)


def test_advice_comes_from_the_measured_rows():
    lower = "try lower sparsities: nothing measured here stays within 10 % of dense"
    for ratios, advice in (
        ({0.1: 1.03, 0.2: 1.09, 0.5: 2.1}, "for this model start at 10 to 20 %"),
        ({0.2: 1.0999, 0.5: 2.1}, "for this model start at up to 20 %"),
        ({0.2: 1.1, 0.5: 2.1}, lower),
        ({0.1: 1.03, 0.125: 1.04, 0.3: 1.2}, "for this model start at 10 to 12.5 %"),
    ):
        rows = [DENSE, *(row("dart", sparsity, ratio) for sparsity, ratio in ratios.items())]
        assert words.advice(rows, "dart") == advice
    rows = [DENSE, row("griffin", 0.3, 1.01), row("dart", 0.5, 2.0), row("dart", 0.0, 1.0)]
    other = "of what was measured griffin 30 % stays within 10 % of dense"
    assert words.advice(rows, "dart") == other  # else of another method's, of pruned ones
    assert words.advice(rows, "griffin") == "for this model start at up to 30 %"


def test_conclusions_of_what_was_measured(snapshot):
    rows = [DENSE, row("dart", 0.3, 1.5), row("griffin", 0.7, 9.0)]
    half, each = accounting("dart", 0.5, 0.5, 0.0), "seconds_per_token"
    fast = {each: {"dense": 0.05, "pruned": 0.025}, "bytes_limit": 1.42}
    demo = [DENSE, row("dart", 0.5, 2.0), row("dart", 0.2, 1.15), row("dart-token", 0.5, 1.03)]
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
        words.perplexity_sentence(perplexity()),
        words.perplexity_sentence({"text": "embedded", "rows": demo}, "dart-token"),
        words.perplexity_sentence({"text": "embedded", "rows": demo}, "dart"),
        words.perplexity_sentence({"text": "wikitext2", "rows": [DENSE]}),
        words.timing_sentence({each: {"dense": 0.05, "pruned": 0.04}, "bytes_limit": 1.42}),
        words.timing_sentence({each: {"dense": 0.04, "pruned": 0.05}}),
        words.timing_sentence({**fast, "dense_by": "transformers"}),
        words.timing_sentence({**fast, "dense_by": "the same steps"}),
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
