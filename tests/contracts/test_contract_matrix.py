"""Every method on every FFN shape, dtype and executor: the promises that hold everywhere.

A new preset, score or budget is picked up by its registration, an architecture by tests/tiny.py.
Of each product a pairwise part runs; the whole product runs with ``-m full``.
"""

from __future__ import annotations

import contextlib
import functools
from itertools import product

import pytest
import torch
from torch import Tensor

from calibrated import ready
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import BUDGETS, METHODS, SCORES
from products import SHAPES, cases, in_turn, method_cases
from steps import apart, decode, same_masks, selections, shared_model, widths_of
from tiny import tokens
from token_cases import Winners, kept_winners, same_winners

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference of the executors' logits, relative to the largest logit."""

PROMPT, DECODED = 66, 4
"""More prompt tokens than any preset wants as evidence; too few decoded ones for a re-mask."""

NO_MEMORY = ("weight", "random", "flap", "fisher")
"""Scores without activations, and those that refuse an ``ema_decay`` (tests/test_baselines.py)."""

SHORT_PRIOR = {"sequences": 2, "length": 24, "opening": 0}
"""A prior that is learnt in no time, for scores and methods that need one."""

RUNNABLE = tuple(name for name in METHODS.names() if METHODS.get(name).weight_bits is None)
"""dense-8bit and dense-4bit prune nothing and are no runs: tests/test_quantise.py."""

PRUNING = tuple(name for name in RUNNABLE if METHODS.get(name).sparsity != 0)


def _masked_only(name: str) -> bool:
    return name.startswith("opt")


def _ids() -> Tensor:
    return tokens(1, PROMPT + DECODED, seed=3)


@functools.cache
def _dense(name: str, dtype: torch.dtype) -> Tensor:
    return decode(shared_model(name, dtype), _ids(), PROMPT)


def _pruned(name: str, dtype: torch.dtype, method: str | PruneConfig, **settings):
    run = ready(shared_model(name, dtype), method, **settings)
    found = selections(run)
    with run:
        logits = decode(run.model, _ids(), PROMPT)
    return run, found, logits


def _check_pair(name: str, dtype: torch.dtype, method: str | PruneConfig, **settings) -> None:
    """Masked equals compact, both differ from dense, and remove what was asked for.

    Where tokens choose their own neurons, half precision rounds some choices otherwise, and one
    neuron is much in a layer of 48: then compact is given masked's choices, close to its own.
    """
    dense, winners, shares = _dense(name, dtype), Winners(), [1.0]
    chooses = PruneConfig.build(method).token is not None and dtype != torch.float32
    with kept_winners(winners) if chooses else contextlib.nullcontext():
        run, masks, masked = _pruned(name, dtype, method, executor="masked", **settings)
    assert run.executor == "masked"
    assert torch.equal(masked[:, :PROMPT], dense[:, :PROMPT])
    assert apart(masked[:, PROMPT:], dense[:, PROMPT:]) > 2 * TOLERANCE[dtype]
    assert len(masks) == 1 and masks[0][0] == 0
    _check_total(run, settings["sparsity"])
    if _masked_only(name):
        with pytest.raises(ConfigError, match="compact"):
            ready(shared_model(name, dtype), method, executor="compact", **settings)
        auto, same, again = _pruned(name, dtype, method, **settings)
        assert auto.executor == auto.report().executor == "masked"
        assert torch.equal(masked, again)
    else:
        with same_winners(winners, shares) if chooses else contextlib.nullcontext():
            auto, same, compact = _pruned(name, dtype, method, executor="compact", **settings)
        assert sum(shares) / len(shares) > 0.95
        assert apart(compact[:, PROMPT:], masked[:, PROMPT:]) < TOLERANCE[dtype]
        assert not torch.equal(compact[:, PROMPT:], dense[:, PROMPT:])
        assert ready(shared_model(name, dtype), method, **settings).executor == "compact"
    assert same_masks(same[0][2], masks[0][2])


def _check_total(run, sparsity: float) -> None:
    report = run.report()
    total = sum(widths_of(run))
    assert abs(sum(layer.kept for layer in report.layers) - (1 - sparsity) * total) <= 1
    assert abs(report.achieved_sparsity - sparsity) <= 1 / total + 1e-9
    assert report.achieved_sparsity == pytest.approx(report.sparsity_while_pruned)
    assert report.decoded_tokens == DECODED and report.dense_token_share == 0


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(("name", "method", "dtype"), method_cases(RUNNABLE), ids=str)
def test_sparsity_zero_is_bit_identical(name: str, method: str, dtype: torch.dtype) -> None:
    run, masks, logits = _pruned(name, dtype, method, sparsity=0.0)
    assert torch.equal(logits, _dense(name, dtype))
    assert masks == []
    report = run.report()
    assert report.achieved_sparsity == 0 and report.decoded_tokens == DECODED
    assert report.ffn_flops_share == report.ffn_bytes_share == 1


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(("name", "method", "dtype"), method_cases(PRUNING), ids=str)
def test_methods(name: str, method: str, dtype: torch.dtype) -> None:
    # half of the neurons, chosen anew by every token or helped by maps of a rank that is the tiny
    # model's whole hidden size, give nearly what all of them give
    config = METHODS.get(method)
    sparsity = 0.75 if config.token or config.compensation_rank else 0.5
    more = {} if config.prior is None else {"prior": SHORT_PRIOR}
    _check_pair(name, dtype, method, sparsity=sparsity, **more)


