"""The first tokens of a sequence leave no evidence: attention sinks, however they arrive."""

import pytest
import torch

from batch_cases import CHOSEN, LENGTHS, evidence_sums, padded, run_batch
from dart_llm.pruning.forward import ForwardCall, Kind, evidence_weights, without_sinks
from dart_llm.pruning.statistics import LayerPrior, LayerStatistics, Sum
from dart_llm.pruning.weights import with_prior
from dart_llm.session.run import prune
from observed_cases import dense_u
from prior_cases import CONFIG, SMALL
from steps import new_cache, pruned, same_masks, shared_model, step, written
from synthetic import Driver, Stream, config, ids_of, make_layers
from tiny import LAYERS, WIDTH, tokens

pytestmark = pytest.mark.contract("same report whatever the batch")

ONE, NIL = [1.0] * 9, [0.0] * 9


@pytest.mark.parametrize(
    ("valid", "before", "wanted"),
    [
        (None, [0.0], [[0, 0, 0, 0, 1, 1]]),
        (None, [1.0, 5.0], [[0, 0, 0, 1, 1], [1] * 5]),  # rows count for themselves
        (None, [3.0], [[0, 1]]),
        (None, [100.0], [[1, 1]]),
        # padding on the left is no token
        ([NIL[:3] + ONE[:6], ONE], [0.0, 0.0], [[0] * 7 + [1] * 2, [0] * 4 + [1] * 5]),
        ([ONE[:6] + NIL[:2]], [0.0], [[0, 0, 0, 0, 1, 1, 0, 0]]),  # nor on the right
        ([NIL[:3] + ONE[:3], ONE[:6]], [0.0, 0.0], [[0] * 6, [0, 0, 0, 0, 1, 1]]),
    ],
)
def test_the_first_four_weigh_nothing(valid, before, wanted):
    weights = None if valid is None else torch.tensor(valid)
    assert without_sinks(weights, before, len(wanted), len(wanted[0])).tolist() == wanted
    assert valid is None or weights.tolist() == valid, "the weights given are not changed"


def test_weights_of_a_forward():
    call = ForwardCall(Kind.PREFILL, 0, 6, 1)
    assert evidence_weights(call, 6, [0.0], False) is None
    assert evidence_weights(call, 6, [4.0], True) is None, "the sinks are behind"
    assert evidence_weights(call, 6, [0.0], True).tolist() == [[0, 0, 0, 0, 1, 1]]
    ended = ForwardCall(Kind.DECODE, 3, 2, 2, live=torch.tensor([True, False]))
    assert evidence_weights(ended, 2, [3.0, 9.0], True).tolist() == [[0, 1], [0, 0]]
    assert evidence_weights(ended, 2, [9.0, 9.0], True).tolist() == [[1, 1], [0, 0]]
    assert evidence_weights(ended, 1, [3.0, 9.0], False).tolist() == [[1], [0]]


WATCH = {"method": CONFIG, "masking_step": 1000}
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
    run, out = written(shared_model(name), ids, 11, WATCH, prefill_chunk_size=chunk)
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
    run, _, _ = run_batch(shared_model(name), [0, 1, 2], *padded(), **WATCH)
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
    learnt = [layer.learnt for layer in run.layers]
    scores = [one.evidence.sums["score"].mean * one.curvature for one in learnt]
    floors = [score.index_fill(0, score.topk(5).indices, torch.inf) for score in scores]
    kept = torch.cat([masks[layer] + WIDTH * layer for layer in range(LAYERS)])
    assert kept.tolist() == sorted(torch.cat(floors).topk(LAYERS * WIDTH // 2).indices.tolist())


def _layers():
    layers = make_layers()
    flat = {"score": Sum(torch.ones(20), 1.0), "signed": Sum(torch.zeros(20), 1.0)}
    return with_prior(
        layers, learnt=[LayerPrior(LayerStatistics(dict(flat)), torch.ones(20)) for _ in layers]
    )


@pytest.mark.parametrize(
    ("score", "chunks"),
    [("magnitude", (3, 37)), ("normalized", (1, 1, 1, 1, 36)), ("fisher", (40,))],
)
def test_masks_do_not_change_with_the_sinks(score, chunks):
    layers, found = _layers(), {}
    given = {"score": score, "prior": SMALL, "compensation": True, "drift": "interval 9"}
    for skip in (True, False):
        for scale in (1.0, 1e3):
            stream = Stream(layers)
            for u in stream.u:
                u[:, :4] = u[:, :4].flip(-1) * scale
            run = Driver(config(**given, skip_sinks=skip), layers=layers, stream=stream)
            for size in chunks:
                run.prefill(size)
            run.steps(12)
            plan = run.plans[len(chunks)]
            found[skip, scale] = ids_of(plan), torch.stack([mask.bias for mask in plan.masks[0]])
    assert found[True, 1.0][0] == found[True, 1e3][0]
    assert torch.equal(found[True, 1.0][1], found[True, 1e3][1])
    assert not torch.equal(found[False, 1.0][1], found[False, 1e3][1])


def test_rolled_back_sinks_count_again():
    """Six tokens, cut to two: the third and fourth that come anew are sinks still."""
    layers = _layers()
    stream = Stream(layers)
    made = config(score="magnitude", skip_sinks=True, prior=SMALL, masking_step=1000)
    run = Driver(made, layers=layers, stream=stream)
    run.prefill(1)
    run.decode(5)
    run.roll_back(4)
    run.steps(6)
    score = run.state.evidence[0].sums["score"]
    torch.testing.assert_close(score.total, stream.u[0][0, 4:8].square().sum(0))
    assert float(score.weight) == 4
