"""The KV cache of whole decode steps: transformers' own, whose layers grow in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

ROOM = 256
"""Positions that are added at a time."""


@dataclass(eq=False)
class Steps:
    """Positions that all layers of one cache got since their buffers were bound.

    ``changed``: whether a layer was given other tensors since.
    """

    done: int = 0
    changed: bool = True


@dataclass(eq=False)
class Buffers:
    """Keys and values of one layer, [B, K, capacity, S].

    ``end``: where the cache's positions ended before ``steps``; ``count``: how many they were;
    ``length``: of the whole sequence then.  ``most``: positions that the layer keeps; ``seen``:
    those that the next step reads, None: all.
    """

    keys: Tensor
    values: Tensor
    end: int
    count: int
    length: int
    most: int | None
    seen: int | None
    steps: Steps

    def _kept(self, done: int) -> int:
        count = self.count + done
        return count if self.most is None else min(count, self.most)

    @property
    def full(self) -> bool:
        return self.end + self.steps.done >= self.keys.shape[2]

    def views(self) -> tuple[Tensor, Tensor]:
        """The layer's current keys and values [B, K, n, S]."""
        done = self.steps.done  # read once: another thread may be between two steps
        count = self._kept(done)
        begin = self.end + done - count
        with torch.inference_mode(False), torch.no_grad():
            return self.keys.narrow(2, begin, count), self.values.narrow(2, begin, count)

    def rebased(self, steps: Steps, grow: torch.dtype | None) -> Buffers:
        """The same positions before other steps; ``grow``: copied, of this dtype, with room."""
        done = self.steps.done
        count, end, keys, values = self._kept(done), self.end + done, self.keys, self.values
        if grow is not None:
            end, (keys, values) = count, (_roomy(t, count, grow) for t in self.views())
        return Buffers(keys, values, end, count, self.length + done, self.most, self.seen, steps)

    def nbytes(self) -> int:
        """Bytes of the spare positions."""
        capacity = self.keys.shape[2]
        spare = capacity - self._kept(self.steps.done)
        return (self.keys.nbytes + self.values.nbytes) // capacity * spare


