"""The parts of a whole decode step in torch: graph runs them, and models are compared with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.models.steps import LayerParts, Norm, StepParts


def embedded(parts: StepParts, token: Tensor, position: Tensor) -> Tensor:
    """The stream [B, D] before the first layer.  token: [B]; position: [1] int64."""
    x = F.embedding(token, parts.embedding)
    if parts.embedding_scale != 1:
        x = x * parts.embedding_scale
    return x if parts.positions is None else x + F.embedding(position, parts.positions)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """``x``, normed where there is a norm."""
    return x if norm is None else norm.of(x)


def heads_of(
    parts: StepParts, layer: LayerParts, h: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, S], keys and values [B, K, S] for the input h [B, D], turned by their angles.

    cosine, sine: [1, tables, R] of the position, in the dtype of ``h``.
    """
    q, k, v = _projected(parts, layer, h)
    size = parts.sizes[3]
    if parts.family.over_all:
        q, k = (normed(t, by) for t, by in zip((q, k), layer.head_norms, strict=True))
    q, k, v = (t.reshape(len(h), -1, size) for t in (q, k, v))
    if not parts.family.over_all:
        q, k = (normed(t, by) for t, by in zip((q, k), layer.head_norms, strict=True))
    if layer.table is not None:
        turning = cosine[:, layer.table], sine[:, layer.table]
        q, k = (_turned(t, *turning) for t in (q, k))
    return q, k, v


def _projected(parts: StepParts, layer: LayerParts, h: Tensor) -> Sequence[Tensor]:
    """Queries [B, H S], keys and values [B, K S]."""
    made = [F.linear(h, w, b) for w, b in zip(layer.qkv, layer.biases, strict=True)]
    if len(made) == 3:
        return made
    _, heads, kv_heads, size, *_ = parts.sizes
    if parts.family.by_heads:
        rows = made[0].view(len(h), heads, 3, size)
        return [rows[:, :, one].reshape(len(h), -1) for one in range(3)]
    return torch.split(made[0], [heads * size, kv_heads * size, kv_heads * size], dim=-1)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    size = cosine.shape[-1]
    head, rest = x[..., :size], x[..., size:]
    first, second = head.chunk(2, dim=-1)
    head = head * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


def attended(
    parts: StepParts, layer: LayerParts, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor
) -> Tensor:
    """What the attention gives, [B, D].  keys, values: [B, K, n, S]; visible: [n] bool."""
    mask = visible[None, None, None]
    if parts.attention_cap:
        mixed = _capped_attention(parts, q, keys, values, mask)
    else:
        mixed = F.scaled_dot_product_attention(
            q[:, :, None],
            keys,
            values,
            attn_mask=mask,
            scale=parts.scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
    return F.linear(mixed.reshape(len(q), -1), layer.out, layer.out_bias)


def _capped_attention(
    parts: StepParts, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = capped(q[:, :, None] @ keys.transpose(2, 3) * parts.scale, parts.attention_cap)
    shares = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return shares.to(q.dtype) @ values


def capped(x: Tensor, cap: float) -> Tensor:
    """c tanh(x / c), or ``x`` where ``cap`` is 0."""
    return cap * torch.tanh(x / cap) if cap else x
