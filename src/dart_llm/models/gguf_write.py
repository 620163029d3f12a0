"""GGUF files with narrower FFNs, written from another file: all other tensors keep their bytes.

llama.cpp loads them as they are.  Rows of gate and up are whole rows of blocks and are copied.  The
columns of down lie within blocks; the order of neurons is free, so that most of them stay in theirs
(``moved_columns``).
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
from dart_llm.models.gguf_facts import ARCHITECTURES
from dart_llm.models.gguf_file import PLAIN, GgufFile, StoredTensor

BLOCK = 32


@dataclass(frozen=True)
class Levels:
    """How a type stores 32 values ``scale * (level - zero) + least``; least is 0 where not stored.

    ``bits`` of a level; of 5, the fifth ones lie before the others.
    """

    bits: int
    zero: int
    has_least: bool

    @property
    def head(self) -> int:
        """Bytes before the levels."""
        return 4 if self.has_least else 2

    def read(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and least [..., 1] and levels [..., 32], float32, of blocks [..., bytes]."""
        ends = data[..., : self.head].contiguous().view(torch.float16).float()
        scale, least = ends[..., :1], ends[..., 1:] if self.has_least else 0 * ends[..., :1]
        body = data[..., self.head :]
        if self.bits == 8:
            return scale, least, body.contiguous().view(torch.int8).float()
        low = body[..., -BLOCK // 2 :]
        levels = torch.cat([low & 15, low >> 4], -1)
        if self.bits == 5:
            places = torch.arange(8, dtype=torch.uint8)
            fifth = (body[..., :4, None] >> places) & 1
            levels = levels | (fifth.flatten(-2) << 4)
        return scale, least, levels.float()

    def written(self, data: Tensor, levels: Tensor) -> Tensor:
        """Blocks with the ends of ``data`` and other levels."""
        head = data[..., : self.head]
        if self.bits == 8:
            return torch.cat([head, levels.to(torch.int8).view(torch.uint8)], -1)
        whole = levels.to(torch.uint8)
        low = (whole[..., : BLOCK // 2] & 15) | ((whole[..., BLOCK // 2 :] & 15) << 4)
        if self.bits == 4:
            return torch.cat([head, low], -1)
        places = torch.arange(8, dtype=torch.uint8)
        fifth = ((whole >> 4).reshape(*whole.shape[:-1], 4, 8) << places).sum(-1, dtype=torch.uint8)
        return torch.cat([head, fifth, low], -1)

    @property
    def most(self) -> tuple[int, int]:
        """The least and the largest level."""
        return (-128, 127) if self.bits == 8 else (0, 2**self.bits - 1)


LEVELS = {
    "q8_0": Levels(8, 0, False),
    "q4_0": Levels(4, 8, False),
    "q4_1": Levels(4, 0, True),
    "q5_0": Levels(5, 16, False),
    "q5_1": Levels(5, 0, True),
}

UNEQUAL = {"llama": "deci"}
"""The architecture that computes the same with a different width in every layer."""

BIASED = ("llama", "gpt2")
"""Architectures of which llama.cpp reads a bias of the down projection."""

WRITTEN = (*PLAIN, *LEVELS)
"""Types in which down projections stay."""

INSTEAD = "q8_0"
"""The type of the others, to which nothing here rounds."""

FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(.*)")
"""Tensors of neurons: layer, projection, the rest of the name."""

DOWN, BIAS = "blk.{}.ffn_down.weight", "blk.{}.ffn_down.bias"

ABOUT = "dart_llm.export"
"""Metadata that states what was removed; llama.cpp ignores it."""


@dataclass(frozen=True)
class NarrowLayer:
    """One layer's FFN after pruning.

    ``ids``: [k] int64 on the host, the kept neurons; ``width``: how many are written, those beyond
    k without effect; ``bias``: [D] float32 for the output, or None.
    """

    ids: Tensor
    width: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: ``shape`` in torch's order, and what makes its bytes [..., n]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def layer_widths(file: GgufFile) -> list[int]:
    """Neurons of every layer; raises ``ConfigError`` for a file whose FFNs cannot be exported."""
    name = file.path.name
    if file.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{name} is of architecture {file.architecture}, which is not exported; "
            f"{', '.join(sorted(ARCHITECTURES))} are"
        )
    for tensor in file.tensors:
        if (part := FFN.fullmatch(tensor)) and part[3] not in (".weight", ".bias"):
            raise ConfigError(
                f"{name} has {tensor}: only plain feed-forward layers are exported, not a mixture "
                "of experts"
            )
    layers = int(file.number("block_count") or 0)
    downs = [file.tensors.get(DOWN.format(layer)) for layer in range(layers)]
    widths = [down.shape[1] for down in downs if down is not None]
    if not widths or len(widths) < layers:
        raise ConfigError(f"{name} is missing the down projection of a layer: nothing is exported")
    return widths


def written_kind(kind: str) -> str:
    """The type in which a down projection of ``kind`` is written."""
    return kind if kind in WRITTEN else INSTEAD


def rounded_columns(kind: str, layer: NarrowLayer) -> int:
    """How many columns of a down projection of ``kind`` are rounded as they are written."""
    if kind not in LEVELS:
        return 0 if kind in PLAIN else len(layer.ids)
    slots, stay = _slots(layer)
    away = slots.reshape(-1, BLOCK) // BLOCK != stay[:, None]
    return int((away.flatten() & (slots >= 0)).sum())


def block_of(file: GgufFile) -> int:
    """Of what every layer's width must be a multiple, so that rows of down are whole blocks."""
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
            f"{name} is of architecture {architecture}, where llama.cpp reads no bias that could "
            "carry the compensation; use compensation=False (--no-compensation) to export"
        )
    widths = _widths(file, layers)
    if len(set(widths)) == 1:
        return architecture
    if architecture not in UNEQUAL:
        raise ConfigError(
            f"the layers keep {min(widths)} to {max(widths)} neurons, and llama.cpp knows no "
            f'architecture like {architecture} with a width for every layer; use budget "uniform"'
        )
    return UNEQUAL[architecture]


def write_narrow(
    file: GgufFile, layers: Sequence[NarrowLayer | None], path: Path, about: str
) -> None:
    """Write ``file`` with narrower FFNs to ``path``, whole or not at all.

    ``layers``: one each, None: unchanged.  ``about``: the metadata under ``ABOUT``.  Raises
    what ``written_architecture`` raises, and ``ResultsError`` where ``path`` cannot be written.
    """
    architecture = written_architecture(file, layers)
    entries = list(_entries(file, layers))
    with replacing(path) as partial:
        if path.exists() and path.samefile(file.path):
            raise ConfigError(f"{path} is the file that is read: give another name")
        _write(file, architecture, _widths(file, layers), entries, partial, about)


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
    """The order in which neurons are written, -1: one without effect; and the blocks that stay."""
    if layer.width % BLOCK == 0:
        return homes(layer.ids, layer.width)
    spare = torch.full((layer.width - len(layer.ids),), -1)
    return torch.cat([layer.ids, spare]), torch.empty(0)


def _rows(tensor: StoredTensor, layer: NarrowLayer, width: int) -> _Entry:
    """Of gate and up, the kept rows as they are stored; fused, those of both halves."""
    slots, _ = _slots(layer)
    if tensor.shape[0] == 2 * width:
        slots = torch.cat([slots, torch.where(slots < 0, -1, slots + width)])

    def make() -> Tensor:
        data = tensor.bytes().reshape(tensor.shape[0], -1)[slots.clamp_min(0)]
        data[slots < 0] = 0  # which are zeros in every type
        return data if len(tensor.shape) > 1 else data.flatten()

    return _Entry(tensor.name, tensor.kind, (len(slots), *tensor.shape[1:]), make)


def _columns(tensor: StoredTensor, layer: NarrowLayer) -> _Entry:
    """Of down, the kept columns."""
    kind, (slots, stay) = written_kind(tensor.kind), _slots(layer)

    def make() -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        values = tensor.values().float()
        if tensor.kind in LEVELS:
            data = tensor.bytes().reshape(len(values), tensor.shape[1] // BLOCK, -1)
            return moved_columns(data, values, kind, slots, stay)
        kept = values[:, slots.clamp_min(0)] * (slots >= 0)
        blocks = quantize(kept.contiguous().numpy(), GGMLQuantizationType[kind.upper()])
        return torch.from_numpy(blocks).view(torch.uint8)

    return _Entry(tensor.name, kind, (tensor.shape[0], layer.width), make)


def _write(
    file: GgufFile,
    architecture: str,
    widths: Sequence[int],
    entries: Sequence[_Entry],
    path: Path,
    about: str,
) -> None:
    """The file itself, one tensor in memory after the other."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    _copy_metadata(file, writer, architecture)
    writer.add_string(ABOUT, about)
    equal = len(set(widths)) == 1
    writer.add_feed_forward_length(widths[0] if equal else list(widths))
    for entry in entries:
        kind = GGMLQuantizationType[entry.kind.upper()]
        weights, size = GGML_QUANT_SIZES[kind]
        shape = (*entry.shape[:-1], entry.shape[-1] // weights * size)
        count = torch.Size(shape).numel()
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make().numpy())
    writer.close()


def _copy_metadata(file: GgufFile, writer: Any, architecture: str) -> None:
    """All but the widths, under the names of ``architecture``."""
    from gguf import GGUFReader, GGUFValueType

    prefix = f"{file.architecture}."
    left = {"general.architecture", "general.alignment", f"{prefix}feed_forward_length", ABOUT}
    for name, field in GGUFReader(file.path).fields.items():
        value = field.contents()
        if name in left or name.startswith("GGUF.") or value == []:  # which it does not write
            continue
        if name.startswith(prefix):
            name = f"{architecture}.{name.removeprefix(prefix)}"
        kind, *_, inner = (*field.types, field.types[-1])
        sub = inner if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub)


# Columns of a matrix in blocks, moved without rounding most of them.
#
# A block stores 32 neighbouring columns of a row as levels between two ends.  Fewer columns make
# fewer blocks: those that keep most of their columns stay, levels and ends, and take in the columns
# of the others; only these are rounded, to the ends of their new block.


def homes(ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where columns ``ids`` go in ``width`` of them: slots [width], -1: empty; and the blocks
    [width / 32] that stay.  Columns of these keep their places in them.
    """
    occupied = torch.bincount(ids // BLOCK, minlength=width // BLOCK)
    stay = occupied.argsort(descending=True, stable=True)[: width // BLOCK].sort().values
    slots = torch.full((len(stay), BLOCK), -1)
    at_home = torch.isin(ids // BLOCK, stay)
    block = torch.searchsorted(stay, ids[at_home] // BLOCK)
    slots[block, ids[at_home] % BLOCK] = ids[at_home]
    slots = slots.flatten()
    guests = ids[~at_home]
    slots[(slots < 0).nonzero().flatten()[: len(guests)]] = guests
    return slots, stay


def moved_columns(data: Tensor, values: Tensor, kind: str, slots: Tensor, stay: Tensor) -> Tensor:
    """Blocks [D, bytes] of the columns ``slots``; data [D, I / 32, bytes], values [D, I] float32.

    A block of which rounding all anew comes nearer is rounded so.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    how, rows = LEVELS[kind], len(values)
    there = slots.reshape(-1, BLOCK) >= 0
    wanted = values[:, slots.clamp_min(0)].reshape(rows, -1, BLOCK) * there
    host = data[:, stay]
    scale, least, levels = how.read(host)
    home = (slots.reshape(-1, BLOCK) // BLOCK == stay[:, None]) | ~there
    near = ((wanted - least) / torch.where(scale == 0, 1, scale)).round() + how.zero
    kept = how.written(host, torch.where(home, levels, near.clamp(*how.most)))
    anew = quantize(wanted.flatten(1).contiguous().numpy(), GGMLQuantizationType[kind.upper()])
    fresh = torch.from_numpy(anew).reshape(kept.shape)
    apart = [((_values(how, blocks) - wanted) * there).square().sum(-1) for blocks in (kept, fresh)]
    return torch.where((apart[0] <= apart[1])[..., None], kept, fresh).flatten(1)


def _values(how: Levels, data: Tensor) -> Tensor:
    scale, least, levels = how.read(data)
    return scale * (levels - how.zero) + least
