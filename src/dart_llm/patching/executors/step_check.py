"""Whether a model computes what its whole decode steps would: one step of both is compared.

``reference_step`` is the float reference of native/csrc/decode.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.models.agreement import UnhookedView, is_compiled, isolated, same, signature
from dart_llm.models.calls import forward_names
from dart_llm.models.describe import decoder_layers, decoder_of
from dart_llm.models.steps import (
    LayerParts,
    Norm,
    StepParts,
    angles,
    step_parts,
    step_unsupported_reason,
)
from dart_llm.patching.executors.native_ffn import act_number

PROMPT = 6
"""Tokens in the cache of the step that is compared."""

ENTRIES = 256
"""Vocabulary entries whose logits are compared."""

Cache = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [1, K, n, S] of each layer."""


def no_steps_reason(model: Any) -> str | None:
    """Why ``model`` cannot be decoded by whole steps; None if it can."""
    if is_compiled(model):
        return "was compiled by torch"
    return step_unsupported_reason(model) or _disagreement_reason(model)


def _disagreement_reason(model: Any) -> str | None:
    """What a whole step would compute otherwise than ``model``; None if nothing.

    Layers that differ in their weights alone are compared once, the others are left out.
    """
    from transformers import DynamicCache

    parts, view = step_parts(model), UnhookedView()
    layers, names, text = decoder_layers(model)
    cache = DynamicCache(config=text)
    marks = [
        (signature(layer), type(kept)) for layer, kept in zip(layers, cache.layers, strict=True)
    ]
    chosen = [index for index, mark in enumerate(marks) if mark not in marks[:index]]
    ffns: dict[int, Any] = {i: view.copy_of(layers[i].get_submodule(names.ffn)) for i in chosen}
    if len({act_number(getattr(ffn, names.act)) for ffn in ffns.values()}) > 1:
        return "has layers that differ in their activation"
    copied = {
        str(i): view.copy_of(layers[i]) if i in ffns else _Skip() for i in range(chosen[-1] + 1)
    }
    view.copy_of(layers).__dict__["_modules"] = copied
    head = {"weight": parts.head[:ENTRIES], "bias": None}
    view.copy_of(model.get_output_embeddings()).__dict__["_parameters"] = head
    rotary = None if parts.rotary is None else view.copy_of(parts.rotary)
    with isolated(parts.head.device):
        try:
            token, before, *computed = _model_step(model, view, cache, parts)
            wanted = reference_step(replace(parts, rotary=rotary), ffns, token, before)
            agrees = all(
                same(t[:, 0], other, len(chosen)) for t, other in zip(computed, wanted, strict=True)
            )
        except Exception as error:  # not called as its model type is
            return f"cannot be run as a {text.model_type} model is ({type(error).__name__})"
    return None if agrees else f"computes something else than a {text.model_type} model"


class _Skip(nn.Module):
    """In the position of a layer that is left out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _model_step(
    model: Any, view: UnhookedView, cache: Any, parts: StepParts
) -> tuple[Tensor, Cache, Tensor, Tensor]:
    """A token [1] that a copy of ``model`` decodes; the cache before it; the last hidden state
    [1, 1, D] and logits [1, 1, V].
    """
    generator = torch.Generator().manual_seed(0)
    size = (1, PROMPT + 1)
    ids = torch.randint(len(parts.embedding), size, generator=generator, device="cpu")
    norm: Any = view.copy_of(getattr(decoder_of(model), parts.family.last_norm))
    hidden: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        hidden.append(norm.forward(x))
        return hidden[-1]

    norm.__dict__["_compiled_call_impl"] = note
    arguments = forward_names(type(model))  # type: ignore[arg-type]
    name = "cache" if "cache" in arguments else "past_key_values"
    options = {name: cache, "use_cache": True, "output_attentions": False}
    options["output_hidden_states"] = False
    run = view.copy_of(model)
    run(input_ids=ids[:, :PROMPT], **options)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    logits = run(input_ids=ids[:, PROMPT:], **options).logits
    return ids[0, PROMPT:], before, hidden[-1], logits


def reference_step(
    parts: StepParts, ffns: Mapping[int, Callable[[Tensor], Tensor]], token: Tensor, cache: Cache
) -> tuple[Tensor, Tensor]:
    """Last hidden state [1, D] and logits [1, ENTRIES] of one more token [1], by the formulas of a
    whole step.

    ``ffns``: of the layers that are run, by their index.
    """
    position = torch.tensor([PROMPT])
    x = F.embedding(token, parts.embedding)
    if parts.embedding_scale != 1:
        x = x * parts.embedding_scale
    if parts.positions is not None:
        x = x + F.embedding(position, parts.positions)
    rotations = [t[PROMPT:].to(x.dtype) for t in angles(parts, PROMPT + 1, x.dtype)]
    for index, ffn in ffns.items():
        layer = parts.layers[index]
        q, *new = _heads(parts, layer, _normed(x, layer.before[0]), *rotations)
        keys, values = (
            torch.cat([old, t[:, :, None]], 2) for old, t in zip(cache[index], new, strict=True)
        )
        mixed = _normed(_attention(parts, layer, q, keys, values), layer.after[0])
        h = _normed(x if parts.parallel else x + mixed, layer.before[1])
        x = x + mixed + _normed(ffn(h[None])[0], layer.after[1])
    hidden = parts.norm.of(x)
    return hidden, capped(F.linear(hidden, parts.head[:ENTRIES]), parts.logits_cap)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm.of(x)


def _heads(
    parts: StepParts, layer: LayerParts, h: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, H, S] and keys, and values [B, K, S], for the input h [B, D].

    cosine, sine: [1, tables, R] of the position, in the dtype of ``h``.
    """
    q, k, v = _projected(parts, layer, h)
    size = parts.sizes[3]
    if parts.family.over_all:
        q, k = (_normed(t, norm) for t, norm in zip((q, k), layer.head_norms, strict=True))
    q, k, v = (t.reshape(len(h), -1, size) for t in (q, k, v))
    if not parts.family.over_all:
        q, k = (_normed(t, norm) for t, norm in zip((q, k), layer.head_norms, strict=True))
    if layer.table is not None:
        q, k = (_rotated(t, cosine[:, layer.table], sine[:, layer.table]) for t in (q, k))
    return q, k, v


def _projected(parts: StepParts, layer: LayerParts, h: Tensor) -> Sequence[Tensor]:
    """Queries [B, H S], keys and values [B, K S]."""
    projected = [F.linear(h, w, b) for w, b in zip(layer.qkv, layer.biases, strict=True)]
    if len(projected) == 3:
        return projected
    _, heads, kv_heads, size, *_ = parts.sizes
    if parts.family.by_heads:
        rows = projected[0].view(len(h), heads, 3, size)
        return [rows[:, :, part].reshape(len(h), -1) for part in range(3)]
    return torch.split(projected[0], [heads * size, kv_heads * size, kv_heads * size], dim=-1)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    size = cosine.shape[-1]
    head, rest = x[..., :size], x[..., size:]
    first, second = head.chunk(2, dim=-1)
    head = head * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


def _attention(
    parts: StepParts, layer: LayerParts, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Output [B, D] of the attention.  q: [B, H, S]; keys, values: [B, K, n, S]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = capped(q[:, :, None] @ keys.transpose(2, 3) * parts.scale, parts.attention_cap)
    mixed = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values
    return F.linear(mixed.reshape(len(q), -1), layer.out, layer.out_bias)


def capped(x: Tensor, cap: float) -> Tensor:
    """c tanh(x / c), or ``x`` where ``cap`` is 0."""
    return cap * torch.tanh(x / cap) if cap else x
