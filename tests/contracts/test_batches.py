"""Rows do not reach one another; padding, ended rows and attention sinks count nowhere."""

import pytest
import torch

from dart_llm.pruning.drift import Rule
from dart_llm.pruning.forward import without_sinks
from dart_llm.pruning.registry import DRIFT_RULES
from dart_llm.session.run import prune
from observed_cases import dense_u
from prior_cases import CONFIG, SMALL
from products import SHAPES
from steps import (
    HALF,
    Forced,
    apart,
    generate,
    new_cache,
    pruned,
    same_masks,
    selections,
    shared_model,
    state_of,
    step,
    written,
)
from tiny import LAYERS, WIDTH, tokens

pytestmark = pytest.mark.contract("same report whatever the batch")

LENGTHS = (20, 13, 8)
"""Real tokens of each row's prompt."""

CHOSEN = ([10, 11, 12, 13, 2], [20, 21, 2], [*range(30, 41), 2])
"""The tokens that each row generates; 2 ends it."""


def padded(side="left"):
    """Prompts of different lengths padded to one: ids and mask, [3, 20]."""
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[row, place] = tokens(1, length, seed=row)[0]
        mask[row, place] = 1
    return ids, mask


def run_batch(model, rows, ids, mask, **settings):
    """Run the rows together (their choices forced).  Returns run, masks, logits [B, steps, V]."""
    chosen = [CHOSEN[row] for row in rows]
    run = prune(model, **settings)
    masks = selections(run)
    forced = {"eos_token_id": 2, "logits_processor": [Forced(ids.shape[1], chosen)]}
    with run:
        out = generate(model, ids, len(CHOSEN[2]), attention_mask=mask, **forced)
    for row, wanted in enumerate(chosen):
        assert out.sequences[row, ids.shape[1] :].tolist()[: len(wanted)] == wanted
    return run, masks, torch.stack(out.logits, 1)


def run_alone(model, row, **settings):
    ids = tokens(1, LENGTHS[row], seed=row)
    return run_batch(model, [row], ids, torch.ones_like(ids), **settings)


def evidence_sums(run, row=0):
    """Every sum and weight of the newest sequence, per layer."""
    return [
        {name: (known.total.clone(), float(known.weight)) for name, known in layer.sums.items()}
        for layer in state_of(run, row).evidence
    ]


def _assert_sums_equal(first, parts):
    for layer, sums in enumerate(first):
        assert sums
        for name, (total, weight) in sums.items():
            wanted = sum(part[layer][name][0] for part in parts)
            torch.testing.assert_close(total, wanted, rtol=2e-4, atol=1e-5)
            assert weight == pytest.approx(sum(part[layer][name][1] for part in parts)), name


ALL_NEEDS = {**HALF, "budget": "blend depth energy", "compensation": True}
"""Every statistic that exists is kept."""

WATCH = {**ALL_NEEDS, "masking_step": 1000}
"""And nothing is pruned."""

ROWS = (*SHAPES, "gemma2", "bloom")
"""Every shape of FFN, a sliding window, and positions that are no embeddings."""


@pytest.mark.contract("defects of the published scripts stay fixed")
@pytest.mark.parametrize("name", ROWS)
def test_shared_statistics_are_the_sum_over_rows(name):
    """Prompt and decode tokens, rows that end at different steps, left padding."""
    model = shared_model(name)
    run, _, _ = run_batch(model, [0, 1, 2], *padded(), **WATCH)
    alone = [run_alone(model, row, **WATCH)[0] for row in range(3)]
    _assert_sums_equal(evidence_sums(run), [evidence_sums(one) for one in alone])
    report, singles = run.report(), [one.report() for one in alone]
    assert report.prompt_tokens == sum(LENGTHS) == sum(one.prompt_tokens for one in singles)
    decoded = sum(len(row) - 1 for row in CHOSEN)
    assert report.decoded_tokens == decoded == sum(one.decoded_tokens for one in singles)


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt2", "right"), ("opt", "left")],
)
def test_padding_of_bare_forwards(name, side):
    model, (ids, mask) = shared_model(name), padded(side)

    def forward(ids, mask=None):
        with prune(model, **WATCH) as run, torch.no_grad():
            model(ids, attention_mask=mask)
        return run

    run = forward(ids, mask)
    assert run.report().prompt_tokens == sum(LENGTHS)
    if side == "right" or name != "gpt2":  # whose positions a bare forward counts from the pad
        alone = [forward(tokens(1, length, seed=row)) for row, length in enumerate(LENGTHS)]
        _assert_sums_equal(evidence_sums(run), [evidence_sums(one) for one in alone])
    assert {weight for _, weight in evidence_sums(run)[0].values()} == {float(sum(LENGTHS))}


