"""One decode step of a Llama-like model as plain torch calls on tensors that stay where they are.

What a CUDA graph can record: no shape and no address depends on the token or the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.ffn import CompactFfn, FfnBlock
from dart_llm.slim_parts import SlimParts


@dataclass(frozen=True)
class StepInput:
    """What a step reads and writes.

    ``token``: [B] int64; ``position``: [1] int64, the cache's length before the step; ``cosine``,
    ``sine``: [capacity, S] in the model's dtype; ``keys``, ``values``: [B, K, capacity, S] per
    layer, written at ``position``.
    """

    token: Tensor
    position: Tensor
    cosine: Tensor
    sine: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class StepOutput:
    """``logits``: [B, V]; ``hidden``: [B, D], the last state after its norm; ``observed``: of each
    layer u [B, I], the FFN's input, its output and the stream before it [B, D], or nothing.
    """

    logits: Tensor
    hidden: Tensor
    observed: tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]


def run_step(
    parts: SlimParts,
    ffns: Sequence[FfnBlock | CompactFfn],
    given: StepInput,
    observe: bool,
) -> StepOutput:
    """Decode one token of every row.  ``ffns``: a layer's block where it is dense."""
    x = F.embedding(given.token, parts.embedding)
    capacity = given.keys[0].shape[2]
    visible = torch.arange(capacity, device=x.device) <= given.position
    seen = []
    for index, (weights, ffn) in enumerate(zip(parts.layers, ffns, strict=True)):
        x = x + attention(parts, weights, rms_norm(x, weights[0], parts.eps), given, index, visible)
        h = rms_norm(x, weights[1], parts.eps)
        if isinstance(ffn, FfnBlock):
            u = ffn.hidden(h)
            z = ffn.down(u)
            if observe:
                seen.append((u, h, z, x))
        else:
            z = ffn.run(h)[1]
        x = x + z
    hidden = rms_norm(x, parts.norm, parts.eps)
    return StepOutput(F.linear(hidden, parts.head), hidden, tuple(seen))


def attention(
    parts: SlimParts,
    weights: Sequence[Tensor],
    h: Tensor,
    given: StepInput,
    index: int,
    visible: Tensor,
) -> Tensor:
    """What the attention of layer ``index`` adds to the stream, [B, D]."""
    _, _, wq, wk, wv, wo, bq, bk, bv, bo, q_norm, k_norm = weights
    size, rows = parts.sizes[3], len(h)
    q, k, v = (
        F.linear(h, w, b if len(b) else None).view(rows, -1, size)
        for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    if len(q_norm):
        q, k = rms_norm(q, q_norm, parts.eps), rms_norm(k, k_norm, parts.eps)
    cosine, sine = (t.index_select(0, given.position) for t in (given.cosine, given.sine))
    q, k = (t * cosine + _half_turn(t) * sine for t in (q, k))
    keys, values = given.keys[index], given.values[index]
    keys.index_copy_(2, given.position, k[:, :, None])
    values.index_copy_(2, given.position, v[:, :, None])
    mixed = F.scaled_dot_product_attention(
        q[:, :, None],
        keys,
        values,
        attn_mask=visible[None, None, None],
        scale=parts.scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return F.linear(mixed.reshape(rows, -1), wo, bo if len(bo) else None)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32 and rounded as the model's own rounds."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
