"""GGUF files with narrower FFNs, written from another file: all other tensors keep their bytes.

llama.cpp loads them as they are.  Rows of gate and up are whole rows of blocks and are copied.  The
columns of down lie within blocks, and are rounded again.
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
"""The architecture that computes the same with a different width in every layer."""

BIASED = ("llama", "gpt2")
"""Architectures of which llama.cpp reads a bias of the down projection."""

WRITTEN = (*PLAIN, "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""Types in which down projections stay; gguf does not round to the others."""

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
    return kind if kind in WRITTEN else "q8_0"


def rounded_columns(kind: str, layer: NarrowLayer) -> int:
    """How many columns of a down projection of ``kind`` are rounded again as they are written."""
    return 0 if kind in PLAIN else len(layer.ids)


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
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    architecture, widths = written_architecture(file, layers), _widths(file, layers)
    entries = list(_entries(file, layers))
    with replacing(path) as scratch:
        if path.exists() and path.samefile(file.path):
            raise ConfigError(f"{path} is the file that is read: give another name")
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
        for entry in entries:  # one tensor in memory after the other
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


def _slots(layer: NarrowLayer) -> Tensor:
    """The neurons that are written [width], -1: one without effect."""
    return torch.cat([layer.ids, torch.full((layer.width - len(layer.ids),), -1)])


def _rows(tensor: StoredTensor, layer: NarrowLayer, width: int) -> _Entry:
    """Of gate and up, the kept rows as they are stored; fused, those of both halves."""
    slots = _slots(layer)
    if tensor.shape[0] == 2 * width:
        slots = torch.cat([slots, torch.where(slots < 0, -1, slots + width)])

    def make() -> Tensor:
        data = tensor.bytes().reshape(tensor.shape[0], -1)[slots.clamp_min(0)]
        data[slots < 0] = 0  # which are zeros in every type
        return data if len(tensor.shape) > 1 else data.flatten()

    return _Entry(tensor.name, tensor.kind, (len(slots), *tensor.shape[1:]), make)


def _columns(tensor: StoredTensor, layer: NarrowLayer) -> _Entry:
    """Of down, the kept columns, dequantised and rounded again."""
    kind, slots = written_kind(tensor.kind), _slots(layer)

    def make() -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        kept = tensor.values().float()[:, slots.clamp_min(0)] * (slots >= 0)
        blocks = quantize(kept.contiguous().numpy(), GGMLQuantizationType[kind.upper()])
        return torch.from_numpy(blocks).view(torch.uint8)

    return _Entry(tensor.name, kind, (tensor.shape[0], layer.width), make)


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
