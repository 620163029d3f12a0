"""Transformers' names for the parts of a decoder layer: one line per model type.

A model type that is not listed is refused.  CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerNames:
    """Where the parts of one decoder layer are found.

    ``ffn``: the FFN module, or "" when the projections are the layer's own.  ``up`` is the
    fused projection when ``fused``.  ``x_from``: modules whose input is x, the residual stream
    entering the FFN half (the first that exists; none: the FFN's own input).  ``post_norm``: the
    module whose output is added to the residual stream, when that is not the FFN's output.
    ``adds_residual``: the FFN adds the residual itself.  ``dropout``: a module between the down
    projection and the FFN's output.  ``attention_out``: the attention's output projection.
    ``width``: the configuration's key for the number of neurons, None where it is not free.
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


_GATED = LayerNames(
    attention_out="self_attn.o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    act="act_fn",
)

_GEMMA = replace(
    _GATED, x_from=("pre_feedforward_layernorm",), post_norm="post_feedforward_layernorm"
)

LAYER_NAMES: dict[str, LayerNames] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), _GATED),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "olmo2": replace(_GEMMA, x_from=()),
    "stablelm": replace(_GATED, x_from=("post_attention_layernorm", "input_layernorm")),
    "phi3": replace(_GATED, gate=None, up="gate_up_proj", act="activation_fn", fused=True),
    "gpt2": LayerNames(
        attention_out="attn.c_proj",
        up="c_fc",
        down="c_proj",
        act="act",
        x_from=("ln_2",),
        dropout="dropout",
        width="n_inner",
    ),
    "gpt_neox": LayerNames(
        attention_out="attention.dense", up="dense_h_to_4h", down="dense_4h_to_h", act="act"
    ),
    "falcon": LayerNames(
        attention_out="self_attention.dense",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        act="act",
        x_from=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        width="ffn_hidden_size",
    ),
    "bloom": LayerNames(
        attention_out="self_attention.dense",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        act="gelu_impl",
        adds_residual=True,
        width=None,
    ),
    "phi": LayerNames(
        attention_out="self_attn.dense",
        up="fc1",
        down="fc2",
        act="activation_fn",
        x_from=("input_layernorm",),
    ),
    "opt": LayerNames(
        attention_out="self_attn.out_proj",
        up="fc1",
        down="fc2",
        act="activation_fn",
        ffn="",
        x_from=("final_layer_norm",),
        width="ffn_dim",
    ),
}
"""The names of every model type that can be pruned, by the configuration's ``model_type``."""
