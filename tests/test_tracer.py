"""The tracer without a model: batches, padding, roll-backs, chunks, and when drift is noticed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_llm.accounting import Costs, run_report
from dart_llm.config import PruneConfig
from dart_llm.life import Phase
from dart_llm.plan import Call, Kind
from dart_llm.tracer import Tracer
from synthetic import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Driver,
    Stream,
    best,
    energy_of,
    ids_of,
    make_layers,
    top,
)

KEEP = 10


def config(**settings: Any) -> PruneConfig:
    return PruneConfig.from_mapping({"sparsity": 0.5, "score": "magnitude", **settings})


def summed(stream: Stream, pairs: list[tuple[int, range | list[int]]]) -> list[Any]:
    """The neurons that a shared mask keeps after seeing (row, positions)."""
    return [
        top(
            sum((energy_of(stream, layer, seen, row) for row, seen in pairs), torch.zeros(WIDTH)),
            KEEP,
        )
        for layer in range(LAYERS)
    ]


def report(run: Driver) -> Any:
    costs = Costs(run.layers, 10_000)
    return run_report(run.tracer.all_lives(), costs, "masked", 0, "a test", 0.5)


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
    run.tracer.begin_forward(Call(Kind.DECODE, run.cached, 1, 1))  # and no end_forward
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


# roll-backs


@pytest.mark.parametrize("phase", ["observe", "pruned"])
@pytest.mark.parametrize("stay", [0, 1, 3, 5])
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
    assert assisted.life.decoded == plain.life.decoded == 21 + stay
    ours, theirs = assisted.tracer.checks, plain.tracer.checks
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.window, a.counter, a.state) == (b.window, b.counter, b.state)
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)
    found, want = report(assisted), report(plain)
    assert found.decoded_tokens == want.decoded_tokens
    assert found.achieved_sparsity == pytest.approx(want.achieved_sparsity)


def test_a_roll_back_beyond_the_forward_in_hand() -> None:
    run = Driver(config(drift="interval 10"))
    run.prefill(8)
    run.steps(6)
    run.decode(3)
    run.roll_back(5)  # none of the three stayed, and two before them are gone
    run.decode()
    assert run.life.decoded == 5
    assert run.life.pruned_run == 5
    assert sum(float(period.tokens) for period in run.life.periods) == 5
    assert run.steps(6) == ["pruned"] * 5 + ["observe"]


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
    assert [check.similarity for check in cut.tracer.checks] == pytest.approx(
        [check.similarity for check in clean.tracer.checks]
    )
    assert [check.step for check in cut.tracer.checks] == [10, 20]


def test_several_tokens_count_as_decode_in_any_phase() -> None:
    run = Driver(config(masking_step=4, release_step=9))
    run.prefill(8)
    run.decode(4)
    run.decode(5)
    run.decode(5)
    assert [ids_of(plan) == [None] for plan in run.plans[1:]] == [True, False, True]
    assert ids_of(run.plans[2]) == best(run.stream, range(12), KEEP)
    run.tracer.flush()
    assert run.life.decoded == 14
    assert report(run).dense_token_share == pytest.approx(9 / 14)


# chunks between state changes


@st.composite
def lives(draw: st.DrawFn) -> tuple[PruneConfig, int, int]:
    masking = draw(st.integers(0, 6))
    rule = draw(st.sampled_from(["never", "interval 1", "interval 7", "paper", "published"]))
    made = PruneConfig(
        sparsity=0.5,
        score={
            "name": draw(st.sampled_from(["normalized", "contribution", "random"])),
            "ema_decay": draw(st.sampled_from([None, 0.7])),
        },
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


@settings(deadline=None, max_examples=60)
@given(
    lives(),
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
        size = min(120 - step, limit, chunked.tracer.tokens_until_change() or 120)
        size = min(size, death - step) if step < death else size
        plan = chunked.decode(size, live=live(step))
        masks += [[ids_of(plan, life) for life in range(len(plan.masks))]] * size
    for step in range(120):
        plan = single.decode(live=live(step))
        assert masks[step] == [ids_of(plan, life) for life in range(len(plan.masks))]
    chunked.tracer.flush()
    assert [(r.row, r.step, r.cause, r.kept) for r in chunked.announced] == [
        (r.row, r.step, r.cause, r.kept) for r in single.announced
    ]

    def records(run: Driver) -> list[tuple[Any, ...]]:
        return [(c.row, c.step, c.window, c.counter, c.trigger, c.state) for c in run.tracer.checks]

    assert records(chunked) == records(single)
    similar = [[c.similarity for c in run.tracer.checks] for run in (chunked, single)]
    assert similar[0] == pytest.approx(similar[1], abs=1e-5)
    ours, theirs = report(chunked), report(single)
    assert ours.achieved_sparsity == pytest.approx(theirs.achieved_sparsity)
    assert ours.decoded_tokens == theirs.decoded_tokens


def test_tokens_until_change_by_hand() -> None:
    run = Driver(config(masking_step=3, release_step=30, drift="interval 8"))
    run.prefill(8)
    bounds = []
    for _ in range(40):
        bounds.append(run.tracer.tokens_until_change())
        run.decode()
    cycle = [8, 7, 6, 5, 4, 3, 2, 1, 3, 2, 1]
    want = [3, 2, 1, *cycle, *cycle, 5, 4, 3, 2, 1]
    assert bounds == want + [None] * 10
    run = Driver(config())
    run.prefill(8)
    assert run.tracer.tokens_until_change() is None
    run = Driver(config(drift="paper"))
    run.prefill(80)
    assert run.tracer.tokens_until_change() == 10
    run.steps(3)
    assert run.tracer.tokens_until_change() == 7
    run = Driver(config(batch="per_row", min_evidence=12), rows=2)
    valid = torch.ones(2, 10)
    valid[1, :3] = 0
    run.prefill(10, valid=valid)
    assert run.tracer.tokens_until_change() == 2


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
        assert [plan.features for plan in run.plans] == [wanted] * 4


def test_a_lone_tracer_has_no_bound_and_no_lives() -> None:
    tracer = Tracer(config(), make_layers())
    tracer.end_forward()
    tracer.observe(0, torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, HIDDEN))
    tracer.feature(torch.zeros(1, 1, HIDDEN))
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
