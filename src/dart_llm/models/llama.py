"""Weights, angles and growing KV cache of Llama-family decoders, for decode steps as a whole.

It looks at what is there, and says why a model is not one of these.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.models.agreement import HOMES, Replacement, forward_of, parts_of
from dart_llm.models.describe import decoder_layers, decoder_of

ROOM = 256
"""Positions that are added at a time."""


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; they go when it goes.

    A cache of transformers copies all its keys and values for every token.  Here each layer's
    tensors [B, K, n, S] are views of buffers of a larger n, and a step writes the next position in
    place.  Whoever else changes the cache (crops it, reorders it, appends to it) leaves tensors of
    his own, which are noticed and copied anew.
    """

    def __init__(self, cache: Any) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._shown: list[Tensor] = []

    def buffers(self, cache: Any) -> tuple[list[Tensor], list[Tensor], int]:
        """Keys and values [B, K, capacity, S] per layer with room for one position, and n."""
        length = int(cache.layers[0].keys.shape[2])
        known = len(self._shown) == 2 * len(cache.layers) and all(
            layer.keys is self._shown[2 * i] and layer.values is self._shown[2 * i + 1]
            for i, layer in enumerate(cache.layers)
        )
        if not known or length >= self.keys[0].shape[2]:
            dtype = cache.layers[0].keys.dtype  # a step reads all in one dtype
            self.keys = [_roomy(layer.keys, length, dtype) for layer in cache.layers]
            self.values = [_roomy(layer.values, length, dtype) for layer in cache.layers]
        return self.keys, self.values, length

    def show(self, cache: Any, length: int) -> None:
        """Let the cache hold the first ``length`` positions."""
        shown = []
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            layer.keys, layer.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)
            shown += [layer.keys, layer.values]
        self._shown = shown

    def nbytes(self) -> int:
        """Bytes beside what the cache itself shows."""
        held, shown = [*self.keys, *self.values], self._shown
        return sum(t.nbytes for t in held) - sum(t.nbytes for t in shown)


def _free(owner: weakref.ref[PreallocatedKVCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing.keys, growing.values, growing._shown = [], [], []


def _roomy(old: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows, heads, _, size = old.shape
    capacity = (length // ROOM + 1) * ROOM + ROOM // 4
    with torch.inference_mode(False):
        made = torch.zeros(rows, heads, capacity, size, dtype=dtype, device=old.device)
    made[:, :, :length] = old
    return made


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


def slim_unsupported_reason(model: Any) -> str:
    """Why ``model`` cannot be decoded natively as a whole: "", or a clause."""
    if reason := step_unsupported_reason(model):
        return reason
    some = next(model.parameters())
    if some.device.type != "cpu":
        return "is not on the CPU"
    if some.dtype not in (torch.float32, torch.bfloat16):
        return "is not float32 or bfloat16 throughout"
    return ""


def step_unsupported_reason(model: Any) -> str:
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
    """The parts of a model for which ``slim_unsupported_reason`` says nothing."""
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
