"""The first tokens of a sequence leave no evidence: attention sinks, however they arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batch_cases import CHOSEN, LENGTHS, evidence_sums, padded, run_batch
from dart_llm.models.describe import describe
from dart_llm.pruning.forward import ForwardCall as Call
from dart_llm.pruning.forward import Kind, evidence_weights, without_sinks
from dart_llm.pruning.statistics import LayerPrior, Sum
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from dart_llm.pruning.weights import FfnWeights
from dart_llm.pruning.weights import with_prior as knowing
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from steps import decode, generate, new_cache, shared_model, step
from synthetic import Driver, Stream, config, ids_of, make_layers
from tiny import LAYERS, WIDTH, tokens

# the weights of tokens


ONE, NIL = [1.0] * 9, [0.0] * 9


@pytest.mark.parametrize(
    ("valid", "before", "wanted"),
    [
        (None, [0.0], [[0, 0, 0, 0, 1, 1]]),
        (None, [0.0, 0.0], [[0, 0, 0]] * 2),
        (None, [1.0, 5.0], [[0, 0, 0, 1, 1], [1] * 5]),  # rows count for themselves
        (None, [2.0], [[0, 0]]),
        (None, [3.0], [[0, 1]]),
        (None, [100.0], [[1, 1]]),
        (  # padding on the left is no token
            [NIL[:3] + ONE[:6], ONE],
            [0.0, 0.0],
            [[0] * 7 + [1] * 2, [0] * 4 + [1] * 5],
        ),
        ([ONE[:6] + NIL[:2]], [0.0], [[0, 0, 0, 0, 1, 1, 0, 0]]),  # nor on the right
        ([NIL[:3] + ONE[:3], ONE[:6]], [0.0, 0.0], [[0] * 6, [0, 0, 0, 0, 1, 1]]),
    ],
)
def test_the_first_four_weigh_nothing(
    valid: list[list[float]] | None, before: list[float], wanted: list[list[int]]
) -> None:
    weights = None if valid is None else torch.tensor(valid)
    rows, tokens = len(wanted), len(wanted[0])
    assert without_sinks(weights, before, rows, tokens).tolist() == wanted
    assert valid is None or weights.tolist() == valid, "the weights given are not changed"


def test_weights_of_a_forward() -> None:
    call = Call(Kind.PREFILL, 0, 6, 1)
    assert evidence_weights(call, 6, [0.0], False) is None
    assert evidence_weights(call, 6, [4.0], True) is None, "the sinks are behind"
    assert evidence_weights(call, 6, [0.0], True).tolist() == [[0, 0, 0, 0, 1, 1]]
    ended = Call(Kind.DECODE, 3, 2, 2, live=torch.tensor([True, False]))
    assert evidence_weights(ended, 2, [3.0, 9.0], True).tolist() == [[0, 1], [0, 0]]
    assert evidence_weights(ended, 2, [9.0, 9.0], True).tolist() == [[1, 1], [0, 0]]
    assert evidence_weights(ended, 1, [3.0, 9.0], False).tolist() == [[1], [0]]


# models

NO_MASK = CONFIG.replace({"masking_step": 1000})
"""Everything is observed, nothing ever masked."""


def observed(model: Any, ids: Tensor) -> list[Tensor]:
    """u of every layer of a dense pass over one row, [T, I]."""
    found: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> None:
        found.append(args[0].detach().reshape(ids.shape[1], -1).clone())

    handles = [block.down.register_forward_pre_hook(take) for block in describe(model).blocks]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def check(run: Any, us: list[list[Tensor]]) -> None:
    """``run``'s newest sums are those over ``us[row][layer]`` [T, I] from token 4 on."""
    for layer, sums in enumerate(evidence_sums(run)):
        rows = [row[layer][4:] for row in us]
        every = torch.cat(rows)
        for name, wanted in (("score", every.square().sum(0)), ("signed", every.sum(0))):
            torch.testing.assert_close(sums[name][0], wanted, rtol=2e-4, atol=1e-4)
        assert {weight for _, weight in sums.values()} == {float(len(every))}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_a_prompt_and_decoded_tokens(name: str) -> None:
    model, ids = shared_model(name), tokens(1, 20, seed=6)
    with prune(model, NO_MASK) as run:
        decode(model, ids, 9)
    check(run, [observed(model, ids)])


@pytest.mark.parametrize("prompt", [1, 3, 4])
def test_short_prompts(prompt: int) -> None:
    """The sinks go on among the decoded tokens."""
    model, ids = shared_model(), tokens(1, 12, seed=6)
    with prune(model, NO_MASK) as run:
        decode(model, ids, prompt)
    check(run, [observed(model, ids)])


@pytest.mark.parametrize(("length", "chunk"), [(5, 2), (9, 1)])
def test_chunked_prompts(length: int, chunk: int) -> None:
    model, ids = shared_model(), tokens(1, length, seed=6)
    with prune(model, NO_MASK) as run:
        out = generate(model, ids, 6, prefill_chunk_size=chunk)
    check(run, [observed(model, out.sequences[:, :-1])])


