"""Decode tokens that were seen and not yet added to the evidence.

Adding many tokens of all layers at once costs about as much as adding one of one layer, so
observing stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
"""Parts of a ``LayerObservation`` by what is made of them."""


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

    ``observed``: tokens that each sequence has observed before.
    """
    return [token for token in range(tokens) if any(_is_read(n + token) for n in observed)]


def sampled_per_sequence(observed: Sequence[int], read: Sequence[int]) -> Tensor | None:
    """Which of the tokens ``read`` every sequence reads itself, [sequences, n] of 0 and 1.

    None: all.  What a sequence reads must not depend on those beside it.
    """
    marks = [[float(_is_read(n + token)) for token in read] for n in observed]
    return None if all(map(all, marks)) else torch.tensor(marks)


def _is_read(number: int) -> bool:
    """Whether a sequence reads the stream of the observed token ``number``, counted from 0."""
    return number < STREAM_FIRST or number % STREAM_EVERY == 0


Update = Callable[[list[bool], tuple[int, ...], LayerObservation, Tensor | None], None]
"""Flags of the sequences, layers, what these saw ([L, B, T, ...] each), weights [B, T] or None."""


def weak_callback(method: Update) -> Update:
    """``method`` without its object, which holds who calls it: a ring would keep both alive."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return call


@dataclass(frozen=True)
class ObservedForward:
    """One observed decode forward of ``rows`` x ``tokens`` tokens.

    ``weights``: [rows, tokens] or None for all ones.  ``sampled``: the tokens whose stream is read;
    ``sampled_by``: [sequences, len(sampled)] of 0 and 1, which of these every sequence reads
    itself; None: all.
    """

    layers: Mapping[int, LayerObservation]
    rows: int
    tokens: int
    weights: Tensor | None = None
    sampled: tuple[int, ...] = ()
    sampled_by: Tensor | None = None

    @classmethod
    def accepted(
        cls,
        layers: Mapping[int, LayerObservation],
        rows: int,
        tokens: int,
        weights: Tensor | None,
        sampled: Sequence[int],
        sampled_by: Tensor | None = None,
    ) -> ObservedForward:
        """The first ``tokens`` of what the layers saw: later ones were rolled back."""
        if next(iter(layers.values())).shown.shape[1] != tokens:
            layers = {layer: seen.cut(slice(tokens)) for layer, seen in layers.items()}
        read = [token for token in sampled if token < tokens]
        if len(read) != tokens:
            layers = {layer: seen.reading(read) for layer, seen in layers.items()}
        by = None if sampled_by is None else sampled_by[:, : len(read)]
        return cls(layers, rows, tokens, weights, tuple(read), by)

    def nbytes(self) -> int:
        """Bytes of the tensors; all layers hold as much as the first."""
        first = next(iter(self.layers.values()))
        each = sum(t.numel() * t.element_size() for t in first if t is not None)
        return each * len(self.layers)


@dataclass
class Observations:
    """A queue of observed decode forwards; ``observing``: one flag per sequence."""

    update: Update
    observing: list[bool] = field(default_factory=list)
    forwards: list[ObservedForward] = field(default_factory=list)

    def add(self, observing: list[bool], forward: ObservedForward) -> None:
        """Queue one forward; the statistics are updated when enough tokens wait."""
        queue = self.forwards
        if observing != self.observing or (queue and queue[0].rows != forward.rows):
            self.flush()
        self.observing = observing
        self.forwards.append(forward)
        tokens = sum(one.tokens for one in self.forwards)
        if tokens >= LIMIT or sum(one.nbytes() for one in self.forwards) >= MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add everything queued to the statistics."""
        forwards, self.forwards = self.forwards, []
        for layers in _alike(forwards[0].layers) if forwards else ():
            for parts in (NEURONS, STREAM):  # the stream is not read on all of them
                some = [one for one in forwards if one.layers[layers[0]][parts[0]] is not None]
                if some:
                    sizes = [(one.rows, one.tokens) for one in some]
                    weights = _weights([one.weights for one in some], sizes)
                    if parts is STREAM:
                        weights = _of_stream(weights, some)
                    self.update(self.observing, layers, _joined(some, layers, parts), weights)


def _of_stream(weights: Tensor | None, forwards: Sequence[ObservedForward]) -> Tensor | None:
    """The weights of the tokens whose stream was read, 0 where a sequence does not read one."""
    if weights is not None:
        starts = accumulate((one.tokens for one in forwards), initial=0)
        pairs = zip(forwards, starts, strict=False)
        weights = weights[:, [start + token for one, start in pairs for token in one.sampled]]
    sizes = [(one.rows, len(one.sampled)) for one in forwards]
    marks = _weights([one.sampled_by for one in forwards], sizes)
    if weights is None or marks is None:
        return weights if marks is None else marks
    return weights * marks.to(weights.device)


def _alike(layers: Mapping[int, LayerObservation]) -> list[tuple[int, ...]]:
    """The layers in groups of one shape on one device, which have the same parts."""
    groups: dict[object, list[int]] = {}
    for layer, seen in layers.items():
        kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in seen[:2])
        groups.setdefault(kind, []).append(layer)
    return [tuple(group) for group in groups.values()]


def _joined(
    forwards: Sequence[ObservedForward], layers: tuple[int, ...], parts: Sequence[int]
) -> LayerObservation:
    """The tokens of some forwards, of some layers, in one tensor per part: [L, B, T, ...]."""
    found: list[Tensor | None] = [None] * len(LayerObservation._fields)
    for part in parts:
        of = [[forward.layers[layer][part] for forward in forwards] for layer in layers]
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
