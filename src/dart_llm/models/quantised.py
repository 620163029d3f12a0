"""Copies of a model with weights rounded to fewer bits: what rounding costs instead of pruning.

Groups of 32 weights on a symmetric grid with the best scale, at any number of bits.  A copy runs
in the model's dtype, so its quality is that of the format and its speed is not; bytes are those
that the format would take.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import describe, weight_facts
from dart_llm.models.ffn import is_by_inputs, matrix_of

GROUP = 32
"""Weights of a group that shares a float16 scale."""

CHUNK = 1 << 22
"""Weights that are rounded at a time."""

TRIES = 19
"""Scales that are tried for a group, around the one that fits its largest weight."""


@dataclass(frozen=True)
class RoundedModel:
    """A rounded copy, its bytes, and what a reader of its numbers must know."""

    model: Any
    facts: dict[str, Any]
    notes: tuple[str, ...]


def round_weights_to(model: Any, bits: int, ffn: bool) -> RoundedModel:
    """A copy of ``model`` whose weights have ``bits`` bits by ``round_symmetric``.

    ``ffn``: only the projections of the FFNs, which are what methods prune; else every linear
    layer, and token embedding and head with at least 8 bits.  Matrices whose rows are not a
    multiple of 32 weights stay in the model's dtype.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("an offloaded model cannot be quantised: load it without a device map")
    rounded = copy.deepcopy(model)
    ends = (rounded.get_input_embeddings(), rounded.get_output_embeddings())
    projections = [part for block in describe(rounded).blocks for part in block.projections]
    replaced: dict[int, tuple[Tensor, nn.Parameter]] = {}  # keeps old weights: ids stay unique
    sizes: dict[int, int] = {}
    kept: list[str] = []
    for name, module in rounded.named_modules():
        is_end = any(module is end for end in ends)
        if not (is_end or isinstance(module, nn.Linear) or is_by_inputs(module)):
            continue
        if ffn and not any(module is part for part in projections):
            continue
        weight: Any = module.weight
        if id(weight) in replaced:
            module.weight = replaced[id(weight)][1]
            continue
        rows = matrix_of(module).detach()
        if rows.shape[1] % GROUP:
            kept.append(f"{name} ({rows.shape[0]} x {rows.shape[1]})")
            continue
        width = max(8, bits) if is_end else bits
        values = round_symmetric(rows, width)
        stored = (values.t() if is_by_inputs(module) else values).contiguous()
        module.weight = nn.Parameter(stored, requires_grad=weight.requires_grad)
        replaced[id(weight)] = weight, module.weight
        sizes[id(module.weight)] = rows.numel() // GROUP * (GROUP * width // 8 + 2)
    weight_format = f"symmetric {bits} bits"
    facts = {
        **weight_facts(rounded, sizes),
        "weight_bits": bits,
        "weight_format": weight_format,
    }
    part = " (FFNs alone)" if ffn else " (token embedding and head 8 bits)" if bits < 8 else ""
    return RoundedModel(rounded, facts, _notes(model, f"{weight_format}{part}", kept))


def round_symmetric(rows: Tensor, bits: int) -> Tensor:
    """rows [n, m] on levels -2^(bits - 1) to 2^(bits - 1) - 1 times a float16 scale per 32 weights.

    m is a multiple of 32.  The result keeps dtype and device.
    """
    pieces = torch.split(rows, max(1, CHUNK // rows.shape[1]))
    return torch.cat([_with_best_scales(piece, bits) for piece in pieces])


def _with_best_scales(rows: Tensor, bits: int) -> Tensor:
    """Each group of 32 on the grid of the scale with the least squared error."""
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


def _notes(model: Any, weight_format: str, kept: Sequence[str]) -> tuple[str, ...]:
    notes = [f"weights rounded through {weight_format}; run dequantised, bytes are the format's"]
    if kept:
        notes.append(
            f"{len(kept)} matrices stay in the model's dtype, because their rows are not a "
            f"multiple of {GROUP} weights: {', '.join(kept[:3])}{', ...' if kept[3:] else ''}"
        )
    before = checkpoint_facts(model)["file_quantisation"]
    if before not in (None, "none"):
        notes.append(f"the checkpoint's weights had been rounded before ({before}) on another grid")
    return tuple(notes)
