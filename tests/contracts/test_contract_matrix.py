"""Every method on every FFN shape and dtype: the promises that hold everywhere.

A new preset or budget is picked up by its registration, an architecture by tests/helpers/tiny.py.
Of each product a pairwise part runs; the whole product runs with ``-m full``.
"""

import functools
from itertools import product

import pytest
import torch

from dart_llm.pruning.registry import BUDGETS, METHODS
from prior_cases import SMALL, ready
from products import DTYPES, SHAPES, cases, in_turn
from steps import apart, decode, pruned, same_masks, shared_model, state_of
from tiny import NAMES, tokens

PROMPT, DECODED = 66, 4
"""More prompt tokens than any preset wants as evidence; too few decoded ones for a re-mask."""
IDS = tokens(1, PROMPT + DECODED, seed=3)

EVERY = tuple(METHODS.names())
DART = [*product(NAMES, ["dart"], DTYPES[:1]), *product(SHAPES, ["dart"], DTYPES)]
"""Every architecture, and every shape by dtype."""

decoded = functools.partial(pruned, ids=IDS, prompt=PROMPT, make=ready)


@functools.cache
def _dense(name, dtype=torch.float32):
    return decode(shared_model(name, dtype), IDS, PROMPT)


def _check_total(run, sparsity):
    report = run.report()
    total = sum(layer.width for layer in report.layers)
    assert abs(sum(layer.kept for layer in report.layers) - (1 - sparsity) * total) <= 1
    assert abs(report.achieved_sparsity - sparsity) <= 1 / total + 1e-9
    assert report.achieved_sparsity == pytest.approx(report.sparsity_while_pruned)
    assert report.decoded_tokens == DECODED and report.dense_token_share == 0


@pytest.mark.contract("sparsity 0 is bit-identical")
@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    cases([*DART, *product(SHAPES, EVERY, DTYPES[:1])], NAMES, EVERY, DTYPES),
    ids=str,
)
def test_sparsity_zero_is_bit_identical(name, method, dtype):
    run, masks, logits = decoded(shared_model(name, dtype), method=method, sparsity=0.0)
    assert torch.equal(logits, _dense(name, dtype))
    assert masks == []
    report = run.report()
    assert report.achieved_sparsity == 0 and report.decoded_tokens == DECODED
    assert report.ffn_bytes_share == 1


SPARSITIES = (0.05, 0.3, 0.75, 0.85)
EACH = tuple(product([*BUDGETS.names(), "blend uniform energy"], SPARSITIES))


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
def test_budgets(name, budget, sparsity):
    settings = {"budget": budget, "sparsity": sparsity, "compensation": True}
    run, masks, logits = decoded(shared_model(name), **settings)
    if sparsity > 0.1:  # below, all that goes may be neurons that a relu had silenced anyway
        assert apart(logits[:, PROMPT:], _dense(name)[:, PROMPT:]) > 1e-3
    _check_total(run, sparsity)
    for ids, layer in zip(masks[0][2], run.report().layers, strict=True):
        assert layer.kept == (layer.width if ids is None else len(ids))
        assert ids is None or (bool((ids[1:] > ids[:-1]).all()) and int(ids[-1]) < layer.width)


@pytest.mark.parametrize("name", SHAPES)
def test_auto_strategy_sets_its_own_counts(name):
    settings = {"score": {"name": "magnitude", "strategy": "auto"}, "sparsity": None}
    run, masks, masked = decoded(shared_model(name), executor="masked", **settings)
    report = run.report()
    assert report.requested_sparsity is None and 0 < report.achieved_sparsity < 1
    assert all(layer.kept >= 0.1 * layer.width - 1 for layer in report.layers)
    if not name.startswith("opt"):
        _, same, compact = decoded(shared_model(name), executor="compact", **settings)
        assert same_masks(masks[0][2], same[0][2])
        assert apart(compact, masked) < 3e-6


@pytest.mark.contract("allocation sums to the budget")
@pytest.mark.parametrize("name", SHAPES)
def test_tables_name_layers(name):
    settings = {"budget": {"table": "0:#5,2:0.5"}, "sparsity": None}
    run, masks, _ = decoded(shared_model(name), **settings)
    width = run.report().layers[0].width
    assert [layer.kept for layer in run.report().layers] == [5, width, width // 2, width]
    ids = masks[0][2]
    assert ids[1] is None and ids[3] is None and len(ids[0]) == 5 and len(ids[2]) == width // 2


def test_where_the_input_is_not_seen_the_mean_stands_for_the_removed_neurons():
    """OPT's layers hold the projections: there are no low-rank maps (others: test_work.py)."""
    settings = {"method": "dart", "self_stats": SMALL, "compensation_rank": 8}
    run, _, _ = decoded(shared_model("opt"), **settings)
    prior = run.config.self_stats.tokens
    for mask, layer in zip(run._newest_masks(), run.layers, strict=True):
        assert mask.low_rank is None and layer.basis is None
        observed = state_of(run).evidence[layer.index].sums["signed"]
        known = layer.self_stats.evidence.sums["signed"].mean
        mean = (observed.total + prior * known) / (observed.weight + prior)
        wanted = layer.down[:, mask.removed()] @ mean[mask.removed()]
        torch.testing.assert_close(mask.bias, wanted, rtol=1e-4, atol=1e-5)