OF_WEIGHTS = ("contribution", "fisher", "max", "weight")
"""Scores that read weights as each shape stores them, or learn."""


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("name", "score"),
    cases(
        [*product(SHAPES[:1], SCORES.names()), *product(SHAPES, OF_WEIGHTS)],
        SHAPES,
        SCORES.names(),
    ),
)
def test_scores(name: str, score: str) -> None:
    more = {"prior": SHORT_PRIOR} if SCORES.get(score).learns else {}
    _check_pair(name, torch.float32, "griffin", score=score, sparsity=0.4, **more)


@pytest.mark.parametrize("score", [n for n in SCORES.names() if n not in NO_MEMORY])
def test_scores_with_memory(score: str) -> None:
    settings = {"score": {"name": score, "ema_decay": 0.9}, "sparsity": 0.4}
    _check_pair("llama-bias", torch.float32, "griffin", **settings)


SPARSITIES = (0.05, 0.3, 0.75, 0.85)
EACH = tuple(product([*BUDGETS.names(), "blend uniform global"], SPARSITIES))


@pytest.mark.contract("allocation sums to the budget")
@pytest.mark.parametrize(
    ("name", "budget", "sparsity"),
    cases(
        [(name, *each) for each, name in in_turn(EACH, SHAPES)],
        SHAPES,
        dict.fromkeys(budget for budget, _ in EACH),
        SPARSITIES,
    ),
)
def test_budgets(name: str, budget: str, sparsity: float) -> None:
    run, masks, logits = _pruned(
        name, torch.float32, "griffin", budget=budget, sparsity=sparsity, compensation=True
    )
    if sparsity > 0.1:  # below, all that goes may be neurons that a relu had silenced anyway
        assert apart(logits[:, PROMPT:], _dense(name, torch.float32)[:, PROMPT:]) > 1e-3
    _check_total(run, sparsity)
    kept = [
        width if ids is None else len(ids)
        for ids, width in zip(masks[0][2], widths_of(run), strict=True)
    ]
    assert kept == [layer.kept for layer in run.report().layers]
    assert all(
        ids is None or (bool((ids[1:] > ids[:-1]).all()) and int(ids[-1]) < width)
        for ids, width in zip(masks[0][2], widths_of(run), strict=True)
    )


BLENDED = (*BUDGETS.names(), "blend energy depth")


@pytest.mark.contract("masked equals compact")
@pytest.mark.parametrize(
    ("budget", "name"),
    cases(in_turn(BLENDED, SHAPES[:4]), BLENDED, SHAPES[:4]),
)
def test_budgets_agree_between_executors(name: str, budget: str) -> None:
    settings = {"budget": budget, "sparsity": 0.5, "compensation": True}
    _check_pair(name, torch.float32, "griffin", **settings)


@pytest.mark.parametrize("name", SHAPES)
def test_auto_strategy_sets_its_own_counts(name: str) -> None:
    settings = {"score": {"name": "magnitude", "strategy": "auto"}}
    run, masks, masked = _pruned(name, torch.float32, "griffin", executor="masked", **settings)
    report = run.report()
    assert report.requested_sparsity is None and 0 < report.achieved_sparsity < 1
    assert all(layer.kept >= 0.1 * layer.width - 1 for layer in report.layers)
    if not _masked_only(name):
        _, same, compact = _pruned(name, torch.float32, "griffin", executor="compact", **settings)
        assert same_masks(masks[0][2], same[0][2])
        assert apart(compact, masked) < TOLERANCE[torch.float32]


@pytest.mark.contract("allocation sums to the budget")
@pytest.mark.parametrize("name", SHAPES)
def test_tables_name_layers(name: str) -> None:
    table = "0:#5,2:0.5"
    run, masks, _ = _pruned(name, torch.float32, "griffin", budget={"table": table})
    width = widths_of(run)[0]
    assert [layer.kept for layer in run.report().layers] == [5, width, width // 2, width]
    ids = masks[0][2]
    assert ids[1] is None and ids[3] is None and len(ids[0]) == 5 and len(ids[2]) == width // 2
