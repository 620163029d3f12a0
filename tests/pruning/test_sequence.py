"""One sequence: when masks are made, from what, how long they hold, what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dart_llm.pruning.budgets import LayerView
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.registry import BUDGETS, SCORES
from synthetic import (
    KEEP,
    LAYERS,
    WIDTH,
    Driver,
    Stream,
    best,
    config,
    energy_of,
    ids_of,
    is_dense,
    make_layers,
    top,
)

# the first mask


@pytest.mark.parametrize(("masking_step", "prompt"), [(0, 1), (1, 12), (3, 2)])
def test_prompt_then_observe_then_pruned(masking_step: int, prompt: int) -> None:
    run = Driver(config(masking_step=masking_step))
    assert is_dense(run.prefill(prompt)) and run.plans[0].observe
    assert run.steps(8) == ["observe"] * masking_step + ["pruned"] * (8 - masking_step)
    seen = range(prompt + masking_step)
    for plan in run.plans[1 : 1 + masking_step]:
        assert is_dense(plan) and plan.observe
    for plan in run.plans[1 + masking_step :]:
        assert not plan.observe and ids_of(plan) == best(run.stream, seen, KEEP)
        assert plan.masks[0] is run.plans[-1].masks[0]
    (remask,) = run.announced
    assert (remask.cause, remask.step, remask.overlap) == ("first", masking_step, None)
    assert (remask.evidence_tokens, remask.kept) == (prompt + masking_step, (KEEP,) * LAYERS)


@pytest.mark.parametrize(
    ("prompt", "masking_step", "wanted", "dense"),
    [(10, 0, 16, 6), (16, 0, 16, 0), (40, 0, 16, 0), (10, 8, 16, 8), (10, 3, 16, 6), (1, 0, 4, 3)],
)
def test_min_evidence(prompt: int, masking_step: int, wanted: int, dense: int) -> None:
    run = Driver(config(masking_step=masking_step, min_evidence=wanted))
    run.prefill(prompt)
    assert run.steps(12) == ["observe"] * dense + ["pruned"] * (12 - dense)
    assert ids_of(run.plans[-1]) == best(run.stream, range(prompt + dense), KEEP)


def test_scores_without_activations_need_no_evidence() -> None:
    run = Driver(config(score="weight", min_evidence=50, masking_step=2))
    run.prefill(3)
    assert run.steps(5) == ["observe", "observe", "pruned", "pruned", "pruned"]
    assert not any(plan.observe for plan in run.plans)
    rule = SCORES.get("weight")
    assert ids_of(run.plans[-1]) == [top(rule(torch.zeros(WIDTH), one), KEEP) for one in run.layers]


def test_a_sequence_that_starts_with_a_decode_step_observes_first() -> None:
    """No prompt was seen (an empty cache was filled elsewhere): one dense token at least."""
    run = Driver(config())
    run.cached = 30
    assert run.steps(3) == ["observe", "pruned", "pruned"]
    assert ids_of(run.plans[-1]) == best(run.stream, [30], KEEP)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.0}, {"sparsity": None, "budget": {"table": "all:1"}}]
)
def test_nothing_to_remove_is_dense_to_the_end(settings: dict[str, Any]) -> None:
    run = Driver(config(drift="paper", masking_step=2, **settings))
    run.prefill(8)
    assert run.steps(60) == ["released"] * 60
    assert all(is_dense(plan) and not plan.observe and not plan.signal for plan in run.plans)
    assert run.announced == [] and run.tokens_until_change() is None


def test_features_are_asked_for_by_rules_that_need_them() -> None:
    for rule, wanted in (("never", False), ("interval 4", False), ("paper", True)):
        run = Driver(config(drift=rule))
        run.prefill(8)
        run.steps(3)
        assert [plan.signal for plan in run.plans] == [wanted] * 4


# release


@pytest.mark.parametrize("release", [3, 7])
def test_release_is_final(release: int) -> None:
    run = Driver(config(masking_step=2, release_step=release, drift="interval 1"))
    run.prefill(6)
    phases = run.steps(12)
    assert phases[release:] == ["released"] * (12 - release)
    assert "released" not in phases[:release] and "pruned" in phases[:release]
    assert all(is_dense(plan) and not plan.observe for plan in run.plans[1 + release :])
    made = len(run.announced)
    assert is_dense(run.prefill(5)) and run.steps(10) == ["released"] * 10
    assert len(run.announced) == made and run.tokens_until_change() is None


@pytest.mark.parametrize("masking_step", [0, 6])
def test_a_roll_back_to_before_the_release_takes_it_back(masking_step: int) -> None:
    """Another continuation of the same prompt is pruned up to there too, by the masks it finds."""
    run = Driver(config(release_step=7, drift="never", masking_step=masking_step))
    run.prefill(6)
    first = ["observe"] * masking_step + ["pruned"] * (7 - masking_step) + ["released"] * 2
    assert run.steps(9) == first
    run.roll_back(9)
    assert run.steps(9) == ["pruned"] * 7 + ["released"] * 2 and len(run.announced) == 1
    waiting = Driver(config(release_step=3, min_evidence=20))
    waiting.prefill(6)
    for _ in range(2):
        assert waiting.steps(5) == ["observe"] * 3 + ["released"] * 2
        waiting.roll_back(5)


def test_a_trigger_just_before_the_release_does_not_outlive_it() -> None:
    run = Driver(config(release_step=6, drift="interval 4", remask={"observe_tokens": 5}))
    run.prefill(6)
    assert run.steps(20) == ["pruned"] * 4 + ["observe"] * 2 + ["released"] * 14
    assert len(run.announced) == 1


# masks that were given


def test_given_masks_hold_from_the_first_decode_step_to_the_end() -> None:
    given = (LayerMask(torch.arange(1), WIDTH), None, LayerMask(torch.arange(5), WIDTH))
    for sparsity in (0.5, 0.0):
        made = config(drift="interval 1", masking_step=3, min_evidence=99, sparsity=sparsity)
        run = Driver(made, given=given)
        assert is_dense(run.prefill(5)) and run.steps(20) == ["pruned"] * 20
        assert ids_of(run.plans[-1]) == [[0], None, [0, 1, 2, 3, 4]]
        assert is_dense(run.prefill(3)) and run.steps(3) == ["pruned"] * 3
        assert not any(plan.observe or plan.signal for plan in run.plans)
        (remask,) = run.announced
        assert (remask.cause, remask.kept) == ("given", (1, WIDTH, 5))
        assert (run.report().decoded_tokens, run.report().dense_token_share) == (23, 0)


# accounting


def test_tokens_are_counted_by_what_they_ran_under() -> None:
    run = Driver(
        config(masking_step=2, drift="interval 4", remask={"observe_tokens": 3}, release_step=12)
    )
    run.prefill(8)
    phases = ["observe"] * 2 + ["pruned"] * 4 + ["observe"] * 3 + ["pruned"] * 3 + ["released"] * 3
    assert run.steps(15) == phases
    report = run.report()
    assert (report.prompt_tokens, report.decoded_tokens) == (8, 15)
    assert report.dense_token_share == pytest.approx(8 / 15)
    assert report.achieved_sparsity == pytest.approx(0.5 * 7 / 15)
    assert report.sparsity_while_pruned == 0.5


@pytest.mark.parametrize(
    ("steps", "back", "decoded", "dense"),
    [
        (10, 7, 4, 0),  # 3 pruned, 2 observed and 2 pruned tokens go
        (10, 4, 7, 1),
        (3, 5, 1, 0),  # into the prompt, as scoring several continuations does
    ],
)
def test_rolled_back_tokens_leave_the_accounting(
    steps: int, back: int, decoded: int, dense: int
) -> None:
    run = Driver(config(drift="interval 5", remask={"observe_tokens": 2}))
    run.prefill(8)
    run.steps(steps)
    run.roll_back(back)
    run.decode()
    report = run.report()
    assert report.decoded_tokens == decoded and report.prompt_tokens == 8
    assert report.dense_token_share == pytest.approx(dense / decoded)


def test_a_roll_back_while_observing_asks_for_the_tokens_again() -> None:
    run = Driver(config(masking_step=4))
    run.prefill(8)
    assert run.steps(3) == ["observe"] * 3
    run.roll_back(2)
    assert run.steps(5) == ["observe"] * 3 + ["pruned"] * 2
    assert run.announced[0].step == 4


def test_a_roll_back_beyond_the_forward_in_hand() -> None:
    run = Driver(config(drift="interval 10"))
    run.prefill(8)
    run.steps(6)
    run.decode(3)
    run.roll_back(5)  # none of the three stayed, and two before them are gone
    run.decode()
    assert run.report().decoded_tokens == 5
    assert run.steps(6) == ["pruned"] * 5 + ["observe"]


def test_a_sequence_that_is_over_holds_no_evidence() -> None:
    run = Driver(config(compensation=True, drift="paper"))
    for _ in range(3):
        run.new_text()
        run.prefill(60)
        run.steps(3)
    first, second, third = run.states
    mask = 2 * KEEP * 8 // 2 + 4 * 6  # ids and bias of one layer
    assert (first.nbytes(), second.nbytes()) == (0, LAYERS * mask)
    assert third.nbytes() > LAYERS * (mask + 3 * 4 * WIDTH)
    sequences = run.report().sequences
    assert [one.remasks[0].kept for one in sequences] == [(KEEP,) * LAYERS] * 3
    assert [(one.prompt_tokens, one.decoded_tokens) for one in sequences] == [(60, 3)] * 3


def test_a_forward_that_raised_leaves_no_trace_in_the_counters() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(2)
    run.interrupted()
    run.steps(2)
    assert run.report().decoded_tokens == 4


@pytest.mark.parametrize("early", [0, 4])
def test_inference_mode_may_come_and_go(early: int) -> None:
    """Evidence that was made under inference mode goes on outside it, and the other way round."""
    made = config(
        budget="depth",
        compensation=True,
        masking_step=2,
        drift="interval 3",
        remask={"evidence": "decay", "observe_tokens": 2},
    )
    plain, mixed = Driver(made), Driver(made)
    plain.prefill(9)
    plain.steps(10)
    with torch.inference_mode():
        mixed.stream = Stream(mixed.layers)
        mixed.prefill(9)
        mixed.steps(early)
    mixed.steps(3)
    with torch.inference_mode():
        mixed.steps(7 - early)
    assert [ids_of(plan) for plan in mixed.plans] == [ids_of(plan) for plan in plain.plans]


# re-masks


def test_a_remask_goes_through_observe() -> None:
    run = Driver(config(drift="interval 5", remask={"observe_tokens": 3}))
    run.prefill(8)
    assert run.steps(21) == ["pruned"] * 5 + (["observe"] * 3 + ["pruned"] * 5) * 2
    first, second, third = run.announced
    assert [(r.cause, r.step) for r in run.announced] == [
        ("first", 0),
        ("interval", 8),
        ("interval", 16),
    ]
    # fresh: the three dense tokens alone; until then the old masks stay as they are
    old, new = best(run.stream, range(8), KEEP), best(run.stream, range(13, 16), KEEP)
    assert ids_of(run.plans[5]) == old and run.plans[5].masks[0] is run.plans[1].masks[0]
    assert is_dense(run.plans[6])
    assert ids_of(run.plans[9]) == new
    assert ids_of(run.plans[17]) == best(run.stream, range(21, 24), KEEP)
    same = sum(len(set(a) & set(b)) for a, b in zip(old, new, strict=True))
    assert first.overlap is None and second.overlap == pytest.approx(same / (KEEP * LAYERS))
    assert second.evidence_tokens == third.evidence_tokens == 3


@pytest.mark.parametrize(("masking_step", "dense"), [(0, 1), (1, 1), (4, 4)])
def test_observe_tokens_follow_the_masking_step(masking_step: int, dense: int) -> None:
    run = Driver(config(drift="interval 3", masking_step=masking_step))
    run.prefill(8)
    phases = run.steps(masking_step + 3 + dense + 1)[masking_step:]
    assert phases == ["pruned"] * 3 + ["observe"] * dense + ["pruned"]


@pytest.mark.parametrize("seen", [40, 600])
def test_decayed_evidence(seen: int) -> None:
    """Old sums times g min(1, 256 / n), the new tokens on top; then the same again."""
    layers = make_layers()
    stream = Stream(layers, length=700)
    remask = {"evidence": "decay", "decay": 0.3, "observe_tokens": 2}
    run = Driver(config(drift="interval 4", remask=remask), layers=layers, stream=stream)
    run.prefill(seen)
    run.steps(13)
    factor = 0.3 * min(1.0, 256 / seen)
    for layer in range(LAYERS):
        first = energy_of(stream, layer, range(seen))
        second = factor * first + energy_of(stream, layer, range(seen + 4, seen + 6))
        third = 0.3 * second + energy_of(stream, layer, range(seen + 10, seen + 12))
        for plan, energy in ((4, first), (7, second), (13, third)):
            assert ids_of(run.plans[plan])[layer] == top(energy, KEEP)
    two = seen * factor + 2
    evidence = [remask.evidence_tokens for remask in run.announced]
    assert evidence == pytest.approx([seen, two, 0.3 * two + 2])


@pytest.mark.parametrize("refresh", ["first", "every"])
def test_counts_are_kept_or_made_anew(refresh: str) -> None:
    budget = {"name": "energy", "refresh": refresh}
    run = Driver(config(budget=budget, drift="interval 3", remask={"observe_tokens": 2}))
    run.prefill(8)
    run.steps(14)

    def energy(positions: range) -> tuple[int, ...]:
        scores = [energy_of(run.stream, layer, positions).sqrt() for layer in range(LAYERS)]
        views = [LayerView(WIDTH, 0.0, score.double()) for score in scores]
        return tuple(BUDGETS.get("energy")(views, KEEP * LAYERS))

    counts = [energy(range(8)), energy(range(11, 13)), energy(range(16, 18))]
    assert counts[1] != counts[0]
    wanted = counts if refresh == "every" else counts[:1] * 3
    assert [remask.kept for remask in run.announced] == wanted
    for plan, kept in zip((run.plans[1], run.plans[6], run.plans[11]), wanted, strict=True):
        assert tuple(len(ids or ()) for ids in ids_of(plan)) == kept


def test_strategy_auto_fixes_its_counts_too() -> None:
    score = {"name": "magnitude", "strategy": "auto"}
    run = Driver(config(sparsity=None, score=score, drift="interval 3"))
    run.prefill(8)
    run.steps(12)
    scores = [energy_of(run.stream, layer, range(8)).sqrt() for layer in range(LAYERS)]
    counts = tuple(int((score >= score.mean()).sum()) for score in scores)
    assert [remask.kept for remask in run.announced] == [counts] * 3


# a second prompt


def test_a_second_prompt_adds_to_the_evidence() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(5)
    second = run.prefill(6)
    assert is_dense(second) and second.observe
    run.steps(2)
    assert ids_of(run.plans[-1]) == best(run.stream, [*range(8), *range(13, 19)], KEEP)
    assert [(r.cause, r.step, r.evidence_tokens) for r in run.announced] == [
        ("first", 0, 8),
        ("prompt", 5, 14),
    ]
    (sequence,) = run.report().sequences
    assert (sequence.prompt_tokens, sequence.decoded_tokens) == (14, 7)


def test_a_second_prompt_waits_for_no_masking_step() -> None:
    run = Driver(config(masking_step=3, min_evidence=20))
    run.prefill(20)
    assert run.steps(5) == ["observe"] * 3 + ["pruned"] * 2
    run.prefill(2)
    assert run.steps(3) == ["pruned"] * 3
    assert ids_of(run.plans[-1]) == best(run.stream, [*range(23), 25, 26], KEEP)


def test_tokens_observed_after_a_second_prompt_run_dense() -> None:
    """Aged evidence (0.1 x 20) and a short prompt are too little: three tokens are wanted first."""
    run = Driver(config(min_evidence=8, remask={"evidence": "decay"}))
    run.prefill(20)
    assert run.steps(2) == ["pruned"] * 2
    run.prefill(3)
    assert run.steps(4) == ["observe"] * 3 + ["pruned"]
    assert all(is_dense(plan) and plan.observe for plan in run.plans[-4:-1])
    assert [(r.cause, r.step) for r in run.announced] == [("first", 0), ("prompt", 5)]


def test_a_chunked_prompt_is_one_prompt() -> None:
    """The second chunk has one token; it is still no decode step."""
    whole, parts = Driver(config(masking_step=1)), Driver(config(masking_step=1))
    whole.prefill(9)
    for size in (7, 1, 1):
        parts.prefill(size)
    assert whole.steps(3) == parts.steps(3) == ["observe", "pruned", "pruned"]
    assert ids_of(whole.plans[-1]) == ids_of(parts.plans[-1])
    assert parts.announced == whole.announced


def test_a_prompt_in_the_middle_of_observing_keeps_the_cause() -> None:
    run = Driver(config(drift="interval 2", remask={"observe_tokens": 4}))
    run.prefill(8)
    assert run.steps(4) == ["pruned", "pruned", "observe", "observe"]
    run.prefill(5)
    assert run.steps(2) == ["pruned", "pruned"]
    assert [(r.cause, r.step) for r in run.announced] == [("first", 0), ("interval", 4)]
    # fresh evidence: two dense tokens and the second prompt
    assert ids_of(run.plans[-1]) == best(run.stream, range(10, 17), KEEP)


# several sequences


def test_sequences_share_nothing() -> None:
    """A second text in the same run is treated as the first text of a run of its own."""
    made = config(masking_step=1, drift="interval 4", remask={"evidence": "decay"})
    both, alone = Driver(made), Driver(made)
    both.prefill(20)
    both.steps(9)
    both.new_text()
    for run in (both, alone):
        run.prefill(6)
        run.steps(9)
    assert [ids_of(plan) for plan in both.plans[10:]] == [ids_of(plan) for plan in alone.plans]
    first, second = both.report().sequences
    assert (first.sequence, second.sequence, first.prompt_tokens) == (0, 1, 20)
    assert first.decoded_tokens == second.decoded_tokens == 9
    assert both.report().remasks == 2 * alone.report().remasks == 2
    assert [(r.sequence, r.step) for r in both.announced] == [(0, 1), (0, 6), (1, 1), (1, 6)]
    assert both.announced == [r for one in both.report().sequences for r in one.remasks]


def test_a_longer_cache_than_was_seen_is_another_sequence() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(2)
    run.cached = 40
    run.prefill(4)
    assert len(run.states) == 2


def test_candidates_that_ride_along_with_a_prompt_are_dense_decoded_tokens() -> None:
    """Assisted decoding: the first forward holds the prompt and guessed tokens."""
    run = Driver(config())
    assert run.prefill(12, observable=9).dense
    assert (run.report().prompt_tokens, run.report().decoded_tokens) == (9, 3)
    run.steps(2)
    assert ids_of(run.plans[-1]) == best(run.stream, range(9), KEEP)
    assert run.report().dense_token_share == pytest.approx(3 / 5)


# batches: rows on models are tests/contracts/test_batches.py


@pytest.mark.parametrize("observed", [1, 20])
def test_padding_and_finished_rows_enter_no_statistic(observed: int) -> None:
    """Row 0 is padded on the left, and ends after two of the observed tokens."""
    run = Driver(config(masking_step=observed + 2), rows=2)
    valid = torch.ones(2, 7)
    valid[0, :4] = 0
    for u in run.stream.u:
        u[0, :4] = u[0, 9:] = 1e6
    run.prefill(7, valid=valid)
    assert run.report().prompt_tokens == 10
    run.steps(2, live=torch.tensor([True, True]))
    assert run.steps(observed + 3, live=torch.tensor([False, True]))[-1] == "pruned"
    for layer, ids in enumerate(ids_of(run.plans[-1])):
        energies = [
            energy_of(run.stream, layer, seen, row)
            for row, seen in ((0, range(4, 9)), (1, range(9 + observed)))
        ]
        assert ids == top(energies[0] + energies[1], KEEP)
    report, decoded = run.report(), 4 + observed + 3
    assert report.decoded_tokens == decoded
    assert report.dense_token_share == pytest.approx((4 + observed) / decoded)
    assert report.achieved_sparsity == pytest.approx(0.5 * 3 / decoded)
    assert report.sparsity_while_pruned == pytest.approx(0.5)


def test_rows_that_ended_make_no_masks() -> None:
    """An ended row is neither re-masked nor counted, however long the others go on."""
    both, one = torch.tensor([True, True]), torch.tensor([True, False])
    for settings, masks in (({"drift": "interval 3"}, [6, 1]), ({"masking_step": 4}, [1, 0])):
        run = Driver(config(batch="per_row", **settings), rows=2)
        run.prefill(6)
        run.steps(2, live=both)
        run.steps(20, live=one)
        assert [len(s.remasks) for s in run.report().sequences] == masks
        assert [s.decoded_tokens for s in run.report().sequences] == [22, 2]


def test_a_row_that_ended_comes_back_with_its_next_prompt() -> None:
    run = Driver(config(batch="per_row"), rows=2)
    run.prefill(6)
    run.steps(4, live=torch.tensor([True, False]))
    assert [len(s.remasks) for s in run.report().sequences] == [1, 0]
    run.prefill(5)
    run.steps(2)
    assert [len(s.remasks) for s in run.report().sequences] == [2, 1]
    assert ids_of(run.plans[-1], 1) == best(run.stream, [*range(6), *range(10, 15)], KEEP, 1)
