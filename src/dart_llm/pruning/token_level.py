"""Token-level selection: each token selects its strongest neurons, the winners, by an estimate.

The idea is that of Prox (arXiv 2607.27591) and WINA (arXiv 2505.19427); docs/reference.md has the
formulas.  Estimates come from low-bit proxies (rough copies) of the weights.  Each matrix row of D
weights is cut into groups.  With m = 2^(bits - 1) - 1, a group's scale is ``max abs(w) / m``, in
bfloat16.  A weight's level is w / scale, rounded to a whole number from -m to m.  The grid is
symmetric on purpose: in a 4-bit file, each group of 32 weights has at most 16 values.  An
asymmetric grid would copy these values almost exactly, and results on such files would not carry
over to other weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.pruning.masks import LayerMask, Masks

CHUNK, CACHED = 1 << 22, 1 << 18
"""Maximum number of weights converted to float32 at a time; ``CACHED`` applies to CPUs' caches."""

SCALE_BYTES = 2
"""Bytes of a group's bfloat16 scale."""


@dataclass(frozen=True)
class QuantizedProxy:
    """A matrix [N, D], D = ``inputs``, with ``bits`` (4 or 8) bits per weight.

    ``levels``: int8 [N, D] with 8 bits.  With 4 bits, uint8 [N, ceil(D / 2)], which stores level +
    8: the first half of the inputs is in the low bits, the second half in the high bits.
    ``scales``: bfloat16 [N, ceil(D / group)].
    """

    levels: Tensor
    scales: Tensor
    inputs: int
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.levels.shape[0]), self.inputs

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Dequantized rows, float32 [n, D]; ``rows``: their ids, or a slice."""
        levels, scales = self.levels[rows], self.scales[rows].float()
        half, groups = levels.shape[1], scales.shape[1]
        stored = 2 * half if self.bits == 4 else half
        values = scales.new_empty(len(levels), max(groups * self.group, stored))
        if self.bits == 4:
            values[:, :half] = levels & 15
            values[:, half:stored] = levels >> 4
            values.sub_(8)
        else:
            values[:, :half] = levels
        grouped = (len(levels), groups, self.group)  # padding of the last group is never read
        values[:, : groups * self.group].view(grouped).mul_(scales[..., None])
        return values[:, : self.inputs]

    def product(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x W^T in float32, [..., n].  x: [..., D]; ``rows``: ids [n] of W's rows, None for all."""
        count = self.shape[0] if rows is None else len(rows)
        parts = [
            F.linear(x.float(), self.dense(span if rows is None else rows[span]))
            for span in _spans(count, self.inputs, self.scales.is_cpu)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def nbytes(self) -> int:
        return self.levels.numel() + SCALE_BYTES * self.scales.numel()


@torch.no_grad()
def low_bit(matrix: Tensor, bits: int, group: int) -> QuantizedProxy:
    """The proxy of ``matrix`` [N, D] (any float dtype and layout), on its device."""
    rows, inputs = matrix.shape
    grids = [
        _grid(matrix[span].float(), bits, group) for span in _spans(rows, inputs, matrix.is_cpu)
    ]
    levels, scales = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return QuantizedProxy(levels, scales, inputs, bits, group)


def _grid(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Levels and scales of w, float32 rows of a matrix."""
    max_level = 2 ** (bits - 1) - 1
    groups = math.ceil(w.shape[1] / group)
    padded = F.pad(w, (0, groups * group - w.shape[1])).view(len(w), groups, group)
    scales = (padded.abs().amax(-1) / max_level).to(torch.bfloat16)
    step = scales.float()[..., None]
    levels = torch.where(step > 0, padded / step, 0.0).round_().clamp_(-max_level, max_level)
    levels = levels.view(len(w), -1)[:, : w.shape[1]]
    if bits == 8:
        return levels.to(torch.int8), scales
    half = (w.shape[1] + 1) // 2
    shifted = F.pad(levels + 8, (0, w.shape[1] % 2)).to(torch.uint8)
    return shifted[:, :half] | (shifted[:, half:] << 4), scales


def _spans(rows: int, inputs: int, on_cpu: bool) -> Iterator[slice]:
    """Slices of a matrix's rows that are small enough to convert at once."""
    step = max(1, (CACHED if on_cpu else CHUNK) // inputs)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


NO_MASK = (
    "token-level selection has no sequence mask: every token selects its own neurons, and only "
    "the number of neurons per layer is fixed"
)
"""Message for a request that needs a mask of the sequence."""


@dataclass(frozen=True)
class TokenMask(LayerMask):
    """The candidates of one layer, from which each token selects its neurons.

    ``ids``: the candidates, ascending.  ``winners``: number of neurons that a token selects.  With
    compensation, ``mean`` is m, [I] float32, the mean activation of each neuron over tokens that do
    not select it.  ``bias`` is then W_down m over all neurons; selected neurons add W_down (u - m)
    to it.  ``saliency``: factor by which each activation is multiplied to rank neurons, [I]
    float32; None means the norm of the output column.
    """

    winners: int = field(kw_only=True)
    mean: Tensor | None = field(default=None, kw_only=True)
    saliency: Tensor | None = field(default=None, kw_only=True)

    @property
    def kept(self) -> int:
        return self.winners

    @property
    def candidates(self) -> Tensor | None:
        """The candidates' ids; None if all neurons are candidates."""
        return None if len(self.ids) == self.width else self.ids

    def nbytes(self) -> int:
        extra = (self.mean, self.saliency)
        return super().nbytes() + sum(t.nbytes for t in extra if t is not None)


def contribution_estimate(estimate: Tensor, saliency: Tensor) -> Tensor:
    """``abs(u~) * saliency``, the estimated cost of removing each neuron, [..., n] float32.

    estimate: u~, [..., n]; saliency: [n].
    """
    return estimate.abs() * saliency


def winner_places(strengths: Tensor, keep: int) -> Tensor:
    """Indices of each token's ``keep`` largest strengths, ascending; in ties, lower indices win.

    strengths: [..., n].  Returns [..., keep] int64.
    """
    order = strengths.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def input_count(inputs: int, winners: int, width: int) -> int:
    """The share ``winners / width`` of a matrix's ``inputs``, rounded up to a whole number."""
    return -(-inputs * winners // width)


def at_largest(x: Tensor, count: int, norms: Tensor | None = None) -> Tensor:
    """x with 0 for all but each token's ``count`` entries with the largest ``abs(x_j) * norms_j``.

    x: [..., M]; norms: [M], or None for ones.  In ties, lower indices are kept.
    """
    if count >= x.shape[-1]:
        return x
    with torch.no_grad():
        places = winner_places(x.abs() if norms is None else x.abs() * norms, count)
        keep = torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, places, True)
    return x.where(keep, 0.0)


def sequence_masks(masks: Masks) -> Masks:
    """``masks``, with None for layers with per-token selection."""
    return tuple(None if isinstance(mask, TokenMask) else mask for mask in masks)


def plain_masks(masks: Masks) -> Masks:
    """Return ``masks``; raise ``ConfigError`` if a layer has per-token selection."""
    if any(isinstance(mask, TokenMask) for mask in masks):
        raise ConfigError(f"{NO_MASK}: use a method with masks of the sequence, e.g. dart")
    return masks
