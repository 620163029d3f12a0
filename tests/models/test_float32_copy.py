"""What a float32 copy of a model is, and what is learnt from where memory is short."""

import pytest
import torch

from dart_llm.calibration.collect import run_forward
from dart_llm.models import float32_copy, float32_products
from dart_llm.models.float32_copy import in_float32
from dart_llm.models.packed import PackedTensor, pack
from steps import Same
from tiny import tiny

IDS = torch.arange(3, 67).reshape(2, 32)


def taken(model):
    found = {}
    run_forward(model, IDS, lambda layer, seen, g: found.setdefault(layer, g))
    return found


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(float32_products, "emulates", lambda dtype: dtype == torch.bfloat16)


@pytest.fixture
def short(monkeypatch):
    """No memory for a copy."""
    monkeypatch.setattr(float32_copy, "available", lambda: 0)


@pytest.mark.usefixtures("slow")
def test_a_copy_has_the_gradients_of_the_same_weights_in_float32():
    model = tiny("llama").to(torch.bfloat16)
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    with in_float32(model) as copied:
        assert copied is not model and {one.dtype for one in copied.parameters()} == {torch.float32}
        found = taken(copied)
    for layer, g in taken(model.float()).items():
        assert torch.equal(found[layer], g)
    for name, one in model.named_parameters():
        assert id(one) == before[name][0] and torch.equal(one, before[name][1].float())


@pytest.mark.usefixtures("native", "slow")
def test_blocks_are_dequantised_and_tied_weights_stay_tied():
    model = tiny("llama", tie_word_embeddings=True).to(torch.bfloat16)
    packed = torch.nn.Parameter(pack(model.lm_head.weight, "q8_0"), requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight = packed
    with in_float32(model) as copied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert not isinstance(copied.lm_head.weight, PackedTensor)
        assert torch.equal(copied.lm_head.weight, packed.dequantise().float())
    assert isinstance(model.lm_head.weight, PackedTensor)


@pytest.mark.contract("exact restore")
@pytest.mark.usefixtures("slow", "short")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_where_memory_is_short(name, monkeypatch):
    """As of the copy but for rounding; no product runs in 16 bits, and the model stays as it is."""
    model, wide = tiny(name).to(torch.bfloat16), taken(tiny(name).to(torch.bfloat16).float())
    model.get_output_embeddings().weight.requires_grad_(False)
    flags = [one.requires_grad for one in model.parameters()]
    with Same(model), in_float32(model) as found:
        assert found is model and not any(one.requires_grad for one in model.parameters())
        narrow = taken(model)
    assert [one.requires_grad for one in model.parameters()] == flags
    for layer, g in wide.items():
        assert narrow[layer].dtype == torch.bfloat16
        assert float((narrow[layer].float() - g).norm() / g.norm()) < 0.03


@pytest.mark.usefixtures("slow")
def test_the_model_itself_where_memory_is_short_or_nothing_is_gained(monkeypatch):
    def copies(model):
        with in_float32(model) as found:
            return found is not model

    model = tiny("llama")
    assert not copies(model)
    model.to(torch.bfloat16)
    size = 4 * sum(one.numel() for one in model.parameters())
    monkeypatch.setattr(float32_copy, "available", lambda: 2 * size - 1)
    assert not copies(model)
    monkeypatch.setattr(float32_copy, "available", lambda: 2 * size)
    assert copies(model)
    monkeypatch.setattr(float32_products, "emulates", lambda dtype: False)
    assert not copies(model)
