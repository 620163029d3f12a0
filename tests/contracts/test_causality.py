"""Later tokens never reach back, neither directly nor through the masks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dart_llm.evaluation.likelihood import score_context
from dart_llm.session.run import prune
from prior_cases import SMALL
from products import cases
from steps import (
    Forced,
    apart,
    decode,
    generate,
    new_cache,
    same_masks,
    selections,
    shared_model,
    step,
)
from tiny import VOCAB, tokens

SHAPES = ("llama", "gemma2", "phi3", "gpt2", "falcon", "opt")
PROMPT, LENGTH, CHANGED = 12, 48, 35
"""Tokens from index CHANGED on differ between the two texts."""

INTERVAL: dict[str, Any] = {
    "sparsity": 0.5,
    "prior": SMALL,
    "min_evidence": 0,
    "drift": {"rule": "interval 8", "min_distance": 0, "max_dense_share": 1.0},
    "remask": {"observe_tokens": 3},
}
PUBLISHED: dict[str, Any] = {"sparsity": 0.5, "masking_step": 21}
"""Enough observed tokens for the detector to be armed when pruning begins."""


def _two_texts() -> tuple[Tensor, Tensor]:
    first = tokens(1, LENGTH, seed=1)
    second = first.clone()
    second[:, CHANGED:] = tokens(1, LENGTH - CHANGED, seed=2)
    assert bool((first != second)[:, CHANGED:].any())
    return first, second


def _traced(name: str, method: str, ids: Tensor, settings: dict[str, Any]):
    run = prune(shared_model(name), method, **settings)
    found = selections(run)
    with run:
        logits = decode(run.model, ids, PROMPT)
    return logits, found, run


METHODS = {
    "dart": INTERVAL,
    "griffin": {"sparsity": 0.5},
    "published": PUBLISHED,
    "dart-token": {"sparsity": 0.5, "prior": SMALL},
}
EXECUTORS = ("auto", "masked")


@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("name", "executor", "method"),
    cases(
        [
            *product(SHAPES, EXECUTORS[:1], ["dart"]),
            *product(SHAPES[:1], EXECUTORS, METHODS),
            *product(["gpt2", "opt"], EXECUTORS[:1], METHODS),
        ],
        SHAPES,
        EXECUTORS,
        METHODS,
    ),
)
def test_later_tokens_do_not_change_earlier_logits(name: str, executor: str, method: str) -> None:
    texts, settings = _two_texts(), METHODS[method]
    (first, masks_a, run), (second, masks_b, _) = (
        _traced(name, method, ids, {**settings, "executor": executor}) for ids in texts
    )
    assert torch.equal(first[:, :CHANGED], second[:, :CHANGED])
    assert apart(first[:, CHANGED:], second[:, CHANGED:]) > 0.1
    known = CHANGED - PROMPT  # decode steps before the first token that differs
    early = [(a, b) for a, b in zip(masks_a, masks_b, strict=False) if a[0] <= known]
    assert early and all(a[0] == b[0] and same_masks(a[2], b[2]) for a, b in early)
    if method == "dart":
        assert [mask[0] for mask in masks_a] == [0, 11, 22, 33]
        assert len(early) == 3
        assert not same_masks(masks_a[3][2], masks_b[3][2])
    if method == "published":
        assert any(check.threshold is not None for check in run.drift_checks)


@pytest.mark.contract("causality")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_masks_are_a_function_of_the_tokens_before_them(name: str) -> None:
    """Every mask is the same when the text ends right before its first use."""
    ids = tokens(1, LENGTH, seed=1)
    _, masks, _ = _traced(name, "dart", ids, INTERVAL)
    assert [mask[0] for mask in masks] == [0, 11, 22, 33]
    for index, (first_use, _, kept) in enumerate(masks):
        before = PROMPT + first_use
        other = torch.cat([ids[:, :before], tokens(1, 2, seed=9)], 1)
        _, again, _ = _traced(name, "dart", other, INTERVAL)
        assert same_masks(again[index][2], kept)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 7) % (VOCAB - 3) + 3
    _, others, _ = _traced(name, "dart", changed, INTERVAL)
    assert not same_masks(others[0][2], masks[0][2])


CHUNKED = ("dart", "griffin", "dart-token")


@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("name", "method"),
    cases([*product(SHAPES, CHUNKED[:1]), *product(["llama", "opt"], CHUNKED)], SHAPES, CHUNKED),
)
def test_teacher_forced_chunks(name: str, method: str) -> None:
    """run.decoding(): one forward of many tokens is causal, and equals token by token."""
    model, found = shared_model(name), []
    settings = {"sparsity": 0.5, "min_evidence": 0, "drift": "never"}
    settings |= {} if method == "griffin" else {"prior": SMALL}
    for ids in _two_texts():
        with prune(model, method, **settings) as run:
            cache = new_cache(model)
            prompt = step(model, ids[:, :PROMPT], cache)
            assert run.tokens_until_change() is None
            with run.decoding():
                found.append(torch.cat([prompt, step(model, ids[:, PROMPT:], cache)], 1))
        assert run.report().decoded_tokens == LENGTH - PROMPT
        assert run.report().achieved_sparsity == 0.5
    assert torch.equal(found[0][:, :CHANGED], found[1][:, :CHANGED])
    single, _, _ = _traced(name, method, _two_texts()[0], settings)
    assert apart(found[0], single) < 1e-5


def test_chunks_bounded_by_the_next_change_equal_single_tokens() -> None:
    ids, model = tokens(1, LENGTH, seed=1), shared_model()
    single, masks, one = _traced("llama", "dart", ids, INTERVAL)
    run = prune(model, "dart", **INTERVAL)
    same, sizes = selections(run), []
    with run, run.decoding():
        cache, start = new_cache(model), PROMPT
        parts = [step(model, ids[:, :PROMPT], cache)]
        while start < LENGTH:
            size = min(run.tokens_until_change() or LENGTH, LENGTH - start)
            parts.append(step(model, ids[:, start : start + size], cache))
            sizes.append(size)
            start += size
    assert sizes == [8, 3, 8, 3, 8, 3, 3]
    assert apart(torch.cat(parts, 1), single) < 1e-5
    assert [m[0] for m in same] == [m[0] for m in masks]
    assert all(same_masks(a[2], b[2]) for a, b in zip(same, masks, strict=True))
    a, b = run.report(), one.report()
    assert a.achieved_sparsity == b.achieved_sparsity and a.decoded_tokens == b.decoded_tokens
    assert a.dense_token_share == b.dense_token_share == pytest.approx(9 / 36)


@pytest.mark.contract("causality")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generate(name: str) -> None:
    """The same through generate, whose choices are forced."""
    found = []
    for ids in _two_texts():
        run = prune(shared_model(name), "dart", **INTERVAL)
        masks = selections(run)
        forced = Forced(PROMPT, [ids[0, PROMPT:].tolist()])
        with run:
            out = generate(run.model, ids[:, :PROMPT], LENGTH - PROMPT, logits_processor=[forced])
        assert torch.equal(out.sequences, ids)
        found.append((torch.stack(out.logits, 1), masks))
    (first, masks_a), (second, masks_b) = found
    same = CHANGED - PROMPT + 1  # logits i follow token PROMPT + i - 1
    assert torch.equal(first[:, :same], second[:, :same])
    assert not torch.equal(first[:, same:], second[:, same:])
    assert [mask[0] for mask in masks_a] == [0, 11, 22, 33]
    assert all(same_masks(a[2], b[2]) for a, b in zip(masks_a[:3], masks_b[:3], strict=True))
    single, masks, _ = _traced(name, "dart", _two_texts()[0], INTERVAL)
    assert apart(first, single[:, PROMPT - 1 : -1]) < 1e-5
    assert all(same_masks(a[2], b[2]) for a, b in zip(masks_a, masks, strict=True))


@pytest.mark.contract("answer tokens never in masks")
@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_an_answer_that_is_scored_changes_no_mask(method: str) -> None:
    """Nor does it change what the tokens before it say: only the prompt chooses."""
    model, context, found = shared_model(), tokens(1, 30)[0].tolist(), []
    settings = {} if method == "griffin" else {"prior": SMALL}
    for seed in (1, 2):
        answer = tokens(1, 6, seed=seed)[0].tolist()
        run = prune(model, method, sparsity=0.5, **settings)
        masks = selections(run)
        with run:
            (scored,), _ = score_context(model, run, context, [answer], "decode")
        found.append(masks)
        assert len(scored.losses) == 6 and len(masks) == 1
    assert same_masks(found[0][0][2], found[1][0][2])


@pytest.mark.contract("causality")
def test_the_first_mask_comes_from_the_prompt_alone() -> None:
    """Masking step 0: the prompt runs dense, and the mask is applied from the next token on."""
    model, ids = shared_model(), tokens(1, 30)
    dense = decode(model, ids, 20)
    with prune(model, "griffin", sparsity=0.5) as run:
        pruned = decode(model, ids, 20)
    assert torch.equal(pruned[:, :20], dense[:, :20])
    assert apart(pruned[:, 20:], dense[:, 20:]) > 1e-2
    first = run.masks()
    other = torch.cat([ids[:, :20], tokens(1, 10, seed=4)], 1)
    with prune(model, "griffin", sparsity=0.5) as run:
        decode(model, other, 20)
    assert all(torch.equal(first[layer], kept) for layer, kept in run.masks().items())
