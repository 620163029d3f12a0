"""Rows of a batch do not reach one another; padding and rows that have ended count nowhere."""

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from batch_cases import CHOSEN, LENGTHS, evidence_sums, padded, run_alone, run_batch
from dart_llm.pruning.drift import Rule
from dart_llm.pruning.registry import DRIFT_RULES
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import SHAPES
from steps import (
    HALF,
    Forced,
    apart,
    decode,
    generate,
    new_cache,
    pruned,
    same_masks,
    shared_model,
    step,
    written,
)
from tiny import tokens

pytestmark = pytest.mark.contract("same report whatever the batch")

Sums = list[dict[str, Any]]


def _added(parts):
    return [
        {name: tuple(sum(p[name][k] for p in layer) for k in (0, 1)) for name in layer[0]}
        for layer in zip(*parts, strict=True)
    ]


def _assert_sums_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and a
        for name in a:
            torch.testing.assert_close(a[name][0], b[name][0], rtol=2e-4, atol=1e-5)
            assert a[name][1] == pytest.approx(b[name][1]), name


ALL_NEEDS = {**HALF, "budget": "blend depth global", "compensation": True}
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
    _assert_sums_equal(evidence_sums(run), _added([evidence_sums(one) for one in alone]))
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
        _assert_sums_equal(evidence_sums(run), _added([evidence_sums(one) for one in alone]))
    assert {weight for _, weight in evidence_sums(run)[0].values()} == {float(sum(LENGTHS))}


AGED = {**ALL_NEEDS, "score": {"name": "magnitude", "ema_decay": 0.9}}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, ALL_NEEDS) for name in ROWS],
        *[(name, {"method": CONFIG}) for name in SHAPES],
        *[(name, AGED) for name in ("llama", "opt")],
    ],
)
def test_rows_of_their_own_equal_rows_alone(name, method):
    """per_row: masks, logits and accounting of each row are those of the row run alone."""
    model = shared_model(name)
    settings = {**method, "masking_step": 3, "batch": "per_row"}
    run, found, logits = run_batch(model, [0, 1, 2], *padded(), **settings)
    assert run.executor == "masked"
    for row in range(3):
        one, alone, single = run_alone(model, row, **settings)
        mine = [(at, kept) for at, place, kept in found if place == row]
        if len(CHOSEN[row]) > 4:
            assert [at for at, _ in mine] == [at for at, _, _ in alone] == [3]
            assert same_masks(mine[0][1], alone[0][2])
        else:
            assert mine == alone == [], "this row ends before its first mask"
        assert apart(logits[row, : single.shape[1]], single[0]) < 3e-5
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert (a.prompt_tokens, a.decoded_tokens) == (b.prompt_tokens, b.decoded_tokens)
        assert a.achieved_sparsity == pytest.approx(b.achieved_sparsity)
        assert len(a.remasks) == len(b.remasks)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, {"method": "dart", "prior": SMALL}) for name in ("llama", "bloom", "opt")],
        *[(name, ALL_NEEDS) for name in ("gemma2", "opt-postnorm")],
    ],
)
def test_a_row_is_observed_while_another_is_pruned(name, method):
    """min_evidence lets the long prompt be pruned at once and the short one two tokens later."""
    model = shared_model(name)
    settings = {**HALF, **method, "batch": "per_row"}
    settings |= {"drift": "never", "min_evidence": 10}
    _, found, logits = run_batch(model, [0, 2], *(part[::2] for part in padded()), **settings)
    assert [(at, row) for at, row, _ in found] == [(0, 0), (2, 1)]
    for row, place in ((0, 0), (2, 1)):
        _, alone, single = run_alone(model, row, **settings)
        assert same_masks(found[place][2], alone[0][2])
        assert apart(logits[place, : single.shape[1]], single[0]) < 2e-5


def test_sensitivities_of_a_row_are_read_where_they_are_alone():
    """On its first 8 observed tokens and the 9th; a row that is pruned at once reads none."""
    model = shared_model()
    chosen = [tokens(1, 30, seed=40 + row)[0].tolist() for row in range(3)]

    def run_rows(rows, text, seen):
        with prune(model, **ALL_NEEDS, batch="per_row", min_evidence=20) as run:
            forced = [Forced(text.shape[1], [chosen[row] for row in rows])]
            generate(model, text, 16, attention_mask=seen, logits_processor=forced)
        return run

    run = run_rows([0, 1, 2], *padded())
    assert sorted(remask.step for remask in run.remasks) == [0, 7, 12]
    for row, (length, reads) in enumerate(zip(LENGTHS, (0, 7, 9), strict=True)):
        text = tokens(1, length, seed=row)
        sums = evidence_sums(run, row)
        assert sums[0]["cosine"][1] == length + reads and sums[0]["score"][1] == 20
        _assert_sums_equal(sums, evidence_sums(run_rows([row], text, torch.ones_like(text))))


def test_shared_masks_follow_the_living_rows():
    """The mask of a batch is the mask of its rows' summed evidence, whatever ended before."""
    model, watch = shared_model(), {**HALF, "masking_step": 1000}
    _, found, _ = run_batch(model, [0, 1, 2], *padded(), **HALF, masking_step=6)
    parts = [evidence_sums(run_alone(model, row, **watch)[0]) for row in (0, 1)]  # both have ended
    with prune(model, **watch) as third:
        generate(model, tokens(1, LENGTHS[2], seed=2), 7, logits_processor=[Forced(8, CHOSEN[2:])])
    total = _added([*parts, evidence_sums(third)])
    for kept, sums in zip(found[0][2], total, strict=True):
        top = sums["score"][0].sqrt().argsort(descending=True)[: len(kept)].sort().values
        assert torch.equal(kept, top)


