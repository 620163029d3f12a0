"""Decode tokens that were seen and not yet added to the evidence.

Adding many tokens of all layers at once costs about as much as adding one of one layer, so
observing stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

LIMIT = 32
"""Tokens after which the evidence is updated."""

MAX_BYTES = 4 << 20
"""Bytes after which it is updated, however few the tokens: large models gain nothing by waiting."""

STREAM_FIRST, STREAM_EVERY = 8, 8
"""Sensitivities are read on the prompt, on the first observed tokens and on every n-th after."""


class LayerObservation(NamedTuple):
    """What one layer saw, or several of one shape with a first dimension for them; None: unneeded.

    ``u``: [B, T, I] activations; ``h``: [B, T, D] the FFN's input, for low-rank compensation;
    ``z``, ``x``, ``r``: [B, T, D] its output, the stream before it and what is added to that.
    """

    u: Tensor | None
    h: Tensor | None = None
    z: Tensor | None = None
    x: Tensor | None = None
    r: Tensor | None = None

    def cut(self, tokens: slice) -> LayerObservation:
        """Some tokens of one layer."""
        return LayerObservation(*(t if t is None else t[:, tokens] for t in self))

    def reading(self, tokens: list[int]) -> LayerObservation:
        """The same with the stream of some tokens of one layer alone."""
        if self.z is None:
            return self
        if not tokens:
            return LayerObservation(self.u, self.h)
        return LayerObservation(
            self.u, self.h, *(t if t is None else t[:, tokens] for t in self[2:])
        )

    @property
    def shown(self) -> Tensor:
        """One of the tensors."""
        return next(t for t in self if t is not None)


NEURONS, STREAM = (0, 1), (2, 3, 4)
"""Parts of ``Seen`` by what is made of them."""


def detached_copy(seen: LayerObservation, stream: bool) -> LayerObservation:
    """What one layer saw, outside any graph and safe from what the model does later.

    ``stream``: whether z, x and r are wanted.
    """
    u, h, z, x, r = seen
    if torch.is_grad_enabled():
        u, h, z, x, r = (t if t is None else t.detach() for t in seen)
    if not stream or z is None:
        return LayerObservation(u, h)
    # z is cloned: some layers add to the FFN's output in place after it returned
    kept = z.clone()
    same = r is not None and r.data_ptr() == z.data_ptr()
    return LayerObservation(u, h, kept, x, kept if same else r)


def sampled_tokens(observed: Sequence[int], tokens: int) -> list[int]:
    """Which of ``tokens`` new decode tokens sensitivities are read on.

    ``observed``: tokens that each life has observed before.
    """
    return [token for token in range(tokens) if any(_is_read(n + token) for n in observed)]


def sampled_per_sequence(observed: Sequence[int], read: Sequence[int]) -> Tensor | None:
    """Which of the tokens ``read`` every life reads itself, [lives, n] of 0 and 1; None: all.

    What a life reads must not depend on the lives beside it.
    """
    marks = [[float(_is_read(n + token)) for token in read] for n in observed]
    return None if all(map(all, marks)) else torch.tensor(marks)


def _is_read(number: int) -> bool:
    """Whether a life reads the stream of the observed token ``number``, counted from 0."""
    return number < STREAM_FIRST or number % STREAM_EVERY == 0


Update = Callable[[list[bool], tuple[int, ...], LayerObservation, Tensor | None], None]
"""Flags of the lives, layers, what these saw ([L, B, T, ...] each) and weights [B, T] or None."""


def weak_callback(method: Update) -> Update:
    """``method`` without its object, which holds who calls it: a ring would keep both alive."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return call