DART = {"method": "dart", "self_stats": SMALL, "sparsity": 0.5}
LATE = {"masking_step": 3}
EVIDENCE = {"min_evidence": 10, "drift": "never"}
"""The long prompt is pruned at once, and the short one while it is: two tokens later."""


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        *[(name, {**ALL_NEEDS, **LATE}, (3, None, 3)) for name in ROWS],
        *[(name, {"method": CONFIG, **LATE}, (3, None, 3)) for name in ("phi3", "opt")],
        *[(name, {**DART, **EVIDENCE}, (0, 0, 2)) for name in ("llama", "bloom", "opt")],
        *[(name, {**ALL_NEEDS, **EVIDENCE}, (0, 0, 2)) for name in ("gemma2", "opt-postnorm")],
    ],
)
def test_rows_with_masks_of_their_own_equal_rows_alone(name, method, steps):
    """per_row: each row's masks, logits and accounting are those of the row run alone."""
    model, settings = shared_model(name), {**method, "batch": "per_row"}
    run, masks, logits = run_batch(model, [0, 1, 2], *padded(), **settings)
    assert run.executor == "masked"
    for row in range(3):
        one, alone, single = run_alone(model, row, **settings)
        mine = [(at, kept) for at, place, kept in masks if place == row]
        expected = [] if steps[row] is None else [steps[row]]
        assert [at for at, _ in mine] == [at for at, _, _ in alone] == expected
        assert all(same_masks(a[1], b[2]) for a, b in zip(mine, alone, strict=True))
        assert apart(logits[row, : single.shape[1]], single[0]) < 3e-5
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert (a.prompt_tokens, a.decoded_tokens) == (b.prompt_tokens, b.decoded_tokens)
        assert a.achieved_sparsity == pytest.approx(b.achieved_sparsity)
        assert len(a.remasks) == len(b.remasks)


def test_shared_masks_follow_the_living_rows():
    model, watch = shared_model(), {**HALF, "masking_step": 1000}
    _, masks, _ = run_batch(model, [0, 1, 2], *padded(), **HALF, masking_step=6)
    with prune(model, **watch) as third:
        generate(model, tokens(1, LENGTHS[2], seed=2), 7, logits_processor=[Forced(8, CHOSEN[2:])])
    runs = [*(run_alone(model, row, **watch)[0] for row in (0, 1)), third]  # two have ended
    parts = [evidence_sums(run) for run in runs]
    for layer, kept in enumerate(masks[0][2]):
        total = sum(part[layer]["score"][0] for part in parts)
        top = total.sqrt().argsort(descending=True)[: len(kept)].sort().values
        assert torch.equal(kept, top)


@pytest.fixture(scope="module", autouse=True)
def _eager():
    """A drift rule that finds every window low."""
    DRIFT_RULES.register("eager", lambda: Rule(3, lambda mu, sigma: mu + 2, 2))
    yield
    DRIFT_RULES.unregister("eager")


def forced(ids, rows, settings=None, new=0, **how):
    """A run whose rows choose ``rows``, and what ``generate`` gave; 2 ends a row."""
    how = {"eos_token_id": 2, "logits_processor": [Forced(ids.shape[1], rows)], **how}
    return written(shared_model(), ids, new or max(map(len, rows)), settings, **how)


WANTED = {
    # 39, 21 and 33 tokens are fed; eager: masks at 7 and 26 (then 4 windows arm it anew)
    "eager": {"first": 3, "drift": 2 + 1 + 2},
    "interval 2": {"first": 3, "interval": 12 + 6 + 10},
}


@pytest.mark.parametrize("rule", WANTED)
def test_windows_and_re_masks_of_rows_alone(rule):
    """Ended rows complete no window and trigger nothing; each row drifts on its own."""
    ids = tokens(3, 64, seed=3)
    chosen = [
        tokens(1, 40, seed=20)[0].tolist(),
        [*tokens(1, 21, seed=21)[0].tolist(), 2],
        [*tokens(1, 33, seed=22)[0].tolist(), 2],
    ]
    settings = {**HALF, "batch": "per_row", "drift": rule, "executor": "masked"}
    run, out = forced(ids, chosen, settings)
    for row in range(3):
        one, alone = forced(ids[[row]], [chosen[row]], settings, 40)
        mine = [check for check in run.drift_checks if check.row == row]
        for a, b in zip(mine, one.drift_checks, strict=True):
            assert a.similarity == pytest.approx(b.similarity, abs=1e-4)
            fields = ("step", "counter", "trigger", "state")
            assert all(getattr(a, field) == getattr(b, field) for field in fields)
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert a.dense_tokens == b.dense_tokens and a.decoded_tokens == b.decoded_tokens
        for mask, other in zip(a.remasks, b.remasks, strict=True):
            assert (mask.step, mask.cause, mask.kept) == (other.step, other.cause, other.kept)
        single = torch.stack(alone.logits, 1)[0]
        assert apart(torch.stack(out.logits, 1)[row, : len(single)], single) < 2e-5
    assert run.report().remask_causes == WANTED[rule]


LIVE = [7, 6, 8, 9, 10, 11]
PADS = [[7, 0, *LIVE[2:]], [12, 13, 14, 2]]


