"""What a decoder of the Llama family is made of, for decode steps that run natively as a whole.

With arch.py and names.py a place that knows transformers' modules; it looks at what is there, and
says why a model is not one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.arch import decoder_layers, decoder_of
from dart_llm.bare import HOMES, forward_of, parts_of
from dart_llm.replacement import Replacement

TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose decoder layer is RMS norm, rotary attention, RMS norm, gated FFN."""

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles depend on the position alone."""

CACHE, LAYER = "DynamicCache", "DynamicLayer"
"""Classes of the caches that a slim step can extend."""


@dataclass(frozen=True)
class SlimParts:
    """Sizes and weights.  ``sizes``: D, H, K, S, I, V; ``weights``: as ops.cpp reads them."""

    sizes: list[int]
    eps: float
    scale: float
    embedding: Tensor
    norm: Tensor
    head: Tensor
    layers: list[list[Tensor]]
    """Per layer: norms (2), q k v o, their biases, norms of q and k; empty ones for none."""
    rotary: nn.Module


def why_not_slim(model: Any) -> str:
    """Why ``model`` cannot be decoded natively as a whole: "", or a clause."""
    if reason := why_not_step(model):
        return reason
    some = next(model.parameters())
    if some.device.type != "cpu":
        return "is not on the CPU"
    if some.dtype not in (torch.float32, torch.bfloat16):
        return "is not float32 or bfloat16 throughout"
    return ""


def why_not_step(model: Any) -> str:
    """Why whole decode steps of ``model`` are not known: "", or a clause."""
    _, _, text = decoder_layers(model)
    if text.model_type not in TYPES:
        return f"is a {text.model_type} model, not one of {', '.join(sorted(TYPES))}"
    if not hasattr(model, "lm_head") or getattr(model.lm_head, "bias", None) is not None:
        return "has no plain language-model head"
    decoder: Any = decoder_of(model)
    if getattr(decoder.embed_tokens, "max_norm", None) is not None:
        return "changes its embedding whenever it reads it"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        return f"has rotary embeddings of type {rope.get('rope_type')}"
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        return "has layers of sliding attention"
    if text.model_type == "mistral" and getattr(text, "sliding_window", None):
        return "has a sliding window"
    tensors = [*model.parameters()]
    if any(type(t) not in (Tensor, nn.Parameter) for t in (*tensors, *model.buffers())):
        return "has weights of a tensor class of its own"
    if len({(p.device, p.dtype) for p in tensors}) > 1 or not tensors[0].is_floating_point():
        return "is not of one floating-point dtype on one device"
    modules = parts_of(model)
    if any("_hf_hook" in module.__dict__ for module in modules):
        return "is spread by accelerate"
    odd = next((module for module in modules if not _known(module)), None)
    if odd is not None:
        return f"has a forward of its own in a {type(odd).__name__}"
    for name in ("variance_epsilon", "scaling"):
        if len({m.__dict__[name] for m in modules if name in m.__dict__}) > 1:
            return f"has layers that differ in their {name}"
    return "" if _fits(model) else "has weights of other shapes or layouts than its kind"


def _known(module: nn.Module) -> bool:
    """Whether a module does what transformers' own does: its class, and its forward."""
    patched = module.__dict__.get("forward")
    ours = patched is None or isinstance(patched, Replacement)
    ours = ours and "parametrizations" not in module._modules  # weights computed at every use
    names = type(module).__module__, forward_of(module)[0].__module__
    return ours and all(name.startswith(HOMES) for name in names)


def _fits(model: Any) -> bool:
    """Whether all weights are what ops.cpp reads: rows in one piece, in every layer the same."""
    try:
        parts = slim_parts(model)
    except AttributeError:  # a part was taken out
        return False
    hidden, heads, kv_heads, size, width, vocabulary = parts.sizes
    queries, keys, ffn = (heads * size, hidden), (kv_heads * size, hidden), (width, hidden)
    expected = [(hidden,), (hidden,), queries, keys, keys, queries[::-1], ffn, ffn, ffn[::-1]]
    layers, _, _ = decoder_layers(model)
    for own, layer in zip(parts.layers, layers, strict=True):
        mlp: Any = layer.mlp
        matrices = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        if [tuple(t.shape) for t in (*own[:6], *matrices)] != expected:
            return False
        if not all(t.is_contiguous() for t in (*own, *matrices[:2])):
            return False
    ends = (parts.embedding, parts.head, parts.norm)
    return len(parts.embedding) >= vocabulary and all(t.is_contiguous() for t in ends)


