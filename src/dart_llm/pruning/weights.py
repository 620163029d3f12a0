"""The FFN weights of one layer, as plain matrices whatever the module's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dart_llm.pruning.statistics import LayerPrior


REACH_CHUNK = 4096
"""Rows of an embedding that are multiplied at a time."""


@dataclass(frozen=True)
class FfnWeights:
    """Views of one layer's FFN weights in the model's dtype; I = neurons, D = hidden size.

    ``stored_up``: ``up``, or its transpose where it lies ``by_inputs``; ``gate``: [I, D] or None;
    ``down``: [D, I].
    ``embedding``: [V, D] rows for forward proxies, shared by all layers.  ``prior``: [I] float32,
    what is known of the neurons before any text is seen, larger is kept first.  ``learnt``: what
    the model's own text taught about the layer.  ``known_reach``: ``reach``, where it is kept.
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
    learnt: LayerPrior | None = None
    known_reach: tuple[Tensor, Tensor] | None = None
    by_inputs: bool = False

    @property
    def up(self) -> Tensor:
        """[I, D] (``fc`` in a plain FFN).

        Taken anew, for a view does not notice that an executor lays its parameter out transposed.
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
    def neuron_bytes(self) -> float:
        """Bytes of one neuron as it is stored: its input rows and its output column."""
        held = (self.stored_up, self.gate, self.down)
        return sum(matrix.nbytes for matrix in held if matrix is not None) / self.width

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.down.device

    @cached_property
    def down_norm(self) -> Tensor:
        """L2 norm of each column of the down projection, [I], float32."""
        return norms_of(self.down, 0)

    @cached_property
    def unit_worth(self) -> Tensor:
        """What a unit of each neuron's activation is worth, [I] float32.

        The root of its mean squared gradient where that was learnt, else ``down_norm``.
        """
        curvature = None if self.learnt is None else self.learnt.curvature
        return self.down_norm if curvature is None else curvature.sqrt()

    @cached_property
    def down_l1(self) -> Tensor:
        """L1 norm of each column of the down projection, [I], float32."""
        return norms_of(self.down, 0, 1)

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor]:
        """``max_v |w_i . e_v|`` and ``mean_v |w_i . e_v|``, each [I], float32.

        ``w_i``: column i of the down projection; ``e_v``: row v of ``embedding``, which must be
        there.
        """
        if self.known_reach is not None:
            return self.known_reach
        assert self.embedding is not None
        return reach_of(self.down.detach(), self.embedding.detach())

    @cached_property
    def in_norms(self) -> Tensor:
        """Product of the L2 norms of each neuron's input rows, [I], float32."""
        norm = norms_of(self.up, 1)
        return norm if self.gate is None else norm * norms_of(self.gate, 1)


def with_prior(layers: Sequence[FfnWeights], **parts: Sequence[Any]) -> tuple[FfnWeights, ...]:
    """The layers, each with its part of what is known: ``prior=``, ``learnt=``, one per layer."""
    found = tuple(layers)
    for name, each in parts.items():
        found = tuple(replace(one, **{name: part}) for one, part in zip(found, each, strict=True))
    return found


def reach_of(down: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``FfnWeights.reach`` of down [D, I] and rows [V, D]: V x D x I products, in chunks of V."""
    high = torch.zeros(down.shape[1], device=down.device)
    total = torch.zeros(down.shape[1], device=down.device)
    columns = down.float()
    for chunk in torch.split(rows, REACH_CHUNK):
        found = (chunk.to(down.device).float() @ columns).abs_()
        high = torch.maximum(high, found.amax(0))
        total += found.sum(0)
    return high, total / len(rows)


def in_blocks(matrix: Tensor) -> bool:
    """Whether a matrix is stored in low-bit blocks, and not in its dtype."""
    return int(matrix.nbytes) != matrix.numel() * matrix.element_size()


def norms_of(matrix: Tensor, dim: int, order: float = 2) -> Tensor:
    """Norms of a matrix's columns (``dim`` 0) or rows (1), float32, from sums at least as wide."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix.detach(), order, dim, dtype=wide)
    return norm.float()
