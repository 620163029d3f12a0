"""Observations of decode tokens, before they are added to the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


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
    if not stream or seen.z is None:
        return seen._replace(z=None, x=None)
    # some layers add to the FFN's output in place after it returned
    return seen._replace(z=seen.z.clone())


LIMIT = 32
"""Tokens after which a queue is full."""

MAX_BYTES = 4 << 20
"""Bytes after which it is, however few the tokens: large models gain nothing by waiting."""


class ObservedForward(NamedTuple):
    """What one decode forward of ``rows`` x ``tokens`` tokens showed of every layer.

    ``layers`` may hold later tokens too, which were rolled back.  ``weights``: [rows, tokens] or
    None for all ones.
    """

    layers: Mapping[int, LayerObservation]
    rows: int
    tokens: int
    weights: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of the tensors; all layers have about as much as the first."""
        return next(iter(self.layers.values())).nbytes() * len(self.layers)


@dataclass
class Observations:
    """A queue of observed decode forwards; ``observing``: one flag per sequence, for all of them.

    Adding many tokens of all layers at once costs about as much as adding one of one layer, so
    observing stays cheap.
    """

    observing: list[bool] = field(default_factory=list)
    forwards: list[ObservedForward] = field(default_factory=list)

    def takes(self, observing: list[bool], rows: int) -> bool:
        """Whether a forward fits to those that wait."""
        alike = observing == self.observing and self.forwards and self.forwards[0].rows == rows
        return bool(alike) or not self.forwards

    @property
    def full(self) -> bool:
        """Whether enough waits to be added to the evidence."""
        tokens = sum(forward.tokens for forward in self.forwards)
        return tokens >= LIMIT or sum(map(ObservedForward.nbytes, self.forwards)) >= MAX_BYTES

    def drain(self) -> Iterator[tuple[tuple[int, ...], LayerObservation, Tensor | None]]:
        """Empties it: layers of one shape, what they saw [L, B, T, ...], weights [B, T] or None."""
        forwards, self.forwards = self.forwards, []
        if not forwards:
            return
        weights = _joined_weights(forwards)
        groups: dict[object, list[int]] = {}
        for layer, seen in forwards[0].layers.items():
            kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in seen)
            groups.setdefault(kind, []).append(layer)
        for group in groups.values():
            parts = (_joined(forwards, group, n) for n in range(len(LayerObservation._fields)))
            yield tuple(group), LayerObservation(*parts), weights


def _joined(forwards: Sequence[ObservedForward], layers: list[int], part: int) -> Tensor | None:
    """One observed tensor of some layers over all tokens, [L, B, T, ...]; None if unneeded."""
    each = [[forward.layers[layer][part] for forward in forwards] for layer in layers]
    if each[0][0] is None:
        return None
    lengths = [forward.tokens for forward in forwards]
    rows = [
        torch.cat([t[:, :n] for t, n in zip(seen, lengths, strict=True) if t is not None], 1)
        for seen in each
    ]
    return torch.stack(rows)


def _joined_weights(forwards: Sequence[ObservedForward]) -> Tensor | None:
    weights = [forward.weights for forward in forwards]
    some = next((w for w in weights if w is not None), None)
    if some is None:
        return None
    ones = [torch.ones((f.rows, f.tokens), device=some.device) for f in forwards]
    return torch.cat([full if w is None else w for full, w in zip(ones, weights, strict=True)], 1)