def slim_parts(model: Any) -> SlimParts:
    """The parts of a model for which ``why_not_slim`` says nothing."""
    layers, _, text = decoder_layers(model)
    decoder: Any = decoder_of(model)
    first: Any = layers[0]
    attention = first.self_attn
    size = int(attention.head_dim)
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    found = [_layer(layer) for layer in layers]
    head = model.lm_head.weight
    width = int(first.mlp.down_proj.in_features)
    sizes = [hidden, heads, int(text.num_key_value_heads), size, width, int(head.shape[0])]
    return SlimParts(
        sizes,
        float(decoder.norm.variance_epsilon),
        float(attention.scaling),
        _plain(decoder.embed_tokens.weight),
        _plain(decoder.norm.weight),
        _plain(head),
        found,
        decoder.rotary_emb,
    )


def step_numbers(model: Any) -> tuple[Any, ...]:
    """What whole steps of a model read once: eps, scale, and what the angles are made of."""
    decoder: Any = decoder_of(model)
    first: Any = decoder_layers(model)[0][0]
    rotary = decoder.rotary_emb
    scaling = first.self_attn.scaling, getattr(rotary, "attention_scaling", None)
    return decoder.norm.variance_epsilon, scaling, rotary.inv_freq.tolist()


def _layer(layer: nn.Module) -> list[Tensor]:
    part: Any = layer
    attention = part.self_attn
    projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [
        _plain(part.input_layernorm.weight),
        _plain(part.post_attention_layernorm.weight),
        *(_plain(one.weight) for one in projections),
        *(_plain(one.bias) for one in projections),
        *(_plain(None if one is None else one.weight) for one in norms),
    ]


def _plain(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else tensor.detach()


def angles(
    rotary: nn.Module,
    count: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, S] float32 of positions, rounded as the model rounds them."""
    positions = torch.arange(count, device=device)[None]
    like = torch.empty(0, dtype=dtype, device=device)
    cosine, sine = rotary(like, positions)
    return cosine[0].float().contiguous(), sine[0].float().contiguous()


@dataclass(frozen=True)
class SlimCall:
    """A forward that decodes one token of each row after a cache: ids [B, 1]; transformers' own
    cache.
    """

    ids: Tensor
    cache: Any


def read_call(
    kwargs: dict[str, Any], args: tuple[Any, ...], dtype: torch.dtype, most: int | None = 1
) -> SlimCall | None:
    """The call of a root forward when a whole step can serve it, else None.

    ``dtype``: of the weights; ``most``: rows that a step takes, None: any number.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    ids = given.pop("input_ids", args[0] if len(args) == 1 else None)
    cache = given.pop("cache", None) or given.pop("past_key_values", None)
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or cache is None:
        return None
    rows = len(ids)
    if ids.shape[1] != 1 or not rows or (most is not None and rows > most):
        return None
    if type(cache).__name__ != CACHE or {type(one).__name__ for one in cache.layers} != {LAYER}:
        return None
    length = cache.get_seq_length()
    if not length or len(cache.layers[0].keys) != rows:
        return None
    first = cache.layers[0]
    if first.keys.dtype != dtype or first.values.dtype != dtype:
        return None  # filled under autocast: the model's own forward says what comes of it
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (rows, length + 1)):
        return None  # a mask for every kind of layer, or of another shape
    if mask is not None and not bool(mask.all()):
        return None
    if positions is not None and not bool((positions[..., -1] == length).all()):
        return None
    plain = {"use_cache": True, "return_dict": True}
    neutral = {"logits_to_keep": (0, 1), "output_attentions": (False,)}
    neutral |= {"output_hidden_states": (False,)}
    for key, value in given.items():
        if key in plain and value is plain[key]:
            continue
        if key in neutral and not isinstance(value, Tensor) and value in neutral[key]:
            continue
        return None
    return SlimCall(ids, cache)


def as_output(logits: Tensor, cache: Any) -> Any:
    """What a causal language model returns.  logits: [B, V]."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(logits=logits[:, None], cache=cache)
