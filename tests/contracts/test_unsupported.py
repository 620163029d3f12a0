"""What cannot be pruned is refused by name, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import DartError, UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES as LAYERS
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from steps import decode, snapshot
from tiny import NAMES, VOCAB, tiny, tokens

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _model(model_type: str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**_SMALL, **settings))


@pytest.mark.parametrize(
    ("model_type", "settings", "found"),
    [
        ("mixtral", {"num_local_experts": 4}, "MixtralSparseMoeBlock"),
        ("qwen3_moe", {"num_experts": 4, "head_dim": 8}, "Qwen3MoeSparseMoeBlock"),
        ("qwen2_moe", {"num_experts": 4}, "Qwen2MoeSparseMoeBlock"),
        ("glm", {"head_dim": 8, "pad_token_id": 0}, "GlmMLP"),
    ],
)
def test_model_types_that_are_not_listed(model_type: str, settings: Any, found: str) -> None:
    model = _model(model_type, **settings)
    with pytest.raises(UnsupportedModel) as error:
        prune(model)
    text = str(error.value)
    assert f"'{model_type}'" in text and found in text and "llama" in text and "\n" not in text
    assert set(LAYERS) <= set(text.replace(",", " ").split())


def _mixture(layer: Any) -> None:
    layer.mlp = nn.Module()
    layer.mlp.experts = nn.ModuleList([nn.Linear(2, 2)])


def test_a_mixture_in_a_listed_model() -> None:
    model = tiny()
    _mixture(model.model.layers[1])
    with pytest.raises(UnsupportedModel, match=r"layer 1: Module .*mixture of experts"):
        prune(model)


def _peft_class(base: type[nn.Module], name: str = "Linear") -> type[nn.Module]:
    return type(name, (base,), {"__module__": "peft.tuners.lora.layer"})


@pytest.mark.parametrize("role", ["gate_proj", "up_proj", "down_proj"])
def test_lora_in_the_ffn(role: str) -> None:
    model = tiny()
    getattr(model.model.layers[2].mlp, role).__class__ = _peft_class(nn.Linear)
    with pytest.raises(UnsupportedModel) as error:
        prune(model)
    text = str(error.value)
    assert "layer 2" in text and role.split("_")[0] in text
    assert "peft.tuners.lora.layer.Linear" in text and "merge_and_unload()" in text


def test_lora_in_attention_alone_is_no_obstacle() -> None:
    model = tiny()
    model.model.layers[0].self_attn.q_proj.__class__ = _peft_class(nn.Linear)
    with prune(model, "griffin", sparsity=0.5) as run:
        decode(model, tokens(), 20)
    assert run.report().achieved_sparsity == 0.5


def test_a_peft_model_around_the_model() -> None:
    """Its generate calls the inner model's, past the hooks on the wrapper: never silently dense."""

    class Wrapper(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base_model = base

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

    Wrapper.__module__ = "peft.peft_model"
    with pytest.raises(UnsupportedModel, match=r"PEFT model.*merge_and_unload\(\)"):
        prune(Wrapper(tiny()))


class PackedLinear(nn.Module):
    """Weights in four bits, as a quantised checkpoint has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class PackedTensor(Tensor):
    """A quantised weight in a plain Linear."""


def _packed(mlp: Any) -> None:
    mlp.up_proj = PackedLinear()


def _foreign(mlp: Any) -> None:
    mlp.up_proj.__class__ = type("Linear", (nn.Linear,), {"__module__": "somequant.layers"})


def _subclass(mlp: Any) -> None:
    weight = mlp.up_proj.weight.detach().as_subclass(PackedTensor)
    del mlp.up_proj.weight
    mlp.up_proj.weight = weight


def _integers(mlp: Any) -> None:
    weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    mlp.up_proj.weight = weight


def _none(mlp: Any) -> None:
    mlp.up_proj = nn.Identity()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_packed, "PackedLinear"),
        (_foreign, "somequant.layers.Linear"),
        (_subclass, "PackedTensor"),
        (_integers, "Linear with Parameter weights"),
        (_none, "Identity"),
    ],
)
def test_packed_and_quantised_projections(change: Callable[[Any], None], found: str) -> None:
    model = tiny()
    change(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModel) as error:
        prune(model)
    text = str(error.value)
    assert "LlamaForCausalLM, layer 1, up projection" in text and found in text
    assert "dequantize=True" in text and "\n" not in text


def test_encoder_decoder() -> None:
    config = CONFIG_MAPPING["t5"](
        vocab_size=VOCAB, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8
    )
    from transformers import AutoModelForSeq2SeqLM

    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        prune(AutoModelForSeq2SeqLM.from_config(config))


def test_things_that_are_no_transformers_model() -> None:
    with pytest.raises(UnsupportedModel, match="Sequential is not a transformers model"):
        prune(nn.Sequential(nn.Linear(2, 2)))
    plain = nn.Linear(2, 2)
    plain.config = SimpleNamespace(model_type="llama")
    with pytest.raises(UnsupportedModel, match="Linear is not a transformers model"):
        prune(plain)


def test_encoder_alone() -> None:
    config = CONFIG_MAPPING["bert"](
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with pytest.raises(UnsupportedModel, match=r"BertModel.*'bert'"):
        prune(AutoModel.from_config(config))


def test_bloom_that_splits_its_down_projection() -> None:
    model = tiny("bloom")
    model.transformer.h[0].mlp.slow_but_exact = True
    with pytest.raises(UnsupportedModel, match="slow_but_exact=False"):
        prune(model)


@pytest.mark.parametrize("name", NAMES)
def test_describe_finds_every_layer_and_touches_nothing(name: str) -> None:
    model = tiny(name)
    before = snapshot(model)
    view = describe(model)
    assert snapshot(model) == before
    assert [block.index for block in view.blocks] == [0, 1, 2, 3]
    widths = {"bloom": 64}
    hidden = {"bloom": 16}.get(name, 32)
    for block, weights in zip(view.blocks, view.weights("output", 0), strict=True):
        assert block.down_width == weights.width == widths.get(name, 48)
        assert weights.up.shape == (weights.width, hidden) and weights.hidden == hidden
        assert (weights.gate is None) == (block.gate is None and not block.fused)
        assert block.inline == name.startswith("opt")
    assert view.parameter_bytes < sum(p.numel() * 4 for p in model.parameters()) + 1
    prune(model)
    assert snapshot(model) == before


def test_a_refused_model_is_untouched() -> None:
    model = tiny()
    model.model.layers[3].mlp.down_proj.__class__ = _peft_class(nn.Linear)
    before = snapshot(model)
    with pytest.raises(DartError):
        prune(model)
    assert snapshot(model) == before
