"""What cannot be pruned is refused by name, before anything is touched."""

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dart_llm.errors import UnsupportedModel
from dart_llm.models.architectures import LAYER_NAMES
from dart_llm.session.run import prune
from steps import pruned, refused
from steps import snapshot as snapshot_of
from tiny import VOCAB, tiny, tokens

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


def _split_bloom():
    model = tiny("bloom")
    model.transformer.h[0].mlp.slow_but_exact = True
    return model


REFUSED = {
    "mixture": _of("mixtral", num_local_experts=4, **_SMALL),
    "unknown FFN": _of("glm", head_dim=8, pad_token_id=0, **_SMALL),
    "adapter": PeftWrapper,
    "no transformers": lambda: nn.Sequential(nn.Linear(2, 2)),
    "sliced": _split_bloom,
    "encoder-decoder": _of("t5", AutoModelForSeq2SeqLM, **T5),
    "encoder": _of("bert", AutoModel, **BERT),
    "compiled": lambda: torch.compile(tiny(), backend="eager"),
}


def test_models_that_are_refused(snapshot):
    """A name, what is supported, and what to do."""
    said = refused(lambda name: prune(REFUSED[name]()), REFUSED, UnsupportedModel)
    listed = ", ".join(sorted(LAYER_NAMES))
    assert {name: words.replace(listed, "LISTED") for name, words in said.items()} == snapshot


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


FFNS = {
    **{role: _lora(role) for role in ("gate", "up", "down")},
    "mixture": _mixture,
    "packed linear": lambda mlp: setattr(mlp, "up_proj", PackedLinear()),
    "foreign linear": lambda mlp: setattr(mlp.up_proj, "__class__", _foreign("somequant.layers")),
    "packed tensor": _weight(lambda w: w.as_subclass(PackedTensor)),
    "int8": _weight(lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)),
}


def test_ffns_that_are_refused(snapshot):
    """The layer, its part, and how to get plain weights; nothing was touched."""

    def attempt(name):
        model = tiny()
        FFNS[name](model.model.layers[1].mlp)
        before = snapshot_of(model)
        try:
            prune(model)
        finally:
            assert snapshot_of(model) == before

    assert refused(attempt, FFNS, UnsupportedModel) == snapshot
    model = tiny()
    model.model.layers[0].self_attn.q_proj.__class__ = _foreign("peft.tuners.lora.layer")
    assert pruned(model, tokens(), 20)[0].report().achieved_sparsity == 0.5
