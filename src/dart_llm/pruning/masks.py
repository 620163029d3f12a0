"""Masks: which neurons each layer keeps, selected from scores and counts or given by the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.weights import FfnWeights

Ids = Mapping[int, Sequence[int] | Tensor]
"""Maps a layer's number to neuron ids."""


def largest(values: Tensor, count: int) -> Tensor:
    """A bool tensor [n], True for the ``count`` largest of values [n].

    In ties, lower indices win.  NaN counts as infinity.  The values are not sorted, because sorting
    would take most of the time of building a mask.
    """
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    threshold = values.kthvalue(len(values) - count + 1).values
    marks = values > threshold
    ties = (values == threshold).nonzero().flatten()
    marks[ties[: count - int(marks.sum())]] = True
    return marks


FLOOR = 0.1
"""Smallest share of neurons that a layer keeps, if the strategy is ``auto`` or if the budget ranks
the neurons of all layers together."""


def floor_count(width: int) -> int:
    """``FLOOR * width``, rounded up."""
    return math.ceil(FLOOR * width - 1e-9)


@dataclass(frozen=True)
class LayerMask:
    """The neurons that one layer keeps.

    ``ids``: [k] int64, ascending, on the layer's device.  ``width``: number of neurons I.  ``bias``
    [D] float32 and ``low_rank``, a linear map of the FFN's input, compensate for the removed
    neurons: they are added to the FFN's output, unless they are None.
    """

    ids: Tensor
    width: int
    bias: Tensor | None = None
    low_rank: LowRank | None = None

    @property
    def kept(self) -> int:
        return int(self.ids.numel())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The mask as a tensor [I]: 1 for kept neurons, 0 for removed ones."""
        mask = torch.zeros(self.width, dtype=dtype, device=self.ids.device)
        mask[self.ids] = 1
        return mask

    def removed(self) -> Tensor:
        """Indices of the removed neurons, ascending, [I - k]."""
        removed = torch.ones(self.width, dtype=torch.bool, device=self.ids.device)
        removed[self.ids] = False
        return removed.nonzero().flatten()

    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.ids, self.bias, self.low_rank) if part is not None)


Masks = tuple[LayerMask | None, ...]
"""The masks of all layers; None for a layer that stays dense."""


def top_ids(score: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest scores, ascending; ties go to the lower index.

    score: [I].  Returns [keep] int64.
    """
    return largest(score, keep).nonzero().flatten()


def split(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the ``keep`` largest scores, and the remaining indices, both ascending."""
    marks = largest(score, keep)
    return marks.nonzero().flatten(), (~marks).nonzero().flatten()


def auto_count(score: Tensor) -> int:
    """How many neurons the strategy ``auto`` keeps: those whose score is at least the layer's mean.

    It keeps at least the share ``FLOOR`` of the layer's neurons.  score: [I] on the host.
    """
    above = int((score >= score.mean()).sum())
    return max(above, floor_count(score.numel()))


def overlap(first: Masks, second: Masks) -> float:
    """Share of ``second``'s kept neurons that ``first`` also keeps, in layers masked by both."""
    same = total = 0
    for old, new in zip(first, second, strict=True):
        if old is not None and new is not None:
            same += int(torch.isin(new.ids, old.ids.to(new.ids.device)).sum())
            total += len(new.ids)
    return same / total if total else 1.0


def _neuron_ids(layer: int, ids: Sequence[int] | Tensor, width: int) -> Tensor:
    """Unique ids, ascending, int64 on the host; raises ``ConfigError`` if they are not valid."""
    try:
        neurons = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"layer {layer} was given {ids!r}: give a list of neuron ids") from None
    if neurons.numel() and (neurons.dtype == torch.bool or neurons.is_floating_point()):
        raise ConfigError(
            f"layer {layer} was given {str(neurons.dtype).removeprefix('torch.')} values: give "
            "neuron ids, whole numbers (mask.nonzero() makes them from a mask)"
        )
    unique: Tensor = torch.unique(neurons.long()).cpu()
    outside = unique[(unique < 0) | (unique >= width)]
    if len(outside):
        raise ConfigError(f"layer {layer} has neurons 0-{width - 1}; got id {int(outside[0])}")
    return unique


def user_masks(layers: Sequence[FfnWeights], keep: Ids | None, remove: Ids | None) -> Masks:
    """Masks from the user's neuron ids: those to ``keep``, or those to ``remove``.

    Layers without ids stay dense.  Masks are on the layers' devices; a mask is None if the layer
    keeps all neurons.  Raises ``ConfigError`` for a layer or neuron that does not exist, and for a
    layer that would keep no neuron.
    """
    if (keep is None) == (remove is None):
        raise ConfigError("give either masks= (neurons to keep) or remove=, not both")
    requested = keep if keep is not None else remove
    if not isinstance(requested, Mapping) or not all(
        hasattr(layer, "__index__") and not isinstance(layer, bool) for layer in requested
    ):
        raise ConfigError("masks= and remove= take a mapping from layer numbers to neuron ids")
    masks: list[LayerMask | None] = [None] * len(layers)
    for number, ids in requested.items():
        if not 0 <= int(number) < len(layers):
            raise ConfigError(
                f"layer {number} is out of range: this model has {len(layers)} layers"
            )
        layer = layers[int(number)]
        marks = torch.zeros(layer.width, dtype=torch.bool)
        marks[_neuron_ids(int(number), ids, layer.width)] = True
        kept = (marks if keep is not None else ~marks).nonzero().flatten()
        if not kept.numel():
            raise ConfigError(f"layer {number} would keep no neuron: keep at least one")
        if len(kept) < layer.width:
            on_device = kept if layer.down.is_meta else kept.to(layer.device)
            masks[int(number)] = LayerMask(on_device, layer.width)
    return tuple(masks)
