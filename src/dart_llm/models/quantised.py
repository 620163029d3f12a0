"""The dense model with quantised weights: what fewer bits give instead of pruning.

A copy of the model whose weights went through a codec and back: one of GGUF's own, or symmetric
groups of 32 with the best scale at any number of bits.  It runs in the model's
dtype, so its quality is that of the format (and the dtype's rounding) and its speed is not; bytes
are those that the format would take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import describe, token_traffic
from dart_llm.models.packed import PackedTensor
from dart_llm.pruning.accounting import BFLOAT16

FORMATS = {8: "Q8_0", 4: "Q4_1"}
"""Bits -> GGUF's format of the linear layers."""

EMBEDDING = "Q8_0"
"""Format of the token embedding and of the output head at any number of bits, as GGUF files do."""

CHUNK = 1 << 22
"""Weights that go through the codec at a time."""


@dataclass(frozen=True)
class Quantised:
    """A rounded copy, its bytes, and what a reader of its numbers must know."""

    model: Any
    facts: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Codec:
    """A format of weights: ``bytes`` of a block of ``block`` weights; ``through`` rounds rows.

    rows: [n, m], m a multiple of ``block``; they come back in their dtype and on their device.
    """

    name: str
    block: int
    bytes: int
    through: Callable[[Tensor], Tensor]

    def rounded(self, rows: Tensor) -> Tensor:
        """What ``through`` makes of a large matrix, in pieces."""
        pieces = torch.split(rows, max(1, CHUNK // rows.shape[1]))
        return torch.cat([self.through(piece) for piece in pieces])


def gguf_codec(kind: str) -> Codec:
    """GGUF's format ``kind``, as its own library rounds."""
    return Codec(kind, *_block(kind), partial(_through, kind=kind))


GROUP = 32
"""Weights of a group that shares a scale."""


def symmetric_codec(bits: int) -> Codec:
    """Levels -2^(bits - 1) to 2^(bits - 1) - 1 times a float16 scale per 32 weights, the best one.

    What rounding alone gives: the yardstick of whatever reads fewer bytes.
    """
    size = GROUP * bits // 8 + 2
    return Codec(f"symmetric {bits} bits", GROUP, size, partial(_best_symmetric, bits=bits))


def quantise(model: Any, bits: int) -> Quantised:
    """A copy of ``model`` with weights of ``bits`` (8 or 4) bits; the model stays as it is.

    Linear layers, token embedding and head are rounded; norms, biases, position embeddings, and
    matrices whose rows are no multiple of the format's 32 weights stay.
    """
    kind, ends = gguf_codec(FORMATS[bits]), gguf_codec(EMBEDDING)
    found = _rounded(model, kind, ends)
    facts = {**found.facts, "weight_bits": bits, "weight_format": FORMATS[bits]}
    other = "" if kind.name == ends.name else f" (token embedding and head {EMBEDDING})"
    note = "so little more is lost"
    return Quantised(found.model, facts, _notes(model, f"{kind.name}{other}", found.notes, note))


def round_weights_to(model: Any, bits: int, ffn: bool) -> Quantised:
    """A copy of ``model`` whose weights have ``bits`` bits by ``symmetric_codec``.

    ``ffn``: the projections of the FFNs alone, what methods leave out of; else all that
    ``quantise`` rounds, token embedding and head with at least 8 bits.
    """
    kind, ends = symmetric_codec(bits), symmetric_codec(max(8, bits))
    only = {id(part) for block in describe(model).blocks for part in block.projections}
    names = {name for name, one in model.named_modules() if id(one) in only} if ffn else None
    found = _rounded(model, kind, ends, names)
    facts = {**found.facts, "weight_bits": bits, "weight_format": kind.name}
    other = " (FFNs alone)" if ffn else " (token embedding and head 8 bits)" if bits < 8 else ""
    note = "on another grid"
    return Quantised(found.model, facts, _notes(model, f"{kind.name}{other}", found.notes, note))


def _rounded(
    model: Any, kind: Codec, ends: Codec, names: Collection[str] | None = None
) -> Quantised:
    """A rounded copy; ``names``: of the modules, None for all.  Its notes name what stays."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("an offloaded model cannot be quantised: load it without a device map")
    rounded = copy.deepcopy(model)
    sizes: dict[int, int] = {}
    opened: dict[int, tuple[Any, nn.Parameter]] = {}  # weights in blocks, and what replaces them
    kept: list[str] = []
    for name, module, codec in _matrices(rounded, kind, ends):
        if names is not None and name not in names:
            continue
        weight: Any = module.weight
        if id(weight) in opened:
            module.weight = opened[id(weight)][1]
        if id(module.weight) in sizes:
            continue
        turned = type(module).__name__ == "Conv1D"  # [in, out]: its rows are columns
        rows = weight.detach().t() if turned else weight.detach()
        if rows.shape[1] % codec.block:
            kept.append(f"{name} ({rows.shape[0]} x {rows.shape[1]})")
            continue
        values = codec.rounded(rows)
        if isinstance(weight, PackedTensor):
            module.weight = nn.Parameter(values, requires_grad=False)
            opened[id(weight)] = weight, module.weight
            weight = module.weight
        with torch.no_grad():
            weight.copy_(values.t() if turned else values)
        sizes[id(weight)] = rows.numel() // codec.block * codec.bytes
    return Quantised(rounded, weight_facts(rounded, sizes), tuple(kept))


def weight_facts(model: Any, sizes: dict[int, int] | None = None) -> dict[str, Any]:
    """Bytes of the weights, exactly.  ``sizes``: {id of a parameter: its bytes}, else as stored.

    ``weight_bytes``: all weights; ``dtype_bytes``: the same in the model's dtype;
    ``weight_bits`` and ``mean_weight_bits``: per weight.  Of a model that can be pruned also
    ``bytes_per_token``: those that one decoded token reads, ``ffn_bytes_share``: bytes of the FFN
    over those in the dtype, ``ffn_share_of_bfloat16``: over 2 bytes per weight, and
    ``token_traffic``: a ``TokenTraffic`` as plain data.
    """
    known = sizes or {}
    parameters = list(model.parameters())
    stored = {id(p): known.get(id(p), p.nbytes) for p in parameters}
    total, plain = sum(stored.values()), sum(map(_size, parameters))
    facts = {
        "weight_bytes": total,
        "dtype_bytes": plain,
        "weight_bits": 8 * model.dtype.itemsize,
        "mean_weight_bits": 8 * total / sum(p.numel() for p in parameters),
    }
    try:
        view = describe(model)
    except UnsupportedModel:
        return facts
    modules = [m for block in view.blocks for m in (block.up, block.gate, block.down) if m]
    ffn: list[Any] = [module.weight for module in modules]
    rows, head = view.input_embedding, view.output_embedding
    looked_up = stored.get(id(rows), 0) if rows is not None and rows is not head else 0
    share = sum(stored[id(w)] for w in ffn) / sum(map(_size, ffn))
    traffic = token_traffic(model, view.blocks, view.attention, known)
    read = {
        "bytes_per_token": total - looked_up,
        "token_traffic": traffic.to_dict(),
        "ffn_share_of_bfloat16": traffic.ffn / (BFLOAT16 * sum(w.numel() for w in ffn)),
    }
    return {**facts, **read, "ffn_bytes_share": share}


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _matrices(model: Any, kind: Codec, ends: Codec) -> Iterator[tuple[str, nn.Module, Codec]]:
    """Token embedding, head and every linear layer, with their formats."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if any(module is end for end in both):
            yield name, module, ends
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module, kind


def _block(kind: str) -> tuple[int, int]:
    """Weights and bytes of one block of a format."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return size


def through(rows: Tensor, kind: str) -> Tensor:
    """rows [n, m] quantised to GGUF's ``kind`` and dequantised, in their dtype, on their device."""
    return gguf_codec(kind).rounded(rows)


def _through(rows: Tensor, kind: str) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    form = GGMLQuantizationType[kind]
    stored = quantize(rows.float().cpu().contiguous().numpy(), form)
    return torch.from_numpy(dequantize(stored, form)).to(rows)


TRIES = 19
"""Scales that are tried for a group, around the one that its largest weight asks for."""


def _best_symmetric(rows: Tensor, bits: int) -> Tensor:
    """rows [n, m], each group of 32 on the grid of the scale with the least squared error."""
    groups = rows.float().reshape(-1, GROUP)
    low = -float(2 ** (bits - 1))
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best, least = groups, torch.full_like(largest, torch.inf)
    for number in range(TRIES):
        # the largest weight falls on the lowest level, or a little beside it
        level = low + 0.1 * (number - TRIES // 2)
        levels = (groups * _inverse(largest / level)).round_().clamp_(low, -low - 1)
        scale = (groups * levels).sum(1, True) * _inverse(levels.square().sum(1, True))
        values = levels * scale.half().float()
        error = (values - groups).square_().sum(1, True)
        better = error < least
        best, least = torch.where(better, values, best), torch.where(better, error, least)
    return best.reshape(rows.shape).to(rows)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0, torch.zeros_like(values), 1 / values)


def _notes(model: Any, form: str, kept: Sequence[str], again: str) -> tuple[str, ...]:
    """``again``: what it means that the weights had been rounded before."""
    notes = [f"weights rounded through {form}; run dequantised, bytes are the format's"]
    if kept:
        notes.append(
            f"{len(kept)} matrices stay in the model's dtype, their rows being no multiple of "
            f"{GROUP} weights: {', '.join(kept[:3])}{', ...' if kept[3:] else ''}"
        )
    before = checkpoint_facts(model)["file_quantisation"]
    if before not in (None, "none"):
        notes.append(f"the checkpoint's weights had been rounded before ({before}), {again}")
    return tuple(notes)
