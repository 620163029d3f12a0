"""Queues observed activations of decode tokens, to add them to the evidence together.

Evidence is the sums over observed tokens from which masks are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class LayerObservation(NamedTuple):
    """Tensors observed in one layer, or stacked for several layers of the same shape.

    ``u``: [B, T, I], the neurons' activations.  ``h``: [B, T, D], the FFN's input, for low-rank
    compensation.  ``z`` and ``x``: [B, T, D], the FFN's output and the residual stream before it,
    for layer sensitivities.  A tensor that the run does not need is None.
    """

    u: Tensor | None
    h: Tensor | None = None
    z: Tensor | None = None
    x: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerObservation:
        """Apply ``function`` to every tensor that is not None."""
        return LayerObservation(*(t if t is None else function(t) for t in self))

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)

    @property
    def shown(self) -> Tensor:
        """The first tensor that is not None."""
        return next(t for t in self if t is not None)


def detached_copy(seen: LayerObservation, stream: bool) -> LayerObservation:
    """Detach the tensors, and copy those that the model may later change in place.

    ``stream``: whether z and x are needed; if not, z and x become None.
    """
    if torch.is_grad_enabled():
        seen = seen.map(Tensor.detach)
    if not stream or seen.z is None:
        return seen._replace(z=None, x=None)
    # some layers later add to the FFN's output in place
    return seen._replace(z=seen.z.clone())


LIMIT = 32
"""Number of tokens at which a queue is full."""

MAX_BYTES = 4 << 20
"""Bytes at which a queue is full, even with few tokens: with large models, a longer queue saves no
time."""


class ObservedForward(NamedTuple):
    """All layers' observations in one decode forward.

    ``rows``: batch rows.  ``tokens``: tokens per row that count.  The tensors in ``layers`` may
    contain later tokens too; these were rolled back and are ignored.  ``weights``: the tokens'
    weights, [rows, tokens]; None if all are 1.
    """

    layers: Mapping[int, LayerObservation]
    rows: int
    tokens: int
    weights: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of the tensors, assuming that all layers are as large as the first."""
        return next(iter(self.layers.values())).nbytes() * len(self.layers)


@dataclass
class Observations:
    """A queue of decode forwards that were observed by the same sequences.

    ``observing``: for each sequence, whether it observes these forwards.  The queue saves time:
    adding many tokens of all layers to the evidence at once takes about as long as adding one token
    of one layer.
    """

    observing: list[bool] = field(default_factory=list)
    forwards: list[ObservedForward] = field(default_factory=list)

    def accepts(self, observing: list[bool], rows: int) -> bool:
        """Whether a forward with these ``observing`` flags and batch rows fits into the queue."""
        alike = observing == self.observing and self.forwards and self.forwards[0].rows == rows
        return bool(alike) or not self.forwards

    @property
    def full(self) -> bool:
        """Whether the queue is large enough to be added to the evidence."""
        tokens = sum(forward.tokens for forward in self.forwards)
        return tokens >= LIMIT or sum(map(ObservedForward.nbytes, self.forwards)) >= MAX_BYTES

    def drain(self) -> Iterator[tuple[tuple[int, ...], LayerObservation, Tensor | None]]:
        """Empty the queue.  Layers whose tensors have the same shapes form a group.

        Yields for each group of L layers: their numbers, their tensors, [L, B, T, ...], and the
        tokens' weights, [B, T], or None if all are 1.
        """
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
    """One field of some layers' observations, over all forwards: [L, B, T, ...].

    ``part``: number of the field in ``LayerObservation``.  None if the run does not need the field.
    """
    tensors = [[forward.layers[layer][part] for forward in forwards] for layer in layers]
    if tensors[0][0] is None:
        return None
    lengths = [forward.tokens for forward in forwards]
    joined = [
        torch.cat([t[:, :n] for t, n in zip(parts, lengths, strict=True) if t is not None], 1)
        for parts in tensors
    ]
    return torch.stack(joined)


def _joined_weights(forwards: Sequence[ObservedForward]) -> Tensor | None:
    """Token weights of all forwards, [B, T]; None if all are 1."""
    weights = [forward.weights for forward in forwards]
    example = next((w for w in weights if w is not None), None)
    if example is None:
        return None
    ones = [torch.ones((f.rows, f.tokens), device=example.device) for f in forwards]
    return torch.cat([full if w is None else w for full, w in zip(ones, weights, strict=True)], 1)
