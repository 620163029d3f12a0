"""Re-masks: what they are made from, the guards against too many, and second prompts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.pruning.budgets import LayerView
from dart_llm.pruning.registry import BUDGETS
from dart_llm.pruning.sequence import Phase
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

# re-masks


def test_a_remask_goes_through_observe() -> None:
    run = Driver(config(drift="interval 5", remask={"observe_tokens": 3}))
    run.prefill(8)
    assert run.steps(21) == ["pruned"] * 5 + (["observe"] * 3 + ["pruned"] * 5) * 2
    first, second, third = run.announced
    assert [r.cause for r in run.announced] == ["first", "interval", "interval"]
    assert [r.step for r in run.announced] == [0, 8, 16]
    assert first.overlap is None
    # fresh: the three dense tokens alone
    old, new = best(run.stream, range(8), KEEP), best(run.stream, range(13, 16), KEEP)
    assert ids_of(run.plans[5]) == old
    assert is_dense(run.plans[6])
    assert ids_of(run.plans[9]) == new
    assert ids_of(run.plans[17]) == best(run.stream, range(21, 24), KEEP)
    same = sum(len(set(a) & set(b)) for a, b in zip(old, new, strict=True))
    assert second.overlap == pytest.approx(same / (KEEP * LAYERS))
    assert second.evidence_tokens == third.evidence_tokens == 3


@pytest.mark.parametrize(("masking_step", "dense"), [(0, 1), (1, 1), (4, 4)])
def test_observe_tokens_follow_the_masking_step(masking_step: int, dense: int) -> None:
    run = Driver(config(drift="interval 3", masking_step=masking_step))
    run.prefill(8)
    phases = run.steps(masking_step + 3 + dense + 1)[masking_step:]
    assert phases == ["pruned"] * 3 + ["observe"] * dense + ["pruned"]


def test_old_masks_hold_until_the_forward_after_the_trigger() -> None:
    run = Driver(config(drift="interval 4"))
    run.prefill(8)
    run.steps(4)
    old = run.plans[-1].masks[0]
    assert old is not None
    assert run.life.phase is Phase.OBSERVE  # decided between two forwards
    assert run.plans[-1].masks[0] is old  # the plan in hand is not touched
    assert is_dense(run.decode())


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
        assert ids_of(run.plans[4])[layer] == top(first, KEEP)
        assert ids_of(run.plans[7])[layer] == top(second, KEEP)
        assert ids_of(run.plans[13])[layer] == top(third, KEEP)
    evidence = [remask.evidence_tokens for remask in run.announced]
    two = seen * factor + 2
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

    first, second, third = (remask.kept for remask in run.announced)
    assert first == energy(range(8))
    if refresh == "first":
        assert second == third == first
    else:
        assert second == energy(range(11, 13)) != first
        assert third == energy(range(16, 18))
    for remask, plan in zip(
        run.announced, (run.plans[1], run.plans[6], run.plans[11]), strict=True
    ):
        masks = plan.masks[0]
        assert masks is not None
        assert tuple(mask.kept for mask in masks if mask is not None) == remask.kept


def test_strategy_auto_fixes_its_counts_too() -> None:
    score = {"name": "magnitude", "strategy": "auto"}
    run = Driver(config(sparsity=None, score=score, drift="interval 3"))
    run.prefill(8)
    run.steps(12)
    scores = [energy_of(run.stream, layer, range(8)).sqrt() for layer in range(LAYERS)]
    counts = tuple(int((score >= score.mean()).sum()) for score in scores)
    assert [remask.kept for remask in run.announced] == [counts] * 3


def test_compensation_follows_the_evidence() -> None:
    run = Driver(config(compensation=True))
    run.prefill(9)
    run.decode()
    masks = run.plans[-1].masks[0]
    assert masks is not None
    for layer, mask in zip(run.layers, masks, strict=True):
        assert mask is not None
        assert mask.bias is not None
        mean = run.stream.u[layer.index][0, :9].mean(0)
        gone = mask.removed()
        want = layer.down[:, gone] @ mean[gone]
        assert mask.bias.tolist() == pytest.approx(want.tolist(), rel=1e-4, abs=1e-5)


# guards


def test_min_distance() -> None:
    drift = {"rule": "interval 2", "min_distance": 12}
    run = Driver(config(drift=drift, remask={"observe_tokens": 1}))
    run.prefill(4)
    phases = run.steps(60)
    triggers = [step for step, phase in enumerate(phases) if phase == "observe"]
    assert triggers == [2, 14, 26, 38, 50]


def test_max_dense_share() -> None:
    """The first 3 dense tokens fit a tenth at 30 decoded tokens, the next at 60, ..."""
    drift = {"rule": "interval 1", "max_dense_share": 0.1}
    run = Driver(config(drift=drift, remask={"observe_tokens": 3}))
    run.prefill(4)
    phases = run.steps(100)
    assert [step for step, phase in enumerate(phases) if phase == "observe"] == [
        *range(27, 30),
        *range(57, 60),
        *range(87, 90),
    ]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 40),
    st.none() | st.floats(0.02, 1),
    st.integers(0, 5),
)
def test_guards_hold_at_every_step(
    every: int, observe: int, distance: int, share: float | None, masking_step: int
) -> None:
    """Dense tokens before the first mask are not charged; those of re-masks never pass the cap."""
    drift = {"rule": f"interval {every}", "min_distance": distance, "max_dense_share": share}
    settings = config(drift=drift, remask={"observe_tokens": observe}, masking_step=masking_step)
    layers = make_layers(1, width=4, hidden=2)
    run = Driver(settings, layers=layers, stream=Stream(layers))
    run.prefill(3)
    phases = run.steps(150)
    assert phases[:masking_step] == ["observe"] * masking_step
    spent, starts = 0, []
    for step, phase in enumerate(phases):
        if step >= masking_step and phase == "observe":
            spent += 1
            if phases[step - 1] == "pruned":
                starts.append(step)
        if share is not None:
            assert spent <= share * (step + 1) + 1e-9
    assert all(b - a >= distance for a, b in itertools.pairwise(starts))
    assert all(phases[start : start + observe] == ["observe"] * observe for start in starts[:-1])
    if share is None and not distance:
        cycle = ["pruned"] * every + ["observe"] * observe
        assert phases[masking_step:] == (cycle * 150)[: 150 - masking_step]


# a second prompt


def test_a_second_prompt_adds_to_the_evidence() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(5)
    before = run.plans[-1].masks[0]
    second = run.prefill(6)
    assert is_dense(second)
    assert second.observe
    run.steps(2)
    seen = [*range(8), *range(13, 19)]
    assert ids_of(run.plans[-1]) == best(run.stream, seen, KEEP)
    assert run.plans[-1].masks[0] is not before
    assert [(r.cause, r.step, r.evidence_tokens) for r in run.announced] == [
        ("first", 0, 8),
        ("prompt", 5, 14),
    ]
    assert run.life.prompt_tokens == 14
    assert run.life.decoded == 7
    assert run.tracer.sequences == 1


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
    assert run.announced[1].overlap is not None


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
