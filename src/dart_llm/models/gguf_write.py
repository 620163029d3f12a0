"""GGUF files with narrower FFNs, written from another file: all other tensors keep their bytes.

llama.cpp loads them without changes.  Rows of gate and up consist of whole blocks and are copied.
In down, a block spans several columns.  Since the order of neurons is free, the blocks that keep
most of their columns stay in place, and the remaining columns of other blocks fill their gaps; only
these are rounded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.files import replacing
from dart_llm.models.gguf_file import ARCHITECTURES, PLAIN, GgufFile, StoredTensor

UNEQUAL = {"llama": "deci"}
"""The equivalent architecture with a different width in every layer."""

BIASED = ("llama", "gpt2")
"""Architectures for which llama.cpp reads a bias of the down projection."""

BLOCK = 32

LEVELS = {
    "q8_0": (8, False),
    "q4_0": (4, False),
    "q4_1": (4, True),
    "q5_0": (5, False),
    "q5_1": (5, True),
}
"""Types in blocks of 32 values ``scale * level + least``: bits of a level, and whether ``least`` is
stored; if not, the middle level means 0."""

WRITTEN = (*PLAIN, *LEVELS)
"""Types that a down projection keeps when it is written; gguf cannot round to other types."""

FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(.*)")
"""Names of FFN tensors: layer, projection, the rest of the name."""

DOWN, BIAS = "blk.{}.ffn_down.weight", "blk.{}.ffn_down.bias"

ABOUT = "dart_llm.export"
"""Metadata that states what was removed; llama.cpp ignores it."""


@dataclass(frozen=True)
class NarrowLayer:
    """One layer's FFN after pruning.

    ``ids``: [k] int64 on the host, the kept neurons; ``width``: how many neurons are written, zeros
    beyond k; ``bias``: [D] float32 for the output, or None.
    """

    ids: Tensor
    width: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: ``shape`` in torch's order; ``make`` returns its bytes [..., n]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def layer_widths(file: GgufFile) -> list[int]:
    """Number of neurons per layer; raises ``ConfigError`` if the file's FFNs cannot be exported."""
    name = file.path.name
    if file.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{name} has architecture {file.architecture}, which cannot be exported; "
            f"{', '.join(sorted(ARCHITECTURES))} can"
        )
    for tensor in file.tensors:
        if (part := FFN.fullmatch(tensor)) and part[3] not in (".weight", ".bias"):
            raise ConfigError(
                f"{name} has {tensor}: only plain FFNs can be exported, not a mixture of experts"
            )
    layers = int(file.number("block_count") or 0)
    downs = [file.tensors.get(DOWN.format(layer)) for layer in range(layers)]
    widths = [down.shape[1] for down in downs if down is not None]
    if not widths or len(widths) < layers:
        raise ConfigError(f"{name} has a layer without a down projection and cannot be exported")
    return widths


def written_kind(kind: str) -> str:
    """The type in which a down projection of ``kind`` is written."""
    return kind if kind in WRITTEN else "q8_0"


def rounded_columns(kind: str, layer: NarrowLayer) -> int:
    """How many columns of a down projection of ``kind`` move to another block."""
    if kind not in LEVELS:
        return 0 if kind in PLAIN else len(layer.ids)
    slots, stay = _slots(layer)
    return int((~_at_home(slots, stay) & (slots >= 0)).sum())


