"""Are a token's best neurons worth more bits?  Graded planes against roundings, at equal bytes.

    python benchmarks/graded_planes.py wiki.txt --model MODEL --form mixed --ggml libggml-base.so \\
        --gguf MODEL-Q4_K_M.gguf --work FOLDER

A simulation in float32, teacher-forced: each token runs all neurons of a layer on a base plane of
low bits, and its best neurons on base and refinement.  Scored are log loss and KL against the
dense model on the second half of slices of 512 tokens.  Bytes are those that a token reads of the
FFN over those of bfloat16: scales, minima and the norms that choose included.

``--form mixed`` breaks the grid that a checkpoint was dequantised from, which rounding would find
again: pairs of channels (i, i + D / 2) are turned by 45 degrees before gate and up, and back after
down.  The dense model computes the same; its weights are no longer on 16 levels per block.

``--ggml`` names llama.cpp's libggml-base, which then rounds as llama-quantize does, blocks laid
over the end of a row where its length is no multiple of 256.  ``--gguf`` takes the FFN of a file.
Rows are kept in ``--work`` as they are made, and not made again; ``--seconds`` ends a run early, 0
before its first row.  Writes benchmarks/results/NAME.json from all rows of the folder, and
``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import parser, read_text, save
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.calibration.self_text import own_start, sample_sequences
from dart_llm.evaluation.perplexity import slices
from dart_llm.experiments.stats import interval, paired_interval
from dart_llm.files import append_row, whole_rows, write_bytes, write_json
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import decoder_of, describe
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.loading import load
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import COLOURS, Plot, legend, render

LENGTH, SCORED = 512, 256
MATMUL: Any = torch.backends.mkldnn.matmul
IN_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether the CPU multiplies bfloat16 numbers; others would do the work twice for nothing."""
OWN = (16, 256)
"""Texts that the model writes to learn from, and their tokens."""
DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to it, as GPTQ does."""
TOGETHER = 4
"""Slices that run as one batch."""
WIDEST = 2048
"""Neurons of a layer of which a whole Hessian is kept; of more its diagonal."""
COLUMNS = 128
"""Columns that are rounded before the rest is told of their errors."""


@dataclass(frozen=True)
class Planes:
    """How a weight matrix is held.  ``coding`` of the scales, one per ``group`` weights:

    ``plain`` float16; ``scales`` 6 bits times a float16 per neuron; with ``minimum`` the grid's
    start is kept the same way; ``ggml:TYPE``, ``gguf:FILE``; ``dense``.  ``extra`` bits of
    refinement, ``nested`` (low bits of one code) or ``residual`` (what the base left, on a grid of
    its scale).  ``learnt``: errors weighted by the ``diagonal`` of the inputs' Hessian, or fed
    back by the whole of it in gate and up (``hessian``), in down too (``hessian all``).
    """

    coding: str = "plain"
    bits: int = 4
    extra: int = 0
    group: int = 32
    minimum: bool = False
    refine: str = "nested"
    learnt: str = "none"
    zero: bool = True
    """Whether a level is 0, with one more below than above; else as many on both sides."""
    both: bool = True
    """Whether a scale minimises the errors of base and nested bits together, not the base's."""
    uneven: bool = False
    """llama.cpp's 16 uneven levels (IQ4_XS); nested bits divide their cells."""

    def base_bits(self, width: int) -> float:
        """Per weight, in rows of ``width``."""
        if self.coding == "dense":
            return 16.0
        numbers = 2 if self.minimum else 1
        if self.coding == "plain":
            return self.bits + 16 * numbers / self.group
        return self.bits + numbers * (6 / self.group + 16 / _super(width))


@dataclass(frozen=True)
class Setting:
    """What a token reads: of ``share`` of the neurons the refinement too.

    ``choose``: the ``best`` of each token and layer by base activity times the norm of the down
    column; all above a threshold, one for the model (``global``) or each layer (``layer``); the
    same for all tokens (``fixed``); ``inputs``: in gate and up the largest inputs of all neurons.
    ``inputs``: share of the inputs at which gate and up are refined.  ``drop``: other neurons are
    left out of down.  ``attention``: bits of its weights: None as they are, ``base``, ``graded``.
    """

    planes: Planes
    share: float = 0.0
    choose: str = "best"
    inputs: float = 1.0
    drop: bool = False
    exact: bool = False
    """The best are read in bfloat16, from copies beside the planes (``dart-token``)."""
    attention: str | None = None


def _super(width: int) -> int:
    """Weights that share a float16 for their scales: a neuron's row, or 256 of a long one."""
    return width if width < 1024 else 256


# Grids.


class Grid(NamedTuple):
    """Elementwise [R, C]: a base value is ``scale * level + start``."""

    scale: Tensor
    start: Tensor
    how: Planes

    def base(self, weight: Tensor, at: Any = slice(None)) -> Tensor:
        scale, start = self.scale[at], self.start[at]
        return scale * level((weight - start) / scale, self.how) + start


UNEVEN = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
).div_(16)
"""The 16 levels of llama.cpp's IQ4_NL and IQ4_XS, in steps of about 1."""
MIDDLES = (UNEVEN[1:] + UNEVEN[:-1]) / 2
ENDS = torch.cat([2 * UNEVEN[:1] - MIDDLES[:1], MIDDLES, 2 * UNEVEN[-1:] - MIDDLES[-1:]])
"""Where the cells of the levels begin and end."""
PLACES = 128
"""Of a step; all ends of cells and of their quarters are multiples of one."""


def _places() -> tuple[Tensor, Tensor]:
    """Of every place from -8 to 8: its level, and the middle of the quarter of its cell."""
    raw = (torch.arange(16 * PLACES, dtype=torch.float32) + 0.5) / PLACES - 8
    cell = torch.bucketize(raw, MIDDLES)
    first, width = ENDS[cell], (ENDS[1:] - ENDS[:-1])[cell]
    code = ((raw - first) / width * 4).floor().clamp(0, 3)
    return UNEVEN[cell], first + (code + 0.5) * width / 4


