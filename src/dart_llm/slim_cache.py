"""Room for keys and values to grow: the cache's own tensors become views of larger buffers.

A cache of transformers copies all its keys and values for every token.  Here each layer's tensors
[B, K, n, S] lie in buffers of a larger n, and a step writes the next position in place.  Whoever
else changes the cache (crops it, reorders it, appends to it) leaves tensors of his own, which are
noticed and copied anew.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

ROOM = 256
"""Positions that are added at a time."""


class GrowingCache:
    """The buffers of one cache; they go when it goes."""

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


def _free(owner: weakref.ref[GrowingCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing.keys, growing.values, growing._shown = [], [], []


def _roomy(old: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows, heads, _, size = old.shape
    capacity = (length // ROOM + 1) * ROOM + ROOM // 4
    with torch.inference_mode(False):
        made = torch.zeros(rows, heads, capacity, size, dtype=dtype, device=old.device)
    made[:, :, :length] = old
    return made
