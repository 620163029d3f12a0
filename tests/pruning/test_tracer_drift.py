"""When the tracer notices drift, and what the detector is shown."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_llm.pruning.controller import PruningController as Tracer
from dart_llm.pruning.observations import LayerObservation as Seen
from dart_llm.pruning.sequence import Phase
from synthetic import (
    HIDDEN,
    KEEP,
    LAYERS,
    WIDTH,
    Driver,
    Stream,
    best,
    config,
    ids_of,
    make_layers,
)

# drift, end to end


def shifting(layers: Any, at: int, rows: int = 1, length: int = 400) -> Stream:
    """v keeps one direction (with noise) up to ``at``, then another."""
    stream = Stream(layers, rows, length)
    generator = torch.Generator().manual_seed(7)
    noise = 0.3 * torch.randn(rows, length, HIDDEN, generator=generator)
    first, second = torch.eye(HIDDEN)[0], torch.eye(HIDDEN)[1]
    stream.v = noise + torch.where(torch.arange(length)[:, None] < at, first, second)
    return stream


def test_a_topic_shift_is_noticed_after_three_windows() -> None:
    layers = make_layers()
    drift = {"rule": "paper"}
    run = Driver(
        config(drift=drift, remask={"observe_tokens": 50}),
        layers=layers,
        stream=shifting(layers, at=120),
    )
    run.prefill(80)
    phases = run.steps(150)
    # windows end at 90, 100, ...; the first three of the new topic at 130, 140, 150
    assert phases[:120] == ["pruned"] * 70 + ["observe"] * 50
    checks = run.tracer.checks
    assert [check.step for check in checks[:7]] == [10, 20, 30, 40, 50, 60, 70]
    assert [check.trigger for check in checks[:7]] == [False] * 6 + [True]
    assert [check.counter for check in checks[4:7]] == [1, 2, 3]
    assert {check.layer for check in checks} == {LAYERS - 1}
    assert {check.state for check in checks} == {"armed"}
    assert run.announced[1].cause == "drift"
    assert run.announced[1].step == 120
    # armed anew on the 50 observed tokens: window and counter start at 0
    assert [check.step for check in checks[7:]] == [130, 140, 150]
    assert [check.window for check in checks[7:]] == [1, 2, 3]
    assert checks[7].counter <= 1


def test_the_reference_is_what_was_observed() -> None:
    """mu, sigma and c from the prompt's tokens after the first four."""
    run = Driver(config(drift="paper"))
    run.prefill(64)
    run.steps(10)
    v = run.stream.v[0, 4:64]
    means = v.reshape(6, 10, HIDDEN).mean(1)
    left_out = torch.stack(
        [cosine_similarity(means[i], v.sum(0) - 10 * means[i], dim=0) for i in range(6)]
    )
    (check,) = run.tracer.checks
    assert check.threshold == pytest.approx(float(left_out.mean() - 0.5 * left_out.std()), abs=1e-5)
    window = run.stream.v[0, 64:74].mean(0)
    assert check.similarity == pytest.approx(
        float(cosine_similarity(window, v.mean(0), dim=0)), abs=1e-5
    )


@pytest.mark.parametrize("chunks", [(30,), (3, 27), (1, 1, 1, 1, 26)])
@pytest.mark.parametrize("masking_step", [0, 15])
def test_attention_sinks_enter_nothing(chunks: tuple[int, ...], masking_step: int) -> None:
    run = Driver(config(drift="published", masking_step=masking_step))
    run.stream.v[:, :4] = 1e6
    for size in chunks:
        run.prefill(size)
    run.steps(masking_step + 5)
    v = run.stream.v[0, 4 : 30 + masking_step]
    assert run.life.detector.total is not None
    assert run.life.detector.total[0].tolist() == pytest.approx(v.sum(0).tolist(), rel=1e-4)
    assert float(run.life.detector.tokens) == 26 + masking_step


