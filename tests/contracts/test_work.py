"""Pruned work is really skipped, and what is said of work and memory is what happens."""

import contextlib
import gc
import weakref
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dart_llm.models.checkpoint import digest_of
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import cases
from steps import decode, new_cache, shared_model, step, storages
from tiny import LAYERS, NAMES, WIDTH, tiny, tokens

SKIPPING = tuple(name for name in NAMES if not name.startswith("opt"))


def _flops(model, body):
    """(all FLOPs, FLOPs inside FFN modules) of ``body``."""
    with FlopCounterMode(display=False) as counter:
        body()
    counts = counter.get_flop_counts()
    ffn = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(".mlp"))
    return counter.get_total_flops(), ffn


def _one_decode_step(model):
    cache = new_cache(model)
    step(model, tokens(1, 70), cache)
    step(model, tokens(1, 1), cache)  # the mask is built and its copies are made
    return lambda: step(model, tokens(1, 1), cache)


SPARSITIES = (0.25, 0.5, 0.75)


@pytest.mark.contract("defects of the published scripts stay fixed")
@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "sparsity"),
    cases([*product(("phi3", "gpt2", "bloom"), [0.5]), ("llama", 0.25)], SKIPPING, SPARSITIES),
)
def test_flops_drop_by_the_stated_ratio(name, sparsity):
    model = shared_model(name)
    dense, dense_ffn = _flops(model, _one_decode_step(model))
    with prune(model, "griffin", sparsity=sparsity) as run:
        fewer, fewer_ffn = _flops(model, _one_decode_step(model))
        copied = [layer.kept.columns.shape[1] for layer in run.patch.layers]
    layers = run.report().layers
    kept, total = sum(layer.kept for layer in layers), sum(layer.width for layer in layers)
    assert kept == round((1 - sparsity) * total)
    assert copied == [layer.kept for layer in layers]
    assert fewer_ffn * total == dense_ffn * kept, "the FFN's FLOPs, exactly"
    assert dense - fewer == dense_ffn - fewer_ffn, "and nothing else changes"
    with prune(model, "griffin", sparsity=sparsity, executor="masked"):
        assert _flops(model, _one_decode_step(model)) == (dense, dense_ffn)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "method"),
    [("llama-bias", "dart-prompt"), ("phi3", "griffin"), ("gpt2", "dart-prompt")],
)
def test_the_report_states_what_the_counter_sees(name, method):
    """Over a whole decode: some tokens dense, some pruned; the rest is the cost of choosing."""
    model, ids = tiny(name), tokens(1, 70 + 20)
    settings = {"sparsity": 0.5, "masking_step": 2, "min_evidence": 0, "drift": "never"}
    prompt = _flops(model, lambda: step(model, ids[:, :70], new_cache(model)))[1]

    def decoded():
        return _flops(model, lambda: decode(model, ids, 70))[1] - prompt

    dense = decoded()
    with prune(model, method, **settings) as run:
        fewer = decoded()
    report = run.report()
    assert fewer / dense == pytest.approx((2 + 18 * 0.5) / 20), "matrix products alone"
    assert report.dense_token_share == pytest.approx(0.1)
    with prune(model, method, **settings, executor="masked") as run:
        assert decoded() == dense


@pytest.mark.contract("accounting equals a count by hooks")
def test_layers_that_stay_dense_are_not_counted_as_copied():
    for masks, decoded, wanted in (
        ({}, 4, 1.0),
        # one layer's half is saved; it is read and written once in 8 tokens
        ({0: range(WIDTH // 2)}, 8, 1 - 0.5 / LAYERS + 2 * 0.5 / LAYERS / 8),
    ):
        with prune(tiny(), masks=masks) as run:
            decode(run.model, tokens(1, 24 + decoded), 24)
        assert run.report().ffn_bytes_share == pytest.approx(wanted)


@pytest.mark.contract("accounting equals a count by hooks")
@pytest.mark.parametrize(
    ("name", "method", "executor"),
    [
        *(("llama-bias", "dart", executor) for executor in ("auto", "masked")),
        *(("gpt2", "published", "masked"), ("opt", "dart", "auto")),
        *(("llama-bias", "dart-token", "auto"), ("opt", "dart-token", "masked")),
    ],
)
def test_extra_memory_is_what_is_held(name, method, executor):
    model, ids = tiny(name), tokens(1, 75)
    decode(model, ids, 70)
    digest_of(torch.zeros(2048))  # whose factors stay, once per process
    before = storages()
    settings = {"self_stats": SMALL} if method.startswith("dart") else {}
    with prune(model, method, sparsity=0.5, executor=executor, **settings) as run:
        decode(model, ids, 70)
        held = sum(size for place, size in storages().items() if place not in before)
        said = run.report().extra_memory_bytes
    if "self_stats" in settings:  # the text that it learned from belongs to no run
        held -= SMALL["sequences"] * SMALL["length"] * torch.int64.itemsize
    assert held == pytest.approx(said, rel=0.02)
    assert said > 1000


@pytest.mark.contract("exact restore")
def test_nothing_of_an_attachment_is_left():
    """Copies go without any collection, the patch with one; the report says what was held."""
    run, alive = prune(tiny(), CONFIG), []
    with contextlib.suppress(RuntimeError), run:
        decode(run.model, tokens(1, 75), 70)
        for layer in run.patch.layers:
            alive.extend((weakref.ref(layer.kept.rows), weakref.ref(layer.kept.columns)))
        del layer
        alive.append(weakref.ref(run.patch))
        raise RuntimeError
    assert len(alive) == 9 and [ref() for ref in alive[:8]] == [None] * 8
    gc.collect()
    assert alive[8]() is None
    assert run.report().extra_memory_bytes > 40_000
