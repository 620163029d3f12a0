"""Triton kernels for the FFNs of decoded tokens: neurons are read in place, by their ids.

The only file that imports triton; with ``TRITON_INTERPRET=1``, set before the import, the kernels
run on a CPU, slowly, for tests.

A few vectors x [M, D] at a time; ids are [k], for all vectors, or [M, k], one set per vector.
Products are summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dart_llm.pruning.token_level import QuantizedProxy

ROWS = 8
"""Neurons of one program where neurons are rows."""

COLUMNS, CHUNK = 128, 32
"""Outputs of one program of the down projection, and neurons that it reads at once."""

SPLITS = 32
"""Parts at most into which the neurons of one output are cut, each summed by a program."""

MOST = 32768
"""Neurons of the largest layer whose strongest ones a program can select."""


@triton.jit
def _rows(x, first, second, ids, out, k, inputs, ids_step, BLOCK: tl.constexpr, N: tl.constexpr):
    """out[part, m, n] = W_part[ids[n]] . x[m]; ``first``, ``second``: W by rows, contiguous."""
    m, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block * N + tl.arange(0, N)
    valid = n < k
    row = tl.load(ids + m * ids_step + n, mask=valid, other=0).to(tl.int64)
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
def _sum(u, down, ids, out, k, outputs, ids_step, part, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """out[s, m, d] = sum of u[m, n] W[ids[n], d] over the n of part s; ``down``: by neurons."""
    m, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < outputs
    total = tl.zeros((CHUNK, COLUMNS), dtype=tl.float32)
    end = tl.minimum((split + 1) * part, k)
    for start in range(split * part, end, CHUNK):
        n = start + tl.arange(0, CHUNK)
        valid = n < end
        row = tl.load(ids + m * ids_step + n, mask=valid, other=0).to(tl.int64)
        value = tl.load(u + m * k + n, mask=valid, other=0.0).to(tl.float32)
        both = valid[:, None] & inside[None, :]
        w = tl.load(down + row[:, None] * outputs + d[None, :], mask=both, other=0.0)
        total += w.to(tl.float32) * value[:, None]
    target = (split * tl.num_programs(0) + m) * outputs + d
    tl.store(out + target, tl.sum(total, 0), mask=inside)


@triton.jit
def _low_bit(
    x, levels, scales, ids, out, k, inputs, stored, groups,
    GROUP: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out[m, n] = Q[ids[n]] . x[m] of a low-bit copy Q; ``HALVES``: 2 levels of 4 bits a byte."""
    m, block = tl.program_id(0), tl.program_id(1)
    n = block * N + tl.arange(0, N)
    valid = n < k
    row = tl.load(ids + n, mask=valid, other=0).to(tl.int64)
    total = tl.zeros((N, BLOCK), dtype=tl.float32)
    for start in range(0, stored, BLOCK):
        d = start + tl.arange(0, BLOCK)
        both = valid[:, None] & (d < stored)[None, :]
        level = tl.load(levels + row[:, None] * stored + d[None, :], mask=both, other=0)
        level = level.to(tl.int32)
        for half in tl.static_range(HALVES):
            column = d + half * stored
            inside = (d < stored) & (column < inputs)
            value = tl.load(x + m * inputs + column, mask=inside, other=0.0).to(tl.float32)
            some = valid[:, None] & inside[None, :]
            at = row[:, None] * groups + (column // GROUP)[None, :]
            scale = tl.load(scales + at, mask=some, other=0.0).to(tl.float32)
            if HALVES == 2:
                whole = ((level >> (4 * half)) & 15) - 8
            else:
                whole = level
            total += whole.to(tl.float32) * scale * value[None, :]
    tl.store(out + m * k + n, tl.sum(total, 1), mask=valid)


@triton.jit
def _largest(strengths, ids, out, n, k, WIDTH: tl.constexpr):
    """out[m] = ids of the k largest strengths[m], in the order of their places.

    Ties go to the lower place, NaN counts as infinite.  Of numbers that are not negative the bits
    are in their order: the k-th is found bit by bit.
    """
    m = tl.program_id(0)
    position = tl.arange(0, WIDTH)
    valid = position < n
    value = tl.load(strengths + m * n + position, mask=valid, other=0.0)
    bits = tl.where(valid, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    edge = tl.full((), 0, tl.int32)
    for shift in range(31):
        tried = edge | (1 << (30 - shift))
        edge = tl.where(tl.sum((bits >= tried).to(tl.int32), 0) >= k, tried, edge)
    more, tied = (bits > edge).to(tl.int32), (bits == edge).to(tl.int32)
    left = k - tl.sum(more, 0)
    chosen = more + tied * (tl.cumsum(tied, 0) <= left).to(tl.int32)
    to = tl.cumsum(chosen, 0) - 1
    tl.store(out + m * k + to, tl.load(ids + position, mask=valid, other=0), mask=chosen > 0)


INTERPRETED = not isinstance(_rows, triton.JITFunction)
"""Whether the kernels run on a CPU, step by step in Python."""


def _step(ids: Tensor) -> int:
    """How far the ids of one vector are from those of the next."""
    return int(ids.shape[-1]) if ids.dim() == 2 else 0


def _block(size: int) -> int:
    """Inputs that a program reads at once."""
    return min(256 if size < 2048 else 512, int(triton.next_power_of_2(size)))


def rows(x: Tensor, matrices: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Products of x [M, D] with the rows ``ids`` of one or two matrices [I, D]: [1 or 2, M, k].

    Matrices are contiguous; the result is float32.
    """
    (count, inputs), k = x.shape, ids.shape[-1]
    out = torch.empty(len(matrices), count, k, dtype=torch.float32, device=x.device)
    grid = (count, triton.cdiv(k, ROWS), len(matrices))
    _launch(_rows, grid, x, matrices[0], matrices[-1], ids, out, k, inputs, _step(ids),
            BLOCK=_block(inputs), N=ROWS)  # fmt: skip
    return out


def weighted_sum(u: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """The rows ``ids`` of ``down`` [I, D], weighted by u [M, k] and summed: [M, D] float32."""
    (count, k), outputs = u.shape, down.shape[1]
    splits = min(SPLITS, triton.cdiv(k, 2 * CHUNK))
    part = triton.cdiv(triton.cdiv(k, splits), CHUNK) * CHUNK
    splits = triton.cdiv(k, part)
    out = torch.empty(splits, count, outputs, dtype=torch.float32, device=u.device)
    grid = (count, triton.cdiv(outputs, COLUMNS), splits)
    _launch(_sum, grid, u, down, ids, out, k, outputs, _step(ids), part,
            COLUMNS=COLUMNS, CHUNK=CHUNK)  # fmt: skip
    return out.sum(0)


def low_bit_product(x: Tensor, copy: QuantizedProxy, ids: Tensor) -> Tensor:
    """``copy.product(x, ids)`` of x [M, D]: [M, n] float32."""
    (count, inputs), k = x.shape, len(ids)
    stored, groups = copy.levels.shape[1], copy.scales.shape[1]
    out = torch.empty(count, k, dtype=torch.float32, device=x.device)
    grid = (count, triton.cdiv(k, ROWS))
    _launch(_low_bit, grid, x, copy.levels, copy.scales, ids, out, k, inputs, stored, groups,
            GROUP=copy.group, HALVES=2 if copy.bits == 4 else 1,
            BLOCK=_block(stored), N=ROWS)  # fmt: skip
    return out


def largest(strengths: Tensor, ids: Tensor, k: int) -> Tensor:
    """Of every vector the ids [M, k] of its k largest strengths [M, n], of at most ``MOST``.

    ids: [n], what the places stand for; ascending ones stay so.
    """
    count, n = strengths.shape
    out = torch.empty(count, k, dtype=ids.dtype, device=ids.device)
    width = triton.next_power_of_2(n)
    warps = max(4, min(32, width // 512))
    _launch(_largest, (count,), strengths, ids, out, n, k, WIDTH=width, num_warps=warps)
    return out


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **sizes: Any) -> None:
    """On the device where x lies."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[grid](x, *args, **sizes)