class _Growing:
    """A cache layer whose key and value views are created lazily.

    A view costs more than a microsecond, and there are two per layer and token.  So between steps
    the layer has only ``buffers``; once other tensors are assigned (a crop, a reordering, an
    update), it keeps these as its base class does.
    """

    buffers: Buffers | None = None
    is_sliding: bool

    def _current(self) -> dict[str, Any]:
        """The attributes that ``buffers`` decide."""
        if self.buffers is None:
            return {}
        keys, values = self.buffers.views()
        length = {"cumulative_length": self.get_seq_length()} if self.is_sliding else {}
        return {"keys": keys, "values": values, **length}

    def __getattr__(self, name: str) -> Any:
        current = self._current() if name in LAZY else {}
        if name not in current:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return current[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LAZY and self.buffers is not None:
            self.buffers.steps.changed = True  # first: an interrupt may come in between
            self.__dict__.update(self._current())
            self.__dict__["buffers"] = None
        object.__setattr__(self, name, value)

    def get_seq_length(self) -> int:
        """As of the base class; called before every step."""
        buffers = self.buffers
        if buffers is None:
            return int(super().get_seq_length())  # type: ignore[misc]
        return buffers.length + buffers.steps.done

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the plain layer."""
        attributes = {**self.__dict__, **self._current()}
        attributes.pop("buffers")
        return _layer, (type(self).__bases__[1], attributes)


LAZY = ("keys", "values", "cumulative_length")
"""Attributes that a growing layer omits while it has buffers; the last only in sliding layers."""


class GrowingLayer(_Growing, DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps all positions."""


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps those of a window."""


def _layer(kind: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(kind)
    layer.__dict__.update(attributes)
    return layer


def _grow_from(layer: Any, buffers: Buffers) -> Any:
    """``layer``, or a growing copy of it, with these ``buffers``."""
    if isinstance(layer, _Growing):
        layer.__dict__["buffers"] = buffers
        for name in LAZY:
            layer.__dict__.pop(name, None)
        return layer
    attributes = {name: v for name, v in layer.__dict__.items() if name not in LAZY}
    kind = GrowingSlidingLayer if layer.is_sliding else GrowingLayer
    return _layer(kind, {**attributes, "buffers": buffers})


def is_static(cache: Any) -> bool:
    """Whether ``cache`` is one of transformers whose tensors stay where they are."""
    return type(cache) is StaticCache


def is_growing(cache: Any) -> bool:
    """Whether ``cache`` is the one of transformers that grows."""
    return type(cache) is DynamicCache


def extendable(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether steps of a model whose layers see ``windows`` positions can extend ``cache``."""
    if not (is_growing(cache) or is_static(cache)) or len(cache.layers) != len(windows):
        return False
    if is_static(cache):
        return all(map(_has_room, cache.layers))
    for layer, window in zip(cache.layers, windows, strict=True):
        # one that keeps the past too does so for a later crop
        slides = type(layer) in (DynamicSlidingWindowLayer, GrowingSlidingLayer)
        if slides and (layer.sliding_window != window or layer.record_past):
            return False
        if not slides and type(layer) not in (DynamicLayer, GrowingLayer):
            return False
    return True


def _has_room(layer: Any) -> bool:
    """Of a static layer: whether the next position has its own slot.

    A window that is full moves all others instead.
    """
    static = type(layer) in (StaticLayer, StaticSlidingWindowLayer) and layer.is_initialized
    return static and int(layer.get_seq_length()) < layer.max_cache_len


def fill_layer(cache: Any, keys: Tensor, values: Tensor, index: int) -> None:
    """As ``cache.update`` with a prompt's, without a copy where layer ``index`` is empty and grows.

    ``keys``, ``values``: [B, K, T, S], the cache's own from now on.
    """
    layer: Any = cache.layers[index] if is_growing(cache) and index < len(cache.layers) else None
    if type(layer) is not DynamicLayer or layer.is_initialized or cache.offloading:
        cache.update(keys, values, index)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def layer_tensors(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, maybe of more positions than it has: for rows and dtypes."""
    buffers = _buffers_of(layer)
    return (layer.keys, layer.values) if buffers is None else (buffers.keys, buffers.values)


def _buffers_of(layer: Any) -> Buffers | None:
    return layer.buffers if isinstance(layer, _Growing) else None


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; they go when it goes.

    A cache of transformers copies all its keys and values for every token.  Here each layer is a
    ``GrowingLayer`` over larger buffers, and a step writes the next position in place; what a
    sliding window leaves behind stays in front of its view until the buffer is full.  A layer that
    is given other tensors is copied anew.

    ``windows``: positions that a token of each layer sees, itself among them; None: all.
    """

    def __init__(self, cache: Any, windows: Sequence[int | None]) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self._windows = list(windows)
        self.rooms: list[Buffers] = []
        self.steps = Steps()
        self._layers: list[Any] = []
        self._spare = 0

    def ready(self, cache: Any) -> bool:
        """Whether a step can be made at once: nothing was changed, and there is room."""
        steps = self.steps
        return steps.done < self._spare and not steps.changed and cache.layers == self._layers

    def prepare(self, cache: Any) -> None:
        """Make room for a position; ``rooms`` and ``steps`` are others where that helps."""
        if self.ready(cache):
            return
        with torch.inference_mode(False), torch.no_grad():
            self._make_rooms(cache)
        # an interrupt may come between any two lines: each leaves layers that work
        for index, buffers in enumerate(self.rooms):
            cache.layers[index] = _grow_from(cache.layers[index], buffers)
        self._layers = list(cache.layers)
        self.steps.changed = False

    def _make_rooms(self, cache: Any) -> None:
        steps, rooms = Steps(), []
        dtype = layer_tensors(cache.layers[0])[0].dtype  # a step reads all in one dtype
        for index, (layer, window) in enumerate(zip(cache.layers, self._windows, strict=True)):
            current = _buffers_of(layer)
            if current is not None and current in self.rooms[index : index + 1]:
                rooms.append(current.rebased(steps, dtype if current.full else None))
            else:
                rooms.append(_adopt(layer, window).rebased(steps, dtype))
        self.rooms, self.steps = rooms, steps
        self._spare = min(room.keys.shape[2] - room.end for room in rooms)

    def advance(self) -> None:
        """A step has written the next position of all layers."""
        self.steps.done += 1

    def nbytes(self) -> int:
        """Bytes in addition to the cache's own views."""
        return sum(room.nbytes() for room in self.rooms)


def _free(owner: weakref.ref[PreallocatedKVCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing.rooms, growing._layers, growing._spare = [], [], 0


def _adopt(layer: Any, window: int | None) -> Buffers:
    """The positions of a cache's layer that a step may read, where they lie."""
    keys, values = layer.keys, layer.values
    end = keys.shape[2]
    seen = None if window is None else window - 1
    most = seen if layer.is_sliding else None
    count = end if most is None else min(end, most)
    return Buffers(keys, values, end, count, layer.get_seq_length(), most, seen, Steps())


def _roomy(old: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows, heads, _, size = old.shape
    capacity = (length // ROOM + 1) * ROOM + ROOM // 4
    with torch.inference_mode(False):
        made = torch.zeros(rows, heads, capacity, size, dtype=dtype, device=old.device)
    made[:, :, :length] = old
    return made


Places = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]
"""Per layer: buffers of keys and of values, where the filled positions end, how many they are, and
how many a step reads beside its own, -1 for all."""


def static_places(cache: Any, windows: Sequence[int | None]) -> Places:
    """Where the next step reads and writes a static cache."""
    layers = cache.layers
    counts = [int(layer.get_seq_length()) for layer in layers]
    seen = [-1 if window is None else window - 1 for window in windows]
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    return keys, values, counts, counts, seen


def count_static(cache: Any) -> None:
    """Let a static cache count the position that a step has written."""
    with torch.inference_mode():  # in which the counts may have been made
        torch._foreach_add_([layer.cumulative_length for layer in cache.layers], 1)
    for layer in cache.layers:
        if layer.is_sliding:
            layer.cumulative_length_int += 1
