"""Pruned work is really skipped, and what is said of work and memory is what happens."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dart_llm.models.fingerprint import digest_of
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import cases
from steps import decode, new_cache, selections, shared_model, step, storages
from tiny import NAMES, tiny, tokens

SKIPPING = tuple(name for name in NAMES if not name.startswith("opt"))


def _flops(model: Any, body: Callable[[], Any]) -> tuple[int, int]:
    """(all FLOPs, FLOPs inside FFN modules) of ``body``."""
    with FlopCounterMode(display=False) as counter:
        body()
    found = counter.get_flop_counts()
    ffn = sum(sum(ops.values()) for name, ops in found.items() if name.endswith(".mlp"))
    return counter.get_total_flops(), ffn


def _one_decode_step(model: Any) -> Callable[[], Any]:
    cache = new_cache(model)
    step(model, tokens(1, 70), cache)
    step(model, tokens(1, 1), cache)  # the mask is built and its copies are made
    return lambda: step(model, tokens(1, 1), cache)


SPARSITIES = (0.25, 0.5, 0.75)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "sparsity"),
    cases(
        [*product(SKIPPING, [0.5]), *product(["llama", "gpt2"], SPARSITIES)], SKIPPING, SPARSITIES
    ),
)
def test_flops_drop_by_the_stated_ratio(name: str, sparsity: float) -> None:
    model = shared_model(name)
    dense, dense_ffn = _flops(model, _one_decode_step(model))
    with prune(model, "griffin", sparsity=sparsity) as run:
        pruned, pruned_ffn = _flops(model, _one_decode_step(model))
    layers = run.report().layers
    kept, total = sum(layer.kept for layer in layers), sum(layer.width for layer in layers)
    assert kept == round((1 - sparsity) * total)
    assert pruned_ffn * total == dense_ffn * kept, "the FFN's FLOPs, exactly"
    assert dense - pruned == dense_ffn - pruned_ffn, "and nothing else changes"
    with prune(model, "griffin", sparsity=sparsity, executor="masked"):
        assert _flops(model, _one_decode_step(model)) == (dense, dense_ffn)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama-bias", "dart-prompt"),
        ("phi3", "griffin"),
        ("gpt2", "dart-prompt"),
        ("falcon", "published"),
    ],
)
def test_the_report_states_what_the_counter_sees(name: str, method: str) -> None:
    """Over a whole decode: some tokens dense, some pruned; the rest is the cost of choosing."""
    model, ids = tiny(name), tokens(1, 70 + 20)
    settings = {"sparsity": 0.5, "masking_step": 2, "min_evidence": 0, "drift": "never"}
    prompt = _flops(model, lambda: step(model, ids[:, :70], new_cache(model)))[1]

    def decoded() -> int:
        return _flops(model, lambda: decode(model, ids, 70))[1] - prompt

    dense = decoded()
    with prune(model, method, **settings) as run:
        pruned = decoded()
    report = run.report()
    assert pruned / dense == pytest.approx((2 + 18 * 0.5) / 20), "matrix products alone"
    assert report.dense_token_share == pytest.approx(0.1)
    assert pruned / dense <= report.ffn_flops_share <= pruned / dense + 0.08
    assert report.ffn_flops_share == report.ffn_flops_share_if_compact
    with prune(model, method, **settings, executor="masked") as run:
        assert decoded() == dense
    # as executed: all of the products, and the cost of choosing on top
    assert 1 <= run.report().ffn_flops_share <= 1.08
    assert run.report().ffn_flops_share_if_compact == pytest.approx(report.ffn_flops_share)


def test_opt_says_that_it_skips_nothing() -> None:
    model = shared_model("opt")
    with prune(model, "griffin", sparsity=0.5) as run:
        decode(model, tokens(1, 90), 70)
    report = run.report()
    assert report.executor == "masked" and report.achieved_sparsity == 0.5
    assert report.ffn_flops_share >= 1 and report.ffn_bytes_share >= 1
    assert report.ffn_flops_share_if_compact < 0.6


def _buffers(layers: list[Any]) -> list[list[int]]:
    names = ("rows", "columns", "row_bias", "bias")
    held = [[getattr(layer.kept, name) for name in names] for layer in layers]
    return [[t.data_ptr() for t in parts if t is not None] for parts in held]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama-bias", "griffin"),
        ("phi3", "dart-prompt"),
        ("gpt2", "dart-prompt"),
        ("falcon", "griffin"),
    ],
)
def test_buffers_are_refilled_in_place(name: str, method: str) -> None:
    model = shared_model(name)
    drift = {"rule": "interval 4", "min_distance": 0, "max_dense_share": 1.0}
    run = prune(model, method, sparsity=0.5, min_evidence=0, drift=drift)
    found = selections(run)
    with run:
        cache, ids = new_cache(model), tokens(1, 30 + 40, seed=2)
        step(model, ids[:, :30], cache)
        seen, contents = [], []
        for at in range(30, 70):
            step(model, ids[:, at : at + 1], cache)
            layers = run.patch.layers
            seen.append(_buffers(layers))
            contents.append(layers[0].kept.columns.clone())
    assert len(found) >= 2 and all(len(place) == len(seen[0]) for place in seen)
    assert seen == [seen[0]] * 40 and len(seen[0][0]) >= 2
    assert not torch.equal(contents[0], contents[-1])
    kept = found[-1][2][0]
    down = model.get_decoder().layers[0].mlp if hasattr(model.get_decoder(), "layers") else None
    if down is not None and hasattr(down, "down_proj"):
        assert torch.equal(contents[-1], down.down_proj.weight[:, kept])


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "method", "executor"),
    [
        ("llama-bias", "dart", "auto"),
        ("llama-bias", "dart", "masked"),
        ("phi3", "griffin", "auto"),
        ("gpt2", "published", "masked"),
        ("opt", "dart", "auto"),
        ("llama-bias", "dart-token", "auto"),
        ("opt", "dart-token", "masked"),
    ],
)
def test_extra_memory_is_what_is_held(name: str, method: str, executor: str) -> None:
    model, ids = tiny(name), tokens(1, 75)
    decode(model, ids, 70)
    digest_of(torch.zeros(2048))  # whose factors stay, once per process
    before = storages()
    settings = {"prior": SMALL} if method.startswith("dart") else {}
    with prune(model, method, sparsity=0.5, executor=executor, **settings) as run:
        decode(model, ids, 70)
        held = sum(size for place, size in storages().items() if place not in before)
        said = run.report().extra_memory_bytes
    assert held == pytest.approx(said, rel=0.02)
    assert said > 1000


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_no_copy_is_alive_after_the_block(error: type[Exception] | None) -> None:
    model = tiny()
    alive: list[weakref.ref[Any]] = []

    def body() -> None:
        with prune(model, CONFIG) as run:
            decode(model, tokens(1, 75), 70)
            layers = run.patch.layers
            alive.extend(weakref.ref(layer.kept.rows) for layer in layers)
            alive.extend(weakref.ref(layer.kept.columns) for layer in layers)
            assert all(ref() is not None for ref in alive)
            layers = None
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    assert len(alive) == 8 and [ref() for ref in alive] == [None] * 8, "without any collection"


def test_nothing_of_an_attachment_is_left() -> None:
    model = tiny()
    run = prune(model, CONFIG)
    with run:
        decode(model, tokens(1, 75), 70)
        kind = weakref.ref(run.patch)
    gc.collect()
    assert kind() is None
    assert run.report().extra_memory_bytes > 40_000, "the report still says what was held"
