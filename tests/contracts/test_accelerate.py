"""Models that accelerate has hooked keep their hooks; offloaded weights are never read."""

from itertools import product

import pytest
import torch

from accelerate_cases import dispatched, on_disk, on_the_host
from dart_llm.errors import ConfigError
from dart_llm.session.run import prune
from steps import apart, generate, shared_model, written
from tiny import tiny, tokens


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("place", "name"),
    [*product([dispatched], ["llama", "gpt2", "opt"]), (on_the_host, "phi3"), (on_disk, "gemma2")],
)
def test_accelerate_hooks_stay(place, name, tmp_path):
    ids = tokens(1, 40)
    _, wanted = written(shared_model(name), ids, 6, {"executor": "masked"})
    model = place(tiny(name), tmp_path)

    def state():
        return [
            (n, list(m.__dict__), id(m.__dict__.get("forward")), hasattr(m, "_hf_hook"))
            for n, m in model.named_modules()
        ]

    before, dense = state(), generate(model, ids, 6)
    run, got = written(model, ids, 6)
    copies = place is dispatched and name != "opt"
    assert run.executor == ("compact" if copies else "masked")
    assert apart(got.logits, wanted.logits) < 1e-5
    assert apart(got.logits, dense.logits) > 1e-2
    assert state() == before and any(hooked for *_, hooked in before)
    after = generate(model, ids, 6)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, dense.logits, strict=True))


@pytest.mark.parametrize("place", [on_the_host, on_disk])
def test_offloaded_weights_are_not_read(place, tmp_path):
    model = place(tiny(), tmp_path)
    for settings in (
        *({"method": method} for method in ("dart", "static")),
        *({"score": score} for score in ("contribution", "max", "random")),
        {"executor": "compact"},
    ):
        with pytest.raises(ConfigError, match="offloaded"):
            prune(model, **{"method": "griffin", **settings})
    ids, found = {layer: list(range(10)) for layer in range(4)}, []
    for one in (model, shared_model()):
        with prune(one, masks=ids, executor="masked"):
            found.append(generate(one, tokens(), 5).logits)
    assert apart(*found) < 1e-5
