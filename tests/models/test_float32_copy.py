"""What a float32 copy of a model is, and where it is learnt from."""

import pytest
import torch

from dart_llm.calibration.collect import gradients
from dart_llm.models import float32_copy
from dart_llm.models.packed import PackedTensor, pack
from tiny import tiny

IDS = torch.arange(3, 67).reshape(2, 32)


def taken(model):
    found = {}
    gradients(model, IDS, lambda layer, seen, g: found.setdefault(layer, g), lambda text: None)
    return found


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(float32_copy, "multiplies_bfloat16", lambda: False)


@pytest.mark.usefixtures("slow")
def test_a_copy_has_the_gradients_of_the_same_weights_in_float32():
    model = tiny("llama").to(torch.bfloat16)
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    copied = float32_copy.where_faster(model)
    assert copied is not model and {one.dtype for one in copied.parameters()} == {torch.float32}
    for layer, g in taken(model.float()).items():
        assert torch.equal(taken(copied)[layer], g)
    for name, one in model.named_parameters():
        assert id(one) == before[name][0] and torch.equal(one, before[name][1].float())


@pytest.mark.usefixtures("native", "slow")
def test_blocks_are_dequantised_and_tied_weights_stay_tied():
    model = tiny("llama", tie_word_embeddings=True).to(torch.bfloat16)
    packed = torch.nn.Parameter(pack(model.lm_head.weight, "q8_0"), requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight = packed
    copied = float32_copy.where_faster(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not isinstance(copied.lm_head.weight, PackedTensor)
    assert torch.equal(copied.lm_head.weight, packed.dequantise().float())
    assert isinstance(model.lm_head.weight, PackedTensor)


@pytest.mark.usefixtures("slow")
def test_the_model_itself_where_memory_is_short_or_nothing_is_gained(monkeypatch):
    model = tiny("llama")
    assert float32_copy.where_faster(model) is model
    model.to(torch.bfloat16)
    size = 4 * sum(one.numel() for one in model.parameters())
    monkeypatch.setattr(float32_copy, "available", lambda: 2 * size - 1)
    assert float32_copy.where_faster(model) is model
    monkeypatch.setattr(float32_copy, "available", lambda: 2 * size)
    assert float32_copy.where_faster(model) is not model
    monkeypatch.setattr(float32_copy, "multiplies_bfloat16", lambda: True)
    assert float32_copy.where_faster(model) is model
