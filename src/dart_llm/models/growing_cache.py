"""The KV cache of decode steps that run as a whole, seen as transformers' own."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROOM = 256
"""Positions that are added at a time."""

CACHE, FULL, SLIDING = "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"
STATIC, STATIC_LAYERS = "StaticCache", ("StaticLayer", "StaticSlidingWindowLayer")
"""Classes of the caches that a step can extend, and of their layers."""

HIDDEN, SHOWN = "_dart_room", "_dart_shown"
"""Where a layer that is hidden keeps its ``Room``, and its class the class that it had."""


def is_static(cache: Any) -> bool:
    """Whether ``cache`` is one of transformers whose tensors stay where they are."""
    return type(cache).__name__ == STATIC


def is_cache(cache: Any) -> bool:
    """Whether ``cache`` is the one of transformers that grows."""
    return type(cache).__name__ == CACHE


def extendable(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether steps of a model whose layers see ``windows`` positions can extend ``cache``."""
    if not (is_cache(cache) or is_static(cache)) or len(cache.layers) != len(windows):
        return False
    if is_static(cache):
        return all(map(_has_room, cache.layers))
    for layer, window in zip(cache.layers, windows, strict=True):
        kind = type(layer).__name__
        # one that keeps the past too does so for a later crop
        slides = kind == SLIDING and layer.sliding_window == window and not layer.record_past
        if not slides and kind != FULL:
            return False
    return True


def begin(cache: Any, keys: Tensor, values: Tensor, index: int) -> None:
    """As ``cache.update`` with a prompt's, without a copy where layer ``index`` is empty and grows.

    ``keys``, ``values``: [B, K, T, S], the cache's own from now on.
    """
    layer: Any = cache.layers[index] if is_cache(cache) and index < len(cache.layers) else None
    if type(layer).__name__ != FULL or layer.is_initialized or getattr(cache, "offloading", False):
        cache.update(keys, values, index)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _has_room(layer: Any) -> bool:
    """Of a static layer: whether the next position has a place of its own.

    One of a window that is full moves all others instead.
    """
    known = type(layer).__name__ in STATIC_LAYERS and layer.is_initialized
    return known and int(layer.get_seq_length()) < layer.max_cache_len


@dataclass(eq=False)
class Steps:
    """How many positions all layers of one cache got since their rooms were made.

    ``seen``: whether a layer of it is not hidden, as somebody has looked.
    """

    done: int = 0
    seen: bool = True


@dataclass(eq=False)
class Room:
    """One layer's buffers [B, K, capacity, S].

    ``end``: where the cache's positions ended before ``steps``; ``count``: how many they were;
    ``length``: of the whole text then.  ``most``: positions that the layer keeps; ``seen``: those
    that the next step reads, None: all.
    """

    keys: Tensor
    values: Tensor
    end: int
    count: int
    length: int
    most: int | None
    seen: int | None
    steps: Steps
    shown: tuple[Tensor, Tensor] | None = None
    """What the layer got when it was last read."""

    @property
    def kept(self) -> int:
        """Positions that the layer holds now."""
        count = self.count + self.steps.done
        return count if self.most is None else min(count, self.most)

    @property
    def full(self) -> bool:
        return self.end + self.steps.done >= self.keys.shape[2]

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, n, S] that the layer holds now."""
        count = self.kept
        begin = self.end + self.steps.done - count
        return self.keys.narrow(2, begin, count), self.values.narrow(2, begin, count)

    def attributes(self, layer: Any) -> dict[str, Any]:
        """What ``layer`` is given to hold now."""
        with torch.inference_mode(False), torch.no_grad():
            self.shown = keys, values = self.views()
        found: dict[str, Any] = {"keys": keys, "values": values}
        if type(layer).__name__ == SLIDING:
            found["cumulative_length"] = self.length + self.steps.done
        return found

    def moved(self, steps: Steps, grow: torch.dtype | None) -> Room:
        """The same positions before other steps; ``grow``: copied, of this dtype, with room."""
        count, done = self.kept, self.steps.done
        end, sides = self.end + done, (self.keys, self.values)
        if grow is not None:
            end, sides = count, tuple(_roomy(t, count, grow) for t in self.views())  # type: ignore[assignment]
        return Room(*sides, end, count, self.length + done, self.most, self.seen, steps)

    def nbytes(self) -> int:
        """Bytes beside what the layer holds."""
        capacity = self.keys.shape[2]
        return (self.keys.nbytes + self.values.nbytes) // capacity * (capacity - self.kept)


# A layer of transformers' cache whose newest positions nobody has asked for yet.
#
# Every view of a buffer costs more than a microsecond, and there are two per layer and token.  So
# between steps the layers of a cache are hidden: they lack the attributes that change, and have a
# class that puts them back, and itself away, at the first look at one of them or the first change.

LOCK = threading.RLock()
"""Held by who hides, shows or counts: another thread may look while a step is made."""


class _Hidden:
    """What the class of a hidden layer has beside that of the layer."""

    __dict__: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if HIDDEN not in self.__dict__ or name not in CHANGING:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _show(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _show(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _show(self)
        delattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _show(self)
        return self.__reduce_ex__(protocol)

    def get_seq_length(self) -> int:
        """As of the layer; asked before every step."""
        room: Room | None = self.__dict__.get(HIDDEN)
        if room is None:
            _show(self)
            return int(self.get_seq_length())
        return room.length + room.steps.done


CHANGING = ("keys", "values", "cumulative_length")
"""What a hidden layer lacks; the last of sliding layers alone."""


@functools.cache
def _hidden(kind: type) -> type:
    """``kind`` under the same name; its only base, as an object can change to no other class."""
    names = ("__getattr__", "__setattr__", "__delattr__", "__reduce_ex__", "get_seq_length")
    members = {name: vars(_Hidden)[name] for name in names}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**members, "_layer_type": None, SHOWN: kind})


def _hide(layer: Any, room: Room) -> None:
    """An interrupt may come between any two instructions: each leaves a layer that works."""
    kept = {name: value for name, value in layer.__dict__.items() if name not in CHANGING}
    if SHOWN not in type(layer).__dict__:
        kind: type[Any] = type(layer)
        layer.__class__ = _hidden(kind)  # type: ignore[arg-type]
    object.__setattr__(layer, "__dict__", {**kept, HIDDEN: room})


def _show(layer: Any) -> None:
    with LOCK:
        now = dict(layer.__dict__)
        room: Room | None = now.pop(HIDDEN, None)
        if room is not None:
            room.steps.seen = True
            now |= room.attributes(layer)
            object.__setattr__(layer, "__dict__", now)
        if SHOWN in type(layer).__dict__:  # no other thread was quicker
            object.__setattr__(layer, "__class__", getattr(type(layer), SHOWN))


def held(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, of more positions where it is hidden: for rows and dtypes."""
    room: Room | None = layer.__dict__.get(HIDDEN)
    return (layer.keys, layer.values) if room is None else (room.keys, room.values)


