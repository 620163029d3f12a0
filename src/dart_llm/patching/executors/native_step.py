"""Decode steps with little overhead: one native call per token.

Norms, attention, FFN and head of a whole step run in C++ (native/decode.cpp) on the model's own
weights, with the masks in force.  Whatever it cannot serve, the model's own forward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import SlimCall
from dart_llm.models.packed import PackedTensor
from dart_llm.models.steps import (
    LayerParts,
    StepParts,
    angles,
    attention_by_inputs,
    copy_again,
    norms_of,
    step_parts,
)
from dart_llm.native.build import ops
from dart_llm.patching.executors.native_ffn import KernelMask, Layout, NativeFfn
from dart_llm.patching.executors.whole_step import StepDecoder
from dart_llm.pruning.masks import LayerMask

POSITIONS = 256
"""Positions whose angles are computed at a time."""


class SlimDecoder(StepDecoder):
    """``ffns``: the model's blocks, laid out for the kernels."""

    rows: int | None = 1
    device = "cpu"

    def __init__(self, model: Any, ffns: Sequence[NativeFfn], layout: Layout) -> None:
        super().__init__()
        ops()
        for one in attention_by_inputs(model):
            weight: Any = one.weight
            layout.neuron_rows(weight.detach().t(), weight)
        parts = step_parts(model)
        self._model, self._ffns, self._parts = model, list(ffns), parts
        self._norms = _norm_floats(parts)
        self._native = _decoder(parts, self._norms, ffns)
        self._everything = [ffn.everything() for ffn in ffns]
        self._masks: Sequence[LayerMask | None] | None = None
        self._loaded: list[KernelMask | None] = [None] * len(ffns)
        self.dtype, self.windows = parts.head.dtype, parts.windows

    def nbytes(self) -> int:
        norms = sum(t.nbytes for t in self._norms) if self.dtype != torch.float32 else 0
        return super().nbytes() + int(self._native.nbytes()) + norms  # scratch memory too

    def refresh(self) -> None:
        copy_again(self._norms, _norm_floats(step_parts(self._model)))

    def load(self, masks: Sequence[LayerMask | None]) -> None:
        if masks is self._masks:
            return
        self._masks = masks
        for index, ffn in enumerate(self._ffns):
            mask = masks[index] if masks else None
            if mask is None:
                kept = self._everything[index]
            else:
                ffn.load(mask)
                kept = ffn.kept
            if kept is not self._loaded[index]:
                self._native.set_mask(
                    index, kept.ids, kept.bias, kept.basis, kept.features, kept.choice
                )
                self._loaded[index] = kept

    def step(self, call: SlimCall, observe: bool) -> tuple[Tensor, Tensor]:
        room = self.room(call.cache)
        with torch.inference_mode(False), torch.no_grad():  # leaving that mode turns gradients on
            position = call.cache.get_seq_length()
            cosine, sine = self._angle(position)
            token, caches = int(call.ids), room.views(call.cache)
            logits, hidden = self._native.step(token, *caches, position, cosine, sine, observe)
            room.show(call.cache)
        return logits[None], hidden[None]

    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, h, z, x, r = (t[:, None] for t in self._native.observed(stream))
        return u, h, z, x, r

    def _angle(self, position: int) -> tuple[Tensor, Tensor]:
        known = 0 if self._angles is None else len(self._angles[0])
        if self._angles is None or position >= known:
            count = (position // POSITIONS + 1) * POSITIONS
            self._angles = angles(self._parts, count, self.dtype)
        cosine, sine = self._angles
        return cosine[position], sine[position]


NOTHING = torch.empty(0)
"""In the place of a weight that a model has not."""


def _decoder(parts: StepParts, norms: list[Tensor], ffns: Sequence[NativeFfn]) -> Any:
    """The native object that decodes; see ops.cpp for the order of what it takes."""
    dtype = parts.head.dtype
    ends = (parts.embedding, parts.head, parts.positions)
    weights = [
        *ends,
        *(t for pair in zip(parts.layers, ffns, strict=True) for t in _weights(*pair)),
    ]
    packed = {i: t.matrix for i, t in enumerate(weights) if isinstance(t, PackedTensor)}
    empty = torch.empty(0, dtype=dtype)
    plain = [empty if t is None or i in packed else t for i, t in enumerate(weights)]
    kind = {
        "fused": len(parts.family.qkv) == 1,
        "by_heads": parts.family.by_heads,
        "over_all": parts.family.over_all,
        "parallel": parts.parallel,
        "centred": parts.norm.centred,
    }
    made: Any = torch.classes.dart_llm.Decoder(
        parts.sizes,
        [name for name, holds in kind.items() if holds],
        [parts.eps, parts.scale, parts.embedding_scale, parts.attention_cap, parts.logits_cap],
        plain,
        norms,
        [-1 if layer.table is None else layer.table for layer in parts.layers],
        ffns[0].act,
    )
    for index, matrix in packed.items():
        made.set_packed(index, matrix)
    return made


def _weights(layer: LayerParts, ffn: NativeFfn) -> list[Tensor | None]:
    """Of one layer, in the order of ops.cpp; a fused projection stands in the place of q."""
    rest = (None,) * (3 - len(layer.qkv))
    attention = [*layer.qkv, *rest, layer.out, *layer.biases, *rest, layer.out_bias]
    return [*attention, ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias]


def _norm_floats(parts: StepParts) -> list[Tensor]:
    """Factors and biases as the kernels read them."""
    both = [(None, None) if one is None else (one.factor, one.bias) for one in norms_of(parts)]
    with torch.inference_mode(False), torch.no_grad():
        pairs = [t for pair in both for t in pair]
        return [NOTHING if t is None else t.float().contiguous() for t in pairs]
