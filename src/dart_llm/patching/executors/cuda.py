"""Executor cuda runs an FFN in Triton kernels that read the kept neurons in place, by their ids.

Only this file imports triton.  With ``TRITON_INTERPRET=1``, set before the import, the kernels run
on a CPU, slowly, for tests.  They compile for GPUs but have not run on one, so executor ``auto``
never chooses cuda.

Kernels take a few vectors x [M, D] and the ids [k] of the neurons.  Products are summed in float32.
A program is one instance of a Triton kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dart_llm.models.ffn import FfnBlock
from dart_llm.models.packed import PackedTensor
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.patching.executors.torch_ffn import buffer, run_rows, total_bias
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask

ROWS = 8
"""Number of neurons per program in ``_rows``."""

COLUMNS, CHUNK = 128, 32
"""``COLUMNS``: outputs per program of ``_sum``.  ``CHUNK``: neurons that it reads at once."""

SPLITS = 32
"""Maximum number of parts into which the neurons are split; one program sums each part."""


@triton.jit
def _rows(x, first, second, ids, out, k, inputs, BLOCK: tl.constexpr, N: tl.constexpr):
    """out[part, m, n] = W_part[ids[n]] . x[m]; W_0: ``first``, W_1: ``second``, contiguous rows."""
    m, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block * N + tl.arange(0, N)
    valid = n < k
    row = tl.load(ids + n, mask=valid, other=0).to(tl.int64)
    total = tl.zeros((N, BLOCK), dtype=tl.float32)
    for start in range(0, inputs, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < inputs
        value = tl.load(x + m * inputs + d, mask=inside, other=0.0).to(tl.float32)
        both = valid[:, None] & inside[None, :]
        at = row[:, None] * inputs + d[None, :]
        if part == 0:
            w = tl.load(first + at, mask=both, other=0.0)
        else:
            w = tl.load(second + at, mask=both, other=0.0)
        total += w.to(tl.float32) * value[None, :]
    target = (part * tl.num_programs(0) + m) * k + n
    tl.store(out + target, tl.sum(total, 1), mask=valid)


@triton.jit
def _sum(u, down, ids, out, k, outputs, part, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """out[s, m, d] = sum of u[m, n] W[ids[n], d] over the ``part`` neurons of split s; W: down."""
    m, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < outputs
    total = tl.zeros((CHUNK, COLUMNS), dtype=tl.float32)
    end = tl.minimum((split + 1) * part, k)
    for start in range(split * part, end, CHUNK):
        n = start + tl.arange(0, CHUNK)
        valid = n < end
        row = tl.load(ids + n, mask=valid, other=0).to(tl.int64)
        value = tl.load(u + m * k + n, mask=valid, other=0.0).to(tl.float32)
        both = valid[:, None] & inside[None, :]
        w = tl.load(down + row[:, None] * outputs + d[None, :], mask=both, other=0.0)
        total += w.to(tl.float32) * value[:, None]
    target = (split * tl.num_programs(0) + m) * outputs + d
    tl.store(out + target, tl.sum(total, 0), mask=inside)


INTERPRETED = not isinstance(_rows, triton.JITFunction)
"""True if the kernels run on a CPU, step by step in Python."""


def _block(size: int) -> int:
    """Return how many of ``size`` inputs a program reads at once."""
    return min(256 if size < 2048 else 512, int(triton.next_power_of_2(size)))


def rows(x: Tensor, matrices: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Return the products of x [M, D] with the rows ``ids`` of one or two matrices [I, D].

    The matrices must be contiguous; the result is [1 or 2, M, k] float32.
    """
    (count, inputs), k = x.shape, ids.shape[-1]
    out = torch.empty(len(matrices), count, k, dtype=torch.float32, device=x.device)
    grid = (count, triton.cdiv(k, ROWS), len(matrices))
    _launch(_rows, grid, x, matrices[0], matrices[-1], ids, out, k, inputs,
            BLOCK=_block(inputs), N=ROWS)  # fmt: skip
    return out


