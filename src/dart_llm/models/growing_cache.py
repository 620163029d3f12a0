"""The growing KV cache of decode steps that run as a whole, seen as transformers' own."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROOM = 256
"""Positions that are added at a time."""

CACHE, FULL, SLIDING = "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"
"""Classes of the caches that a step can extend, and of their layers."""


def extendable(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether steps of a model whose layers see ``windows`` positions can extend ``cache``."""
    if type(cache).__name__ != CACHE or len(cache.layers) != len(windows):
        return False
    for layer, window in zip(cache.layers, windows, strict=True):
        kind = type(layer).__name__
        # one that keeps the past too does so for a later crop
        slides = kind == SLIDING and layer.sliding_window == window and not layer.record_past
        if not slides and kind != FULL:
            return False
    return True


@dataclass
class Room:
    """One layer's buffers [B, K, capacity, S], of which ``count`` positions from ``begin`` on are
    the cache's.  ``most``: positions that it keeps; ``seen``: those that the next step reads.
    """

    keys: Tensor
    values: Tensor
    begin: int
    count: int
    most: int | None
    seen: int | None

    def grow(self, dtype: torch.dtype) -> None:
        """Make room for one position at least, of a cache that has none left."""
        sides = (t.narrow(2, self.begin, self.count) for t in (self.keys, self.values))
        self.keys, self.values = (_roomy(t, self.count, dtype) for t in sides)
        self.begin = 0

    def next_views(self) -> tuple[Tensor, Tensor]:
        """What the next step reads, and as their last position writes."""
        before = self.count if self.seen is None else min(self.count, self.seen)
        start = self.begin + self.count - before
        return self.keys.narrow(2, start, before + 1), self.values.narrow(2, start, before + 1)

    def add(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Take the position over that a step wrote to ``views``: what the cache shows from now."""
        self.count += 1
        if self.most is not None and self.count > self.most:
            self.begin, self.count = self.begin + self.count - self.most, self.most
        if views[0].shape[2] == self.count:
            return views
        return tuple(t.narrow(2, self.begin, self.count) for t in (self.keys, self.values))  # type: ignore[return-value]


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; they go when it goes.

    A cache of transformers copies all its keys and values for every token.  Here each layer's
    tensors [B, K, n, S] are views of buffers of a larger n, and a step writes the next position in
    place; what a sliding window leaves behind stays in front of the view until the buffer is full.
    Whoever else changes the cache (crops it, reorders it, appends to it) leaves tensors of his own,
    which are noticed and copied anew.

    ``windows``: positions that a token of each layer sees, itself among them; None: all.
    """

    def __init__(self, cache: Any, windows: Sequence[int | None]) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self._windows = list(windows)
        self.rooms: list[Room] = []
        self._next: list[tuple[Tensor, Tensor]] = []
        self._shown: list[Tensor] = []

    def buffers(self, cache: Any) -> tuple[list[Tensor], list[Tensor], int]:
        """Keys and values [B, K, capacity, S] per layer with room for one position, and n.

        For layers that see all positions.
        """
        rooms = self._prepared(cache)
        return [room.keys for room in rooms], [room.values for room in rooms], rooms[0].count

    def views(self, cache: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values [B, K, n + 1, S] that a step reads; it writes the last position."""
        self._prepared(cache)
        return [keys for keys, _ in self._next], [values for _, values in self._next]

    def _prepared(self, cache: Any) -> list[Room]:
        """The rooms, each with a position to spare."""
        known = len(self._shown) == 2 * len(cache.layers) and all(
            layer.keys is self._shown[2 * i] and layer.values is self._shown[2 * i + 1]
            for i, layer in enumerate(cache.layers)
        )
        dtype = cache.layers[0].keys.dtype  # a step reads all in one dtype
        if not known:
            pairs = zip(cache.layers, self._windows, strict=True)
            self.rooms = [_adopted(layer, window) for layer, window in pairs]
        for room in self.rooms:
            if not known or room.begin + room.count >= room.keys.shape[2]:
                room.grow(dtype)
        self._next = [room.next_views() for room in self.rooms]
        return self.rooms

    def show(self, cache: Any) -> None:
        """Let the cache hold the position that a step has written."""
        shown = []
        for layer, room, views in zip(cache.layers, self.rooms, self._next, strict=True):
            layer.keys, layer.values = room.add(views)
            if room.most is not None:
                layer.cumulative_length += 1
            shown += [layer.keys, layer.values]
        self._shown = shown

    def nbytes(self) -> int:
        """Bytes beside what the cache itself shows."""
        held = sum(room.keys.nbytes + room.values.nbytes for room in self.rooms)
        return held - sum(t.nbytes for t in self._shown)


def _free(owner: weakref.ref[PreallocatedKVCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing.rooms, growing._next, growing._shown = [], [], []


def _adopted(layer: Any, window: int | None) -> Room:
    """The positions of a cache's layer that a step may read, where they lie."""
    held = layer.keys.shape[2]
    seen = None if window is None else window - 1
    most = seen if type(layer).__name__ == SLIDING else None
    count = held if most is None else min(held, most)
    return Room(layer.keys, layer.values, held - count, count, most, seen)


def _roomy(old: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows, heads, _, size = old.shape
    capacity = (length // ROOM + 1) * ROOM + ROOM // 4
    with torch.inference_mode(False):
        made = torch.zeros(rows, heads, capacity, size, dtype=dtype, device=old.device)
    made[:, :, :length] = old
    return made
