"""The FFN weights of one layer, as plain matrices, whatever the layout of the model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dart_llm.pruning.statistics import UP, SelfStats

REACH_CHUNK = 4096
"""Number of rows of an embedding that are multiplied at a time."""


@dataclass(frozen=True)
class FfnWeights:
    """Views of one layer's FFN weights in the model's dtype; I = neurons, D = hidden size.

    ``stored_up``: ``up``, or its transpose if ``by_inputs`` is True.  ``gate``: [I, D]; None in an
    FFN without a gate.  ``down``: [D, I].  ``embedding``: [V, D], the vocabulary's embedding for
    forward-proxy scores, shared by all layers.  ``prior``: [I] float32, calibrated scores of the
    neurons; the largest are best.  ``self_stats``: statistics of the layer, learned from text that
    the model generated.
    """

    index: int
    depth: float
    """Relative depth l / (L - 1), 0 to 1."""
    stored_up: Tensor
    gate: Tensor | None
    down: Tensor
    embedding: Tensor | None = None
    seed: int = 0
    prior: Tensor | None = None
    self_stats: SelfStats | None = None
    by_inputs: bool = False

    @property
    def up(self) -> Tensor:
        """The up projection, [I, D] (the first matrix of an FFN without a gate).

        It is not cached, because an executor may transpose the parameter later.
        """
        return self.stored_up.t() if self.by_inputs else self.stored_up

    @property
    def width(self) -> int:
        """Number of neurons I."""
        return int(self.down.shape[1])

    @property
    def hidden(self) -> int:
        """Hidden size D."""
        return int(self.down.shape[0])

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Up, gate (if there is one) and down, as they are stored."""
        inputs = (self.stored_up,) if self.gate is None else (self.stored_up, self.gate)
        return (*inputs, self.down)

    @property
    def device(self) -> torch.device:
        return self.down.device

    @property
    def fisher(self) -> Tensor | None:
        """Mean squared loss gradient with respect to each activation, [I]; None if not learned."""
        return None if self.self_stats is None else self.self_stats.fisher

    @property
    def basis(self) -> Tensor | None:
        """Input directions for low-rank compensation, [r, D]; None if not learned."""
        return None if self.self_stats is None else self.self_stats.basis

    @cached_property
    def down_norm(self) -> Tensor:
        """L2 norm of each column of the down projection, [I], float32."""
        return norms_of(self.down, 0)

    @cached_property
    def saliency(self) -> Tensor:
        """Factor by which each neuron's activation is multiplied to rank neurons, [I].

        It is the root of ``fisher`` if that was learned, otherwise ``down_norm``.  If the mean
        squares of the up projection were learned, it is multiplied by their roots.
        """
        saliency = self.down_norm if self.fisher is None else self.fisher.sqrt()
        up = None if self.self_stats is None else self.self_stats.evidence.sums.get(UP)
        return saliency if up is None else saliency * up.mean.sqrt()

    @cached_property
    def down_l1(self) -> Tensor:
        """L1 norm of each column of the down projection, [I], float32."""
        return norms_of(self.down, 0, 1)

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """How much each neuron can change the scores of vocabulary entries.

        Returns ``max_v |w_i . e_v|`` and ``mean_v |w_i . e_v|``, each [I] float32, where ``w_i`` is
        column i of the down projection and ``e_v`` row v of ``embedding``, which must not be None.
        """
        assert self.embedding is not None
        high = torch.zeros(self.width, device=self.device)
        total = torch.zeros(self.width, device=self.device)
        columns = self.down.detach().float()
        for chunk in torch.split(self.embedding.detach(), REACH_CHUNK):
            products = (chunk.to(self.device).float() @ columns).abs_()
            high = torch.maximum(high, products.amax(0))
            total += products.sum(0)
        return high, total / len(self.embedding)

    @cached_property
    def in_norms(self) -> Tensor:
        """Product of the L2 norms of each neuron's input rows, [I], float32."""
        norm = norms_of(self.up, 1)
        return norm if self.gate is None else norm * norms_of(self.gate, 1)


def with_parts(layers: Sequence[FfnWeights], **parts: Sequence[Any]) -> tuple[FfnWeights, ...]:
    """Copies of the layers with new values of fields such as ``prior=``, one value per layer."""
    changed = tuple(layers)
    for name, values in parts.items():
        pairs = zip(changed, values, strict=True)
        changed = tuple(replace(layer, **{name: value}) for layer, value in pairs)
    return changed


def in_blocks(matrix: Tensor) -> bool:
    """Whether a matrix is quantized, that is, stored in blocks of low-bit weights."""
    return int(matrix.nbytes) != matrix.numel() * matrix.element_size()


def stored_bytes(matrix: Tensor, weight_bytes: int | None = None) -> float:
    """Bytes of a matrix as stored, or ``weight_bytes`` per weight if it is not quantized."""
    if weight_bytes is None or in_blocks(matrix):
        return matrix.nbytes
    return matrix.numel() * weight_bytes


def norms_of(matrix: Tensor, dim: int, order: float = 2) -> Tensor:
    """Norms of a matrix's columns (``dim`` 0) or rows (1), float32, summed in at least float32."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix.detach(), order, dim, dtype=wide)
    return norm.float()