@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_tokens_of_rows_that_end(batch):
    for rows, how, decoded in (
        # with an end token, padding cannot be told from a chosen pad token: that one is left out
        (PADS, {"pad_token_id": 0}, 4 + 3),
        (PADS, {"pad_token_id": 0, "eos_token_id": None}, 5 + 5),
        ([LIVE, [12, 13, 14, 2]], {"pad_token_id": 2}, 5 + 3),
        ([LIVE, PADS[1], [15, 5]], {"pad_token_id": 0, "eos_token_id": [2, 5]}, 5 + 3 + 1),
    ):
        run, _ = forced(tokens(len(rows), 20), rows, {"batch": batch}, **how)
        assert run.report().decoded_tokens == decoded


ONE, NIL = [1.0] * 9, [0.0] * 9


def test_the_first_four_weigh_nothing():
    for valid, before, expected in (
        (None, [1.0, 5.0], [[0, 0, 0, 1, 1], [1] * 5]),  # rows count for themselves
        # padding is no token
        ([NIL[:3] + ONE[:6], ONE], [0.0, 0.0], [[0] * 7 + [1] * 2, [0] * 4 + [1] * 5]),
        ([ONE[:6] + NIL[:2]], [0.0], [[0, 0, 0, 0, 1, 1, 0, 0]]),
    ):
        weights = None if valid is None else torch.tensor(valid)
        weighted = without_sinks(weights, before, len(expected), len(expected[0]))
        assert weighted.tolist() == expected


SEEN = {"method": CONFIG, "masking_step": 1000}
"""Everything is observed, nothing ever masked."""


def check(run, *texts):
    """``run``'s newest sums are those over the texts' u from token 4 on, of dense passes."""
    layers = zip(*(dense_u(run.model, text) for text in texts), strict=True)
    for parts, sums in zip(layers, evidence_sums(run), strict=True):
        every = torch.cat([u[4:] for u in parts]).float()
        for name, wanted in (("score", every.square().sum(0)), ("signed", every.sum(0))):
            torch.testing.assert_close(sums[name][0], wanted, rtol=2e-4, atol=1e-4)
        assert {weight for _, weight in sums.values()} == {float(len(every))}


@pytest.mark.parametrize(
    ("name", "prompt", "chunk"),
    [
        *((name, 9, None) for name in ("llama", "phi3", "gpt2", "opt")),
        *(("llama", *case) for case in ((1, None), (3, None), (5, 2), (9, 1))),
    ],
)
def test_prompts_and_decoded_tokens(name, prompt, chunk):
    """After a short prompt the sinks go on among the decoded tokens; chunks do not matter."""
    ids = tokens(1, prompt, seed=6)
    run, out = written(shared_model(name), ids, 11, SEEN, prefill_chunk_size=chunk)
    check(run, out.sequences[:, :-1])


@pytest.mark.contract("defects of the published scripts stay fixed")
def test_two_prompts_in_one_cache():
    """The second turn has no sinks of its own; a new cache does."""
    model, ids = shared_model(), tokens(1, 24, seed=6)
    with prune(model, CONFIG, masking_step=1000) as run:
        step(model, tokens(1, 2), new_cache(model))
        cache = new_cache(model)
        for part in ids.split([3, 7, 14], 1):
            step(model, part, cache)
    check(run, ids)
    with prune(model, CONFIG, masking_step=1000) as run:
        for part in (ids, ids[:, :6]):
            step(model, part, new_cache(model))
    check(run, ids[:, :6])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_that_end_and_rows_shorter_than_the_sinks(name):
    """Left padding of 0, 7 and 12; then of a row of 2 tokens, of which nothing is left."""
    run, _, _ = run_batch(shared_model(name), [0, 1, 2], *padded(), **SEEN)
    ends = [torch.tensor([chosen[:-1]]) for chosen in CHOSEN]
    prompts = [tokens(1, length, seed=row) for row, length in enumerate(LENGTHS)]
    check(run, *(torch.cat(pair, 1) for pair in zip(prompts, ends, strict=True)))
    ids, mask = tokens(2, 9, seed=2), torch.ones(2, 9, dtype=torch.long)
    mask[0, :7] = 0
    with prune(shared_model(), CONFIG, masking_step=1000) as run:
        step(run.model, ids, new_cache(run.model), mask)
    check(run, ids[1:])


def test_a_prompt_of_sinks_alone_is_pruned_by_the_prior():
    """Whatever the three tokens are, the masks are those of the prior's scores."""
    runs = [pruned(shared_model(), tokens(1, 8, seed=seed), 3, method=CONFIG)[0] for seed in (1, 2)]
    run, masks = runs[0], runs[0].masks()
    assert same_masks(masks, runs[1].masks()) and run.report().dense_token_share == 0
    learned = [layer.self_stats for layer in run.layers]
    scores = [one.evidence.sums["score"].mean * one.fisher for one in learned]
    floors = [score.index_fill(0, score.topk(5).indices, torch.inf) for score in scores]
    kept = torch.cat([masks[layer] + WIDTH * layer for layer in range(LAYERS)])
    assert kept.tolist() == sorted(torch.cat(floors).topk(LAYERS * WIDTH // 2).indices.tolist())
