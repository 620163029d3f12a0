"""The life of a sequence: when masks are made, from what, how long they hold, what they cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.sequence import MaskSpan as Period
from dart_llm.pruning.sequence import Phase
from dart_llm.pruning.sequence import SequenceState as Life
from synthetic import (
    KEEP,
    LAYERS,
    WIDTH,
    Driver,
    Stream,
    best,
    config,
    ids_of,
    is_dense,
    make_layers,
    top,
)

# the first mask


@pytest.mark.parametrize("masking_step", [0, 1, 3])
@pytest.mark.parametrize("prompt", [1, 2, 12])
def test_prompt_then_observe_then_pruned(masking_step: int, prompt: int) -> None:
    run = Driver(config(masking_step=masking_step))
    assert is_dense(run.prefill(prompt))
    assert run.plans[0].observe
    assert run.tracer.last_phase is Phase.PREFILL
    phases = run.steps(8)
    assert phases == ["observe"] * masking_step + ["pruned"] * (8 - masking_step)
    for plan in run.plans[1 : 1 + masking_step]:
        assert is_dense(plan)
        assert plan.observe
    seen = range(prompt + masking_step)
    for plan in run.plans[1 + masking_step :]:
        assert not plan.observe
        assert ids_of(plan) == best(run.stream, seen, KEEP)
        assert plan.masks[0] is run.plans[-1].masks[0]
    (remask,) = run.announced
    assert (remask.cause, remask.step, remask.overlap) == ("first", masking_step, None)
    assert remask.evidence_tokens == prompt + masking_step
    assert remask.kept == (KEEP,) * LAYERS
    assert run.life.remasks == [remask]


@pytest.mark.parametrize(
    ("prompt", "masking_step", "wanted", "dense"),
    [(10, 0, 16, 6), (16, 0, 16, 0), (40, 0, 16, 0), (10, 8, 16, 8), (10, 3, 16, 6), (1, 0, 4, 3)],
)
def test_min_evidence(prompt: int, masking_step: int, wanted: int, dense: int) -> None:
    run = Driver(config(masking_step=masking_step, min_evidence=wanted))
    run.prefill(prompt)
    assert run.steps(12) == ["observe"] * dense + ["pruned"] * (12 - dense)
    assert ids_of(run.plans[-1]) == best(run.stream, range(prompt + dense), KEEP)


def test_a_mask_never_knows_the_token_it_is_applied_to() -> None:
    """Other activations from the first pruned token on leave the mask as it is."""
    masks = []
    for seed in (1, 2):
        layers = make_layers()
        stream, other = Stream(layers), Stream(layers, seed=seed)
        for u, changed in zip(stream.u, other.u, strict=True):
            u[:, 14:] = changed[:, 14:]
        run = Driver(config(masking_step=2), stream=stream)
        run.prefill(12)
        run.steps(4)
        masks.append(ids_of(run.plans[3]))
    assert masks[0] == masks[1]


def test_all_layers_get_their_masks_in_the_same_forward() -> None:
    run = Driver(config(masking_step=1, drift="interval 3", remask={"observe_tokens": 2}))
    run.prefill(5)
    run.steps(30)
    for plan in run.plans:
        masks = ids_of(plan)
        assert masks == [None] or all(one is not None for one in masks)


def test_scores_without_activations_need_no_evidence() -> None:
    run = Driver(config(score="weight", min_evidence=50, masking_step=2))
    assert not run.prefill(3).observe
    assert run.steps(5) == ["observe", "observe", "pruned", "pruned", "pruned"]
    assert not any(plan.observe for plan in run.plans)
    rule = SCORES.get("weight")
    want = [top(rule(torch.zeros(WIDTH), layer), KEEP) for layer in run.layers]
    assert ids_of(run.plans[-1]) == want


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
    assert not run.prefill(8).observe
    assert run.steps(60) == ["released"] * 60
    assert all(is_dense(plan) for plan in run.plans)
    assert not any(plan.observe or plan.signal for plan in run.plans)
    assert run.announced == []
    assert run.tracer.tokens_until_change() is None


# release


@pytest.mark.parametrize("release", [3, 4, 7])
def test_release_is_final(release: int) -> None:
    run = Driver(config(masking_step=2, release_step=release, drift="interval 1"))
    run.prefill(6)
    phases = run.steps(12)
    assert phases[release:] == ["released"] * (12 - release)
    assert "released" not in phases[:release]
    assert "pruned" in phases[:release]
    for plan in run.plans[1 + release :]:
        assert is_dense(plan)
        assert not plan.observe
    made = len(run.announced)
    assert is_dense(run.prefill(5))
    assert run.steps(10) == ["released"] * 10
    assert len(run.announced) == made
    assert run.tracer.tokens_until_change() is None


@pytest.mark.parametrize("masking_step", [0, 2, 6])
def test_a_roll_back_to_before_the_release_takes_it_back(masking_step: int) -> None:
    """Another continuation of the same prompt is pruned up to there too, by the masks it finds."""
    settings = {"release_step": 7, "drift": "never", "masking_step": masking_step}
    run = Driver(config(**settings))
    run.prefill(6)
    first = run.steps(9)
    run.roll_back(9)
    pruned = ["pruned"] * (7 - masking_step)
    assert first == ["observe"] * masking_step + pruned + ["released"] * 2
    assert run.steps(9) == ["pruned"] * 7 + ["released"] * 2
    assert len(run.announced) == 1


def test_a_roll_back_to_before_a_release_without_masks() -> None:
    run = Driver(config(release_step=3, min_evidence=20))
    run.prefill(6)
    assert run.steps(5) == ["observe"] * 3 + ["released"] * 2
    run.roll_back(5)
    assert run.steps(5) == ["observe"] * 3 + ["released"] * 2


def test_a_trigger_just_before_the_release_does_not_outlive_it() -> None:
    run = Driver(config(release_step=6, drift="interval 4", remask={"observe_tokens": 5}))
    run.prefill(6)
    assert run.steps(20) == ["pruned"] * 4 + ["observe"] * 2 + ["released"] * 14
    assert len(run.announced) == 1


def test_drift_after_the_release_is_not_looked_at() -> None:
    layers = make_layers()
    stream = Stream(layers, steady=True)
    stream.v[:, 70:] *= -1
    run = Driver(config(release_step=3, drift="published"), stream=stream, layers=layers)
    run.prefill(60)
    run.steps(100)
    assert run.tracer.checks == []
    assert [remask.cause for remask in run.announced] == ["first"]


# masks that were given


def given_masks(layers: int = LAYERS) -> tuple[LayerMask | None, ...]:
    masks: list[LayerMask | None] = [
        LayerMask(torch.arange(2 * layer + 1), WIDTH) for layer in range(layers)
    ]
    masks[1] = None
    return tuple(masks)


def test_given_masks_hold_from_the_first_decode_step_to_the_end() -> None:
    run = Driver(config(drift="interval 1", masking_step=3, min_evidence=99), given=given_masks())
    assert is_dense(run.prefill(5))
    assert run.steps(20) == ["pruned"] * 20
    assert ids_of(run.plans[-1]) == [[0], None, [0, 1, 2, 3, 4]]
    assert is_dense(run.prefill(3))
    assert run.steps(3) == ["pruned"] * 3
    assert not any(plan.observe or plan.signal for plan in run.plans)
    (remask,) = run.announced
    assert (remask.cause, remask.kept) == ("given", (1, WIDTH, 5))
    assert run.life.decoded == 23
    assert [(period.kept, period.tokens) for period in run.life.periods] == [((1, WIDTH, 5), 23.0)]


def test_given_masks_can_be_released() -> None:
    run = Driver(config(release_step=2), given=given_masks())
    run.prefill(5)
    assert run.steps(4) == ["pruned", "pruned", "released", "released"]


def test_given_masks_work_where_nothing_would_be_removed() -> None:
    run = Driver(config(sparsity=0.0), given=given_masks())
    run.prefill(5)
    assert run.steps(2) == ["pruned", "pruned"]


# accounting


def periods(life: Life) -> list[tuple[tuple[int, ...] | None, float, int, int]]:
    return [(p.kept, float(p.tokens), p.forwards, p.observed) for p in life.periods]


def test_periods() -> None:
    run = Driver(
        config(masking_step=2, drift="interval 4", remask={"observe_tokens": 3}, release_step=12)
    )
    run.prefill(8)
    run.steps(15)
    kept = (KEEP,) * LAYERS
    assert periods(run.life) == [
        (None, 2, 2, 2),
        (kept, 4, 4, 0),
        (None, 3, 3, 3),
        (kept, 3, 3, 0),
        (None, 3, 3, 0),
    ]
    assert run.life.decoded == 15
    assert run.life.spent == 3


def test_a_period_gives_back_rolled_back_tokens() -> None:
    period = Period(None, tokens=6.0, length=3)  # two rows of three tokens
    assert period.cut(1) == 0
    assert (period.tokens, period.length) == (4.0, 2)
    assert period.cut(5) == 3
    assert (period.tokens, period.length) == (0.0, 0)
    assert period.cut(1) == 1


def test_rolled_back_tokens_leave_the_accounting() -> None:
    """A roll-back of 7 tokens: 3 pruned, 2 dense and observed, 2 pruned ones before them."""
    run = Driver(config(drift="interval 5", remask={"observe_tokens": 2}))
    run.prefill(8)
    run.steps(10)
    run.roll_back(7)
    run.decode()
    kept = (KEEP,) * LAYERS
    assert [(p.kept, float(p.tokens)) for p in run.life.periods] == [
        (kept, 3),
        (None, 0),
        (kept, 1),
    ]
    assert run.life.decoded == 4
    assert sum(float(p.tokens) for p in run.life.periods) == 4


def test_a_roll_back_into_the_prompt_takes_back_decoded_tokens_alone() -> None:
    """Scoring several continuations of one context cuts the cache back below the first step."""
    run = Driver(config())
    run.prefill(8)
    run.steps(3)
    run.roll_back(5)
    run.decode()
    assert run.life.decoded == 1
    assert [float(p.tokens) for p in run.life.periods] == [1]


def test_a_roll_back_while_observing_asks_for_the_tokens_again() -> None:
    run = Driver(config(masking_step=4))
    run.prefill(8)
    assert run.steps(3) == ["observe"] * 3
    run.roll_back(2)
    assert run.steps(5) == ["observe"] * 3 + ["pruned"] * 2
    assert run.life.remasks[0].step == 4


def test_a_sequence_that_is_over_holds_no_evidence() -> None:
    run = Driver(config(compensation=True, drift="paper"))
    for _ in range(3):
        run.new_text()
        run.prefill(60)
        run.steps(3)
    first, second, third = run.tracer.all_lives()
    mask = 2 * KEEP * 8 // 2 + 4 * 6  # ids and bias of one layer
    assert first.nbytes() == 0
    assert second.nbytes() == LAYERS * mask
    assert third.nbytes() > LAYERS * (mask + 3 * 4 * WIDTH)
    assert [life.remasks[0].kept for life in (first, second, third)] == [(KEEP,) * LAYERS] * 3
    assert [life.decoded for life in (first, second, third)] == [3, 3, 3]
    assert math.isclose(first.prompt_tokens, 60)
