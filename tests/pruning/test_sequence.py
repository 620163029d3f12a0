"""One sequence: when masks are made, from what, how long they stay, what is counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dart_llm.pruning.budgets import LayerView
from dart_llm.pruning.registry import BUDGETS
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


def phases(run, steps, **settings):
    """The phases of ``steps`` decode steps, by first letters."""
    return "".join({"released": "r"}.get(one, one[0]) for one in run.steps(steps, **settings))


def after(prompt, steps=0, **settings):
    """A sequence that has read a prompt and decoded so many tokens."""
    run = Driver(config(**settings))
    run.prefill(prompt)
    run.steps(steps)
    return run


def made(run):
    return [(remask.cause, remask.step) for remask in run.announced]


CAPPED = {"drift": {"rule": "interval 1", "max_dense_share": 0.1}, "remask": {"observe_tokens": 3}}


@pytest.mark.parametrize(
    ("settings", "prompt", "wanted"),
    [
        ({}, 1, "p" * 8),
        ({"masking_step": 3}, 2, "ooopp"),
        # prompt and observed tokens reach min_evidence
        ({"min_evidence": 16}, 10, "o" * 6 + "pp"),
        ({"min_evidence": 16, "masking_step": 8}, 10, "o" * 8 + "pp"),
        # a sequence that starts with a decode step observes one token at least
        ({}, 0, "opp"),
        # the release is final, also for an observation that has begun
        ({"masking_step": 2, "release_step": 7, "drift": "interval 4"}, 6, "oopppp" + "o" + "rrr"),
        # observe_tokens follow the masking step where they are not given
        ({"drift": "interval 3", "masking_step": 4}, 8, "oooo" + "ppp" + "oooo" + "p"),
        ({"drift": "interval 2", "remask": {"observe_tokens": 3}}, 8, "ppoooppooo"),
        # guards: a distance between triggers, and a share of dense tokens
        ({"drift": {"rule": "interval 2", "min_distance": 12}}, 4, ("pp" + "o" + "p" * 11) + "o"),
        (CAPPED, 4, ("p" * 27 + "ooo") * 3),
        # nothing can be removed
        ({"sparsity": 0.0, "drift": "paper", "masking_step": 2}, 8, "r" * 60),
        ({"sparsity": None, "budget": {"table": "all:1"}}, 8, "r" * 9),
    ],
)
def test_phases_and_the_tokens_that_masks_are_made_from(settings, prompt, wanted):
    """Every mask is made from the tokens observed since the trigger: ``fresh`` evidence."""
    run = Driver(config(**settings))
    run.cached = 0 if prompt else 30
    if prompt:
        assert is_dense(run.prefill(prompt))
    start, observes = run.cached, "r" not in wanted[:1]
    assert phases(run, len(wanted)) == wanted
    seen, masks = [*range(prompt)], None
    for step, (letter, plan) in enumerate(zip(wanted, run.plans[-len(wanted) :], strict=True)):
        assert is_dense(plan) == (letter != "p")
        assert plan.observe == (letter == "o")
        if letter == "o":
            seen, masks = [*(seen if masks is None else []), start + step], None
        elif letter == "p":
            assert masks is None or plan.masks[0] is masks
            masks = plan.masks[0]
            assert ids_of(plan) == best(run.stream, seen, KEEP)
            if wanted[step + 1 : step + 2] == "o":
                seen = []
    assert bool(run.announced) == observes
    if run.announced:
        first = run.announced[0]
        assert (first.cause, first.step, first.overlap) == ("first", wanted.index("p"), None)
        assert first.evidence_tokens == prompt + first.step and first.kept == (KEEP,) * LAYERS
        assert len(run.announced) == wanted.replace("p", " p").count("o p") + (wanted[0] == "p")
    if wanted[-1] == "r":  # a further prompt changes nothing
        assert is_dense(run.prefill(5)) and phases(run, 3) == "rrr"
        assert run.tokens_until_change() is None


def test_a_roll_back_takes_the_state_back():
    # from the accounting go 3 pruned, 2 observed and 2 pruned tokens; then all of them
    for steps, back, decoded in ((10, 7, 4), (3, 5, 1)):
        run = after(8, steps, drift="interval 5", remask={"observe_tokens": 2})
        run.roll_back(back)
        run.decode()
        report = run.report()
        assert (report.decoded_tokens, report.prompt_tokens) == (decoded, 8)
        assert report.dense_token_share == 0
    run = after(8, 3, masking_step=4)  # while observing: the tokens are asked for again
    run.roll_back(2)
    assert phases(run, 5) == "ooopp" and made(run) == [("first", 4)]
    run = after(8, 6, drift="interval 10")  # beyond the forward in hand
    run.decode(3)
    run.roll_back(5)
    run.decode()
    assert run.report().decoded_tokens == 5 and phases(run, 6) == "pppppo"
    # to before the release: another continuation is pruned up to there too, by the masks it finds
    for masking_step in (0, 6):
        run = after(6, release_step=7, masking_step=masking_step)
        assert phases(run, 9) == "o" * masking_step + "p" * (7 - masking_step) + "rr"
        run.roll_back(9)
        assert phases(run, 9) == "p" * 7 + "rr" and len(run.announced) == 1


@pytest.mark.parametrize(("step", "stay"), [(8, 0), (8, 3), (0, 1), (0, 5)])
def test_rejected_tokens_enter_nothing(step, stay):
    """Assisted decoding: of five candidates the next forward shows how many stayed."""
    settings = {"masking_step": step, "drift": "paper", "compensation": True, "budget": "depth"}
    plain, assisted = (after(60, 1, **settings) for _ in range(2))
    plain.steps(stay)
    spoilt = assisted.stream = Stream(assisted.layers)
    for tensor in (*spoilt.u, *spoilt.z, *spoilt.x):
        tensor[:, 61 + stay :] = 1e3  # what rejected tokens do
    spoilt.v[:, 61 + stay :] *= -1
    assisted.decode(5)
    assisted.stream = plain.stream
    assisted.roll_back(5 - stay)
    for run in (plain, assisted):
        run.steps(20)
    assert ids_of(assisted.plans[-1]) == ids_of(plain.plans[-1])
    assert len(same_checks(assisted, plain)) > 0
    result, want = assisted.report(), plain.report()
    assert result.decoded_tokens == want.decoded_tokens == 21 + stay
    assert result.achieved_sparsity == pytest.approx(want.achieved_sparsity)


def same_checks(one, other):
    result = [
        [(c.row, c.step, c.window, c.counter, c.trigger, c.state) for c in run.checks]
        for run in (one, other)
    ]
    assert result[0] == result[1]
    similar = [[c.similarity for c in run.checks] for run in (one, other)]
    assert similar[0] == pytest.approx(similar[1], abs=1e-5)
    return result[0]


@pytest.mark.parametrize("chunks", [(40,), (6, 34)])
def test_sinks_are_counted_from_the_first_real_token(chunks):
    """Left padding of 10: the sinks of that row lie at positions 10 to 13."""
    run = Driver(config(drift="published"), rows=2)
    run.stream.v[0, :14] = run.stream.v[1, :4] = 1e6
    valid = torch.ones(2, 40)
    valid[0, :10] = 0
    for part in valid.split(chunks, 1):
        run.prefill(part.shape[1], valid=part)
    for row, first in ((0, 14), (1, 4)):
        wanted = run.stream.v[row, first:40].sum(0).tolist()
        assert run.state.detector.total[row].tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("gone", [1, 4])
def test_tokens_taken_back_one_by_one_leave_the_window(gone):
    """Single tokens were counted already; cutting the cache takes them out of the window."""
    clean, cut = (after(60, 3, drift="paper") for _ in range(2))
    cut.stream = Stream(cut.layers)
    cut.stream.v[:, 63:] *= -1
    cut.steps(gone)
    cut.stream = clean.stream
    cut.roll_back(gone)
    for run in (clean, cut):
        run.steps(17)
    assert [check[1] for check in same_checks(clean, cut)] == [10, 20]


def test_decayed_evidence():
    """Old sums times g min(1, 256 / n), the new tokens on top; then the same again."""
    seen, layers = 600, make_layers()
    stream = Stream(layers, length=700)
    remask = {"evidence": "decay", "decay": 0.3, "observe_tokens": 2}
    run = Driver(config(drift="interval 4", remask=remask), layers=layers, stream=stream)
    run.prefill(seen)
    run.steps(13)
    factor = 0.3 * 256 / seen
    for layer in range(LAYERS):
        first = energy_of(stream, layer, range(seen))
        second = factor * first + energy_of(stream, layer, range(seen + 4, seen + 6))
        third = 0.3 * second + energy_of(stream, layer, range(seen + 10, seen + 12))
        for plan, energy in ((4, first), (7, second), (13, third)):
            assert ids_of(run.plans[plan])[layer] == top(energy, KEEP)
    pairs = zip(ids_of(run.plans[4]), ids_of(run.plans[7]), strict=True)
    same = sum(len({*a} & {*b}) for a, b in pairs)
    assert run.announced[1].overlap == pytest.approx(same / (KEEP * LAYERS))
    two = seen * factor + 2
    evidence = [remask.evidence_tokens for remask in run.announced]
    assert evidence == pytest.approx([seen, two, 0.3 * two + 2])


def test_counts_stay_as_at_the_first_mask():
    def scores(run, span):
        return [energy_of(run.stream, layer, span).sqrt() for layer in range(LAYERS)]

    def energy(run, span):
        views = [LayerView(WIDTH, 0.0, score.double()) for score in scores(run, span)]
        return tuple(BUDGETS.get("energy")(views, KEEP * LAYERS))

    run = after(8, 14, budget="energy", drift="interval 3", remask={"observe_tokens": 2})
    wanted, anew = energy(run, range(8)), energy(run, range(11, 13))
    assert wanted != anew
    assert [remask.kept for remask in run.announced] == [wanted] * 3
    result = [ids_of(run.plans[place]) for place in (1, 6, 11)]
    assert [tuple(map(len, ids)) for ids in result] == [wanted] * 3


def continued(settings, first, steps, second, then):
    run = after(first, **settings)
    assert phases(run, len(steps)) == steps
    plan = run.prefill(second)
    assert is_dense(plan) and plan.observe
    assert phases(run, len(then)) == then
    return run


def test_a_second_prompt():
    run = continued({}, 8, "ppppp", 6, "pp")  # adds to the evidence
    assert ids_of(run.plans[-1]) == best(run.stream, [*range(8), *range(13, 19)], KEEP)
    assert made(run) == [("first", 0), ("prompt", 5)]
    assert [remask.evidence_tokens for remask in run.announced] == [8, 14]
    (sequence,) = run.report().sequences
    assert (sequence.prompt_tokens, sequence.decoded_tokens) == (14, 7)
    # aged evidence (0.1 x 20) and a short prompt are too little: three tokens run dense first
    run = continued({"min_evidence": 8, "remask": {"evidence": "decay"}}, 20, "pp", 3, "ooop")
    assert made(run) == [("first", 0), ("prompt", 5)]
    # in the middle of observing: two dense tokens and the second prompt
    settings = {"drift": "interval 2", "remask": {"observe_tokens": 4}}
    run = continued(settings, 8, "ppoo", 5, "pp")
    assert made(run) == [("first", 0), ("interval", 4)]
    assert ids_of(run.plans[-1]) == best(run.stream, range(10, 17), KEEP)


one_of = st.sampled_from
methods = st.builds(
    config,
    score=one_of(["normalized", "random", {"name": "contribution", "ema_decay": 0.7}]),
    budget=one_of(["uniform", "energy", "depth", "ranked"]),
    drift=st.fixed_dictionaries(
        {
            "rule": one_of(["never", "interval 1", "interval 7", "paper", "published"]),
            "min_distance": one_of([0, 12]),
            "max_dense_share": one_of([None, 0.2]),
        }
    ),
    remask=st.fixed_dictionaries(
        {"evidence": one_of(["fresh", "decay"]), "observe_tokens": one_of([None, 1, 17, 45])}
    ),
    masking_step=one_of([0, 1, 6]),
    release_step=one_of([None, 7, 50]),
    min_evidence=one_of([0, 30]),
    compensation=st.booleans(),
    batch=one_of(["shared", "per_row"]),
)


@pytest.mark.contract("same report whatever the batch")
@examples(deadline=None, max_examples=40)
@given(
    methods,
    st.tuples(st.integers(1, 50), st.integers(0, 50)),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 100),
)
def test_chunks_up_to_the_next_change_equal_single_tokens(method, text, limit, rows, death):
    """The first row of a batch is padded, the last one ends after ``death`` tokens."""
    (prompt, seed), layers = text, make_layers()
    stream = Stream(layers, rows, seed=seed)
    single, chunked = (Driver(method, rows, layers, stream) for _ in range(2))
    valid = torch.ones(rows, prompt) if rows > 1 else None
    if valid is not None:
        valid[0, : prompt // 3] = 0
    for run in (single, chunked):
        run.prefill(prompt, valid=valid)

    def live(step):
        return None if rows == 1 or step < death else torch.arange(rows) < rows - 1

    masks = []
    while (step := len(masks)) < 120:
        size = min(120 - step, limit, chunked.tokens_until_change() or 120)
        size = min(size, death - step) if step < death else size
        plan = chunked.decode(size, live=live(step))
        masks += [[ids_of(plan, row) for row in range(len(plan.masks))]] * size
    for step in range(120):
        plan = single.decode(live=live(step))
        assert masks[step] == [ids_of(plan, row) for row in range(len(plan.masks))]
    kept = [[(r.row, r.step, r.cause, r.kept) for r in run.announced] for run in (single, chunked)]
    assert kept[0] == kept[1]
    ours, theirs = chunked.report(), single.report()
    same_checks(chunked, single)
    assert ours.achieved_sparsity == pytest.approx(theirs.achieved_sparsity)
    assert ours.decoded_tokens == theirs.decoded_tokens


def test_tokens_until_change_by_hand():
    run, bounds = after(8, masking_step=3, release_step=30, drift="interval 8"), []
    for _ in range(32):
        bounds.append(run.tokens_until_change())
        run.decode()
    cycle = [8, 7, 6, 5, 4, 3, 2, 1, 3, 2, 1]
    assert bounds == [3, 2, 1, *cycle, *cycle, 5, 4, 3, 2, 1, None, None]
