"""The digest of what a model computes: of the function, wherever and however weights lie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dart_llm.models import fingerprint as module
from dart_llm.models.fingerprint import digest_of, fingerprint
from dart_llm.session.run import prune
from steps import decode
from tiny import NAMES, tiny, tokens


def down(model: Any) -> nn.Parameter:
    found: nn.Parameter = model.model.layers[1].mlp.down_proj.weight
    return found


def _numpy(model: Any) -> None:
    down(model).detach().numpy()[3, 5] += 0.25


def _negated_column(model: Any) -> None:
    down(model).data[:, 7].neg_()


def _act(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _act_function(model: Any) -> None:
    del model.model.layers[0].mlp.act_fn
    model.model.layers[0].mlp.act_fn = F.relu


def _forward(model: Any) -> None:
    layer = model.model.layers[2].mlp
    layer.forward = lambda x: x * 2


def _swap_neurons(model: Any) -> None:
    weight = down(model).data
    weight[:, [0, 1]] = weight[:, [1, 0]].clone()


CHANGES: dict[str, Callable[[Any], object]] = {
    "mul": lambda m: down(m).data.mul_(1.5),
    "copy": lambda m: down(m).data.copy_(torch.randn(down(m).shape)),
    "numpy view": _numpy,
    "one number, one bit": lambda m: down(m).data.view(torch.int32)[2, 3].bitwise_xor_(1),
    "a negated neuron": _negated_column,
    "two neurons swapped": _swap_neurons,
    "activation": _act,
    "activation as a function": _act_function,
    "norm eps": lambda m: setattr(m.model.norm, "variance_epsilon", 0.1),
    "attention scaling": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a forward of one's own": _forward,
    "configuration": lambda m: setattr(m.config, "hidden_act", "relu"),
    "dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_function_changes_the_digest(change: Callable[[Any], object]) -> None:
    model = tiny()
    before = fingerprint(model)
    assert fingerprint(tiny()) == before
    change(model)
    assert fingerprint(model) != before


def test_a_forward_is_told_by_what_it_closes_over() -> None:
    """The same code with another number in it; the same number is the same digest."""

    def scaled(by: float) -> Callable[[Any], Any]:
        return lambda x: x * by

    found = []
    for by in (2.0, 3.0, 2.0):
        model = tiny()
        model.model.layers[0].mlp.forward = scaled(by)
        found.append(fingerprint(model))
    assert found[0] == found[2] != found[1]


def test_a_class_that_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = fingerprint(model)
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: x * self.weight)
    assert fingerprint(model) != before


def test_what_changes_nothing() -> None:
    model = tiny()
    before = fingerprint(model)
    model.train()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.config.use_cache = False
    model.requires_grad_(False)
    weight = down(model)
    weight.data = weight.data.t().contiguous().t()  # the same values, by columns
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == before


@pytest.mark.parametrize("executor", ["masked", "compact", "native", "slim"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_attached_run_is_not_seen(native: None, name: str, executor: str) -> None:
    """Also where weights lie transposed in place, and methods of the model are replaced."""
    model = tiny(name)
    before = fingerprint(model)
    with prune(model, "griffin", sparsity=0.5, executor=executor):
        assert fingerprint(model) == before
        decode(model, tokens(1, 30, seed=3), 20)
        assert fingerprint(model) == before
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_one(name: str) -> None:
    assert fingerprint(tiny(name)) == fingerprint(tiny(name)) != fingerprint(tiny(name, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_sums_are_the_same_on_every_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The CPU multiplies in int8, others in float32: both are exact."""
    drawn = torch.randint(-128, 128, (300, 1000), generator=torch.Generator().manual_seed(0))
    tensor = drawn.to(dtype)
    there = digest_of(tensor)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(module, "ROWS", 7)
    assert digest_of(tensor) == there
    assert digest_of(tensor.t().contiguous().t()) == there
    assert digest_of(tensor.t()) != there


def test_small_tensors_and_none_at_all() -> None:
    made = [torch.tensor(1.0), torch.tensor(2.0), torch.zeros(3), torch.zeros(0), torch.zeros(0, 2)]
    assert len({digest_of(one) for one in made}) == len(made)
    assert digest_of(torch.zeros(3, device="meta")) != digest_of(torch.zeros(3))
