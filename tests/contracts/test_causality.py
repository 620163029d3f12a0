"""Later tokens never reach back, neither directly nor through the masks."""

from itertools import product

import pytest
import torch

import steps
from dart_llm.evaluation.likelihood import score_context
from dart_llm.pruning.registry import METHODS as PRESETS
from dart_llm.pruning.registry import TOKEN_RULES
from dart_llm.session.run import prune
from prior_cases import SMALL
from tiny import tokens

SHAPES = ("llama", "gemma2", "phi3", "gpt2", "opt")
PROMPT, LENGTH, CHANGED = 12, 48, 35
"""Tokens from index CHANGED on differ between the two texts."""

LEARNT = {"sparsity": 0.5, "self_stats": SMALL}
INTERVAL = LEARNT | {"method": "dart", "min_evidence": 0}
INTERVAL |= {"remask": {"observe_tokens": 3}}
INTERVAL |= {"drift": {"rule": "interval 8", "min_distance": 0, "max_dense_share": 1.0}}
METHODS = {
    "dart": INTERVAL,
    "griffin": steps.HALF,
    # enough observed tokens for the detector to be armed when pruning begins
    "published": {"method": "published", "sparsity": 0.5, "masking_step": 21},
    "dart-token": {"method": "dart-token", **LEARNT},
}
RULES = [name for name in TOKEN_RULES.names() if name != "low-bit"]
"""Per-token rules other than that of dart-token."""
for rule in RULES:
    preset = rule if rule in PRESETS else "cats"
    METHODS[rule] = {"method": preset, "token": {"rule": rule}, "sparsity": 0.5}
FIRST, SECOND = tokens(1, LENGTH, seed=1), tokens(1, LENGTH, seed=1)
SECOND[:, CHANGED:] = tokens(1, LENGTH - CHANGED, seed=2)


@pytest.mark.contract("defects of the published scripts stay fixed")
@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("name", "executor", "method"),
    [
        *product(SHAPES, ["auto"], ["dart"]),
        *product(SHAPES[:1], ["auto", "masked"], ["griffin", "published", "dart-token"]),
        ("llama", "masked", "dart"),
        *product(["gpt2", "opt"], ["auto"], ["griffin", "published", "dart-token"]),
        *product(SHAPES, ["auto"], ["teal-attention"]),
        *product(["llama", "phi3", "opt"], ["masked"], RULES),
    ],
)
def test_later_tokens_do_not_change_earlier_logits(name, executor, method):
    model, settings = steps.shared_model(name), {**METHODS[method], "executor": executor}
    run, masks_a, first = steps.pruned(model, FIRST, PROMPT, **settings)
    _, masks_b, second = steps.pruned(model, SECOND, PROMPT, **settings)
    assert torch.equal(first[:, :CHANGED], second[:, :CHANGED])
    assert steps.apart(first[:, CHANGED:], second[:, CHANGED:]) > 0.1
    assert torch.equal(first[:, :PROMPT], steps.decode(model, FIRST[:, :PROMPT], PROMPT))
    known = CHANGED - PROMPT  # decode steps before the first token that differs
    early = [(a, b) for a, b in zip(masks_a, masks_b, strict=False) if a[0] <= known]
    assert early and all(a[0] == b[0] and steps.same_masks(a[2], b[2]) for a, b in early)
    if method == "dart":
        assert [mask[0] for mask in masks_a] == [0, 11, 22, 33] and len(early) == 3
        assert not steps.same_masks(masks_a[3][2], masks_b[3][2])
    if method == "published":
        assert any(check.threshold is not None for check in run.drift_checks)


@pytest.mark.contract("causality")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *product(SHAPES, ["dart"]),
        *product(["llama", "opt"], ["griffin", "dart-token", "teal-attention", "cats"]),
    ],
)
def test_teacher_forced_chunks(name, method):
    """run.decoding(): one forward of many tokens is causal, and equals token by token."""
    model, logits = steps.shared_model(name), []
    settings = {"method": method, "sparsity": 0.5, "min_evidence": 0, "drift": "never"}
    settings |= {"self_stats": SMALL} if method.startswith("dart") else {}
    for ids in (FIRST, SECOND):
        with prune(model, **settings) as run:
            cache = steps.new_cache(model)
            prompt = steps.step(model, ids[:, :PROMPT], cache)
            assert run.tokens_until_change() is None
            with run.decoding():
                logits.append(torch.cat([prompt, steps.step(model, ids[:, PROMPT:], cache)], 1))
        assert run.report().decoded_tokens == LENGTH - PROMPT
        assert run.report().achieved_sparsity == 0.5
    assert torch.equal(logits[0][:, :CHANGED], logits[1][:, :CHANGED])
    _, _, single = steps.pruned(model, FIRST, PROMPT, **settings)
    assert steps.apart(logits[0], single) < 1e-5


@pytest.mark.contract("causality")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_chunks_up_to_the_next_change_and_generate_equal_single_tokens(name):
    """generate is made to choose the same tokens: what held above holds there."""
    model, sizes = steps.shared_model(name), []
    one, masks, single = steps.pruned(model, FIRST, PROMPT, **INTERVAL)
    run = prune(model, **INTERVAL)
    same = steps.selections(run)
    with run, run.decoding():
        cache, start = steps.new_cache(model), PROMPT
        parts = [steps.step(model, FIRST[:, :PROMPT], cache)]
        while start < LENGTH:
            size = min(run.tokens_until_change() or LENGTH, LENGTH - start)
            parts.append(steps.step(model, FIRST[:, start : start + size], cache))
            sizes.append(size)
            start += size
    assert sizes == [8, 3, 8, 3, 8, 3, 3]
    assert steps.apart(torch.cat(parts, 1), single) < 1e-5
    a, b = run.report(), one.report()
    assert a.achieved_sparsity == b.achieved_sparsity and a.decoded_tokens == b.decoded_tokens
    assert a.dense_token_share == b.dense_token_share == pytest.approx(9 / 36)
    with prune(model, **INTERVAL) as run:
        written = steps.selections(run)
        forced = steps.Forced(PROMPT, [FIRST[0, PROMPT:].tolist()])
        out = steps.generate(model, FIRST[:, :PROMPT], LENGTH - PROMPT, logits_processor=[forced])
    assert torch.equal(out.sequences, FIRST)
    assert steps.apart(torch.stack(out.logits, 1), single[:, PROMPT - 1 : -1]) < 1e-5
    for selected in (same, written):
        assert [mask[0] for mask in selected] == [mask[0] for mask in masks]
        assert all(steps.same_masks(a[2], b[2]) for a, b in zip(selected, masks, strict=True))


@pytest.mark.contract("answer tokens never in masks")
@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_an_answer_that_is_scored_changes_no_mask(method):
    """Nor does it change what the tokens before it say: only the prompt chooses."""
    model, context, selected = steps.shared_model(), tokens(1, 30)[0].tolist(), []
    settings = {} if method == "griffin" else {"self_stats": SMALL}
    for seed in (1, 2):
        answer = tokens(1, 6, seed=seed)[0].tolist()
        run = prune(model, method, sparsity=0.5, **settings)
        masks = steps.selections(run)
        with run:
            (scored,), _ = score_context(model, run, context, [answer], "decode")
        selected.append(masks)
        assert len(scored.losses) == 6 and len(masks) == 1
    assert steps.same_masks(selected[0][0][2], selected[1][0][2])
