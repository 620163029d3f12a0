"""Forwards of several decode tokens: rejected ones, and chunks between two state changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.pruning.config import PruneConfig
from synthetic import (
    Driver,
    Stream,
    config,
    ids_of,
    make_layers,
)

# roll-backs


@pytest.mark.parametrize(
    ("phase", "stay"), [("observe", 0), ("observe", 3), ("pruned", 1), ("pruned", 5)]
)
def test_rejected_tokens_enter_nothing(phase: str, stay: int) -> None:
    """Assisted decoding: of five candidates the next forward shows how many stayed."""
    settings = config(
        masking_step=8 if phase == "observe" else 0,
        drift="paper",
        min_evidence=0,
        compensation=True,
        budget="global",
    )
    plain, assisted = Driver(settings), Driver(settings)
    for run in (plain, assisted):
        run.prefill(60)
        run.steps(1)
    plain.steps(stay)
    kept = {name: [t.clone() for t in getattr(assisted.stream, name)] for name in "uzxr"}
    v = assisted.stream.v.clone()
    for tensors in (assisted.stream.u, assisted.stream.z, assisted.stream.x, assisted.stream.r):
        for tensor in tensors:
            tensor[:, 61 + stay :] = 1e3  # what rejected tokens do
    assisted.stream.v[:, 61 + stay :] *= -1
    assisted.decode(5)
    for name, tensors in kept.items():
        setattr(assisted.stream, name, tensors)
    assisted.stream.v = v
    assisted.roll_back(5 - stay)
    for run in (plain, assisted):
        run.steps(20)
    assert ids_of(assisted.plans[-1]) == ids_of(plain.plans[-1])
    ours, theirs = assisted.checks, plain.checks
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.window, a.counter, a.state) == (b.window, b.counter, b.state)
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)
    found, want = assisted.report(), plain.report()
    assert found.decoded_tokens == want.decoded_tokens == 21 + stay
    assert found.achieved_sparsity == pytest.approx(want.achieved_sparsity)


@pytest.mark.parametrize("gone", [1, 4])
def test_tokens_taken_back_one_by_one_leave_the_window(gone: int) -> None:
    """Single tokens were counted already; cutting the cache takes them out of the window."""
    clean, cut = Driver(config(drift="paper")), Driver(config(drift="paper"))
    for run in (clean, cut):
        run.prefill(60)
        run.steps(3)
    v = cut.stream.v.clone()
    cut.stream.v[:, 63:] *= -1
    cut.steps(gone)
    cut.stream.v = v
    cut.roll_back(gone)
    for run in (clean, cut):
        run.steps(17)
    assert [check.similarity for check in cut.checks] == pytest.approx(
        [check.similarity for check in clean.checks]
    )
    assert [check.step for check in cut.checks] == [10, 20]


# chunks between state changes


@st.composite
def sequences(draw: st.DrawFn) -> tuple[PruneConfig, int, int]:
    masking = draw(st.integers(0, 6))
    rule = draw(st.sampled_from(["never", "interval 1", "interval 7", "paper", "published"]))
    score = draw(st.sampled_from(["normalized", "contribution", "random"]))
    decays = [None] if score == "random" else [None, 0.7]  # random scores average nothing
    made = PruneConfig(
        sparsity=0.5,
        score={"name": score, "ema_decay": draw(st.sampled_from(decays))},
        budget={
            "name": draw(st.sampled_from(["uniform", "energy", "depth", "global"])),
            "refresh": draw(st.sampled_from(["first", "every"])),
        },
        drift={
            "rule": rule,
            "min_distance": draw(st.sampled_from([0, 12])),
            "max_dense_share": draw(st.sampled_from([None, 0.2])),
        },
        remask={
            "evidence": draw(st.sampled_from(["fresh", "decay"])),
            "observe_tokens": draw(st.sampled_from([None, 1, 17, 45])),
        },
        masking_step=masking,
        release_step=draw(st.none() | st.integers(masking + 1, 90)),
        min_evidence=draw(st.sampled_from([0, 30])),
        compensation=draw(st.booleans()),
    )
    return made, draw(st.integers(1, 50)), draw(st.integers(0, 50))


@pytest.mark.contract("same report whatever the batch")
@settings(deadline=None, max_examples=40)
@given(
    sequences(),
    st.integers(1, 40),
    st.sampled_from(["shared", "per_row"]),
    st.integers(1, 3),
    st.integers(1, 100),
)
def test_chunks_up_to_the_next_change_equal_single_tokens(
    case: tuple[PruneConfig, int, int], limit: int, batch: str, rows: int, death: int
) -> None:
    """``tokens_until_change`` is safe: the same masks on the same tokens, the same records.

    The first row of a batch is padded on the left, the last one ends after ``death`` tokens.
    """
    made, prompt, seed = case
    layers = make_layers()
    stream = Stream(layers, rows, seed=seed)
    settings = made.replace({"batch": batch})
    single, chunked = (Driver(settings, rows, layers, stream) for _ in range(2))
    valid = None
    if rows > 1:
        valid = torch.ones(rows, prompt)
        valid[0, : prompt // 3] = 0
    single.prefill(prompt, valid=valid)
    chunked.prefill(prompt, valid=valid)

    def live(step: int) -> Tensor | None:
        return None if rows == 1 or step < death else torch.arange(rows) < rows - 1

    masks: list[list[Any]] = []
    while len(masks) < 120:
        step = len(masks)
        size = min(120 - step, limit, chunked.tokens_until_change() or 120)
        size = min(size, death - step) if step < death else size
        plan = chunked.decode(size, live=live(step))
        masks += [[ids_of(plan, row) for row in range(len(plan.masks))]] * size
    for step in range(120):
        plan = single.decode(live=live(step))
        assert masks[step] == [ids_of(plan, row) for row in range(len(plan.masks))]
    ours, theirs = chunked.report(), single.report()
    assert [(r.row, r.step, r.cause, r.kept) for r in chunked.announced] == [
        (r.row, r.step, r.cause, r.kept) for r in single.announced
    ]

    def records(run: Driver) -> list[tuple[Any, ...]]:
        return [(c.row, c.step, c.window, c.counter, c.trigger, c.state) for c in run.checks]

    assert records(chunked) == records(single)
    similar = [[c.similarity for c in run.checks] for run in (chunked, single)]
    assert similar[0] == pytest.approx(similar[1], abs=1e-5)
    assert ours.achieved_sparsity == pytest.approx(theirs.achieved_sparsity)
    assert ours.decoded_tokens == theirs.decoded_tokens


def test_tokens_until_change_by_hand() -> None:
    run = Driver(config(masking_step=3, release_step=30, drift="interval 8"))
    run.prefill(8)
    bounds = []
    for _ in range(40):
        bounds.append(run.tokens_until_change())
        run.decode()
    cycle = [8, 7, 6, 5, 4, 3, 2, 1, 3, 2, 1]
    want = [3, 2, 1, *cycle, *cycle, 5, 4, 3, 2, 1]
    assert bounds == want + [None] * 10
    run = Driver(config())
    run.prefill(8)
    assert run.tokens_until_change() is None
    run = Driver(config(drift="paper"))
    run.prefill(80)
    assert run.tokens_until_change() == 10
    run.steps(3)
    assert run.tokens_until_change() == 7
    run = Driver(config(batch="per_row", min_evidence=12), rows=2)
    valid = torch.ones(2, 10)
    valid[1, :3] = 0
    run.prefill(10, valid=valid)
    assert run.tokens_until_change() == 2
