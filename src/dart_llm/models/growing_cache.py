"""The KV cache for native decode steps: transformers' cache, with layers that grow in place.

A native decode step decodes one token per row in a single call of C++.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dart_llm.native.memory import empty

ROOM = 256
"""Number of positions by which buffers grow."""


@dataclass(eq=False)
class Steps:
    """What has happened to the layers of one cache since their buffers were allocated.

    ``done``: number of decode steps, each of which added a position to every layer.  ``changed``:
    True if other tensors were assigned to a layer.
    """

    done: int = 0
    changed: bool = True


@dataclass(eq=False)
class Buffers:
    """Keys and values of one layer, [B, K, capacity, S]: rows, heads, positions, head size.

    ``end``: number of filled positions at allocation.  ``length``: length of the sequence at
    allocation.  ``steps`` counts the positions that were added later.  ``most``: maximum number of
    positions in the views; None means all.
    """

    keys: Tensor
    values: Tensor
    end: int
    length: int
    most: int | None
    steps: Steps

    def views(self) -> tuple[Tensor, Tensor]:
        """The layer's current keys and values [B, K, n, S], as views of the buffers."""
        end = self.end + self.steps.done  # read once: another thread may decode a step meanwhile
        begin = 0 if self.most is None else max(0, end - self.most)
        with torch.inference_mode(False), torch.no_grad():
            return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def nbytes(self) -> int:
        """Bytes of the buffers' positions that the views do not contain."""
        used = sum(view.nbytes for view in self.views())
        return self.keys.nbytes + self.values.nbytes - used


def _lazy(name: str) -> Any:
    """A property that is computed from ``buffers`` until a value is assigned to it."""

    def read(layer: _Growing) -> Any:
        current = layer.current()
        return current[name] if name in current else layer.__dict__[name]

    def write(layer: _Growing, value: Any) -> None:
        if layer.buffers is not None:
            layer.buffers.steps.changed = True  # set first: any line may be interrupted
            layer.__dict__.update(layer.current())
            layer.buffers = None
        layer.__dict__[name] = value

    return property(read, write)


class _Growing:
    """A cache layer that creates the views of its keys and values lazily.

    Creating a view takes more than a microsecond, and a step would need two per layer.  So between
    steps the layer has only ``buffers``.  Once other tensors are assigned (by a crop, a reordering
    or an update), the layer stores these tensors, as transformers' class does.
    """

    buffers: Buffers | None = None
    keys, values = _lazy("keys"), _lazy("values")

    def current(self) -> dict[str, Any]:
        """The attributes that are computed from ``buffers``; empty without buffers."""
        if self.buffers is None:
            return {}
        keys, values = self.buffers.views()
        return {"keys": keys, "values": values}

    def get_seq_length(self) -> int:
        """As in the base class, but without creating a view, because every step calls it."""
        buffers = self.buffers
        if buffers is None:
            return int(super().get_seq_length())  # type: ignore[misc]
        return buffers.length + buffers.steps.done

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Make copies and pickles layers of transformers' class, without ``buffers``."""
        attributes = {**self.__dict__, **self.current()}
        attributes.pop("buffers", None)
        return _layer, (type(self).__bases__[1], attributes)


