"""Decode tokens that were seen and not yet added to the evidence.

Adding many tokens of all layers at once costs about as much as adding one of one layer, so
observing stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

LIMIT = 32
"""Tokens after which the evidence is updated."""

MAX_BYTES = 4 << 20
"""Bytes after which it is updated, however few the tokens: large models gain nothing by waiting."""


class LayerObservation(NamedTuple):
    """What one layer saw, or several of one shape with a first dimension for them; None: unneeded.

    ``u``: [B, T, I] activations; ``h``: [B, T, D] the FFN's input, for low-rank compensation;
    ``z``, ``x``: [B, T, D] its output and the residual stream before it, for sensitivities.
    """

    u: Tensor | None
    h: Tensor | None = None
    z: Tensor | None = None
    x: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerObservation:
        """``function`` of every part that is there."""
        return LayerObservation(*(t if t is None else function(t) for t in self))

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)

    @property
    def shown(self) -> Tensor:
        """One of the tensors."""
        return next(t for t in self if t is not None)


def detached_copy(seen: LayerObservation, stream: bool) -> LayerObservation:
    """What one layer saw, outside any graph and safe from what the model does later.

    ``stream``: whether z and x are wanted.
    """
    if torch.is_grad_enabled():
        seen = seen.map(Tensor.detach)
    u, h, z, x = seen
    # z is cloned: some layers add to the FFN's output in place after it returned
    return (
        LayerObservation(u, h, z.clone(), x)
        if stream and z is not None
        else seen._replace(z=None, x=None)
    )


Update = Callable[[list[bool], tuple[int, ...], LayerObservation, Tensor | None], None]
"""Flags of the sequences, layers, what these saw ([L, B, T, ...] each), weights [B, T] or None."""


def weak_callback(method: Update) -> Update:
    """``method`` without a strong reference to its object: avoids a reference cycle."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        target = reference()
        if target is not None:
            target(*arguments)

    return call


@dataclass(frozen=True)
class ObservedForward:
    """One observed decode forward of ``rows`` x ``tokens`` tokens.

    ``weights``: [rows, tokens] or None for all ones.
    """

    layers: Mapping[int, LayerObservation]
    rows: int
    tokens: int
    weights: Tensor | None = None

    @classmethod
    def accepted(
        cls,
        layers: Mapping[int, LayerObservation],
        rows: int,
        tokens: int,
        weights: Tensor | None,
    ) -> ObservedForward:
        """The first ``tokens`` of what the layers saw: later ones were rolled back."""
        if next(iter(layers.values())).shown.shape[1] != tokens:
            layers = {n: seen.map(lambda t: t[:, :tokens]) for n, seen in layers.items()}
        return cls(layers, rows, tokens, weights)

    def nbytes(self) -> int:
        """Bytes of the tensors; all layers have as much as the first."""
        return next(iter(self.layers.values())).nbytes() * len(self.layers)


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
        tokens = sum(queued.tokens for queued in self.forwards)
        if tokens >= LIMIT or sum(queued.nbytes() for queued in self.forwards) >= MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add everything queued to the statistics."""
        forwards, self.forwards = self.forwards, []
        for layers in _alike(forwards[0].layers) if forwards else ():
            self.update(self.observing, layers, _joined(forwards, layers), _weights(forwards))


def _alike(layers: Mapping[int, LayerObservation]) -> list[tuple[int, ...]]:
    """The layers in groups of one shape on one device, which have the same parts."""
    groups: dict[object, list[int]] = {}
    for layer, seen in layers.items():
        kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in seen)
        groups.setdefault(kind, []).append(layer)
    return [tuple(group) for group in groups.values()]


def _joined(forwards: Sequence[ObservedForward], layers: tuple[int, ...]) -> LayerObservation:
    """The tokens of some forwards, of some layers, in one tensor per part: [L, B, T, ...]."""
    parts: list[Tensor | None] = []
    for part in range(len(LayerObservation._fields)):
        each = [[forward.layers[layer][part] for forward in forwards] for layer in layers]
        rows = [
            torch.cat([t for t in seen if t is not None], 1) for seen in each if seen[0] is not None
        ]
        parts.append(torch.stack(rows) if rows else None)
    return LayerObservation(*parts)


def _weights(forwards: Sequence[ObservedForward]) -> Tensor | None:
    some = next((forward.weights for forward in forwards if forward.weights is not None), None)
    if some is None:
        return None
    parts = [
        torch.ones((forward.rows, forward.tokens), device=some.device)
        if forward.weights is None
        else forward.weights
        for forward in forwards
    ]
    return torch.cat(parts, 1)
