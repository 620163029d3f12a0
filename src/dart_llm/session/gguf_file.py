"""Masks written into a narrower GGUF file, which llama.cpp loads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256
from dart_llm.models.checkpoint import blocks_file
from dart_llm.models.gguf_file import GgufFile, read_gguf
from dart_llm.models.gguf_write import (
    DOWN,
    NarrowLayer,
    block_of,
    layer_widths,
    rounded_columns,
    write_narrow,
    written_architecture,
    written_kind,
)
from dart_llm.pruning.config import USER_MASKS
from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.session.export import check_plain


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Per layer: ``neurons`` of the model, how many the method ``requested``, and how many are
    ``written``: a multiple of ``block``.  ``kinds``: types of the down projections, and those that
    they are written in; ``rounded``: fraction of their columns that lie in another block than
    before, and are rounded for that.
    Bytes are those of the files.
    """

    path: Path
    source: Path
    architecture: str
    method: str
    neurons: tuple[int, ...]
    requested: tuple[int, ...]
    written: tuple[int, ...]
    block: int
    compensated: bool
    kinds: Mapping[str, str]
    rounded: float
    bytes_before: int
    bytes: int

    @property
    def achieved_sparsity(self) -> float:
        """Fraction of the neurons that the file has no more."""
        return 1 - sum(self.written) / sum(self.neurons)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        names = {"path": str(self.path), "source": self.source.name}
        return {**asdict(self), **names, "achieved_sparsity": self.achieved_sparsity}


def source_file(model: Any, source: str | Path | None = None) -> GgufFile:
    """The file to narrow: ``source``, or what ``model`` was loaded from.

    Raises ``ConfigError`` where the model holds no file's blocks.
    """
    path = blocks_file(model) if source is None else Path(source).expanduser()
    if path is None:
        raise ConfigError(
            f"{type(model).__name__} was not loaded from the blocks of a GGUF file, and only such "
            "a file is narrowed: load one with weights='file' or give source=FILE.gguf, which "
            "llama.cpp's convert_hf_to_gguf.py makes of a checkpoint"
        )
    return read_gguf(path)


def write_masks(
    file: GgufFile,
    masks: Masks,
    path: str | Path,
    requested: Sequence[int] | None = None,
    label: str = USER_MASKS,
) -> GgufExport:
    """Narrow ``file`` to ``masks`` and write it to ``path``.

    ``requested``: counts per layer; ``label``: of the method.

    Raises ``ConfigError`` for masks that no such file can hold, as ``export_gguf``.
    """
    check_plain(masks)
    neurons, block, path = layer_widths(file), block_of(file), Path(path)
    widths = [None if mask is None else mask.width for mask in masks]
    if len(widths) != len(neurons) or any(
        width not in (None, whole) for width, whole in zip(widths, neurons, strict=True)
    ):
        raise ConfigError(
            f"{file.path.name} has {len(neurons)} layers of {neurons[0]} neurons, and these masks "
            "are of another model: give its file"
        )
    layers = [None if mask is None else _narrow(mask, block) for mask in masks]
    pairs = list(zip(neurons, layers, strict=True))
    written = tuple(width if layer is None else layer.width for width, layer in pairs)
    kept = tuple(width if layer is None else len(layer.ids) for width, layer in pairs)
    downs = [file.tensors[DOWN.format(index)].kind for index in range(len(layers))]
    narrow = [(kind, layer) for kind, layer in zip(downs, layers, strict=True) if layer is not None]
    if written == tuple(neurons):
        raise ConfigError(
            f"in whole blocks of {block} neurons no layer loses any: give a higher sparsity"
        )
    rounded = sum(rounded_columns(kind, layer) for kind, layer in narrow)
    facts = {"method": label, "kept": sum(kept), "of": sum(neurons)}
    write_narrow(file, layers, path, json.dumps({**facts, "source": file_sha256(file.path)}))
    return GgufExport(
        path=path,
        source=file.path,
        architecture=written_architecture(file, layers),
        method=label,
        neurons=tuple(neurons),
        requested=tuple(requested or kept),
        written=written,
        block=block,
        compensated=any(layer is not None and layer.bias is not None for layer in layers),
        kinds={kind.upper(): written_kind(kind).upper() for kind, _ in narrow},
        rounded=rounded / max(1, sum(len(layer.ids) for _, layer in narrow)),
        bytes_before=file.path.stat().st_size,
        bytes=path.stat().st_size,
    )


def _narrow(mask: LayerMask, block: int) -> NarrowLayer:
    width = min(math.ceil(mask.kept / block) * block, mask.width)
    return NarrowLayer(mask.ids.cpu(), width, mask.bias)