class PreallocatedKVCache:
    """Buffers in which the keys and values of one cache grow; they go when it goes.

    A cache of transformers copies all its keys and values for every token.  Here each layer's
    tensors [B, K, n, S] are views of buffers of a larger n, made when somebody reads them, and a
    step writes the next position in place; what a sliding window leaves behind stays in front of
    the view until the buffer is full.  Whoever else changes the cache (crops it, reorders it,
    appends to it) leaves tensors of his own, which are noticed and copied anew.

    ``windows``: positions that a token of each layer sees, itself among them; None: all.
    """

    def __init__(self, cache: Any, windows: Sequence[int | None]) -> None:
        self.of = weakref.ref(cache, functools.partial(_free, weakref.ref(self)))
        self._windows = list(windows)
        self.rooms: list[Room] = []
        self.steps = Steps()
        self._layers: list[Any] = []
        self._spare = 0

    def ready(self, cache: Any) -> bool:
        """Whether a step can be made at once: nobody has looked, and there is room."""
        steps = self.steps
        return steps.done < self._spare and not steps.seen and cache.layers == self._layers

    def prepare(self, cache: Any) -> None:
        """Let there be room for a position; ``rooms`` and ``steps`` are others where that helps."""
        if self.ready(cache):
            return
        with LOCK:
            with torch.inference_mode(False), torch.no_grad():
                self._make_rooms(cache)
            self._layers = list(cache.layers)
            for layer, room in zip(self._layers, self.rooms, strict=True):
                _hide(layer, room)
            self.steps.seen = False

    def _make_rooms(self, cache: Any) -> None:
        steps, rooms = Steps(), []
        dtype = held(cache.layers[0])[0].dtype  # a step reads all in one dtype
        for index, (layer, window) in enumerate(zip(cache.layers, self._windows, strict=True)):
            known = self._known(index, layer)
            room = _adopted(layer, window) if known is None else known
            grows = known is None or known.full
            rooms.append(room.moved(steps, dtype if grows else None))
        self.rooms, self.steps = rooms, steps
        self._spare = min(room.keys.shape[2] - room.end for room in rooms)

    def _known(self, index: int, layer: Any) -> Room | None:
        """The room of a layer that holds nothing else."""
        room = self.rooms[index] if self.rooms else None
        if room is None or layer.__dict__.get(HIDDEN) is room:
            return room
        shown = room.shown
        return room if shown and shown[0] is layer.keys and shown[1] is layer.values else None

    def advance(self) -> None:
        """A step has written the next position of all layers."""
        with LOCK:
            self.steps.done += 1
            if self.steps.seen:  # by another thread, which got one position less
                for index, layer in enumerate(self._layers):
                    room = self._known(index, layer)
                    if room is not None and HIDDEN not in layer.__dict__:
                        layer.__dict__.update(room.attributes(layer))

    def show(self) -> None:
        """Let all layers be what they were, with the positions that they got."""
        for layer in self._layers:
            if HIDDEN in layer.__dict__:
                _show(layer)

    def nbytes(self) -> int:
        """Bytes beside what the cache itself shows."""
        return sum(room.nbytes() for room in self.rooms)


Places = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]
"""Per layer: buffers of keys and of values, where the filled positions end, how many they are, and
how many a step reads beside its own, -1 for all."""


def static_places(cache: Any, windows: Sequence[int | None]) -> Places:
    """Where the next step finds and leaves what a static cache holds."""
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


def _free(owner: weakref.ref[PreallocatedKVCache], gone: object) -> None:
    if (growing := owner()) is not None:
        growing.rooms, growing._layers, growing._spare = [], [], 0


def _adopted(layer: Any, window: int | None) -> Room:
    """The positions of a cache's layer that a step may read, where they lie."""
    end = layer.keys.shape[2]
    seen = None if window is None else window - 1
    most = seen if type(layer).__name__ == SLIDING else None
    count = end if most is None else min(end, most)
    length = layer.get_seq_length()
    return Room(layer.keys, layer.values, end, count, length, most, seen, Steps())


def _roomy(old: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    rows, heads, _, size = old.shape
    capacity = (length // ROOM + 1) * ROOM + ROOM // 4
    with torch.inference_mode(False):
        made = torch.zeros(rows, heads, capacity, size, dtype=dtype, device=old.device)
    made[:, :, :length] = old
    return made
