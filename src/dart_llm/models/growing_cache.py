"""The KV cache of whole decode steps: transformers' cache with layers that grow in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256
"""Positions that are added at a time."""


@dataclass(eq=False)
class Steps:
    """Positions added to all layers of one cache since their buffers were allocated.

    ``changed``: whether other tensors were assigned to a layer since.
    """

    done: int = 0
    changed: bool = True


@dataclass(eq=False)
class Buffers:
    """Keys and values of one layer, [B, K, capacity, S].

    ``end``: number of positions filled before ``steps``; ``length``: length of the sequence at that
    time.  ``most``: positions that the layer keeps, None: all.
    """

    keys: Tensor
    values: Tensor
    end: int
    length: int
    most: int | None
    steps: Steps

    def views(self) -> tuple[Tensor, Tensor]:
        """The layer's current keys and values [B, K, n, S]."""
        end = self.end + self.steps.done  # read once: another thread may decode a step meanwhile
        begin = 0 if self.most is None else max(0, end - self.most)
        with torch.inference_mode(False), torch.no_grad():
            return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def nbytes(self) -> int:
        """Bytes of the spare positions."""
        used = sum(view.nbytes for view in self.views())
        return self.keys.nbytes + self.values.nbytes - used


def _lazy(name: str) -> Any:
    """An attribute computed from ``buffers`` until a value is assigned to it."""

    def read(layer: _Growing) -> Any:
        current = layer.current()
        return current[name] if name in current else layer.__dict__[name]

    def write(layer: _Growing, value: Any) -> None:
        if layer.buffers is not None:
            layer.buffers.steps.changed = True  # first: an interrupt may come in between
            layer.__dict__.update(layer.current())
            layer.buffers = None
        layer.__dict__[name] = value

    return property(read, write)


class _Growing:
    """A cache layer whose key and value views are created lazily.

    A view costs more than a microsecond, and there are two per layer and token.  So between steps
    the layer has only ``buffers``; once other tensors are assigned (by a crop, a reordering, an
    update), it stores these as its base class does.
    """

    buffers: Buffers | None = None
    keys, values = _lazy("keys"), _lazy("values")

    def current(self) -> dict[str, Any]:
        """The attributes computed from ``buffers``; empty without buffers."""
        if self.buffers is None:
            return {}
        keys, values = self.buffers.views()
        return {"keys": keys, "values": values}

    def get_seq_length(self) -> int:
        """As in the base class; called before every step."""
        buffers = self.buffers
        if buffers is None:
            return int(super().get_seq_length())  # type: ignore[misc]
        return buffers.length + buffers.steps.done

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the base class of transformers."""
        attributes = {**self.__dict__, **self.current()}
        attributes.pop("buffers", None)
        return _layer, (type(self).__bases__[1], attributes)


class GrowingLayer(_Growing, DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps all positions."""


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps the positions of a sliding window."""

    cumulative_length = _lazy("cumulative_length")

    def current(self) -> dict[str, Any]:
        """As in the base class, with the length of the whole sequence."""
        views = super().current()
        return {**views, "cumulative_length": self.get_seq_length()} if views else {}


def _layer(kind: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(kind)
    layer.__dict__.update(attributes)
    return layer


def _grow(layer: Any, buffers: Buffers) -> Any:
    """A growing layer in place of ``layer``, with these ``buffers``."""
    kind = GrowingSlidingLayer if layer.is_sliding else GrowingLayer
    lazy = ("keys", "values", "cumulative_length")
    attributes = {name: v for name, v in layer.__dict__.items() if name not in lazy}
    return _layer(kind, {**attributes, "buffers": buffers})


def is_growing(cache: Any) -> bool:
    """Whether ``cache`` is transformers' growing cache."""
    return type(cache) is DynamicCache