@pytest.mark.parametrize("masking_step", [0, 1, 2])
def test_sinks_among_the_decoded_tokens_enter_nothing(masking_step: int) -> None:
    """A prompt of one token: positions 1 to 3 are decoded, and still sinks."""
    run = Driver(config(drift="published", masking_step=masking_step))
    run.stream.v[:, :4] = 1e6
    run.prefill(1)
    run.steps(3 + 20)
    assert run.life.detector.armed
    assert [check.step for check in run.tracer.checks] == [8, 13, 18, 23]
    assert {check.state for check in run.tracer.checks} == {"arming"}
    v = run.stream.v[0, 4:24]
    assert run.life.detector.total is not None
    assert run.life.detector.total[0].tolist() == pytest.approx(v.sum(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("chunks", [(40,), (6, 34), (16, 16, 8)])
def test_sinks_are_counted_from_the_first_real_token(chunks: tuple[int, ...]) -> None:
    """Left padding of 10: the sinks of that row lie at positions 10 to 13."""
    run = Driver(config(drift="published"), rows=2)
    run.stream.v[0, :14] = 1e6
    run.stream.v[1, :4] = 1e6
    valid = torch.ones(2, 40)
    valid[0, :10] = 0
    start = 0
    for size in chunks:
        run.prefill(size, valid=valid[:, start : start + size])
        start += size
    detector = run.life.detector
    assert detector.tokens is not None
    assert detector.tokens.tolist() == [26, 36]
    for row, first in ((0, 14), (1, 4)):
        assert detector.total is not None
        want = run.stream.v[row, first:40].sum(0).tolist()
        assert detector.total[row].tolist() == pytest.approx(want, rel=1e-4)


def test_a_short_prompt_arms_late_and_says_so() -> None:
    run = Driver(config(drift="paper"))
    run.prefill(6)
    run.steps(60)
    checks = run.tracer.checks
    assert [check.state for check in checks] == ["arming"] * 4 + ["armed"] * 2
    assert [check.threshold is None for check in checks] == [True] * 4 + [False] * 2
    assert not any(check.trigger for check in checks[:4])


def test_triggers_that_the_guards_put_off_are_said_to_be_held() -> None:
    layers = make_layers()
    drift = {"rule": "published", "max_dense_share": 0.1}
    run = Driver(
        config(drift=drift, remask={"observe_tokens": 5}),
        layers=layers,
        stream=shifting(layers, at=80),
    )
    run.prefill(80)
    phases = run.steps(60)
    assert phases.index("observe") == 45  # (0 + 5) <= 0.1 (45 + 5)
    early = [check for check in run.tracer.checks if check.step < 45]
    assert {check.state for check in early} == {"held"}
    assert [check.trigger for check in early] == [False] * 8
    assert run.tracer.checks[8].trigger
    assert run.tracer.checks[8].state == "armed"


def test_two_triggers_in_a_row_keep_their_distance() -> None:
    layers = make_layers()
    stream = shifting(layers, at=80)
    generator = torch.Generator().manual_seed(1)
    stream.v[:, 80:] = torch.randn(1, 320, HIDDEN, generator=generator)
    drift = {"rule": "published", "min_distance": 64}
    run = Driver(config(drift=drift, masking_step=0), layers=layers, stream=stream)
    run.prefill(80)
    phases = run.steps(300)
    starts = [step for step, phase in enumerate(phases) if phase == "observe"]
    assert len(starts) >= 3
    assert all(b - a >= 64 for a, b in itertools.pairwise(starts))


def test_rows_of_a_shared_mask_vote() -> None:
    """Three rows: one that drifts is outvoted, two are not; ended rows have no vote and no line."""
    layers = make_layers()
    for drifting, live, noticed in (
        ([0], None, False),
        ([0, 1], None, True),
        ([0], torch.tensor([True, True, False]), False),
        ([0], torch.tensor([True, False, False]), True),
    ):
        stream = shifting(layers, at=400, rows=3)
        other = shifting(layers, at=60, rows=3)
        for row in drifting:
            stream.v[row] = other.v[row]
        run = Driver(config(drift="published"), rows=3, layers=layers, stream=stream)
        run.prefill(60)
        run.steps(5, live=live)
        assert [check.trigger for check in run.tracer.checks].count(True) == (
            len(run.tracer.checks) if noticed else 0
        )
        rows = [0, 1, 2] if live is None else torch.nonzero(live).flatten().tolist()
        assert [check.row for check in run.tracer.checks] == rows
        assert (run.life.phase is Phase.OBSERVE) == noticed


def test_rows_with_masks_of_their_own_drift_alone() -> None:
    layers = make_layers()
    stream = shifting(layers, at=400, rows=2)
    stream.v[1] = shifting(layers, at=60, rows=2).v[1]
    run = Driver(
        config(drift="published", batch="per_row", remask={"observe_tokens": 3}),
        rows=2,
        layers=layers,
        stream=stream,
    )
    run.prefill(60)
    run.steps(5)
    plan = run.decode()
    first, second = run.tracer.lives
    assert (first.phase, second.phase) == (Phase.PRUNED, Phase.OBSERVE)
    assert plan.masks[0] is not None
    assert plan.masks[1] is None
    run.steps(3)
    assert ids_of(run.plans[-1], 0) == best(run.stream, range(60), KEEP, 0)
    assert ids_of(run.plans[-1], 1) == best(run.stream, range(65, 68), KEEP, 1)
    assert [check.row for check in run.tracer.checks] == [0, 1]
    assert [check.trigger for check in run.tracer.checks] == [False, True]


def test_a_finished_row_does_not_disarm_the_others() -> None:
    """Row 1 ends before the re-mask; the reference of row 0 is armed all the same."""
    run = Driver(
        config(drift={"rule": "published", "min_distance": 10}, remask={"observe_tokens": 20}),
        rows=2,
    )
    run.prefill(60)
    run.steps(4)
    run.life.trigger("drift")
    run.steps(21, live=torch.tensor([True, False]))
    assert run.life.phase is Phase.PRUNED
    assert run.life.detector.armed


def test_no_features_are_asked_for_without_a_rule_that_needs_them() -> None:
    for rule, wanted in (("never", False), ("interval 4", False), ("paper", True)):
        run = Driver(config(drift=rule))
        run.prefill(8)
        run.steps(3)
        assert [plan.signal for plan in run.plans] == [wanted] * 4


def test_a_lone_tracer_has_no_bound_and_no_lives() -> None:
    tracer = Tracer(config(), make_layers())
    tracer.after_forward()
    tracer.observe(0, Seen(torch.zeros(1, 1, WIDTH)))
    tracer.observe_signal(torch.zeros(1, 1, HIDDEN))
    assert tracer.tokens_until_change() is None
    assert tracer.all_lives() == []


def test_prompt_statistics_of_a_stream_budget_by_hand() -> None:
    """x and r of the same tokens as u and z reach the sensitivity, padding left out."""
    run = Driver(config(budget="blend depth depth-residual"), rows=2)
    valid = torch.ones(2, 6)
    valid[0, :2] = 0
    run.prefill(6, valid=valid)

    def real(name: str, layer: int) -> Tensor:
        return getattr(run.stream, name)[layer][:, :6][valid.bool()]

    for layer in range(LAYERS):
        x, z, r = (real(name, layer) for name in "xzr")
        sums = run.life.evidence[layer].sums
        cosine = cosine_similarity(x, z, dim=-1).mean()
        assert float(sums["cosine"].mean) == pytest.approx(float(cosine), abs=1e-5)
        change = ((z - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        assert float(sums["change"].mean) == pytest.approx(float(change), rel=1e-5)
        cosine = cosine_similarity(x, x + r, dim=-1).mean()
        assert float(sums["cosine-residual"].mean) == pytest.approx(float(cosine), abs=1e-5)
        change = (r.norm(dim=-1) / x.norm(dim=-1)).mean()
        assert float(sums["change-residual"].mean) == pytest.approx(float(change), rel=1e-5)