LEVELS, QUARTERS = _places()


def _place(raw: Tensor) -> Tensor:
    return ((raw + 8) * PLACES).clamp_(0, 16 * PLACES - 1).to(torch.int32)


def centre(how: Planes) -> float:
    """The lowest level of an even grid."""
    if how.minimum:
        return 0.0
    return -(2**how.bits) / 2 if how.zero else -(2**how.bits - 1) / 2


def level(raw: Tensor, how: Planes) -> Tensor:
    """The level next to weights in units of their scale."""
    if how.uneven:
        return LEVELS[_place(raw)]
    first = centre(how)
    return (raw - first).round_().clamp_(0, 2**how.bits - 1).add_(first)


def finer(raw: Tensor, base: Tensor, how: Planes) -> Tensor:
    """What the nested bits add to a level: the middle of a part of its cell."""
    count = 2**how.extra
    if not how.uneven:
        return _part(raw - base, count)
    quarter = QUARTERS[_place(raw)]
    if how.extra == 2:
        return quarter - base
    halves = ENDS[1:] - ENDS[:-1]
    width = halves[torch.bucketize(base, MIDDLES)]
    return torch.where(quarter > base, width, -width) / 4


def _part(left: Tensor, count: int) -> Tensor:
    """The middle of that of ``count`` parts of a step in which a remainder lies."""
    return (left * count).floor_().clamp_(-count // 2, count // 2 - 1).add_(0.5).div_(count)


FACTORS, UNEVEN_FACTORS = (0.7, 0.78, 0.85, 0.91, 0.97, 1.03), (0.78, 0.85, 0.91, 0.97, 1.03)
"""Of the scale that reaches the largest weight: where least squares start from."""
IN_CACHE = 65536
"""Weights that are fitted at a time."""
FINE = 4.0
"""What the error of the refinement counts over the base's: it is read where more is at stake."""


def fit(weight: Tensor, how: Planes, importance: Tensor | None) -> Grid:
    """The grid with the least error by groups of a row; ``importance``: of the columns."""
    rows, width = weight.shape
    parts = weight.view(rows, width // how.group, how.group)
    by = torch.ones(1, 1, how.group) if importance is None else importance.view(1, -1, how.group)
    few = max(1, IN_CACHE // width)
    fitted = [_fitted(some, how, by, width) for some in parts.split(few)]
    scale, begin = (torch.cat(found) for found in zip(*fitted, strict=True))

    def spread_out(values: Tensor) -> Tensor:
        return values.expand(-1, -1, how.group).reshape(rows, width).contiguous()

    return Grid(spread_out(scale), spread_out(begin), how)


def _fitted(parts: Tensor, how: Planes, by: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scale and start [R, G, 1], as they are kept, of groups [R, G, g]."""
    reach, start = _reaching(parts, how)
    best, scale, begin = torch.full_like(reach, math.inf), reach, start
    for factor in UNEVEN_FACTORS if how.uneven else FACTORS:
        inset = reach * (2**how.bits - 1) / 2 * (1 - factor) if how.minimum else 0.0
        tried = _improved(parts, reach * factor, start + inset, how, by)
        raw = (parts - tried[1]) / tried[0]
        near = level(raw, how)
        error = (raw - near).square_()
        if how.extra and how.both:
            error += FINE * (raw - near - finer(raw, near, how)).square_()
        error = (error * by).sum(-1, keepdim=True) * tried[0].square()
        better = error < best
        best = torch.where(better, error, best)
        scale, begin = torch.where(better, tried[0], scale), torch.where(better, tried[1], begin)
    return _coded(scale, how, width), _coded(begin, how, width, signed=True)


def _reaching(parts: Tensor, how: Planes) -> tuple[Tensor, Tensor]:
    """[R, G, 1] scale and start of the grid that ends at the largest weights."""
    if how.minimum:
        low = parts.amin(-1, keepdim=True)
        return _no_zero((parts.amax(-1, keepdim=True) - low) / (2**how.bits - 1)), low
    most = parts.abs().amax(-1, keepdim=True)
    longest = -float(UNEVEN[0]) if how.uneven else -centre(how)
    if how.zero or how.uneven:  # the longer side of the grid where the largest weight is
        far = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
        most = torch.where(far > 0, -most, most)
    return _no_zero(most / longest), torch.zeros_like(most)


def _no_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-9, torch.full_like(scale, 1e-9), scale)


def _improved(
    parts: Tensor, scale: Tensor, start: Tensor, how: Planes, by: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and start by least squares for the levels that these ones give."""
    found = level((parts - start) / scale, how)
    if not how.minimum:
        top_part = (by * found * parts).sum(-1, keepdim=True)
        bottom = (by * found * found).sum(-1, keepdim=True)
        return _no_zero(torch.where(bottom > 0, top_part / bottom.clamp_min(1e-20), scale)), start
    total = by.sum(-1, keepdim=True)
    middle = (by * found).sum(-1, keepdim=True) / total
    mean = (by * parts).sum(-1, keepdim=True) / total
    off = found - middle
    bottom = (by * off * off).sum(-1, keepdim=True)
    better = (by * off * (parts - mean)).sum(-1, keepdim=True) / bottom.clamp_min(1e-20)
    better = _no_zero(torch.where(bottom > 0, better, scale))
    return better, mean - better * middle


def _coded(values: Tensor, how: Planes, width: int, signed: bool = False) -> Tensor:
    """Scales [R, G, 1] as they are kept: float16, or 6 bits of the largest nearby."""
    if how.coding == "plain":
        return _no_zero(values.half().float()) if not signed else values.half().float()
    rows, count, _ = values.shape
    size = max(1, _super(width) // how.group)
    padded = F.pad(values[..., 0], (0, -count % size)).view(rows, -1, size)
    steps = 31 if signed or how.zero or how.uneven else 63
    most = (padded.abs().amax(-1, keepdim=True) / steps).half().float().clamp_min(1e-7)
    code = (padded / most).round()
    if not signed:
        code = torch.where(code == 0, torch.ones_like(code), code)
    return (code * most).view(rows, -1)[:, :count, None]


# Rounding.


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of a damped Hessian's inverse, by which errors are fed back."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * float(hessian.diagonal().mean()) + 1e-8)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def round_with_feedback(weight: Tensor, grid: Grid, root: Tensor) -> Tensor:
    """Values [R, C] of a grid; the error of each column is made good by those behind it (GPTQ)."""
    weight, found = weight.clone(), torch.empty_like(weight)
    width = weight.shape[1]
    for begin in range(0, width, COLUMNS):
        end = min(begin + COLUMNS, width)
        part = weight[:, begin:end].t().contiguous()
        errors = torch.empty_like(part)
        within = root[begin:end, begin:end]
        for place in range(end - begin):
            at = (slice(None), begin + place)
            value = grid.base(part[place], at)
            found[:, begin + place] = value
            errors[place] = (part[place] - value) / within[place, place]
            part[place + 1 :].addr_(within[place, place + 1 :], errors[place], alpha=-1)
        weight[:, end:] -= errors.t() @ root[begin:end, end:]
    return found


def two_planes(
    weight: Tensor, how: Planes, hessian: Tensor | None, by_neurons: bool
) -> tuple[Tensor, Tensor | None]:
    """Base values of a matrix, and what the refinement adds to them; groups lie along rows.

    ``hessian``: of the inputs, which are its columns; ``by_neurons``: its rows (down, transposed).
    """
    importance = None
    if hessian is not None and not by_neurons:
        importance = hessian.diagonal()
    grid = fit(weight, how, importance if how.learnt != "none" else None)
    fed = how.learnt == "hessian all" or (how.learnt == "hessian" and not by_neurons)
    if fed and hessian is not None:
        root = inverse_root(hessian)
        if by_neurons:
            turned = Grid(grid.scale.t().contiguous(), grid.start.t().contiguous(), how)
            base = round_with_feedback(weight.t().contiguous(), turned, root).t().contiguous()
        else:
            base = round_with_feedback(weight, grid, root)
    else:
        base = grid.base(weight)
    if not how.extra:
        return base, None
    if how.refine == "nested":
        raw, known = ((one - grid.start) / grid.scale for one in (weight, base))
        return base, finer(raw, known, how) * grid.scale
    left, count = (weight - base) / grid.scale, 2**how.extra
    reach = _reach(left, count)
    return base, reach * _part(left / reach, count) * grid.scale


def _reach(left: Tensor, count: int) -> float:
    """By how much the refinement's grid is wider than a base step, for the least error."""
    sample = left.flatten()[:: max(1, left.numel() // 100_000)]
    tried = [1.0 + 0.1 * n for n in range(21)]
    return min(tried, key=lambda r: float((sample - r * _part(sample / r, count)).square().sum()))


# llama.cpp's roundings.


class Ggml:
    """The quantisers of llama.cpp's libggml-base."""

    def __init__(self, path: Path | None) -> None:
        self.library = None if path is None else ctypes.CDLL(str(path.absolute()))

    def __call__(self, weight: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, int]:
        """Values of [R, C] rounded, and the bytes that they take; ``importance``: [C]."""
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        assert self.library is not None
        found = GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[found]
        width = math.lcm(weight.shape[1], block)
        data = np.ascontiguousarray(weight.numpy().reshape(-1, width), np.float32)
        matrix = None
        if importance is not None:
            matrix = np.ascontiguousarray(
                np.tile(importance.numpy(), width // weight.shape[1]), np.float32
            )
        into = np.empty(data.size // block * size, np.uint8)
        quantise = self.library.ggml_quantize_chunk
        quantise.restype = ctypes.c_size_t
        pointer = ctypes.c_void_p
        self.library.ggml_quantize_init(ctypes.c_int(int(found)))
        quantise(
            ctypes.c_int(int(found)),
            pointer(data.ctypes.data),
            pointer(into.ctypes.data),
            ctypes.c_int64(0),
            ctypes.c_int64(data.shape[0]),
            ctypes.c_int64(width),
            pointer(None if matrix is None else matrix.ctypes.data),
        )
        values = dequantize(into, found).reshape(weight.shape)
        return torch.from_numpy(values), len(into)


GGUF_NAMES = ("ffn_gate", "ffn_up", "ffn_down")


def of_file(path: Path, index: int) -> list[tuple[Tensor, int]]:
    """Gate, up and down [out, in] of one layer of a GGUF file, with their bytes."""
    tensors = _file(path).tensors
    stored = [tensors[f"blk.{index}.{name}.weight"] for name in GGUF_NAMES]
    return [(one.values().float(), one.size) for one in stored]


@functools.cache
def _file(path: Path) -> Any:
    return read_gguf(path)


# What the model says of its inputs on text of its own.


@dataclass
class Learnt:
    """Of one layer: mean of x x' and u u', and scores of some neurons and tokens, each sorted."""

    x: Tensor
    u: Tensor
    scores: Tensor


def mixed(x: Tensor) -> Tensor:
    """[..., D] with channels i and i + D / 2 turned by 45 degrees; its own inverse."""
    a, b = x.chunk(2, -1)
    return torch.cat([a + b, a - b], -1) * math.sqrt(0.5)


@torch.inference_mode()
def learn(
    model: Any, blocks: list[FfnBlock], ids: Tensor, say: Callable[[str], None]
) -> list[Learnt]:
    """Hessians and scores of every layer, from texts [B, T]; the first token is left out."""
    found: list[Learnt] = []
    for block in blocks:
        width, hidden = block.down_width, block.matrices()[1].shape[1]
        empty = torch.zeros((width, width) if width <= WIDEST else width)
        found.append(Learnt(torch.zeros(hidden, hidden), empty, torch.empty(0)))

    def watch(block: FfnBlock, one: Learnt) -> Callable[..., None]:
        norms = block.matrices()[2].norm(dim=0)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0][:, 1:].flatten(0, 1)
            u = block.hidden(x)
            one.x.addmm_(x.t(), x, alpha=1 / ids.numel())
            if one.u.dim() == 2:
                one.u.addmm_(u.t(), u, alpha=1 / ids.numel())
            else:
                one.u += u.square().sum(0) / ids.numel()
            some = (u.abs() * norms).flatten()[::997]
            one.scores = torch.cat([one.scores, some])

        return hook

    hooks = [
        block.ffn.register_forward_pre_hook(watch(block, one))
        for block, one in zip(blocks, found, strict=True)
    ]
    for number, part in enumerate(ids.split(4)):
        say(f"Hessians: batch {number + 1} of {-(-len(ids) // 4)}")
        model(part, logits_to_keep=1, use_cache=False)
    for one in hooks:
        one.remove()
    return found


def _diagonal(hessian: Tensor) -> Tensor:
    return hessian.diagonal() if hessian.dim() == 2 else hessian


# A layer in planes.


class Layer(NamedTuple):
    """Planes of one FFN, gate and up [I, D], down [D, I], and what chooses."""

    base: list[Tensor]
    extra: list[Tensor | None]
    norms: Tensor
    bits: float
    """Of the base, per weight."""


@dataclass
class Study:
    """A model with what is known of it, and what its FFNs are replaced by."""

    model: Any
    blocks: list[FfnBlock]
    learn: Callable[[], list[Learnt]]
    windows: list[Tensor]
    dense: list[Tensor]
    is_mixed: bool
    ggml: Ggml
    files: dict[str, Path]

    @functools.cached_property
    def learnt(self) -> list[Learnt]:
        return self.learn()

    def loss(self, most: int) -> float:
        """Of the dense model, the mean over the first slices."""
        pairs = zip(self.windows[:most], self.dense, strict=False)
        found = [-float(d.float().gather(1, w[-SCORED:, None]).mean()) for w, d in pairs]
        return sum(found) / len(found)

    def weights(self, block: FfnBlock) -> list[Tensor]:
        """Gate, up and down of a layer, [out, in], as they are to be rounded."""
        gate, up, down = (one.detach().float() for one in block.matrices() if one is not None)
        if self.is_mixed:
            return [mixed(gate), mixed(up), mixed(down.t()).t().contiguous()]
        return [gate, up, down]

    def hessian(self, index: int, down: bool) -> Tensor:
        found = self.learnt[index].u if down else self.learnt[index].x
        return mixed(mixed(found).t()) if self.is_mixed and not down else found

    def layer(self, block: FfnBlock, how: Planes) -> Layer:
        weights = self.weights(block)
        norms = weights[2].norm(dim=0)
        if how.coding == "dense":
            return Layer(weights, [None] * 3, norms, 16.0)
        if how.coding.startswith(("ggml:", "gguf:")):
            return self._theirs(block, weights, norms, how)
        base, extra = [], []
        for number, weight in enumerate(weights):
            down = number == 2
            known = self.hessian(block.index, down) if how.learnt != "none" else None
            held = weight.t().contiguous() if down else weight
            pair = two_planes(held, how, known, down)
            values, more = (None if p is None else _rounded(p.t() if down else p) for p in pair)
            base.append(values)
            extra.append(more)
        return Layer(base, extra, norms, how.base_bits(weights[0].shape[1]))

    def _theirs(self, block: FfnBlock, weights: list[Tensor], norms: Tensor, how: Planes) -> Layer:
        """By llama.cpp: its types, or a file of its."""
        kind = how.coding[5:]
        if how.coding.startswith("gguf:"):
            found = of_file(self.files[kind], block.index)
        else:
            known = [None, None, None]
            if how.learnt != "none":
                known = [_diagonal(self.hessian(block.index, n == 2)) for n in range(3)]
            found = [self.ggml(one, kind, by) for one, by in zip(weights, known, strict=True)]
        bits = 8 * sum(size for _, size in found) / sum(weight.numel() for weight in weights)
        return Layer([_rounded(values) for values, _ in found], [None] * 3, norms, bits)


def _rounded(values: Tensor) -> Tensor:
    """To bfloat16, as dequantised weights are."""
    return values.contiguous().bfloat16().float()


class Graded:
    """The forward of one FFN in planes; counts what it refines."""

    def __init__(self, study: Study, block: FfnBlock, layer: Layer, setting: Setting, cut: Any):
        self.study, self.block, self.layer, self.setting = study, block, layer, setting
        self.cut = cut
        self.refined, self.seen = 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        flat = mixed(flat) if self.study.is_mixed else flat
        y = self.ffn(flat)
        y = mixed(y) if self.study.is_mixed else y
        return self.block.finish(y.view_as(x), (x,))

    def ffn(self, x: Tensor) -> Tensor:
        setting, act = self.setting, self.block.act
        (gate, up, down), (more_gate, more_up, more_down), norms = self.layer[:3]
        g, u = product(x, gate), product(x, up)
        a = act(g) * u
        if setting.choose == "none" or not (setting.share or setting.drop):
            return product(a, down)
        seen = x
        if setting.choose == "inputs":
            seen = x * top(x.abs() * self.cut, setting.share)
        elif setting.inputs < 1:
            seen = x * top(x.abs(), setting.inputs)
        chosen = self.choose(a.abs() * norms)
        if more_gate is not None:
            fine = act(g + product(seen, more_gate)) * (u + product(seen, more_up))
            a = fine if setting.choose == "inputs" else torch.where(chosen, fine, a)
        kept = a * chosen
        y = product(kept if setting.drop else a, down)
        return y if more_down is None else y + product(kept, more_down)

    def choose(self, score: Tensor) -> Tensor:
        """Which neurons of each token are refined, [n, I]."""
        if self.setting.choose in ("global", "layer"):
            chosen = score > self.cut
        elif self.setting.choose == "fixed":
            chosen = self.cut.expand_as(score)
        else:
            chosen = top(score, self.setting.share)
        self.refined += int(chosen.sum())
        self.seen += chosen.numel()
        return chosen


def top(score: Tensor, share: float) -> Tensor:
    """Which of [n, I] are among the largest ``share`` of their row."""
    count = max(1, round(share * score.shape[-1]))
    return score >= score.topk(count, dim=-1, sorted=False)[0].amin(-1, keepdim=True)


# Measuring.


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' in float32 for weights that are bfloat16 numbers; inputs keep 16 bits.

    Two products of bfloat16 numbers with float32 sums, which matrix units are fast at; elsewhere
    one of float32 numbers.
    """
    if not IN_BFLOAT16:
        return F.linear(x, weight, bias)
    high = x.bfloat16().float()
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "bf16"
    try:
        return F.linear(high, weight, bias).add_(F.linear(x - high, weight))
    finally:
        MATMUL.fp32_precision = before


def multiply_fast(model: Any) -> None:
    """The linear layers of a model whose weights are bfloat16 numbers, by ``product``."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.detach(), module.bias
            module.forward = lambda x, w=weight, b=bias: product(x, w, b)  # type: ignore[misc]


@contextlib.contextmanager
def replaced(blocks: list[FfnBlock], forwards: list[Graded]) -> Iterator[None]:
    """The FFNs' forwards while it lasts."""
    for block, forward in zip(blocks, forwards, strict=False):
        block.ffn.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for block in blocks:
            del block.ffn.forward


@torch.inference_mode()
def log_probabilities(model: Any, windows: list[Tensor]) -> Iterator[Tensor]:
    """[SCORED, V] float32 of each window, for the tokens of its second half."""
    hidden = decoder_of(model)(torch.stack(windows), use_cache=False)[0]
    head = model.get_output_embeddings()
    for one in hidden[:, -SCORED - 1 : -1]:
        yield head(one).log_softmax(-1)


@torch.inference_mode()
def measure(study: Study, most: int) -> tuple[list[float], list[float]]:
    """Mean loss and mean KL of each slice."""
    losses, divergences = [], []
    for begin in range(0, most, TOGETHER):
        windows = study.windows[begin : begin + TOGETHER][: most - begin]
        for number, found in enumerate(log_probabilities(study.model, windows), begin):
            targets, known = study.windows[number][-SCORED:, None], study.dense[number].float()
            losses.append(-float(found.gather(1, targets).mean()))
            divergences.append(float((known.exp() * (known - found)).sum(-1).mean()))
    return losses, divergences


class Runner:
    """Settings one after the other; layers in planes are kept while settings share them."""

    def __init__(self, study: Study) -> None:
        self.study, self.how = study, Planes("none")
        self.layers: list[Layer] = []

    def run(self, setting: Setting, most: int) -> dict[str, Any]:
        with self.running(setting) as read_by_a_token:
            losses, divergences = measure(self.study, most)
            return {**read_by_a_token(), "losses": losses, "kls": divergences}

    @contextlib.contextmanager
    def running(self, setting: Setting) -> Iterator[Callable[[], dict[str, Any]]]:
        """The model in planes; the function says what its tokens have read until then."""
        study = self.study
        if setting.planes != self.how:
            self.layers = []
            self.layers = [study.layer(block, setting.planes) for block in study.blocks]
            self.how = setting.planes
        layers = self.layers
        if setting.exact:
            layers = [self._exact(layer, n) for n, layer in enumerate(layers)]
        forwards = [
            Graded(study, block, layer, setting, self._cut(setting, block, layer))
            for block, layer in zip(study.blocks, layers, strict=True)
        ]
        blocks = study.blocks if setting != DENSE else []  # the model itself
        width = layers[0].base[0].shape[1]
        bits = sum(layer.bits for layer in self.layers) / len(self.layers)

        with replaced(blocks, forwards), attention(study, setting) as attended:

            def read_by_a_token() -> dict[str, Any]:
                seen = sum(one.seen for one in forwards)
                share = sum(one.refined for one in forwards) / seen if seen else 0.0
                of_dense = read(setting, bits, share, width)
                return {"share": share, "bytes": of_dense, "attention_bits": attended}

            yield read_by_a_token

    def _exact(self, layer: Layer, index: int) -> Layer:
        """With what the base lacks of the weights themselves as its refinement."""
        if layer.extra[0] is not None or layer.bits == 16:
            return layer
        exact = self.study.weights(self.study.blocks[index])
        left = [_rounded(w - b) for w, b in zip(exact, layer.base, strict=True)]
        return layer._replace(extra=left)

    def _cut(self, setting: Setting, block: FfnBlock, layer: Layer) -> Any:
        """A threshold, the neurons that all tokens refine, or the inputs' norms."""
        one = slice(block.index, block.index + 1)
        if setting.choose in ("global", "layer"):
            learnt = self.study.learnt[slice(None) if setting.choose == "global" else one]
            scores = torch.cat([one.scores for one in learnt])
            return float(scores.sort().values[int((1 - setting.share) * len(scores))])
        if setting.choose == "fixed":
            known = self.study.learnt[block.index]
            return top((_diagonal(known.u).sqrt() * layer.norms)[None], setting.share)
        if setting.choose == "inputs":
            assert layer.extra[0] is not None
            return layer.extra[0].norm(dim=0)
        return None


def read(setting: Setting, bits: float, share: float, width: int) -> float:
    """FFN bytes that a token reads over those of bfloat16, ``share`` of the neurons refined."""
    extra = 16.0 if setting.exact else setting.planes.extra
    if not setting.share:
        return bits / 16
    base = bits * (2 + (share if setting.drop and not setting.exact else 1)) / 3
    if setting.exact:
        base = bits * 2 / 3
    inputs = share if setting.choose == "inputs" else share * setting.inputs
    more = extra * (2 * inputs + share) / 3
    norms = 16 / (3 * width)
    return (base + more + norms) / 16


@contextlib.contextmanager
def attention(study: Study, setting: Setting) -> Iterator[float | None]:
    """Query, key, value and output in planes; graded: at the largest inputs of a token."""
    if setting.attention is None:
        yield None
        return
    how = replace(setting.planes, learnt="none")
    share = setting.share if setting.attention == "graded" else 0.0
    patched, bits = [], how.base_bits(10**9)
    for name, module in study.model.named_modules():
        if not isinstance(module, nn.Linear) or name.split(".")[-1] not in (
            *("q_proj", "k_proj", "v_proj", "o_proj"),
        ):
            continue
        weight = module.weight.detach()
        base, extra = two_planes(weight, how, None, False)
        norms = None if extra is None else extra.norm(dim=0)

        def forward(
            x: Tensor,
            base: Tensor = base,
            extra: Tensor | None = extra,
            norms: Tensor | None = norms,
            bias: Tensor | None = module.bias,
        ) -> Tensor:
            y = F.linear(x, base, bias)
            if extra is None or not share:
                return y
            return y + F.linear(x * top((x.abs() * norms).flatten(0, 1), share).view_as(x), extra)

        module.forward = forward  # type: ignore[method-assign]
        patched.append(module)
    try:
        yield bits + share * how.extra
    finally:
        for module in patched:
            del module.forward


# Which settings, the decisive ones first.


def graded(planes: Planes, *shares: float, **more: Any) -> list[Setting]:
    return [Setting(planes, share, **more) for share in shares]


def rounded(*planes: Planes) -> list[Setting]:
    return [Setting(one, choose="none") for one in planes]


def by_llama_cpp(*kinds: str, learnt: str = "none") -> list[Setting]:
    return rounded(*(Planes(f"ggml:{kind}", learnt=learnt) for kind in kinds))


UNEVEN_PLANES = Planes(coding="scales", extra=2, uneven=True)
GPTQ = Planes(coding="scales", uneven=True, learnt="hessian")


def core() -> list[Setting]:
    """Those that answer: uneven planes of 4 + 2 bits against the best roundings."""
    return [
        *graded(UNEVEN_PLANES, 0.3, 0.15, 0.5),
        *by_llama_cpp("IQ4_XS", "Q4_K", "Q5_K"),
        *rounded(replace(UNEVEN_PLANES, extra=0), GPTQ, Planes(bits=5, learnt="hessian")),
        *graded(Planes(extra=2), 0.3),
    ]


def planes() -> list[Setting]:
    """Other splits of the bits, other scales, error feedback."""
    fed = replace(UNEVEN_PLANES, learnt="hessian", refine="residual")
    return [
        *graded(fed, 0.3, 0.15),
        *graded(replace(UNEVEN_PLANES, both=False), 0.3),
        *graded(Planes(bits=5, extra=1), 0.1),
        *graded(Planes(bits=3, extra=3), 0.5, 0.3),
        *graded(Planes(coding="scales", minimum=True, extra=2), 0.3, 0.15),
        *graded(replace(UNEVEN_PLANES, extra=1), 0.5),
        *graded(Planes(bits=3, extra=2), 0.3),
        *graded(replace(UNEVEN_PLANES, coding="plain"), 0.3),
        *rounded(replace(GPTQ, learnt="hessian all"), Planes(), Planes(bits=5), Planes(bits=3)),
        *by_llama_cpp("IQ4_XS", "Q4_K", "Q5_K", learnt="diagonal"),
        *by_llama_cpp("Q3_K"),
        *graded(Planes(extra=2, zero=False), 0.3),
        *graded(replace(UNEVEN_PLANES, group=64), 0.3),
    ]


def choices() -> list[Setting]:
    """How the best are chosen, and what else may be refined or dropped."""
    ways = ("fixed", "layer", "global", "inputs")
    return [
        *(one for way in ways for one in graded(UNEVEN_PLANES, 0.3, choose=way)),
        *graded(UNEVEN_PLANES, 0.3, 0.5, inputs=0.5),
        *graded(UNEVEN_PLANES, 0.3, 0.5, drop=True),
        *graded(UNEVEN_PLANES, 0.05),
        *graded(UNEVEN_PLANES, 0.3, attention="graded"),
        *graded(UNEVEN_PLANES, 0.3, attention="base"),
        *graded(replace(UNEVEN_PLANES, extra=0), 0.1, exact=True, drop=True),
    ]


DENSE = Setting(Planes("dense"), choose="none")

SETS: dict[str, Callable[[], list[Setting]]] = {
    "core": core,
    "planes": planes,
    "choices": choices,
}


def label(setting: Setting) -> str:
    """What a row of the table is called."""
    how = setting.planes
    words = [how.coding.split(":")[-1] if ":" in how.coding else f"{how.bits}"]
    if how.coding == "dense":
        words = ["bfloat16"]
    if how.extra and not setting.exact:
        words[0] += f" + {how.extra}"
    if ":" not in how.coding and how.coding != "dense":
        words[0] += " bits"
        words += ["residual"] * (how.refine == "residual" and how.extra > 0)
        words += ["scales of scales"] * (how.coding == "scales") + ["minimum"] * how.minimum
        words += (
            ["no level at 0"] * (not how.zero)
            + ["uneven"] * how.uneven
            + ["scale for the base"] * (how.extra > 0 and not how.both)
            + [f"groups of {how.group}"] * (how.group != 32)
        )
    words += [] if how.learnt == "none" else [how.learnt]
    if setting.share:
        words.append(f"{setting.choose} {setting.share:.0%}")
    words += [f"at {setting.inputs:.0%} of the inputs"] * (setting.inputs < 1)
    words += ["winners exact"] * setting.exact + ["others dropped"] * setting.drop
    words += [] if setting.attention is None else [f"attention {setting.attention}"]
    return ", ".join(words)


# The run.


def spread(count: int) -> list[int]:
    """Numbers below ``count``, so ordered that the first few lie far from each other."""
    return sorted(range(count), key=lambda n: f"{n:016b}"[::-1])


def whole(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model in float32, its tokenizer, and what identifies it."""
    model, tokenizer = load(args.model, dtype="bfloat16", weights="dense", device="cpu")
    checkpoint = {k: v for k, v in checkpoint_facts(model).items() if k != "path"}
    return model.float(), tokenizer, {"checkpoint": checkpoint, "grid": args.grid}


def unlearnt(model: Any, args: argparse.Namespace) -> Study:
    """A study without texts, for settings that learn nothing of the model."""

    def nothing() -> list[Learnt]:
        raise SystemExit(
            "this setting learns from the model's own text: only graded_planes.py does"
        )

    files = {path.stem: path for path in args.gguf}
    blocks = list(describe(model).blocks)
    return Study(model, blocks, nothing, [], [], args.form == "mixed", Ggml(args.ggml), files)


def prepare(args: argparse.Namespace, console: Ui) -> tuple[Study, dict[str, Any]]:
    """A study whose dense outputs, and what is learnt of the model, are kept in ``--work``."""
    model, tokenizer, facts = whole(args)
    text, facts["text"] = read_text(args.text)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    cut = slices(ids, args.slices, LENGTH - SCORED, SCORED)
    windows = [cut[n] for n in spread(len(cut))[: args.most]]
    study = unlearnt(model, args)
    folder = args.work / args.name
    folder.mkdir(parents=True, exist_ok=True)
    multiply_fast(model)

    def learnt() -> list[Learnt]:
        def written() -> Tensor:
            return sample_sequences(model, own_start(model), *OWN, seed=0, say=console.say)

        own = kept(folder / "own.pt", written)
        return kept(folder / "learnt.pt", lambda: learn(model, study.blocks, own, console.say))

    dense = [
        kept(
            folder / f"dense-{args.slices}-{n}.pt",
            lambda w=w: next(log_probabilities(model, [w])).half(),
        )
        for n, w in enumerate(windows)
    ]
    return replace(study, learn=learnt, windows=windows, dense=dense), facts


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and written to it."""
    if not path.is_file():
        made = make()
        torch.save(made, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    return torch.load(path, weights_only=False)


def wanted(args: argparse.Namespace) -> list[Setting]:
    """The settings of ``--sets`` that the options allow, each once."""
    found = dict.fromkeys(one for name in args.sets.split(",") for one in SETS[name]())
    own = args.form == "own"
    files = rounded(*(Planes(f"gguf:{path.stem}") for path in args.gguf)) if own else []

    def possible(setting: Setting) -> bool:
        return args.ggml is not None or not setting.planes.coding.startswith("ggml:")

    named = [part for part in args.only.split(";") if part]
    return [
        one
        for one in [*files, *found]
        if possible(one) and (not named or any(part in label(one) for part in named))
    ]


def run(args: argparse.Namespace, console: Ui, until: float) -> bool:
    """Make the rows that are lacking; whether time was left for all."""
    path = args.work / "rows.jsonl"
    done = {
        (row["model"], row["form"], row["label"])
        for row in whole_rows(path)
        if len(row["losses"]) >= args.most
    }
    settings = [DENSE, *wanted(args)]
    left = [one for one in settings if (args.name, args.form, label(one)) not in done]
    if not left or time.monotonic() >= until:
        return not left
    study, facts = prepare(args, console)
    write_json(args.work / f"{args.name}.json", facts)
    runner = Runner(study)
    with console.progress(f"{args.name}, {args.form}", len(left)) as advance:
        for setting in left:
            if time.monotonic() > until:
                return False
            found = runner.run(setting, args.most)
            row = {"model": args.name, "form": args.form, "label": label(setting)}
            append_row(path, {**row, "setting": asdict(setting), **found})
            kl = sum(found["kls"]) / len(found["kls"])
            ratio = math.exp(sum(found["losses"]) / len(found["losses"]) - study.loss(args.most))
            console.say(f"{found['bytes']:.3f} x {ratio:.4f} KL {kl:.5f}  {label(setting)}")
            advance(1)
    return True


# What the rows say together.


def facts_of(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A row beside the dense one of the same slices, with intervals over slices."""
    losses, base = (
        {str(n): (loss, SCORED) for n, loss in enumerate(one["losses"])} for one in (row, dense)
    )
    shared = {n: base[n] for n in losses}
    over = [loss - base[n][0] for n, (loss, _) in losses.items()]
    ratio = paired_interval(losses, shared, "ratio_of_exp_mean")
    divergence = interval(row["kls"])
    return {
        **row,
        "slices": len(over),
        "loss": sum(over) / len(over),
        "ratio": math.exp(sum(over) / len(over)),
        "interval": ratio and ratio.ends,
        "kl": sum(row["kls"]) / len(row["kls"]),
        "kl_interval": divergence and divergence.ends,
    }


def kind_of(row: dict[str, Any]) -> str:
    """``rounding``, ``graded`` or ``dropping``; attention in planes stands apart."""
    setting = row["setting"]
    if setting["attention"]:
        return "attention"
    return "rounding" if not setting["share"] else "dropping" if setting["drop"] else "graded"


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of (bytes, value): what mixes of layers can reach."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(found) >= 2:
            (x0, y0), (x1, y1) = found[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            found.pop()
        found.append((x, y))
    lowest = min(range(len(found)), key=lambda n: found[n][1], default=0)
    return found[: lowest + 1]  # more bytes need not be worse


def at(curve: list[tuple[float, float]], x: float) -> float | None:
    """The value of a hull at ``x`` bytes; None outside."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


BYTES = [round(0.24 + 0.01 * n, 2) for n in range(12)]
"""At which the curves are compared."""


def beside_roundings(rows: list[dict[str, Any]]) -> None:
    """Tell each row that is none what roundings cost at its bytes."""
    for row in rows:
        same = [r for r in rows if (r["model"], r["form"]) == (row["model"], row["form"])]
        known = [r for r in same if r["kind"] == "rounding"]
        for what in ("kl", "loss"):
            found = at(hull([(r["bytes"], r[what]) for r in known]), row["bytes"])
            row[f"{what}_of_rounding"] = None if row["kind"] == "rounding" else found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and form: is graded below rounding, and within 1.5 % at 0.32 bytes?"""
    found = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in rows):
        own = [row for row in rows if (row["model"], row["form"]) == (model, form)]
        curves = {
            (kind, what): hull([(row["bytes"], row[what]) for row in own if row["kind"] == kind])
            for kind in ("rounding", "graded")
            for what in ("loss", "kl")
        }
        near = [row for row in own if row["bytes"] <= 0.32 and row["ratio"] <= 1.015]
        found.append(
            {
                "model": model,
                "form": form,
                "within": [row["label"] for row in near if row["kind"] == "graded"],
                "roundings_within": [row["label"] for row in near if row["kind"] == "rounding"],
                "at": [
                    {"bytes": x, **{" ".join(key): at(curve, x) for key, curve in curves.items()}}
                    for x in BYTES
                ],
            }
        )
    return found


def finish(args: argparse.Namespace) -> None:
    """The results file of all finished rows, and the plot."""
    latest = {(r["model"], r["form"], r["label"]): r for r in whole_rows(args.work / "rows.jsonl")}
    rows = []
    for (model, form, _), row in latest.items():
        dense = latest.get((model, form, label(DENSE)))
        if dense and row is not dense and len(dense["losses"]) >= len(row["losses"]):
            rows.append({**facts_of(row, dense), "kind": kind_of(row)})
    rows.sort(key=lambda row: (row["model"], row["form"], row["bytes"]))
    beside_roundings(rows)
    known = {
        row["model"]: json.loads((args.work / f"{row['model']}.json").read_text(encoding="utf-8"))
        for row in rows
    }
    data = {
        "checkpoints": {name: facts["checkpoint"] for name, facts in known.items()},
        "grids": {name: facts["grid"] for name, facts in known.items()},
        "text": next(iter(known.values()))["text"],
        "prompt": LENGTH - SCORED,
        "scored": SCORED,
        "summary": summary(rows),
        "rows": rows,
    }
    print(save(args.out or "graded-planes", None, data))
    if args.plot is not None:
        write_bytes(args.plot, render(picture(rows), "svg"))


def picture(rows: list[dict[str, Any]]) -> Plot:
    """Log loss over dense against bytes, a panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))

    def draw(figure: Any, palette: Any, narrow: bool) -> None:
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            for place, kind in enumerate(("rounding", "graded", "dropping")):
                points = [
                    (row["bytes"], row["loss"])
                    for row in rows
                    if row["model"] == model and row["form"] == "mixed" and row["kind"] == kind
                    if row["bytes"] < 0.5
                ]
                if not points:
                    continue
                colour = palette[COLOURS[place]]
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=14, color=colour, marker="os^"[place], label=kind)
                if kind != "dropping":
                    axes.plot(*zip(*hull(points), strict=True), color=colour, zorder=1)
            axes.set_title(model, fontsize=9, loc="right")
            axes.set_xlim(0.24, 0.36)
            axes.set_ylim(0, 0.15)
            axes.set_xlabel("FFN bytes over bfloat16")
        panels[0].set_ylabel("log loss over dense")
        legend(panels[0], 3, panels[1:])

    return Plot(
        "graded_planes",
        "Graded planes and roundings: log loss over bytes that a token reads",
        "Log loss over the dense model's against FFN bytes, for roundings and graded planes",
        "Weights off the grid of the files that they were dequantised from; lines are lower hulls.",
        3.4,
        draw,
    )


def options_of(doc: str) -> argparse.ArgumentParser:
    """Which model, which settings, and where rows are kept."""
    options = parser(doc)
    options.add_argument("--name", default="SmolLM2-135M", help="of the model, in the table")
    options.add_argument("--grid", default="Q4_1", help="types the checkpoint was dequantised from")
    options.add_argument("--form", default="own", choices=("own", "mixed"))
    options.add_argument("--sets", default="core", help=", ".join(SETS))
    options.add_argument("--only", default="", help="labels that hold one of these, by semicolons")
    options.add_argument("--ggml", type=Path, help="libggml-base.so")
    options.add_argument("--gguf", type=Path, action="append", default=[], help="a file's FFN")
    options.add_argument("--work", type=Path, required=True, help="folder of finished rows")
    return options


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("text", help="a text file")
    options.add_argument("--slices", type=int, default=8, help="of the text")
    options.add_argument("--most", type=int, default=8, help="of these that are scored")
    options.add_argument("--seconds", type=float, default=math.inf, help="75 is returned then")
    options.add_argument("--plot", type=Path, help="an SVG file to draw")
    args = options.parse_args()
    in_time = run(args, Ui(), time.monotonic() + args.seconds)
    finish(args)
    if not in_time:
        raise SystemExit(75)


if __name__ == "__main__":
    main()
