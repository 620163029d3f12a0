"""What cannot be pruned is refused by name, before anything is touched."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES
from dart_llm.models.describe import describe
from dart_llm.session.run import prune
from steps import WIDTHS, pruned, snapshot
from tiny import NAMES, VOCAB, tiny, tokens

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
_SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def _of(model_type, auto=AutoModelForCausalLM, **settings):
    return lambda: auto.from_config(CONFIG_MAPPING[model_type](**settings))


class PeftWrapper(nn.Module):
    """Its generate calls the inner model's, past the hooks on the wrapper: never silently dense."""

    def __init__(self):
        super().__init__()
        self.base_model = tiny()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


PeftWrapper.__module__ = "peft.peft_model"
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB}
T5 = {"d_model": 16, "d_ff": 24, "num_layers": 2, "d_kv": 8}


def _bare_linear():
    plain = nn.Linear(2, 2)
    plain.config = SimpleNamespace(model_type="llama")
    return plain


def _split_bloom():
    model = tiny("bloom")
    model.transformer.h[0].mlp.slow_but_exact = True
    return model


LISTED = tuple(LAYER_NAMES)
"""What is supported is said where a type is not."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            _of("mixtral", num_local_experts=4, **_SMALL),
            ("'mixtral'", "MixtralSparseMoeBlock", *LISTED),
        ),
        (
            _of("qwen3_moe", num_experts=4, head_dim=8, **_SMALL),
            ("'qwen3_moe'", "Qwen3MoeSparseMoeBlock", *LISTED),
        ),
        (_of("glm", head_dim=8, pad_token_id=0, **_SMALL), ("'glm'", "GlmMLP", *LISTED)),
        (PeftWrapper, ("PEFT model", "merge_and_unload()")),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ("Sequential is not a transformers model",)),
        (_bare_linear, ("Linear is not a transformers model",)),
        (_split_bloom, ("slow_but_exact=False",)),
        (
            _of("t5", AutoModelForSeq2SeqLM, **T5),
            ("T5ForConditionalGeneration is an encoder-decoder",),
        ),
        (_of("bert", AutoModel, **BERT), ("BertModel", "'bert'")),
        (lambda: torch.compile(tiny(), backend="eager"), ("wraps a compiled model",)),
    ],
)
def test_models_that_are_refused(make, words):
    with pytest.raises(UnsupportedModel) as error:
        prune(make())
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


class PackedLinear(nn.Module):
    """Weights in four bits, as a quantised checkpoint has them."""

    def __init__(self):
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)


class PackedTensor(Tensor):
    """A quantised weight in a plain Linear."""


def _foreign(module):
    return type("Linear", (nn.Linear,), {"__module__": module})


def _lora(role):
    def change(mlp):
        getattr(mlp, f"{role}_proj").__class__ = _foreign("peft.tuners.lora.layer")

    return change


def _weight(value):
    def change(mlp):
        made = value(mlp.up_proj.weight.detach())
        del mlp.up_proj.weight
        mlp.up_proj.weight = made

    return change


def _mixture(mlp):
    del mlp.up_proj
    mlp.experts = nn.ModuleList([nn.Linear(2, 2)])


UP, DEQUANTIZE = "LlamaForCausalLM, layer 1, up projection", "dequantize=True"
MERGE = ("layer 1", "peft.tuners.lora.layer.Linear", "merge_and_unload()")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *[(_lora(role), (role, *MERGE)) for role in ("gate", "up", "down")],
        (_mixture, ("layer 1", "mixture of experts")),
        (lambda mlp: setattr(mlp, "up_proj", PackedLinear()), (UP, "PackedLinear", DEQUANTIZE)),
        (lambda mlp: setattr(mlp, "up_proj", nn.Identity()), (UP, "Identity", DEQUANTIZE)),
        (
            lambda mlp: setattr(mlp.up_proj, "__class__", _foreign("somequant.layers")),
            (UP, "somequant.layers.Linear", DEQUANTIZE),
        ),
        (_weight(lambda w: w.as_subclass(PackedTensor)), (UP, "PackedTensor", DEQUANTIZE)),
        (
            _weight(lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)),
            (UP, "Linear with Parameter weights", DEQUANTIZE),
        ),
    ],
)
def test_ffns_that_are_refused(change, words):
    model = tiny()
    change(model.model.layers[1].mlp)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel) as error:
        prune(model)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert snapshot(model) == before


def test_lora_in_attention_alone_is_no_obstacle():
    model = tiny()
    model.model.layers[0].self_attn.q_proj.__class__ = _foreign("peft.tuners.lora.layer")
    assert pruned(model, tokens(), 20)[0].report().achieved_sparsity == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_describe_finds_every_layer_and_touches_nothing(name):
    model = tiny(name)
    before = snapshot(model)
    view = describe(model)
    assert [block.index for block in view.blocks] == [0, 1, 2, 3]
    hidden = 16 if name == "bloom" else 32
    for block, weights in zip(view.blocks, view.weights("output", 0), strict=True):
        assert block.down_width == weights.width == WIDTHS.get(name, 48)
        assert weights.up.shape == (weights.width, hidden) and weights.hidden == hidden
        assert (weights.gate is None) == (block.gate is None and not block.fused)
        assert block.inline == name.startswith("opt")
    assert view.parameter_bytes < sum(p.numel() * 4 for p in model.parameters()) + 1
    prune(model)
    assert snapshot(model) == before