class GrowingLayer(_Growing, DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps all positions."""


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps the positions of a sliding window."""

    cumulative_length = _lazy("cumulative_length")

    def current(self) -> dict[str, Any]:
        """The attributes of ``_Growing.current``, and the length of the whole sequence."""
        views = super().current()
        return {**views, "cumulative_length": self.get_seq_length()} if views else {}


def _layer(kind: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(kind)
    layer.__dict__.update(attributes)
    return layer


def _grow(layer: Any, buffers: Buffers) -> Any:
    """A growing layer that replaces ``layer`` and uses ``buffers``."""
    kind = GrowingSlidingLayer if layer.is_sliding else GrowingLayer
    lazy = ("keys", "values", "cumulative_length")
    attributes = {name: v for name, v in layer.__dict__.items() if name not in lazy}
    return _layer(kind, {**attributes, "buffers": buffers})


def is_growing(cache: Any) -> bool:
    """Whether ``cache`` is exactly transformers' ``DynamicCache``."""
    return type(cache) is DynamicCache


def extendable(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether decode steps can extend ``cache``; ``windows``: each layer's attention window."""
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
    """Store a prompt's keys and values in layer ``index``, as ``cache.update`` does.

    An empty ``DynamicLayer`` stores ``keys`` and ``values`` [B, K, T, S] without a copy, so callers
    must not modify these tensors.
    """
    layer: Any = cache.layers[index] if is_growing(cache) and index < len(cache.layers) else None
    if type(layer) is not DynamicLayer or layer.is_initialized or cache.offloading:
        cache.update(keys, values, index)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def layer_tensors(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's keys and values; read only rows and dtypes, as positions may not be filled."""
    source = (layer.buffers if isinstance(layer, _Growing) else None) or layer
    return source.keys, source.values


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; they are freed with the cache.

    A cache of transformers copies all its keys and values for every token.  Here each layer is a
    ``GrowingLayer`` with larger buffers, and a step writes the next position in place.  Positions
    that leave a sliding window remain in the buffer, before the positions in the views.  When a
    buffer is full or other tensors are assigned to a layer, all layers are copied to new buffers.

    ``windows``: for each layer, to how many positions a token attends, including its own; None
    means all.
    """

    def __init__(self, cache: Any, windows: Sequence[int | None]) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self._windows = list(windows)
        self.steps = Steps()
        self._layers: list[Any] = []

    def ready(self, cache: Any) -> bool:
        """Whether the next step can use the buffers: no layer changed, and each buffer has room."""
        steps = self.steps
        return steps.done < ROOM and not steps.changed and cache.layers == self._layers

    def prepare(self, cache: Any) -> None:
        """Make room for one position; new buffers also change ``places()`` and ``steps``."""
        if self.ready(cache):
            return
        steps = Steps()
        with torch.inference_mode(False), torch.no_grad():
            buffers = _copied(cache.layers, steps)
            layers = [_grow(*pair) for pair in zip(cache.layers, buffers, strict=True)]
        # any of these lines may be the last before an interrupt: layers are consistent after each
        self.steps, self._layers = steps, layers
        cache.layers[:] = layers
        steps.changed = False

    def places(self) -> tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]:
        """The native step's arguments for these buffers: five lists with one value per layer.

        The first two lists are the buffers of keys and the buffers of values.  The third is where
        the filled positions end, and the fourth is how many positions are filled; here both are
        equal.  The last is how many earlier positions a step reads, -1 for all.
        """
        buffers = [layer.buffers for layer in self._layers]
        ends = [each.end for each in buffers]
        keys, values = [each.keys for each in buffers], [each.values for each in buffers]
        seen = [-1 if window is None else window - 1 for window in self._windows]
        return keys, values, ends, ends, seen

    def advance(self) -> None:
        """Count the position that a step has written to every layer."""
        self.steps.done += 1

    def nbytes(self) -> int:
        """Bytes of all positions in the buffers that are not in use."""
        return sum(layer.buffers.nbytes() for layer in self._layers if layer.buffers is not None)


def _free(owner: weakref.ref[PreallocatedKVCache], _cache: object) -> None:
    if (growing := owner()) is not None:
        growing._layers = []


def _copied(layers: Sequence[Any], steps: Steps) -> list[Buffers]:
    """New buffers with copies of the positions that a step may read, and room for ``ROOM`` more.

    All of them share one memory, because a step reads them as it reads weights: pages of 4 KB would
    make it wait.
    """
    most = [layer.sliding_window - 1 if layer.is_sliding else None for layer in layers]
    old = [_read(layer, count) for layer, count in zip(layers, most, strict=True)]
    dtype = old[0][0].dtype  # a step reads only one dtype
    shapes = [(*keys.shape[:2], keys.shape[2] + ROOM, keys.shape[3]) for keys, _ in old]
    device = old[0][0].device
    room = empty(2 * sum(map(math.prod, shapes)), dtype, device)
    buffers, begin = [], 0
    for layer, (keys, values), shape, window in zip(layers, old, shapes, most, strict=True):
        count, size = keys.shape[2], math.prod(shape)
        to_keys, to_values = room[begin : begin + 2 * size].view(2, *shape)
        to_keys[:, :, :count], to_values[:, :, :count] = keys, values
        begin += 2 * size
        length = layer.get_seq_length()
        buffers.append(Buffers(to_keys, to_values, count, length, window, steps))
    return buffers


def _read(layer: Any, most: int | None) -> tuple[Tensor, Tensor]:
    """A layer's keys and values [B, K, n, S] of the positions that a step may read."""
    begin = 0 if most is None else max(0, layer.keys.shape[2] - most)
    return layer.keys[:, :, begin:], layer.values[:, :, begin:]
