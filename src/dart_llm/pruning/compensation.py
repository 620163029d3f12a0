"""Compensation: the removed neurons' output, estimated by a linear map of a few features.

The features are r projections of the FFN's input, ``f = P h``.  A ridge regression over the tokens
of the evidence and of self-generated text gives the map.  With r = 0, the estimate is a constant:
the mean, as in FLAP (arXiv 2312.11983) for static pruning.  See docs/reference.md, "Compensation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dart_llm.native.build import ops, why_not
from dart_llm.pruning.statistics import LayerStatistics, full_precision
from dart_llm.pruning.weights import FfnWeights


def compensation(down: Tensor, mean: Tensor, removed: Tensor | None = None) -> Tensor:
    """The removed neurons' mean output, ``b = W_down[:, removed] m[removed]``, [D] float32.

    down: [D, I].  mean: m, [I] float32, mean activation over the observed tokens.  removed: ids,
    [n] int64; None means all neurons.
    """
    if removed is None and down.dtype == torch.float32:
        return functional.linear(mean, down.detach())  # which reads packed weights as they are
    if removed is None:
        return down.detach().float() @ mean
    return down.detach().index_select(1, removed).float() @ mean.index_select(0, removed)


RIDGE = 0.1
"""Added to the features' variances, each of which is 1 over self-generated text."""

ROUNDING = 1e-6
"""Directions of h are dropped if their variance is less than this share of the mean square of h,
because such a variance is rounding error."""

FLOOR = 0.01
"""Share of the mean variance that is added to the variance of every direction of h."""


@dataclass(frozen=True)
class LowRank:
    """A linear map of the FFN's input h; its value ``out (basis h)`` is added to the FFN's output.

    ``basis``: [r, D].  ``out``: [D, r], or [B, D, r] with one map per batch row.
    """

    basis: Tensor
    out: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """Apply the map to h, [..., D] (or [B, T, D], with one map per row); keeps the shape."""
        features = functional.linear(h, self.basis)
        if self.out.dim() == 2:
            return functional.linear(features, self.out)
        return features @ self.out.mT

    @property
    def nbytes(self) -> int:
        """Bytes of ``out``; the bytes of ``basis`` count with the learned statistics."""
        return self.out.nbytes


def read_features(h: Tensor | None, layers: Sequence[FfnWeights]) -> Tensor | None:
    """Features [L, B, T, r] of the layers' FFN inputs h [L, B, T, D]; None if not needed."""
    bases = [None if layer.self_stats is None else layer.basis for layer in layers]
    learned = [basis for basis in bases if basis is not None]
    if h is None or len(learned) < len(bases):
        return None
    with full_precision(h):
        parts = [functional.linear(t.to(basis), basis) for t, basis in zip(h, learned, strict=True)]
    return torch.stack(parts)


def find_basis(h: Tensor, rank: int) -> Tensor:
    """The ``rank`` directions in which h varies most, each scaled to variance 1.

    h: [T, D] float32 of T tokens.  Returns [min(rank, T - 1, D), D] float32.
    """
    centred = h - h.mean(0)
    first = len(h) - min(rank, len(h) - 1, h.shape[1])
    with full_precision(h):
        values, vectors = torch.linalg.eigh(centred @ centred.T / len(h))  # [T], [T, T]
        # eigenvector j of the covariance is centred.T v_j / sqrt(T value_j)
        directions = (centred.T @ vectors[:, first:]).T
    values = values[first:].clamp_min(0)
    floor = FLOOR * centred.square().sum() / (len(h) * h.shape[1])
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scale = (values + floor).clamp_min(1e-12).rsqrt()
    scale = scale * (values + floor > ROUNDING * h.square().mean())
    basis: Tensor = unit * scale[:, None]
    # contiguous like a basis loaded from a file, because rounding in kernels depends on the layout
    return basis.contiguous()


class CompensationInputs(NamedTuple):
    """Inputs of the regression that gives a layer's map.

    ``down``: [D, I].  ``evidence``: sums over tokens, of which the regression reads ``signed`` [I],
    ``features`` [r], ``cross`` [I, r] and ``moments`` [r, r].  ``basis``: [r, D].  ``removed``: ids
    of the neurons that the map replaces, [n] int64.
    """

    down: Tensor
    evidence: LayerStatistics
    basis: Tensor
    removed: Tensor

    def covariances(self) -> Tensor:
        """The removed neurons' covariances of u with the features, then mean u, [n, r + 1]."""
        sums = self.evidence.sums
        mean, f = sums["signed"].rows(self.removed), sums["features"].mean
        cross = torch.addr(sums["cross"].rows(self.removed), mean, f, alpha=-1)
        return torch.cat([cross, mean[:, None]], 1)


def low_rank(layers: Sequence[CompensationInputs]) -> list[tuple[Tensor, LowRank]]:
    """For each layer, the constant [D] float32 and the map that replace its removed neurons."""
    batches = dict[object, list[int]]()
    for index, layer in enumerate(layers):
        batches.setdefault((layer.basis.device, layer.basis.shape), []).append(index)
    maps = dict[int, tuple[Tensor, LowRank]]()
    for indices in batches.values():  # a batch of layers takes little longer than one layer
        maps |= zip(indices, _low_rank([layers[i] for i in indices]), strict=True)
    return [maps[index] for index in range(len(layers))]


def _low_rank(layers: Sequence[CompensationInputs]) -> list[tuple[Tensor, LowRank]]:
    with full_precision(layers[0].down):
        f = torch.stack([layer.evidence.sums["features"].mean for layer in layers])
        # multiply with the inverses last: then the other factor is [D, r] instead of [n, r]
        products = [
            _folded(layer.down.detach().t(), layer.removed, layer.covariances()) for layer in layers
        ]
        projected = torch.stack(products)
        out = projected[..., :-1] @ inverses(layers, f)
        bias = projected[..., -1] - (out @ f[..., None])[..., 0]
        maps = out.to(layers[0].down.dtype).unbind(0)
    results = zip(bias.unbind(0), maps, layers, strict=True)
    return [(constant, LowRank(layer.basis, linear)) for constant, linear, layer in results]


def inverses(layers: Sequence[CompensationInputs], f: Tensor) -> Tensor:
    """Inverses of the features' covariances plus the ridge, [L, r, r]; f: mean features [L, r].

    ``covariances()``, without its last column, times the inverse gives the coefficients that
    predict the removed neurons' activations from the features.
    """
    moments = torch.stack([layer.evidence.sums["moments"].mean for layer in layers])
    ridge = RIDGE * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    inverse: Tensor = torch.linalg.inv(moments - f[:, :, None] * f[:, None, :] + ridge)
    return inverse


def _folded(rows: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """``rows[ids].T @ factors`` in float32, [D, c].  rows: [I, D]; ids: [n]; factors: [n, c]."""
    plain = rows.device.type == "cpu" and rows.is_contiguous() and type(rows) is Tensor
    if plain and rows.dtype in (torch.float32, torch.bfloat16) and not why_not():
        product: Tensor = ops().fold(rows, ids.to(torch.int32), factors.contiguous())
        return product.t()
    wide = rows.index_select(0, ids).float()
    return (factors.t() @ wide).t()  # takes half the time of wide.t() @ factors
