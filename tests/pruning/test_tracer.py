"""The tracer without a model: what it takes, batches, padding and finished rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dart_llm.pruning.forward import ForwardCall as Call
from dart_llm.pruning.forward import Kind
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
    make_layers,
    report,
    top,
)


def summed(stream: Stream, pairs: list[tuple[int, range | list[int]]]) -> list[Any]:
    """The neurons that a shared mask keeps after seeing (row, positions)."""
    return [
        top(
            sum((energy_of(stream, layer, seen, row) for row, seen in pairs), torch.zeros(WIDTH)),
            KEEP,
        )
        for layer in range(LAYERS)
    ]


# what is handed over


def test_sums_do_not_hold_the_graph() -> None:
    layers = make_layers()
    stream = Stream(layers)
    for tensors in (stream.u, stream.z, stream.x, stream.r):
        for tensor in tensors:
            tensor.requires_grad_()
    stream.v.requires_grad_()
    run = Driver(config(budget="blend depth global", drift="paper"), layers=layers, stream=stream)
    run.prefill(60)
    run.steps(15)
    for evidence in run.life.evidence:
        assert not any(known.total.requires_grad for known in evidence.sums.values())
    assert run.life.detector.mu is not None
    assert not run.life.detector.mu.requires_grad
    masks = run.plans[-1].masks[0]
    assert masks is not None


@pytest.mark.parametrize("early", [0, 1, 4])
def test_inference_mode_may_come_and_go(early: int) -> None:
    """Evidence that was made under inference mode goes on outside it, and the other way round."""
    settings = config(
        budget="depth",
        compensation=True,
        masking_step=2,
        drift="interval 3",
        remask={"evidence": "decay", "observe_tokens": 2},
    )
    plain, mixed = Driver(settings), Driver(settings)
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


def test_a_forward_that_raised_leaves_no_trace_in_the_counters() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(2)
    run.tracer.before_forward(Call(Kind.DECODE, run.cached, 1, 1))  # and no after_forward
    run.steps(2)
    assert run.life.decoded == 4
    assert report(run).decoded_tokens == 4


def test_every_mask_is_announced_once_with_its_record() -> None:
    run = Driver(config(drift="interval 2"))
    for _ in range(2):
        run.new_text()
        run.prefill(6)
        run.steps(9)
    assert [(r.sequence, r.step) for r in run.announced] == [
        (0, 0),
        (0, 3),
        (0, 6),
        (1, 0),
        (1, 3),
        (1, 6),
    ]
    assert run.announced == [r for life in run.tracer.all_lives() for r in life.remasks]


def test_sequences_share_nothing() -> None:
    """A second text in the same run is treated as the first text of a run of its own."""
    settings = config(masking_step=1, drift="interval 4", remask={"evidence": "decay"})
    both, alone = Driver(settings), Driver(settings)
    both.prefill(20)
    both.steps(9)
    both.new_text()
    for run in (both, alone):
        run.prefill(6)
        run.steps(9)
    assert [ids_of(plan) for plan in both.plans[10:]] == [ids_of(plan) for plan in alone.plans]
    first, second = (life for life in both.tracer.all_lives())
    assert (first.sequence, second.sequence) == (0, 1)
    assert first.prompt_tokens == 20
    assert report(both).decoded_tokens == 18
    assert [s.decoded_tokens for s in report(both).sequences] == [9, 9]
    assert report(both).remasks == 2 * report(alone).remasks == 2


def test_a_longer_cache_than_was_seen_is_another_sequence() -> None:
    run = Driver(config())
    run.prefill(8)
    run.steps(2)
    run.cached = 40
    run.prefill(4)
    assert run.tracer.sequences == 2


def test_candidates_that_ride_along_with_a_prompt_are_dense_decoded_tokens() -> None:
    """Assisted decoding: the first forward holds the prompt and guessed tokens."""
    run = Driver(config())
    plan = run.prefill(12, observable=9)
    assert plan.dense
    assert run.life.prompt_tokens == 9
    assert run.life.decoded == 3
    run.steps(2)
    assert ids_of(run.plans[-1]) == best(run.stream, range(9), KEEP)
    assert report(run).dense_token_share == pytest.approx(3 / 5)


# batches with one mask


def test_a_shared_mask_sums_the_rows() -> None:
    run = Driver(config(masking_step=1), rows=2)
    run.prefill(7)
    run.steps(3)
    assert ids_of(run.plans[-1]) == summed(run.stream, [(0, range(8)), (1, range(8))])
    assert len(run.tracer.lives) == 1
    assert report(run).decoded_tokens == 6
    assert report(run).prompt_tokens == 14


def test_padding_enters_no_statistic() -> None:
    run = Driver(config(), rows=2)
    valid = torch.ones(2, 7)
    valid[0, :4] = 0  # left padding
    run.stream.u[0][0, :4] = 1e6
    run.prefill(7, valid=valid)
    run.steps(2, valid=torch.ones(2, 1))
    assert ids_of(run.plans[-1]) == summed(run.stream, [(0, range(4, 7)), (1, range(7))])
    assert run.life.prompt_tokens == 5  # the mean of 3 and 7
    assert report(run).prompt_tokens == 10


@pytest.mark.parametrize("queue", [1, 5, 20])
def test_finished_rows_enter_no_statistic(queue: int) -> None:
    """Row 0 ends after two of the observed tokens."""
    run = Driver(config(masking_step=queue + 2), rows=2)
    run.prefill(7)
    run.steps(2, live=torch.tensor([True, True]))
    for u in run.stream.u:
        u[0, 9:] = 1e6
    run.steps(queue + 3, live=torch.tensor([False, True]))
    assert run.tracer.last_phase is Phase.PRUNED
    seen = [(0, range(9)), (1, range(9 + queue))]
    assert ids_of(run.plans[-1]) == summed(run.stream, seen)
    found = report(run)
    assert found.decoded_tokens == 4 + queue + 3
    assert found.dense_token_share == pytest.approx((4 + queue) / (4 + queue + 3))
    assert found.achieved_sparsity == pytest.approx(0.5 * 3 / (4 + queue + 3))
    assert found.sparsity_while_pruned == pytest.approx(0.5)


# batches with a mask per row


def test_every_row_lives_its_own_life() -> None:
    """Each row of a batch is treated as if it ran alone."""
    settings = config(batch="per_row", budget="energy", min_evidence=10, compensation=True)
    run = Driver(settings, rows=2)
    valid = torch.ones(2, 9)
    valid[0, :5] = 0
    run.prefill(9, valid=valid)
    run.steps(10, valid=torch.ones(2, 1))
    first, second = run.tracer.lives
    assert (first.row, second.row) == (0, 1)
    assert (first.prompt_tokens, second.prompt_tokens) == (4, 9)
    assert (first.remasks[0].step, second.remasks[0].step) == (6, 1)
    for row, seen in ((0, range(5, 15)), (1, range(10))):
        alone = Driver(config(budget="energy", min_evidence=10, compensation=True))
        alone.stream = _row(run.stream, row, seen.start)
        alone.prefill(len(seen) if row else 4)
        alone.steps(11 if not row else 3)
        assert ids_of(run.plans[-1], row) == ids_of(alone.plans[-1])
        masks, lone = run.plans[-1].masks[row], alone.plans[-1].masks[0]
        assert masks is not None
        assert lone is not None
        for a, b in zip(masks, lone, strict=True):
            assert a is not None and a.bias is not None
            assert b is not None and b.bias is not None
            assert a.bias.tolist() == pytest.approx(b.bias.tolist(), rel=1e-4, abs=1e-5)
    shares = [s.dense_token_share for s in report(run).sequences]
    assert shares == pytest.approx([0.6, 0.1])


def _row(stream: Stream, row: int, start: int) -> Stream:
    """One row of a stream from ``start`` on."""
    alone = Stream(make_layers())
    for name in ("u", "z", "x", "r"):
        setattr(alone, name, [t[row : row + 1, start:] for t in getattr(stream, name)])
    alone.v = stream.v[row : row + 1, start:]
    return alone


def test_rows_that_ended_make_no_masks() -> None:
    """An ended row is neither re-masked nor counted, however long the others go on."""
    run = Driver(config(batch="per_row", drift="interval 3"), rows=2)
    run.prefill(6)
    run.steps(2, live=torch.tensor([True, True]))
    run.steps(20, live=torch.tensor([True, False]))
    ended, alive = run.tracer.lives[1], run.tracer.lives[0]
    assert len(ended.remasks) == 1
    assert len(alive.remasks) == 6
    assert [s.decoded_tokens for s in report(run).sequences] == [22, 2]
    assert report(run).remasks == 5


def test_a_row_that_ends_while_observed_gets_no_mask() -> None:
    run = Driver(config(batch="per_row", masking_step=4), rows=2)
    run.prefill(6)
    run.steps(2, live=torch.tensor([True, True]))
    run.steps(6, live=torch.tensor([True, False]))
    assert [len(life.remasks) for life in run.tracer.lives] == [1, 0]


def test_a_row_that_ended_comes_back_with_its_next_prompt() -> None:
    run = Driver(config(batch="per_row"), rows=2)
    run.prefill(6)
    run.steps(4, live=torch.tensor([True, False]))
    assert [len(life.remasks) for life in run.tracer.lives] == [1, 0]
    run.prefill(5)
    run.steps(2)
    assert [len(life.remasks) for life in run.tracer.lives] == [2, 1]
    assert ids_of(run.plans[-1], 1) == best(run.stream, [*range(6), *range(10, 15)], KEEP, 1)
