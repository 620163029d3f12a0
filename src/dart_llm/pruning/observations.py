"""Observations of decode tokens, before they are added to the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class LayerObservation(NamedTuple):
    """Tensors observed in one layer, or stacked for several layers of one shape; None: not needed.

    ``u``: [B, T, I] activations; ``h``: [B, T, D] the FFN's input, for low-rank compensation;
    ``z``, ``x``: [B, T, D] the FFN's output and the residual stream before it, for sensitivities.
    """

    u: Tensor | None
    h: Tensor | None = None
    z: Tensor | None = None
    x: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerObservation:
        """``function`` applied to every tensor that is not None."""
        return LayerObservation(*(t if t is None else function(t) for t in self))

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)

    @property
    def shown(self) -> Tensor:
        """The first tensor that is not None."""
        return next(t for t in self if t is not None)


def detached_copy(seen: LayerObservation, stream: bool) -> LayerObservation:
    """The observation, detached and safe from later in-place changes by the model.

    ``stream``: whether z and x are needed.
    """
    if torch.is_grad_enabled():
        seen = seen.map(Tensor.detach)
    if not stream or seen.z is None:
        return seen._replace(z=None, x=None)
    # some layers later add to the FFN's output in place
    return seen._replace(z=seen.z.clone())


LIMIT = 32
"""Tokens after which a queue is full."""

MAX_BYTES = 4 << 20
"""Bytes after which a queue is full, however few its tokens: large models gain nothing by waiting.
"""


class ObservedForward(NamedTuple):
    """All layers' observations in one decode forward of ``rows`` x ``tokens`` tokens.

    ``layers`` may also hold later tokens, which were rolled back.  ``weights``: [rows, tokens], or
    None for all ones.
    """

    layers: Mapping[int, LayerObservation]
    rows: int
    tokens: int
    weights: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of the tensors, if all layers are as large as the first."""
        return next(iter(self.layers.values())).nbytes() * len(self.layers)


@dataclass
class Observations:
    """A queue of observed decode forwards that share ``observing``, one flag per sequence.

    Adding many tokens of all layers to the evidence at once costs about as much as adding one token
    of one layer.
    """

    observing: list[bool] = field(default_factory=list)
    forwards: list[ObservedForward] = field(default_factory=list)

    def takes(self, observing: list[bool], rows: int) -> bool:
        """Whether a forward can be queued with those that wait."""
        alike = observing == self.observing and self.forwards and self.forwards[0].rows == rows
        return bool(alike) or not self.forwards

    @property
    def full(self) -> bool:
        """Whether the queue is large enough to be added to the evidence."""
        tokens = sum(forward.tokens for forward in self.forwards)
        return tokens >= LIMIT or sum(map(ObservedForward.nbytes, self.forwards)) >= MAX_BYTES

    def drain(self) -> Iterator[tuple[tuple[int, ...], LayerObservation, Tensor | None]]:
        """Empty the queue: layers of one shape, tensors [L, B, T, ...], weights [B, T] or None."""
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
    """One observed tensor of some layers over all tokens, [L, B, T, ...]; None if not needed."""
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
