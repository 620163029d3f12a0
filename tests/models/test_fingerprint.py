"""The digest of what a model computes: of the function, wherever and however weights lie."""

import copy

import pytest
import torch
from torch import nn

from dart_llm.models import checkpoint as module
from dart_llm.models.checkpoint import digest_of, fingerprint
from dart_llm.session.run import prune
from steps import decode
from tiny import tiny, tokens


def down(model):
    return model.model.layers[1].mlp.down_proj.weight.data


CHANGES = {
    "one number, one bit": lambda m: down(m).view(torch.int32)[2, 3].bitwise_xor_(1),
    "a negated neuron": lambda m: down(m)[:, 7].neg_(),
    "activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()),
    "norm eps": lambda m: setattr(m.model.norm, "variance_epsilon", 0.1),
    "attention scaling": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.5),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a replaced forward": lambda m: setattr(m.model.layers[2].mlp, "forward", lambda x: x * 2),
    "configuration": lambda m: setattr(m.config, "hidden_act", "relu"),
    "dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_function_changes_the_digest(change):
    model = tiny()
    before = fingerprint(model)
    assert fingerprint(tiny()) == before
    change(model)
    assert fingerprint(model) != before


def test_what_changes_nothing():
    model = tiny()
    before = fingerprint(model)
    model.train()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.config.use_cache = False
    model.requires_grad_(False)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.t().contiguous().t()  # the same values, by columns
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == before


@pytest.mark.parametrize("executor", ["masked", "compact", "native"])
def test_an_attached_run_is_not_seen(native, executor):
    """Also where weights lie transposed in place, and methods of the model are replaced."""
    model = tiny("qwen2")
    before = fingerprint(model)
    with prune(model, "griffin", sparsity=0.5, executor=executor):
        assert fingerprint(model) == before
        decode(model, tokens(1, 30, seed=3), 20)
        assert fingerprint(model) == before
    assert fingerprint(model) == before


def test_digests_of_tensors(monkeypatch):
    """The CPU multiplies in int8, others in float32: both are exact, however it lies."""
    drawn = torch.randint(-128, 128, (300, 1000), generator=torch.Generator().manual_seed(0))
    drawn = [drawn.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bool)]
    digests = [digest_of(tensor) for tensor in drawn]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(module, "ROWS", 7)
    assert [digest_of(tensor.t().contiguous().t()) for tensor in drawn] == digests
    assert not set(digests) & {digest_of(tensor.t()) for tensor in drawn}
    others = [torch.tensor(1.0), torch.zeros(3), torch.zeros(3, device="meta"), torch.zeros(0, 2)]
    assert len({digest_of(tensor) for tensor in others}) == len(others)