@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_all_rows_alike(batch):
    """Rows with the same text get the mask and the logits of one row."""
    model, ids = shared_model(), tokens(1, 30)
    one, _, single = pruned(model, ids, 24, executor="masked")
    run, _, rows = pruned(model, ids.expand(3, -1), 24, executor="masked", batch=batch)
    assert apart(rows, single.expand(3, -1, -1)) < 1e-5
    assert same_masks(run.masks(), one.masks())
    assert run.report().prompt_tokens == 72 and run.report().decoded_tokens == 18


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rows_with_masks_of_their_own_in_multi_token_forwards(name):
    model, ids, cache = shared_model(name), tokens(3, 30), new_cache(shared_model(name))
    with prune(model, CONFIG, batch="per_row") as run:
        step(model, ids[:, :20], cache)
        with run.decoding():
            together = step(model, ids[:, 20:], cache)
    for row in range(3):
        _, _, single = pruned(model, ids[row : row + 1], 20, method=CONFIG, executor="masked")
        assert apart(together[row : row + 1], single[:, 20:]) < 2e-5


def test_one_prompt_continued_by_many_rows():
    """A cache that was repeated: the rows share the mask that the prompt made."""
    model, ids, more = shared_model(), tokens(1, 20), tokens(4, 5, seed=9)
    with prune(model, **HALF) as run:
        cache = new_cache(model)
        step(model, ids, cache)
        cache.batch_repeat_interleave(4)
        with run.decoding():
            rows = step(model, more, cache)
    assert run.report().decoded_tokens == 20 and run.report().achieved_sparsity == 0.5
    for row in range(4):
        with prune(model, **HALF):
            text = torch.cat([ids, more[row : row + 1]], 1)
            assert apart(rows[row : row + 1], decode(model, text, 20)[:, 20:]) < 1e-5


# rows that have ended: no window, no trigger, no mask and no token of theirs counts


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


@pytest.mark.parametrize("rule", ["published", "eager", "interval 2"])
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
        assert [c.step for c in mine] == [c.step for c in one.drift_checks]
        for a, b in zip(mine, one.drift_checks, strict=True):
            assert a.similarity == pytest.approx(b.similarity, abs=1e-4)
            assert (a.counter, a.trigger, a.state) == (b.counter, b.trigger, b.state)
        a, b = run.report().sequences[row], one.report().sequences[0]
        assert [(m.step, m.cause, m.kept) for m in a.remasks] == [
            (m.step, m.cause, m.kept) for m in b.remasks
        ]
        assert a.dense_tokens == b.dense_tokens and a.decoded_tokens == b.decoded_tokens
        single = torch.stack(alone.logits, 1)[0]
        assert apart(torch.stack(out.logits, 1)[row, : len(single)], single) < 2e-5
    wanted = {
        # 39, 21 and 33 tokens are fed; eager: masks at 7 and 26 (then 4 windows arm it anew)
        "eager": {"first": 3, "drift": 2 + 1 + 2},
        "interval 2": {"first": 3, "interval": 12 + 6 + 10},
    }
    assert run.report().remask_causes == wanted.get(rule, {"first": 3})


@pytest.mark.parametrize("rule", ["published", "paper", "eager"])
def test_shared_windows_leave_ended_rows_out(rule):
    """A batch whose other rows have ended decides as its living row would."""
    ids, live = tokens(3, 64, seed=3), tokens(1, 60, seed=20)[0].tolist()
    settings = {**HALF, "drift": rule, "score": "weight"}
    both, _ = forced(ids, [[5, 2], live, [6, 2]], settings)
    one, _ = forced(ids[[1]], [live], settings)
    mine = [(c.step, c.counter, c.trigger, c.state) for c in both.drift_checks if c.row == 1]
    assert mine == [(c.step, c.counter, c.trigger, c.state) for c in one.drift_checks]
    assert len(mine) > 4
    assert {c.row for c in both.drift_checks if c.step > 5} == {1}, "ended rows fill no window"
    assert both.report().decoded_tokens == one.report().decoded_tokens + 2


class _EndRow(StoppingCriteria):
    """Ends row 1 once it holds 23 tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[1] = input_ids.shape[1] >= 23
        return done


LIVE = [7, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("rows", "how", "decoded"),
    [
        # with an end token, padding cannot be told from a chosen pad token: that one is left out
        ([[7, 0, *LIVE[2:]], [12, 13, 14, 2]], {"pad_token_id": 0}, 4 + 3),
        ([[7, 0, *LIVE[2:]], [12, 13, 14, 2]], {"pad_token_id": 0, "eos_token_id": None}, 5 + 5),
        ([LIVE, [12, 13, 14, 2]], {"pad_token_id": 2}, 5 + 3),
        ([LIVE, [12, 13, 14, 2], [15, 5]], {"pad_token_id": 0, "eos_token_id": [2, 5]}, 5 + 3 + 1),
        # the last chosen token of a row that another criterion ends is fed as well
        (
            [LIVE, [12, 13, 14, 15]],
            {"pad_token_id": 0, "stopping_criteria": StoppingCriteriaList([_EndRow()])},
            5 + 3,
        ),
    ],
)
@pytest.mark.parametrize("batch", ["shared", "per_row"])
def test_tokens_of_rows_that_end(rows, how, decoded, batch):
    run, _ = forced(tokens(len(rows), 20), rows, {"batch": batch}, **how)
    assert run.report().decoded_tokens == decoded
