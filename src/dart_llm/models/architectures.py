"""Transformers' names for the modules of a decoder layer, with one entry per model type.

Models of any other type are refused.  CONTRIBUTING.md explains how to add a model type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerNames:
    """Names of the modules in one decoder layer.

    ``attention_out``: the attention's output projection.  ``up``: the up projection, or the fused
    gate and up projection if ``fused`` is True.  ``ffn``: the FFN module, or "" if the projections
    belong to the layer itself.  ``x_from``: names of modules.  The input of the first
    that exists (or else of the FFN) is the residual stream at the start of the layer's FFN half.
    ``post_norm``: the norm between the FFN's output and the residual stream; None if there is none.
    ``adds_residual``: True if the FFN adds the residual stream itself.  ``dropout``: a module
    between the down projection and the FFN's output, or None.  ``width``: the configuration's key
    for the number of neurons; None if there is no such key.
    """

    attention_out: str
    up: str
    down: str
    act: str
    gate: str | None = None
    fused: bool = False
    ffn: str = "mlp"
    x_from: tuple[str, ...] = ("post_attention_layernorm",)
    post_norm: str | None = None
    adds_residual: bool = False
    dropout: str | None = None
    width: str | None = "intermediate_size"


_GATED = LayerNames("self_attn.o_proj", "up_proj", "down_proj", "act_fn", gate="gate_proj")

_GEMMA = replace(
    _GATED, x_from=("pre_feedforward_layernorm",), post_norm="post_feedforward_layernorm"
)

_NEOX = LayerNames("attention.dense", "dense_h_to_4h", "dense_4h_to_h", "act")

_BLOOM = replace(_NEOX, attention_out="self_attention.dense")

_PHI = LayerNames("self_attn.dense", "fc1", "fc2", "activation_fn", x_from=("input_layernorm",))

LAYER_NAMES: dict[str, LayerNames] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), _GATED),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "olmo2": replace(_GEMMA, x_from=()),
    "stablelm": replace(_GATED, x_from=("post_attention_layernorm", "input_layernorm")),
    "phi3": replace(_GATED, gate=None, up="gate_up_proj", act="activation_fn", fused=True),
    "gpt2": LayerNames(
        "attn.c_proj", "c_fc", "c_proj", "act", x_from=("ln_2",), dropout="dropout", width="n_inner"
    ),
    "gpt_neox": _NEOX,
    "falcon": replace(
        _BLOOM,
        x_from=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        width="ffn_hidden_size",
    ),
    "bloom": replace(_BLOOM, act="gelu_impl", adds_residual=True, width=None),
    "phi": _PHI,
    "opt": replace(
        _PHI,
        attention_out="self_attn.out_proj",
        ffn="",
        x_from=("final_layer_norm",),
        width="ffn_dim",
    ),
}
"""Maps each model type that can be pruned (``model_type`` of the configuration) to its names."""