def block_of(file: GgufFile) -> int:
    """The divisor of every layer's width, so that rows of down consist of whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    downs = [file.tensors[DOWN.format(layer)] for layer in range(len(layer_widths(file)))]
    kinds = {GGMLQuantizationType[written_kind(down.kind).upper()] for down in downs}
    return max(int(GGML_QUANT_SIZES[kind][0]) for kind in kinds)


def written_architecture(file: GgufFile, layers: Sequence[NarrowLayer | None]) -> str:
    """The architecture for these layers; raises ``ConfigError`` where llama.cpp has none."""
    name, architecture = file.path.name, file.architecture
    biased = any(layer is not None and layer.bias is not None for layer in layers)
    if biased and architecture not in BIASED:
        raise ConfigError(
            f"{name} has architecture {architecture}, for which llama.cpp reads no bias that could "
            "store the compensation; use compensation=False (--no-compensation) to export"
        )
    widths = _widths(file, layers)
    if len(set(widths)) == 1:
        return architecture
    if architecture not in UNEQUAL:
        raise ConfigError(
            f"the layers keep {min(widths)} to {max(widths)} neurons, and llama.cpp has no "
            f"equivalent of {architecture} with a different width in every layer; use budget "
            '"uniform"'
        )
    return UNEQUAL[architecture]


def write_narrow(
    file: GgufFile, layers: Sequence[NarrowLayer | None], path: Path, about: str
) -> None:
    """Write ``file`` with narrower FFNs to ``path``, completely or not at all.

    ``layers``: one entry per layer, None: unchanged.  ``about``: the metadata under ``ABOUT``.
    Raises what ``written_architecture`` raises, and ``ResultsError`` if ``path`` cannot be written.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    architecture, widths = written_architecture(file, layers), _widths(file, layers)
    entries = list(_entries(file, layers))
    with replacing(path) as scratch:
        if path.exists() and path.samefile(file.path):
            raise ConfigError(f"{path} is the source file: give another name")
        writer = GGUFWriter(scratch, architecture)
        _copy_metadata(file, writer, architecture)
        writer.add_string(ABOUT, about)
        writer.add_feed_forward_length(widths[0] if len(set(widths)) == 1 else widths)
        for entry in entries:
            kind = GGMLQuantizationType[entry.kind.upper()]
            weights, size = GGML_QUANT_SIZES[kind]
            shape = (*entry.shape[:-1], entry.shape[-1] // weights * size)
            count = torch.Size(shape).numel()
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), count, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:  # one tensor in memory at a time
            writer.write_tensor_data(entry.make().numpy())
        writer.close()


def _widths(file: GgufFile, layers: Sequence[NarrowLayer | None]) -> list[int]:
    pairs = zip(layer_widths(file), layers, strict=True)
    return [width if layer is None else layer.width for width, layer in pairs]


def _entries(file: GgufFile, layers: Sequence[NarrowLayer | None]) -> Iterator[_Entry]:
    for name, tensor in file.tensors.items():
        part = FFN.fullmatch(name)
        layer = layers[int(part[1])] if part else None
        if part is None or layer is None:
            yield _Entry(name, tensor.kind, tensor.shape, partial(_bytes, tensor))
        elif part[2] != "down":
            yield _rows(tensor, layer, file.tensors[DOWN.format(part[1])].shape[1])
        elif part[3] == ".weight":
            yield _columns(tensor, layer)
            bias = BIAS.format(part[1])
            if layer.bias is not None and bias not in file.tensors:
                yield _vector(bias, layer.bias)
        else:
            values = tensor.values().float()
            yield _vector(name, values if layer.bias is None else values + layer.bias.cpu())


def _bytes(tensor: StoredTensor) -> Tensor:
    return tensor.bytes().reshape(*tensor.shape[:-1], -1)


def _vector(name: str, values: Tensor) -> _Entry:
    data = values.float().cpu().contiguous()
    return _Entry(name, "f32", tuple(data.shape), lambda: data.view(torch.uint8))


