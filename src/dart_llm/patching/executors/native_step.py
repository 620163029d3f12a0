"""Decode steps with little overhead: one native call per token, for decoders of the Llama family.

Norms, attention, FFN and head of a whole step run in C++ (native/decode.cpp) on the model's own
weights, with the masks in force.  Whatever it cannot serve, the model's own forward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import SlimCall
from dart_llm.models.llama import angles, slim_parts
from dart_llm.native.build import ops
from dart_llm.patching.executors.native_ffn import KernelMask, NativeFfn
from dart_llm.patching.executors.whole_step import StepDecoder
from dart_llm.pruning.masks import LayerMask

POSITIONS = 256
"""Positions whose angles are computed at a time."""


class SlimDecoder(StepDecoder):
    """``ffns``: the model's blocks, laid out for the kernels."""

    rows: int | None = 1
    device = "cpu"

    def __init__(self, model: Any, ffns: Sequence[NativeFfn]) -> None:
        super().__init__()
        ops()
        parts = slim_parts(model)
        weights = [parts.embedding, parts.norm, parts.head]
        for layer, ffn in zip(parts.layers, ffns, strict=True):
            own = (ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias)
            weights += [*layer, *(torch.empty(0) if t is None else t for t in own)]
        self._ffns = list(ffns)
        self._native = torch.classes.dart_llm.Decoder(
            parts.sizes, parts.eps, parts.scale, weights, ffns[0].act
        )
        self._everything = [ffn.everything() for ffn in ffns]
        self._masks: Sequence[LayerMask | None] | None = None
        self._loaded: list[KernelMask | None] = [None] * len(ffns)
        self._rotary, self.dtype = parts.rotary, parts.head.dtype

    def nbytes(self) -> int:
        return super().nbytes() + int(self._native.nbytes())  # scratch memory too

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
            keys, values, length = room.buffers(call.cache)
            cosine, sine = self._angle(length)
            caches = [t[0] for t in keys], [t[0] for t in values]
            token = int(call.ids)
            logits, hidden = self._native.step(token, *caches, length, cosine, sine, observe)
            room.show(call.cache, length + 1)
        return logits[None], hidden[None]

    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, h, z, x = (t[:, None] for t in self._native.observed(stream))
        return u, h, z, x

    def _angle(self, position: int) -> tuple[Tensor, Tensor]:
        known = 0 if self._angles is None else len(self._angles[0])
        if self._angles is None or position >= known:
            count = (position // POSITIONS + 1) * POSITIONS
            self._angles = angles(self._rotary, count, self.dtype)
        cosine, sine = self._angles
        return cosine[position], sine[position]