@dataclass
class Observations:
    """A queue of observed decode forwards; ``observing``: one flag per life."""

    update: Update
    observing: list[bool] = field(default_factory=list)
    forwards: list[Mapping[int, LayerObservation]] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    """Of each forward, the tokens whose stream is read."""
    own: list[Tensor | None] = field(default_factory=list)
    """Of each forward, which of these every life reads itself."""

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.shapes)

    def add(
        self,
        observing: list[bool],
        layers: Mapping[int, LayerObservation],
        weights: Tensor | None,
        rows: int,
        tokens: int,
        read: list[int],
        own: Tensor | None = None,
    ) -> None:
        """Queue the first ``tokens`` of one forward; ``weights``: [B, tokens] or None.

        ``read``: the tokens whose stream is read, where it was captured; ``own``: as of
        ``own_reads``, where every row has a life of its own.
        """
        if not layers or not tokens:
            return
        if observing != self.observing or (self.shapes and self.shapes[0][0] != rows):
            self.flush()
        self.observing = observing
        if next(iter(layers.values())).shown.shape[1] != tokens:
            layers = {layer: seen.cut(slice(tokens)) for layer, seen in layers.items()}
        read = [token for token in read if token < tokens]  # others were rolled back
        if len(read) != tokens:
            layers = {layer: seen.reading(read) for layer, seen in layers.items()}
        self.forwards.append(layers)
        self.read.append(read)
        self.own.append(None if own is None else own[:, : len(read)])
        self.weights.append(weights)
        self.shapes.append((rows, tokens))
        if self.tokens >= LIMIT or self.nbytes() >= MAX_BYTES:
            self.flush()

    def nbytes(self) -> int:
        """Bytes of the queued tensors; all layers hold as much as the first."""
        first = [next(iter(layers.values())) for layers in self.forwards]
        each = sum(t.numel() * t.element_size() for seen in first for t in seen if t is not None)
        return each * len(self.forwards[0]) if first else 0

    def flush(self) -> None:
        """Add everything queued to the evidence."""
        forwards, self.forwards = self.forwards, []
        given, self.weights = self.weights, []
        shapes, self.shapes = self.shapes, []
        read, self.read = self.read, []
        own, self.own = self.own, []
        for layers in _alike(forwards[0]) if forwards else ():
            for parts in (NEURONS, STREAM):  # the stream is not read on all of them
                has = [one[layers[0]][parts[0]] is not None for one in forwards]
                if any(has):
                    seen = _joined(list(compress(forwards, has)), layers, parts)
                    weights = _weights(list(compress(given, has)), list(compress(shapes, has)))
                    if parts is STREAM:
                        weights = _of_stream(weights, shapes, read, own, has)
                    self.update(self.observing, layers, seen, weights)


def _of_stream(
    weights: Tensor | None,
    shapes: list[tuple[int, int]],
    read: list[list[int]],
    own: list[Tensor | None],
    has: Sequence[bool],
) -> Tensor | None:
    """The weights of the tokens whose stream was read, 0 where a life does not read one."""
    if weights is not None:
        weights = weights[:, _places(shapes, read, has)]
    sizes = [(rows, len(tokens)) for (rows, _), tokens in zip(shapes, read, strict=True)]
    marks = _weights(list(compress(own, has)), list(compress(sizes, has)))
    if weights is None or marks is None:
        return weights if marks is None else marks
    return weights * marks.to(weights.device)


def _places(shapes: list[tuple[int, int]], read: list[list[int]], has: Sequence[bool]) -> list[int]:
    """Where the tokens whose stream was read stand among all tokens of these forwards."""
    found, start = [], 0
    for (_, tokens), own, one in zip(shapes, read, has, strict=True):
        if one:
            found += [start + token for token in own]
            start += tokens
    return found


def _alike(layers: Mapping[int, LayerObservation]) -> list[tuple[int, ...]]:
    """The layers in groups of one shape on one device, which have the same parts."""
    groups: dict[object, list[int]] = {}
    for layer, seen in layers.items():
        kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in seen[:2])
        groups.setdefault(kind, []).append(layer)
    return [tuple(group) for group in groups.values()]


def _joined(
    forwards: list[Mapping[int, LayerObservation]], layers: tuple[int, ...], parts: Sequence[int]
) -> LayerObservation:
    """The tokens of some forwards, of some layers, in one tensor per part: [L, B, T, ...]."""
    found: list[Tensor | None] = [None] * len(LayerObservation._fields)
    for part in parts:
        of = [[forward[layer][part] for forward in forwards] for layer in layers]
        rows = [torch.cat([t for t in one if t is not None], 1) for one in of if one[0] is not None]
        found[part] = torch.stack(rows) if rows else None
    return LayerObservation(*found)


def _weights(given: list[Tensor | None], shapes: list[tuple[int, int]]) -> Tensor | None:
    some = next((w for w in given if w is not None), None)
    if some is None:
        return None
    parts = [
        torch.ones(shape, device=some.device) if w is None else w
        for w, shape in zip(given, shapes, strict=True)
    ]
    return torch.cat(parts, 1)
