"""Runs one FFN block in PyTorch: all neurons multiplied by a mask, or only the kept neurons.

x [..., D] is the block's input, z [..., D] the block's output, u [..., I] the input of down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.models.ffn import FfnBlock
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask

Project = Callable[[Tensor], Tensor]


def run_masked(
    block: FfnBlock,
    project: Project,
    x: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    linear: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(u, z)`` from all neurons: u without mask, z from u times ``mask`` [I] (None: 1)."""
    u = block.hidden(x)
    z = project(u if mask is None else u * mask)
    z = z if bias is None else z + bias
    return u, (z if linear is None else z + linear(x))


class CompactFfn:
    """Runs one block with compact weights: copies of the kept neurons, renewed by every new mask.

    ``rows``: up [k, D], or gate above up [2k, D].  ``columns``: down [D, k].
    """

    token_rows = 0
    """Largest batch with per-token selection: 0, because it does not run on compact weights."""

    def __init__(self, block: FfnBlock) -> None:
        self.block = block
        self.unload()

    def unload(self) -> None:
        """Drop the compact weights."""
        self.mask: LayerMask | None = None
        self.rows = self.columns = self.row_bias = self.bias = None  # type: Tensor | None
        self.linear: LowRank | None = None

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Copy the neurons that ``mask`` keeps; do nothing if it is loaded already."""
        if mask is self.mask:
            return
        gate, up, down = self.block.matrices()
        parts = [up] if gate is None else [gate, up]
        k, hidden = mask.kept, down.shape[0]
        with torch.inference_mode(False):
            self.rows = buffer(self.rows, (len(parts) * k, up.shape[1]), up)
            self.columns = buffer(self.columns, (hidden, k), down)
            for index, part in enumerate(parts):
                torch.index_select(
                    part.detach(), 0, mask.ids, out=self.rows[index * k : (index + 1) * k]
                )
            torch.index_select(down.detach(), 1, mask.ids, out=self.columns)
            self._load_biases(mask)
        self.linear = mask.low_rank
        self.mask = mask

    def _load_biases(self, mask: LayerMask) -> None:
        gate, up, down = self.block.biases()
        inputs = [up] if self.block.matrices()[0] is None else [gate, up]
        example = next((bias for bias in inputs if bias is not None), None)
        if example is not None:
            zeros = torch.zeros_like(example)
            rows = [(zeros if bias is None else bias)[mask.ids] for bias in inputs]
            self.row_bias = torch.cat(rows)
        self.bias = down
        if mask.bias is not None and (total := total_bias(mask, down)) is not None:
            self.bias = total.to(self.block.matrices()[1])

    def run(self, x: Tensor) -> Tensor:
        """Return z from only the kept neurons."""
        assert self.rows is not None and self.columns is not None
        hidden = F.linear(x, self.rows, self.row_bias)
        if self.block.fused or self.block.gate is not None:
            gate, up = hidden.chunk(2, dim=-1)
            u = self.block.act(gate) * up
        else:
            u = self.block.act(hidden)
        z = F.linear(u, self.columns, self.bias)
        return z if self.linear is None else z + self.linear(x)

    def nbytes(self) -> int:
        """Return the bytes of the compact weights, without the mask itself."""
        others = (self.block.biases()[2], None if self.mask is None else self.mask.bias)
        bias = None if any(self.bias is other for other in others) else self.bias
        parts = (self.rows, self.columns, self.row_bias, bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def run_rows(
    x: Tensor,
    matrices: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    ids: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return z [M, D] without the output bias, for many vectors x [M, D].

    Copies the rows ``ids`` of the matrices; None uses all rows.  ``matrices``: gate (or None), up
    and down, [I, D] each.  ``biases``: those of gate and up.
    """
    parts = (*matrices, *biases)
    gate, up, down, gate_bias, up_bias = (
        part if part is None or ids is None else part[ids] for part in parts
    )
    assert up is not None and down is not None
    u = F.linear(x, up, up_bias)
    u = act(u) if gate is None else act(F.linear(x, gate, gate_bias)) * u
    return u @ down


def total_bias(mask: LayerMask, down: Tensor | None) -> Tensor | None:
    """Return the sum of the biases ``down`` and ``mask.bias``, [D] float32; None without any."""
    parts = [bias.float() for bias in (down, mask.bias) if bias is not None]
    return sum(parts[1:], parts[0]).contiguous() if parts else None


def buffer(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return ``old`` if it has this shape and the dtype of ``like``, else a new tensor."""
    if old is not None and old.shape == shape and old.dtype == like.dtype:
        return old
    return torch.empty(shape, dtype=like.dtype, device=like.device)
