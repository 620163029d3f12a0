"""What the layers of one forward saw, before it is added to the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def stacked_alike(
    layers: Mapping[int, LayerObservation], tokens: int
) -> Iterator[tuple[tuple[int, ...], LayerObservation]]:
    """The layers in groups of one shape on one device, and what each group saw in one tensor.

    [L, B, T, ...] of the first ``tokens``: adding these costs about as much as adding one layer.
    """
    groups: dict[object, list[int]] = {}
    for layer, seen in layers.items():
        kind = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in seen)
        groups.setdefault(kind, []).append(layer)
    for group in groups.values():
        parts = zip(*(layers[layer] for layer in group), strict=True)
        tensors = [[t for t in each if t is not None] for each in parts]
        stacks = (torch.stack(each)[:, :, :tokens] if each else None for each in tensors)
        yield tuple(group), LayerObservation(*stacks)
