"""Writes a copy of a GGUF file with narrower FFNs; all other tensors keep their bytes.

An unmodified llama.cpp loads these files.  GGUF stores quantised weights in *blocks*: groups of
weights of one row that share a scale.  In gate and up, a neuron is a row, which consists of whole
blocks and is copied.  In down, a neuron is a column, and a block spans several columns.  Neurons
can be stored in any order, so the blocks with the most kept columns stay.  The kept columns of all
other blocks are moved into the gaps of the blocks that stay, and only blocks with moved columns are
rounded again.  A down projection of a type that is not in ``WRITTEN`` is rounded as a whole.
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
"""Maps an architecture to an equivalent one in which layers can have different FFN widths."""

BIASED = ("llama", "gpt2")
"""Architectures in which llama.cpp reads a bias of the down projection."""

BLOCK = 32
"""Weights per block of the types in ``LEVELS``."""

LEVELS = {
    "q8_0": (8, False),
    "q4_0": (4, False),
    "q4_1": (4, True),
    "q5_0": (5, False),
    "q5_1": (5, True),
}
"""Maps types with blocks of 32 weights ``scale * level + least`` to the bits of a level and whether
a block stores ``least``.  If it does not, the middle level represents 0."""

WRITTEN = (*PLAIN, *LEVELS)
"""Types that a written down projection can have; gguf cannot round to other types."""

FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(.*)")
"""Matches names of FFN tensors; the groups are layer, projection, and the rest of the name."""

DOWN, BIAS = "blk.{}.ffn_down.weight", "blk.{}.ffn_down.bias"

ABOUT = "dart_llm.export"
"""Metadata key that states what was removed; llama.cpp ignores it."""


@dataclass(frozen=True)
class NarrowLayer:
    """One layer's FFN after pruning.

    ``ids``: the kept neurons, [k] int64 in host memory.  ``width``: number of neurons to write;
    if it is more than k, the others are zeros.  ``bias``: [D] float32, which is added to the FFN's
    output, or None.
    """

    ids: Tensor
    width: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor to write, with ``shape`` in torch's order; ``make()`` returns its bytes [..., n]."""

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
    """The type in which a down projection of type ``kind`` is written."""
    return kind if kind in WRITTEN else "q8_0"


def rounded_columns(kind: str, layer: NarrowLayer) -> int:
    """How many columns of the down projection are rounded again if its type is ``kind``."""
    if kind not in LEVELS:
        return 0 if kind in PLAIN else len(layer.ids)
    slots, stay = _slots(layer)
    moved = slots // BLOCK != stay.repeat_interleave(BLOCK)
    return int((moved & (slots >= 0)).sum())


def block_of(file: GgufFile) -> int:
    """The number that must divide each layer's width so that rows of down have whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    downs = [file.tensors[DOWN.format(layer)] for layer in range(len(layer_widths(file)))]
    kinds = {GGMLQuantizationType[written_kind(down.kind).upper()] for down in downs}
    return max(int(GGML_QUANT_SIZES[kind][0]) for kind in kinds)


def written_architecture(file: GgufFile, layers: Sequence[NarrowLayer | None]) -> str:
    """The architecture to write; raises ``ConfigError`` if llama.cpp has none for the layers."""
    name, architecture = file.path.name, file.architecture
    biased = any(layer is not None and layer.bias is not None for layer in layers)
    if biased and architecture not in BIASED:
        raise ConfigError(
            f"{name} has architecture {architecture}, and llama.cpp does not read the bias that "
            "would store the compensation; use compensation=False (--no-compensation) to export"
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

    ``layers``: one entry per layer; None leaves the layer unchanged.  ``about``: the metadata under
    ``ABOUT``.  Raises ``ConfigError`` as ``written_architecture`` does, or if ``path`` is ``file``.
    Raises ``ResultsError`` if ``path`` cannot be written.
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
    """Two tensors that say where a narrower down projection stores the kept neurons.

    The first, [width], has the neuron of each written column (*slot*), -1 for padding.  The second,
    [width / 32], has the numbers of the original blocks that stay; it is empty unless 32 divides
    ``width``.
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


def _rows(tensor: StoredTensor, layer: NarrowLayer, width: int) -> _Entry:
    """The kept rows of gate or up, as stored; of both halves if the matrix is fused."""
    slots, _ = _slots(layer)
    if tensor.shape[0] == 2 * width:
        slots = torch.cat([slots, torch.where(slots < 0, -1, slots + width)])

    def make() -> Tensor:
        data = tensor.bytes().reshape(tensor.shape[0], -1)[slots.clamp_min(0)]
        data[slots < 0] = 0  # in every type, zero bytes represent zeros
        return data if len(tensor.shape) > 1 else data.flatten()

    return _Entry(tensor.name, tensor.kind, (len(slots), *tensor.shape[1:]), make)


def _columns(tensor: StoredTensor, layer: NarrowLayer) -> _Entry:
    """The kept columns of down; a block gets a new scale if that gives a smaller error."""
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
            array.reshape(len(columns), len(stay), -1)
            for array in (columns, torch.from_numpy(dequantize(rounded, written)), blocks)
        )
        stored = tensor.bytes().reshape(len(columns), tensor.shape[1] // BLOCK, -1)[:, stay]
        used = (slots >= 0).reshape(-1, BLOCK)
        same_scale, values = _with_values(kind, stored, exact)
        errors = [((result - exact) * used).square().sum(-1) for result in (values, restored)]
        return torch.where((errors[0] <= errors[1])[..., None], same_scale, blocks).flatten(1)

    return _Entry(tensor.name, kind, (tensor.shape[0], layer.width), make)


def _with_values(kind: str, blocks: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """``blocks`` [..., bytes] with the levels nearest to ``exact`` [..., 32], and the new values.

    Scale and ``least`` do not change, so the values that a block had before remain exact.
    """
    bits, has_least = LEVELS[kind]
    head = blocks[..., : 4 if has_least else 2]
    parameters = head.contiguous().view(torch.float16).float()
    scale = parameters[..., :1]
    least = parameters[..., 1:] if has_least else -scale * 2 ** (bits - 1)
    levels = ((exact - least) / torch.where(scale == 0, 1, scale)).round().clamp(0, 2**bits - 1)
    codes = levels.to(torch.uint8)
    if bits == 8:  # signed
        return torch.cat([head, codes ^ 128], -1), scale * levels + least
    first, second = (codes & 15).chunk(2, -1)
    fifths = (codes >> 4).reshape(*codes.shape[:-1], 4, 8)
    packed = (fifths << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    fifth = packed[..., : 4 * (bits - 4)]  # empty for four bits
    return torch.cat([head, fifth, first | second << 4], -1), scale * levels + least


def _copy_metadata(file: GgufFile, writer: Any, architecture: str) -> None:
    """Copy all metadata except the FFN widths, with keys renamed for ``architecture``."""
    from gguf import GGUFReader, GGUFValueType

    prefix = f"{file.architecture}."
    skipped = {"general.architecture", "general.alignment", f"{prefix}feed_forward_length", ABOUT}
    for name, field in GGUFReader(file.path).fields.items():
        value = field.contents()
        if name in skipped or name.startswith("GGUF.") or value == []:  # gguf cannot write []
            continue
        if name.startswith(prefix):
            name = f"{architecture}.{name.removeprefix(prefix)}"
        kind, *_, inner = (*field.types, field.types[-1])
        sub = inner if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub)