def extendable(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether decode steps can extend ``cache``, for a model with these attention ``windows``."""
    if not is_growing(cache) or len(cache.layers) != len(windows):
        return False
    for layer, window in zip(cache.layers, windows, strict=True):
        # a layer with record_past also keeps older positions for a later crop
        slides = type(layer) in (DynamicSlidingWindowLayer, GrowingSlidingLayer)
        if slides and (layer.sliding_window != window or layer.record_past):
            return False
        if not slides and type(layer) not in (DynamicLayer, GrowingLayer):
            return False
    return True


def fill_layer(cache: Any, keys: Tensor, values: Tensor, index: int) -> None:
    """Like ``cache.update`` with a prompt, without a copy if layer ``index`` is empty and grows.

    ``keys``, ``values``: [B, K, T, S]; the cache owns them from now on.
    """
    layer: Any = cache.layers[index] if is_growing(cache) and index < len(cache.layers) else None
    if type(layer) is not DynamicLayer or layer.is_initialized or cache.offloading:
        cache.update(keys, values, index)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def layer_tensors(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, possibly with spare positions; for reading rows and dtypes."""
    source = (layer.buffers if isinstance(layer, _Growing) else None) or layer
    return source.keys, source.values


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; freed together with the cache.

    A cache of transformers copies all its keys and values for every token.  Here each layer is a
    ``GrowingLayer`` over larger buffers, and a step writes the next position in place; positions
    that leave a sliding window remain in the buffer, before its view.  When a buffer is full or
    other tensors are assigned to a layer, all layers are copied into new buffers.

    ``windows``: positions that a token of each layer sees, including itself; None: all.
    """

    def __init__(self, cache: Any, windows: Sequence[int | None]) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self._windows = list(windows)
        self.steps = Steps()
        self._layers: list[Any] = []

    def ready(self, cache: Any) -> bool:
        """Whether the next step needs no new buffers: nothing was changed, and there is room."""
        steps = self.steps
        return steps.done < ROOM and not steps.changed and cache.layers == self._layers

    def prepare(self, cache: Any) -> None:
        """Make room for a position; ``places()`` and ``steps`` change if buffers are replaced."""
        if self.ready(cache):
            return
        steps, dtype = Steps(), layer_tensors(cache.layers[0])[0].dtype  # a step reads one dtype
        with torch.inference_mode(False), torch.no_grad():
            layers = [_grow(layer, _copied(layer, dtype, steps)) for layer in cache.layers]
        # an interrupt may come between any two lines: the layers work after each of them
        self.steps, self._layers = steps, layers
        cache.layers[:] = layers
        steps.changed = False

    def places(self) -> tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]:
        """What the native object binds, per layer: buffers of keys and of values, where the filled
        positions end, how many there are, and how many a step reads before its own, -1 for all.
        """
        rooms = [layer.buffers for layer in self._layers]
        ends = [room.end for room in rooms]
        keys, values = [room.keys for room in rooms], [room.values for room in rooms]
        seen = [-1 if window is None else window - 1 for window in self._windows]
        return keys, values, ends, ends, seen

    def advance(self) -> None:
        """Count the position that a step has written in all layers."""
        self.steps.done += 1

    def nbytes(self) -> int:
        """Bytes of the buffers beyond the positions in use."""
        return sum(layer.buffers.nbytes() for layer in self._layers if layer.buffers is not None)


def _free(owner: weakref.ref[PreallocatedKVCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing._layers = []


def _copied(layer: Any, dtype: torch.dtype, steps: Steps) -> Buffers:
    """Copies of the positions of a layer that a step may read, with room for more."""
    most = layer.sliding_window - 1 if layer.is_sliding else None
    begin = 0 if most is None else max(0, layer.keys.shape[2] - most)
    old = [t[:, :, begin:] for t in (layer.keys, layer.values)]
    rows, heads, count, size = old[0].shape
    shape = rows, heads, count + ROOM, size
    keys, values = (torch.zeros(shape, dtype=dtype, device=t.device) for t in old)
    for room, positions in ((keys, old[0]), (values, old[1])):
        room[:, :, :count] = positions
    return Buffers(keys, values, count, layer.get_seq_length(), most, steps)