def test_two_prompts_in_one_cache() -> None:
    """The second turn has no sinks of its own; a new cache does."""
    model, ids = shared_model(), tokens(1, 24, seed=6)
    with prune(model, NO_MASK) as run:
        step(model, tokens(1, 2), new_cache(model))
        cache = new_cache(model)
        for part in (slice(0, 3), slice(3, 10), slice(10, 24)):
            step(model, ids[:, part], cache)
        check(run, [observed(model, ids)])
        step(model, ids[:, :6], new_cache(model))
        check(run, [observed(model, ids[:, :6])])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_and_rows_that_end(name: str) -> None:
    model = shared_model(name)
    ids, mask = padded()
    run, _, _ = run_batch(model, [0, 1, 2], ids, mask, method=NO_MASK)
    rows = []
    for row, length in enumerate(LENGTHS):
        text = tokens(1, length, seed=row)[0].tolist() + CHOSEN[row][:-1]
        rows.append(observed(model, torch.tensor([text])))
    check(run, rows)


def test_rows_shorter_than_the_sinks() -> None:
    """Rows of 2 and 9 tokens: nothing is left of the one, whatever its masks are."""
    model = shared_model()
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0, 7:], mask[0, 7:] = tokens(1, 2, seed=1)[0], 1
    ids[1], mask[1] = tokens(1, 9, seed=2)[0], 1
    with prune(model, NO_MASK) as run:
        step(model, ids, new_cache(model), mask)
    check(run, [observed(model, tokens(1, 9, seed=2))])
    with prune(model, CONFIG, batch="per_row") as run:
        decode(
            model,
            torch.cat([ids, tokens(2, 3, seed=3)], 1),
            9,
            torch.cat([mask, torch.ones(2, 3)], 1).long(),
        )
    assert run.report().achieved_sparsity == pytest.approx(0.5)


def test_a_prompt_of_sinks_alone_is_pruned_by_the_prior() -> None:
    """Whatever the three tokens are, the masks are those of the prior's scores."""
    model, masks = shared_model(), []
    for seed in (1, 2):
        with prune(model, CONFIG) as run:
            decode(model, tokens(1, 8, seed=seed), 3)
        assert run.report().dense_token_share == 0
        masks.append(run.masks())
    assert all(torch.equal(masks[0][layer], masks[1][layer]) for layer in range(LAYERS))
    learnt = [layer.learnt for layer in run.layers]
    scores = [one.evidence.sums["score"].mean * one.curvature for one in learnt]
    floors = [score.index_fill(0, score.topk(5).indices, torch.inf) for score in scores]
    kept = torch.cat([masks[0][layer] + WIDTH * layer for layer in range(LAYERS)])
    assert kept.tolist() == sorted(torch.cat(floors).topk(LAYERS * WIDTH // 2).indices.tolist())


# masks do not follow the sinks


def _layers() -> tuple[FfnWeights, ...]:
    layers = make_layers()
    flat = {"score": Sum(torch.ones(20), 1.0), "signed": Sum(torch.zeros(20), 1.0)}
    return knowing(
        layers, learnt=[LayerPrior(LayerEvidence(dict(flat)), torch.ones(20)) for _ in layers]
    )


@pytest.mark.parametrize(
    ("score", "chunks"),
    [("magnitude", (3, 37)), ("normalized", (1, 1, 1, 1, 36)), ("fisher", (40,))],
)
def test_masks_do_not_change_with_the_sinks(score: str, chunks: tuple[int, ...]) -> None:
    layers, found = _layers(), {}
    for skip in (True, False):
        for scale in (1.0, 1e3):
            stream = Stream(layers)
            for u in stream.u:
                u[:, :4] = u[:, :4].flip(-1) * scale
            made = config(
                score=score, skip_sinks=skip, prior=SMALL, compensation=True, drift="interval 9"
            )
            run = Driver(made, layers=layers, stream=stream)
            for size in chunks:
                run.prefill(size)
            run.steps(12)
            biases = [mask.bias for mask in run.plans[len(chunks)].masks[0]]
            found[skip, scale] = (ids_of(run.plans[len(chunks)]), biases)
    same, other = found[True, 1.0], found[True, 1e3]
    assert same[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(same[1], other[1], strict=True))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(*(found[False, s][1] for s in (1.0, 1e3)), strict=True)
    )


def test_rolled_back_sinks_count_again() -> None:
    """Six tokens, cut to two: the third and fourth that come anew are sinks still."""
    layers = _layers()
    stream = Stream(layers)
    run = Driver(
        config(score="magnitude", skip_sinks=True, prior=SMALL, masking_step=1000),
        layers=layers,
        stream=stream,
    )
    run.prefill(1)
    run.decode(5)
    run.roll_back(4)
    run.steps(6)
    wanted, score = stream.u[0][0, 4:8].square().sum(0), run.state.evidence[0].sums["score"]
    torch.testing.assert_close(score.total, wanted)
    assert float(score.weight) == 4
