"""After a run the model is exactly what it was, however the run ended."""

from __future__ import annotations

import contextlib
import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import dart_llm
from dart_llm.errors import AttachError
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import SHAPES, cases
from steps import Forced, Same, decode, generate, shared_model
from tiny import NAMES, tiny, tokens

METHODS = ("griffin", "dart", "dart-token", "published", "static", "dense")


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("name", "method"),
    cases([*product(NAMES, METHODS[:1]), *product(SHAPES, METHODS)], NAMES, METHODS),
)
def test_normal_exit(name: str, method: str) -> None:
    model = shared_model(name)
    settings = {"prior": SMALL} if method.startswith("dart") else {}
    settings |= {} if method == "dense" else {"sparsity": 0.5}
    with Same(model), prune(model, method, **settings) as run:
        generate(model, tokens(2, 70), 8)
    assert run.report().decoded_tokens == 14


def test_nested_blocks_are_refused() -> None:
    model = shared_model()
    with Same(model):
        with prune(model, "griffin", sparsity=0.5) as run:
            inner = prune(model, "dart")
            with pytest.raises(AttachError, match=r"dart_llm\.restore\(model\)"):
                inner.attach()
            with pytest.raises(AttachError, match="attached already"):
                run.attach()
            with pytest.raises(AttachError, match="restore"), prune(model.model, "griffin"):
                pass
            generate(model, tokens(), 4)
        assert run.report().decoded_tokens == 3
        inner.detach()


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_error_in_the_block(name: str) -> None:
    """Also between re-masks, and with maps of the FFN's input."""
    model, drift = shared_model(name), {"rule": "interval 4", "min_distance": 0}
    with (
        Same(model),
        contextlib.suppress(ZeroDivisionError),
        prune(model, CONFIG, drift=drift, remask={"observe_tokens": 2}),
    ):
        generate(model, tokens(1, 30), 8)
        raise ZeroDivisionError


@pytest.mark.contract("exact restore")
def test_attach_and_detach() -> None:
    model, found = shared_model(), []
    run = prune(model, "griffin", sparsity=0.5)
    for _ in range(2):
        with Same(model):
            run.attach()
            run.reset()
            found.append(generate(model, tokens(), 8).sequences)
            run.detach()
            run.detach()
    assert torch.equal(*found) and run.report().decoded_tokens == 7


@pytest.mark.contract("exact restore")
def test_restore_is_always_safe() -> None:
    model = shared_model()
    dart_llm.restore(model)
    dart_llm.restore(nn.Linear(2, 2))
    with Same(model):
        run = prune(model, "griffin", sparsity=0.5).attach()
        generate(model, tokens(), 4)
        dart_llm.restore(model)
        dart_llm.restore(model)
    with Same(model):
        assert run.report().decoded_tokens == 3
        with pytest.raises(AttachError, match="attached run"), run.decoding():
            pass
        with run:
            generate(model, tokens(), 4)
        assert run.report().decoded_tokens == 6
    with Same(model):
        old = prune(model, "griffin", sparsity=0.5).attach()
        dart_llm.restore(model.model)
        with prune(model, "griffin", sparsity=0.25) as new:
            old.detach()
            generate(model, tokens(), 4)
        assert new.report().achieved_sparsity == 0.25
        with old:
            dart_llm.restore(model)


@pytest.mark.contract("exact restore")
def test_forwards_and_hooks_of_the_user_stay() -> None:
    model = tiny()
    mlp, calls = model.model.layers[1].mlp, []
    plain = mlp.forward

    def own(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[1])
        return plain(x)

    mlp.forward = own
    model.generate = model.generate
    handles = [model.register_forward_hook(lambda *a: None), mlp.register_forward_hook(print_no)]
    with Same(model):
        with prune(model, "griffin", sparsity=0.0):
            generate(model, tokens(), 4)
        assert mlp.forward is own and len(calls) >= 4
        with prune(model, "griffin", sparsity=0.5):
            assert model.generate.__doc__ == type(model).generate.__doc__
            generate(model, tokens(), 4)
    for handle in handles:
        handle.remove()


def print_no(*args: Any) -> None:
    """A hook that does nothing."""


def test_a_model_that_moved_before_it_was_attached() -> None:
    """Views of fused and transposed weights follow ``model.to``."""
    for name in ("llama", "phi3", "gpt2"):
        model, half = tiny(name), tiny(name, dtype=torch.bfloat16)
        run = prune(model, CONFIG, score="contribution")
        model.to(torch.bfloat16)
        with run:
            got = decode(model, tokens(1, 74), 70)
        with prune(half, CONFIG, score="contribution") as other:
            wanted = decode(half, tokens(1, 74), 70)
        assert torch.equal(got, wanted)
        assert run.report().ffn_bytes_share == other.report().ffn_bytes_share
        assert run.report().extra_memory_bytes == other.report().extra_memory_bytes


def test_two_models_at_once() -> None:
    first, second = tiny("llama", seed=1), tiny("gpt2", seed=2)
    alone = []
    for model in (first, second):
        with prune(model, "griffin", sparsity=0.5):
            alone.append(generate(model, tokens(), 8))
    with (
        Same(first),
        Same(second),
        prune(first, "griffin", sparsity=0.5) as a,
        prune(second, "griffin", sparsity=0.5) as b,
    ):
        both = [generate(model, tokens(), 8) for model in (first, second)]
    for one, other in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.logits, other.logits, strict=True))
    assert a.report().decoded_tokens == b.report().decoded_tokens == 7


def test_a_dropped_model_is_freed() -> None:
    model = tiny()
    run = prune(model, "griffin", sparsity=0.5).attach()
    generate(model, tokens(), 4)
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None


def test_forced_tokens_are_really_forced() -> None:
    rows = [[7, 8, 9, 10]]
    got = generate(shared_model(), tokens(), 4, logits_processor=[Forced(24, rows)])
    assert got.sequences[0, 24:].tolist() == rows[0]
