"""Models that accelerate has hooked keep their hooks; offloaded weights are never read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dart_llm
from accelerate_cases import dispatched, on_disk, on_the_host
from dart_llm.session.run import prune
from steps import apart, generate, shared_model
from tiny import tiny, tokens


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        *[(dispatched, name) for name in ("llama", "gpt2", "opt")],
        (on_the_host, "phi3"),
        (on_disk, "gemma2"),
    ],
)
def test_accelerate_hooks_stay(place: Callable[..., Any], name: str, tmp_path: Any) -> None:
    with prune(shared_model(name), "griffin", sparsity=0.5, executor="masked") as run:
        wanted = generate(run.model, tokens(1, 40), 6)
    model = place(tiny(name), tmp_path)
    hooked = sorted(n for n, m in model.named_modules() if hasattr(m, "_hf_hook"))
    assert hooked
    keys = {n: list(m.__dict__) for n, m in model.named_modules()}
    forwards = {n: id(m.__dict__.get("forward")) for n, m in model.named_modules()}
    dense = generate(model, tokens(1, 40), 6)
    with prune(model, "griffin", sparsity=0.5) as run:
        got = generate(model, tokens(1, 40), 6)
    inline = name == "opt"
    assert run.executor == ("compact" if place is dispatched and not inline else "masked")
    assert apart(got.logits, wanted.logits) < 1e-5
    assert apart(got.logits, dense.logits) > 1e-2
    assert sorted(n for n, m in model.named_modules() if hasattr(m, "_hf_hook")) == hooked
    assert {n: list(m.__dict__) for n, m in model.named_modules()} == keys
    assert {n: id(m.__dict__.get("forward")) for n, m in model.named_modules()} == forwards
    after = generate(model, tokens(1, 40), 6)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, dense.logits, strict=True))


@pytest.mark.parametrize("place", [on_the_host, on_disk])
def test_offloaded_weights_are_not_read(place: Callable[..., Any], tmp_path: Any) -> None:
    model = place(tiny(), tmp_path)
    for method in ("dart", "static"):
        with pytest.raises(dart_llm.ConfigError, match="layer 0 is offloaded"):
            prune(model, method)
    for score in ("contribution", "max", "random"):
        with pytest.raises(dart_llm.ConfigError, match="layer 0 is offloaded"):
            prune(model, "griffin", score=score)
    with pytest.raises(dart_llm.ConfigError, match="offloaded"):
        prune(model, "griffin", executor="compact")
    ids = {layer: list(range(10)) for layer in range(4)}
    with prune(model, masks=ids):
        got = generate(model, tokens(), 5)
    with prune(shared_model(), masks=ids, executor="masked"):
        wanted = generate(shared_model(), tokens(), 5)
    assert apart(got.logits, wanted.logits) < 1e-5
