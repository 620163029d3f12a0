"""When a sequence notices drift, what its detector is shown, and the guards against too much."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from synthetic import HIDDEN, KEEP, LAYERS, Driver, Stream, best, config, ids_of, make_layers


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
    run = Driver(
        config(drift={"rule": "paper"}, remask={"observe_tokens": 50}),
        layers=layers,
        stream=shifting(layers, at=120),
    )
    run.prefill(80)
    phases = run.steps(150)
    # windows end at 90, 100, ...; the first three of the new topic at 130, 140, 150
    assert phases[:120] == ["pruned"] * 70 + ["observe"] * 50
    checks = run.checks
    assert [check.step for check in checks[:7]] == [10, 20, 30, 40, 50, 60, 70]
    assert [check.trigger for check in checks[:7]] == [False] * 6 + [True]
    assert [check.counter for check in checks[4:7]] == [1, 2, 3]
    assert {(check.layer, check.state) for check in checks} == {(LAYERS - 1, "armed")}
    assert (run.announced[1].cause, run.announced[1].step) == ("drift", 120)
    # armed anew on the 50 observed tokens: window and counter start at 0
    assert [(check.step, check.window) for check in checks[7:]] == [(130, 1), (140, 2), (150, 3)]
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
    (check,) = run.checks
    assert check.threshold == pytest.approx(float(left_out.mean() - 0.5 * left_out.std()), abs=1e-5)
    window = run.stream.v[0, 64:74].mean(0)
    wanted = float(cosine_similarity(window, v.mean(0), dim=0))
    assert check.similarity == pytest.approx(wanted, abs=1e-5)


def seen_by_detector(run: Driver, row: int = 0) -> Tensor:
    """The sum over the tokens that the reference was, or will be, made from."""
    total: Tensor = run.state.detector.total[row]
    return total


@pytest.mark.parametrize(
    ("chunks", "masking_step", "last"),
    [((30,), 0, 30), ((3, 27), 15, 45), ((1, 1, 1, 1, 26), 15, 45), ((1,), 1, 24), ((1,), 2, 24)],
)
def test_attention_sinks_enter_nothing(
    chunks: tuple[int, ...], masking_step: int, last: int
) -> None:
    """Also where they are decoded, after a prompt of one token, and the detector arms late."""
    run = Driver(config(drift="published", masking_step=masking_step))
    run.stream.v[:, :4] = 1e6
    for size in chunks:
        run.prefill(size)
    run.steps(23 if chunks == (1,) else masking_step + 5)
    wanted = run.stream.v[0, 4:last].sum(0).tolist()
    assert seen_by_detector(run).tolist() == pytest.approx(wanted, rel=1e-4)
    if chunks == (1,):
        assert [(c.step, c.state) for c in run.checks] == [(n, "arming") for n in (8, 13, 18, 23)]


@pytest.mark.parametrize("chunks", [(40,), (6, 34), (16, 16, 8)])
def test_sinks_are_counted_from_the_first_real_token(chunks: tuple[int, ...]) -> None:
    """Left padding of 10: the sinks of that row lie at positions 10 to 13."""
    run = Driver(config(drift="published"), rows=2)
    run.stream.v[0, :14] = run.stream.v[1, :4] = 1e6
    valid = torch.ones(2, 40)
    valid[0, :10] = 0
    for part in valid.split(chunks, 1):
        run.prefill(part.shape[1], valid=part)
    for row, first in ((0, 14), (1, 4)):
        wanted = run.stream.v[row, first:40].sum(0).tolist()
        assert seen_by_detector(run, row).tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_short_prompt_arms_late_and_says_so() -> None:
    run = Driver(config(drift="paper"))
    run.prefill(6)
    run.steps(60)
    assert [check.state for check in run.checks] == ["arming"] * 4 + ["armed"] * 2
    assert [check.threshold is None for check in run.checks] == [True] * 4 + [False] * 2
    assert not any(check.trigger for check in run.checks[:4])


# batches


def test_rows_of_a_shared_mask_vote() -> None:
    """Three rows: one that drifts is outvoted, two are not; ended rows have no vote and no line."""
    layers = make_layers()
    for drifting, live, noticed in (
        ([0], None, False),
        ([0, 1], None, True),
        ([0], torch.tensor([True, True, False]), False),
        ([0], torch.tensor([True, False, False]), True),
    ):
        stream, other = (shifting(layers, at=at, rows=3) for at in (400, 60))
        stream.v[drifting] = other.v[drifting]
        run = Driver(config(drift="published"), rows=3, layers=layers, stream=stream)
        run.prefill(60)
        run.steps(5, live=live)
        rows = [0, 1, 2] if live is None else torch.nonzero(live).flatten().tolist()
        assert [(check.row, check.trigger) for check in run.checks] == [(r, noticed) for r in rows]
        assert run.steps(1, live=live) == (["observe"] if noticed else ["pruned"])


def test_rows_with_masks_of_their_own_drift_alone() -> None:
    layers = make_layers()
    stream = shifting(layers, at=400, rows=2)
    stream.v[1] = shifting(layers, at=60, rows=2).v[1]
    made = config(drift="published", batch="per_row", remask={"observe_tokens": 3})
    run = Driver(made, rows=2, layers=layers, stream=stream)
    run.prefill(60)
    run.steps(5)
    plan = run.decode()
    assert plan.masks[0] is not None and plan.masks[1] is None
    run.steps(3)
    assert ids_of(run.plans[-1], 0) == best(run.stream, range(60), KEEP, 0)
    assert ids_of(run.plans[-1], 1) == best(run.stream, range(65, 68), KEEP, 1)
    assert [(check.row, check.trigger) for check in run.checks] == [(0, False), (1, True)]


# guards


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
    early = [(check.state, check.trigger) for check in run.checks if check.step < 45]
    assert early == [("held", False)] * 8
    assert run.checks[8].trigger and run.checks[8].state == "armed"


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
    observed = [step for step, phase in enumerate(phases) if phase == "observe"]
    assert observed == [*range(27, 30), *range(57, 60), *range(87, 90)]


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
    made = config(drift=drift, remask={"observe_tokens": observe}, masking_step=masking_step)
    layers = make_layers(1, width=4, hidden=2)
    run = Driver(made, layers=layers, stream=Stream(layers))
    run.prefill(3)
    phases = run.steps(150)
    assert phases[:masking_step] == ["observe"] * masking_step
    dense, starts = 0, []
    for step, phase in enumerate(phases):
        if step >= masking_step and phase == "observe":
            dense += 1
            if phases[step - 1] == "pruned":
                starts.append(step)
        assert share is None or dense <= share * (step + 1) + 1e-9
    assert all(b - a >= distance for a, b in itertools.pairwise(starts))
    assert all(phases[start : start + observe] == ["observe"] * observe for start in starts[:-1])
    if share is None and not distance:
        cycle = ["pruned"] * every + ["observe"] * observe
        assert phases[masking_step:] == (cycle * 150)[: 150 - masking_step]