def weighted_sum(u: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """Return the product of u [M, k] and the rows ``ids`` of ``down`` [I, D]: [M, D] float32."""
    (count, k), outputs = u.shape, down.shape[1]
    splits = min(SPLITS, triton.cdiv(k, 2 * CHUNK))
    part = triton.cdiv(triton.cdiv(k, splits), CHUNK) * CHUNK
    splits = triton.cdiv(k, part)
    out = torch.empty(splits, count, outputs, dtype=torch.float32, device=u.device)
    grid = (count, triton.cdiv(outputs, COLUMNS), splits)
    _launch(_sum, grid, u, down, ids, out, k, outputs, part,
            COLUMNS=COLUMNS, CHUNK=CHUNK)  # fmt: skip
    return out.sum(0)


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **sizes: Any) -> None:
    """Launch ``kernel`` on the device of x."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[grid](x, *args, **sizes)


def cuda_unsupported_reason(block: FfnBlock) -> str | None:
    """Return why the kernels cannot run ``block``, which must not be inline; None if they can."""
    if any(isinstance(part.weight, PackedTensor) for part in block.projections):
        return "has quantized weights"
    down = block.down.weight
    assert isinstance(down, Tensor)
    if down.device.type != "cuda" and not INTERPRETED:
        return "is not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, to test them)"
    return None


class CudaFfn:
    """Runs the kept neurons of one FFN block in the kernels.

    ``matrices``: gate (or None), up and down, [I, D] each, one neuron per row.  A model's matrices
    that store neurons as rows are read in place.  Those that store them as columns (usually down)
    are copied, with all neurons, for every new mask.
    """

    def __init__(self, block: FfnBlock) -> None:
        self.block = block
        self.unload()

    def unload(self) -> None:
        """Drop the mask and all copies."""
        self.mask: LayerMask | None = None
        self.matrices: list[Tensor | None] = [None, None, None]
        self.bias: Tensor | None = None
        self.linear: LowRank | None = None

    token_rows = 0
    """Largest batch with per-token selection: 0, because cuda does not support that selection."""

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Switch to ``mask``; do nothing if it is loaded already."""
        if mask is self.mask:
            return
        self.mask = None
        gate, up, down = self.block.matrices()
        with torch.inference_mode(False):
            pairs = zip(self.matrices, (gate, up, down.t()), strict=True)
            self.matrices = [None if part is None else _by_rows(old, part) for old, part in pairs]
            self.bias = total_bias(mask, self.block.biases()[2])
            self.linear = mask.low_rank
        self.mask = mask

    def run(self, x: Tensor) -> Tensor:
        """Return z [..., D] from only the kept neurons; x: [..., D]."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        assert self.mask is not None
        if len(flat) > STEP_ROWS or torch.compiler.is_compiling():
            # for many vectors, copying the rows and multiplying matrices is faster
            biases = self.block.biases()[:2]
            z = run_rows(flat, self.matrices, biases, self.mask.ids, self.block.act).float()
        else:
            z = self._by_ids(flat, self.mask.ids)
        z = (z if self.bias is None else z + self.bias).to(x.dtype)
        z = z if self.linear is None else z + self.linear(flat)
        return z.reshape(x.shape)

    def _by_ids(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return z [M, D] float32 from the neurons ``ids`` [k], without bias."""
        *inputs, down = self.matrices
        assert down is not None
        parts = rows(x, tuple(m for m in inputs if m is not None), ids).unbind(0)
        pairs = zip(parts, self.block.biases()[2 - len(parts) : 2], strict=True)
        *gate, up = ((part if b is None else part + b[ids]).to(x.dtype) for part, b in pairs)
        u = self.block.act(gate[0]) * up if gate else self.block.act(up)
        return weighted_sum(u.contiguous(), down, ids)

    def nbytes(self) -> int:
        """Return the bytes of the copied matrices and of the bias, without the mask itself."""
        weights = {_memory(part) for part in self.block.matrices() if part is not None}
        parts = [t for t in (*self.matrices, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts if _memory(t) not in weights)


def _by_rows(old: Tensor | None, matrix: Tensor) -> Tensor:
    """Return ``matrix`` if it is contiguous, else a contiguous copy (in ``old``, if it fits)."""
    matrix = matrix.detach()
    if matrix.is_contiguous():
        return matrix
    return buffer(old, tuple(matrix.shape), matrix).copy_(matrix)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