def _slots(layer: NarrowLayer) -> tuple[Tensor, Tensor]:
    """The neurons in the order of writing [width], -1 for padding; and the numbers of the blocks
    that stay [width / 32], those that keep most columns (empty if 32 does not divide the width).
    """
    ids, width = layer.ids, layer.width
    if width % BLOCK:
        return torch.cat([ids, torch.full((width - len(ids),), -1)]), torch.empty(0)
    occupied = torch.bincount(ids // BLOCK, minlength=width // BLOCK)
    stay = occupied.argsort(descending=True, stable=True)[: width // BLOCK].sort().values
    stays = torch.isin(ids // BLOCK, stay)
    slots = torch.full((width,), -1)
    slots[torch.searchsorted(stay, ids[stays] // BLOCK) * BLOCK + ids[stays] % BLOCK] = ids[stays]
    moved = ids[~stays]
    slots[(slots < 0).nonzero().flatten()[: len(moved)]] = moved
    return slots, stay


def _at_home(slots: Tensor, stay: Tensor) -> Tensor:
    """Which of ``slots`` keep a column in its original block [width]."""
    return slots // BLOCK == stay.repeat_interleave(BLOCK)


def _rows(tensor: StoredTensor, layer: NarrowLayer, width: int) -> _Entry:
    """The kept rows of gate and up, as stored; of both halves if fused."""
    slots, _ = _slots(layer)
    if tensor.shape[0] == 2 * width:
        slots = torch.cat([slots, torch.where(slots < 0, -1, slots + width)])

    def make() -> Tensor:
        data = tensor.bytes().reshape(tensor.shape[0], -1)[slots.clamp_min(0)]
        data[slots < 0] = 0  # zero bytes are zeros in every type
        return data if len(tensor.shape) > 1 else data.flatten()

    return _Entry(tensor.name, tensor.kind, (len(slots), *tensor.shape[1:]), make)


def _columns(tensor: StoredTensor, layer: NarrowLayer) -> _Entry:
    """The kept columns of down; a block gets a new scale where that is more exact."""
    kind, (slots, stay) = written_kind(tensor.kind), _slots(layer)

    def make() -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quantize

        written = GGMLQuantizationType[kind.upper()]
        columns = (tensor.values().float()[:, slots.clamp_min(0)] * (slots >= 0)).contiguous()
        rounded = quantize(columns.numpy(), written)
        blocks = torch.from_numpy(rounded).view(torch.uint8)
        if tensor.kind not in LEVELS:
            return blocks
        exact, restored, blocks = (
            each.reshape(len(columns), len(stay), -1)
            for each in (columns, torch.from_numpy(dequantize(rounded, written)), blocks)
        )
        stored = tensor.bytes().reshape(len(columns), tensor.shape[1] // BLOCK, -1)[:, stay]
        there = (slots >= 0).reshape(-1, BLOCK)
        same, values = _with_values(kind, stored, exact)
        errors = [((each - exact) * there).square().sum(-1) for each in (values, restored)]
        return torch.where((errors[0] <= errors[1])[..., None], same, blocks).flatten(1)

    return _Entry(tensor.name, kind, (tensor.shape[0], layer.width), make)


def _with_values(kind: str, blocks: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """``blocks`` [..., bytes] with the levels nearest to ``exact`` [..., 32], and their values.

    Scale and ``least`` stay, so that the block's original values remain exact.
    """
    bits, has_least = LEVELS[kind]
    head = blocks[..., : 4 if has_least else 2]
    ends = head.contiguous().view(torch.float16).float()
    scale = ends[..., :1]
    least = ends[..., 1:] if has_least else -scale * 2 ** (bits - 1)
    levels = ((exact - least) / torch.where(scale == 0, 1, scale)).round().clamp(0, 2**bits - 1)
    whole = levels.to(torch.uint8)
    if bits == 8:  # signed
        return torch.cat([head, whole ^ 128], -1), scale * levels + least
    first, second = (whole & 15).chunk(2, -1)
    fifths = (whole >> 4).reshape(*whole.shape[:-1], 4, 8)
    packed = (fifths << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    fifth = packed[..., : 4 * (bits - 4)]  # empty for four bits
    return torch.cat([head, fifth, first | second << 4], -1), scale * levels + least


def _copy_metadata(file: GgufFile, writer: Any, architecture: str) -> None:
    """All metadata but the widths, under the names of ``architecture``."""
    from gguf import GGUFReader, GGUFValueType

    prefix = f"{file.architecture}."
    left = {"general.architecture", "general.alignment", f"{prefix}feed_forward_length", ABOUT}
    for name, field in GGUFReader(file.path).fields.items():
        value = field.contents()
        if name in left or name.startswith("GGUF.") or value == []:  # gguf writes no empty list
            continue
        if name.startswith(prefix):
            name = f"{architecture}.{name.removeprefix(prefix)}"
        kind, *_, inner = (*field.types, field.types[-1])
        sub = inner if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub)
