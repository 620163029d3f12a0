"""The dense model with quantised weights: what 8 or 4 bits give instead of pruning.

A copy of the model whose weights went through GGUF's own codecs and back.  It runs in the model's
dtype, so its quality is that of the format (and the dtype's rounding) and its speed is not; bytes
are those that the format would take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError, UnsupportedModel
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import describe
from dart_llm.models.packed import PackedTensor

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


def quantise(model: Any, bits: int) -> Quantised:
    """A copy of ``model`` with weights of ``bits`` (8 or 4) bits; the model stays as it is.

    Linear layers, token embedding and head are rounded; norms, biases, position embeddings, and
    matrices whose rows are no multiple of the format's 32 weights stay.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("an offloaded model cannot be quantised: load it without a device map")
    rounded = copy.deepcopy(model)
    sizes: dict[int, int] = {}
    opened: dict[int, tuple[Any, nn.Parameter]] = {}  # weights in blocks, and what replaces them
    kept: list[str] = []
    for name, module, kind in _matrices(rounded, FORMATS[bits]):
        weight: Any = module.weight
        if id(weight) in opened:
            module.weight = opened[id(weight)][1]
        if id(module.weight) in sizes:
            continue
        turned = type(module).__name__ == "Conv1D"  # [in, out]: its rows are columns
        rows = weight.detach().t() if turned else weight.detach()
        if rows.shape[1] % _block(kind)[0]:
            kept.append(f"{name} ({rows.shape[0]} x {rows.shape[1]})")
            continue
        values = _through(rows, kind)
        if isinstance(weight, PackedTensor):
            module.weight = nn.Parameter(values, requires_grad=False)
            opened[id(weight)] = weight, module.weight
            weight = module.weight
        with torch.no_grad():
            weight.copy_(values.t() if turned else values)
        sizes[id(weight)] = rows.numel() // _block(kind)[0] * _block(kind)[1]
    facts = {**weight_facts(rounded, sizes), "weight_bits": bits, "weight_format": FORMATS[bits]}
    return Quantised(rounded, facts, _notes(model, bits, kept))


def weight_facts(model: Any, sizes: dict[int, int] | None = None) -> dict[str, Any]:
    """Bytes of the weights, exactly.  ``sizes``: {id of a parameter: its bytes}, else as stored.

    ``weight_bytes``: all weights; ``dtype_bytes``: the same in the model's dtype;
    ``weight_bits`` and ``mean_weight_bits``: per weight.  Of a model that can be pruned also
    ``bytes_per_token``: those that one decoded token reads, and ``ffn_bytes_share``: bytes of the
    FFN over those in the dtype.
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
    return {**facts, "bytes_per_token": total - looked_up, "ffn_bytes_share": share}


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _matrices(model: Any, kind: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Token embedding, head and every linear layer, with their formats."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            yield name, module, EMBEDDING
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module, kind


def _block(kind: str) -> tuple[int, int]:
    """Weights and bytes of one block of a format."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return size


def _through(rows: Tensor, kind: str) -> Tensor:
    """rows [n, m] quantised and dequantised, in their dtype and on their device."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    form = GGMLQuantizationType[kind]
    step = max(1, CHUNK // rows.shape[1])
    done = []
    for part in torch.split(rows, step):
        stored = quantize(part.float().cpu().contiguous().numpy(), form)
        done.append(torch.from_numpy(dequantize(stored, form)).to(rows))
    return torch.cat(done)


def _notes(model: Any, bits: int, kept: list[str]) -> tuple[str, ...]:
    kind = FORMATS[bits]
    other = "" if kind == EMBEDDING else f" (token embedding and head {EMBEDDING})"
    notes = [f"weights rounded through {kind}{other}; run dequantised, bytes are the format's"]
    if kept:
        notes.append(
            f"{len(kept)} matrices stay in the model's dtype, their rows being no multiple of "
            f"{_block(kind)[0]} weights: {', '.join(kept[:3])}{', ...' if kept[3:] else ''}"
        )
    before = checkpoint_facts(model)["file_quantisation"]
    if before not in (None, "none"):
        notes.append(
            f"the checkpoint's weights had been rounded before ({before}), so little more is lost"
        )
    return tuple(notes)
