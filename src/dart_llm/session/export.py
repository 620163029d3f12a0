"""Exports the neurons that a mask keeps, as a narrower checkpoint or GGUF file for llama.cpp."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.files import file_sha256
from dart_llm.models.checkpoint import blocks_file
from dart_llm.models.ffn import FfnBlock
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


def export(
    model: nn.Module, blocks: Sequence[FfnBlock], masks: Sequence[LayerMask | None], folder: Path
) -> Path:
    """Write ``model`` to ``folder`` with only the kept neurons, and return ``folder``.

    Compensation, the mean contribution of the removed neurons, is added to the output biases.

    Raises ``ConfigError`` if the layers keep different numbers of neurons, if the architecture
    fixes the width or has no bias where one is needed, or if the masks have low-rank compensation,
    which a plain checkpoint cannot express.
    """
    _check_plain(masks)
    pairs = list(zip(blocks, masks, strict=True))
    kept = {block.down_width if mask is None else mask.kept for block, mask in pairs}
    if len(kept) != 1:
        raise ConfigError(
            "export needs the same number of neurons in every layer, but this mask keeps "
            f'{min(kept)} to {max(kept)}; use budget "uniform" and a sparsity that gives every '
            "layer the same count, such as 0.25"
        )
    if blocks[0].width_key is None:
        raise ConfigError(f"{type(model).__name__} fixes its FFN width, so it cannot be narrowed")
    if any(block.offloaded for block in blocks):
        raise ConfigError("an offloaded model cannot be exported: load it without offloading")
    biased = [block for block, mask in pairs if mask is not None and mask.bias is not None]
    bias = any(getattr(block.down, "bias", None) is None for block in biased)
    narrow = _narrow_model(model, blocks[0].width_key, kept.pop(), bias)
    state = model.state_dict()
    names = {id(module): name for name, module in model.named_modules()}
    for block, mask in pairs:
        if mask is not None:
            _slice(state, names, block, mask)
    missing, unexpected = narrow.load_state_dict(state, strict=False)
    if unexpected or any("mlp" not in name or "bias" not in name for name in missing):
        parameters = ", ".join(missing or unexpected)
        raise ConfigError(
            f"{type(model).__name__} cannot be exported: its state dict has missing or unexpected "
            f"parameters: {parameters}"
        )
    with torch.no_grad():
        for name in missing:  # biases of gate and up, which come with the output bias
            narrow.get_parameter(name).zero_()
    narrow.generation_config = model.generation_config
    narrow.save_pretrained(folder)
    return folder


def _check_plain(masks: Sequence[LayerMask | None]) -> None:
    if any(mask is not None and mask.low_rank is not None for mask in masks):
        raise ConfigError(
            "an exported model cannot have low-rank compensation: use compensation_rank=0 to export"
        )


def _narrow_model(model: Any, key: str, width: int, bias: bool) -> Any:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    setattr(text, key, width)
    if bias:
        if not hasattr(text, "mlp_bias"):
            raise ConfigError(
                f"{type(model).__name__} has no FFN biases to carry the compensation; "
                "use compensation=False to export"
            )
        text.mlp_bias = True
    # random weights are drawn here and replaced later; drawing must not change the random state
    with torch.random.fork_rng():
        return type(model)(config).to(next(model.parameters()).dtype)


def _slice(
    state: dict[str, Tensor], names: dict[int, str], block: FfnBlock, mask: LayerMask
) -> None:
    """Keep only the neurons of ``mask`` in the entries of ``state`` that belong to ``block``."""
    rows = torch.cat([mask.ids, mask.ids + mask.width]) if block.fused else mask.ids
    for module, dim, ids in ((block.up, 0, rows), (block.gate, 0, rows), (block.down, 1, mask.ids)):
        if module is None:
            continue
        weight, bias = (f"{names[id(module)]}.{part}" for part in ("weight", "bias"))
        transposed = type(module).__name__ == "Conv1D"
        state[weight] = state[weight].index_select(1 - dim if transposed else dim, ids)
        if dim == 0 and bias in state:
            state[bias] = state[bias].index_select(0, ids)
    if mask.bias is not None:
        down = names[id(block.down)]
        old = state.get(f"{down}.bias")
        total = mask.bias if old is None else old.float() + mask.bias
        state[f"{down}.bias"] = total.to(state[f"{down}.weight"])


@dataclass(frozen=True)
class GgufExport:
    """Describes a narrower GGUF file that was written.

    Numbers of neurons per layer: ``neurons`` in the model, ``requested`` by the method, ``written``
    to the file after rounding up to multiples of ``block``, the values per quantization block.
    ``kinds``: maps a type of down projections in the model's file to the type in the new file.
    ``rounded``: fraction of the down projections' columns that moved to another quantization block
    and were requantized.  ``compensated``: True if output biases contain the mean of removed
    neurons.
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
        """Fraction of the neurons that were removed from the file."""
        return 1 - sum(self.written) / sum(self.neurons)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the sparsity as data for JSON."""
        paths = {"path": str(self.path), "source": self.source.name}
        return {**asdict(self), **paths, "achieved_sparsity": self.achieved_sparsity}


def source_file(model: Any, source: str | Path | None = None) -> GgufFile:
    """Return the file to narrow: ``source``, or the file that ``model`` was loaded from.

    Raises ``ConfigError`` if ``source`` is None and ``model`` was not loaded from the quantized
    weights of a GGUF file.
    """
    path = blocks_file(model) if source is None else Path(source).expanduser()
    if path is None:
        raise ConfigError(
            f"{type(model).__name__} was not loaded from a GGUF file's quantized weights, and only "
            "GGUF files can be narrowed: load the model with weights='file', or give "
            "source=FILE.gguf, which llama.cpp's convert_hf_to_gguf.py makes from a checkpoint"
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

    ``requested``: how many neurons of each layer the method keeps, before rounding; None: as many
    as ``masks``.  ``label``: the method's label, for the file.  Raises like ``export_gguf``.
    """
    _check_plain(masks)
    neurons, block, path = layer_widths(file), block_of(file), Path(path)
    widths = [width if mask is None else mask.width for mask, width in zip(masks, neurons)]  # noqa: B905
    if len(masks) != len(neurons) or widths != list(neurons):
        raise ConfigError(
            f"{file.path.name} has {len(neurons)} layers of {neurons[0]} neurons, but these masks "
            "belong to a different model: give the GGUF file of the model that they were made for"
        )
    layers = [None if mask is None else _narrow(mask, block) for mask in masks]
    pairs = list(zip(neurons, layers, strict=True))
    written = tuple(width if layer is None else layer.width for width, layer in pairs)
    kept = tuple(width if layer is None else len(layer.ids) for width, layer in pairs)
    if written == tuple(neurons):
        raise ConfigError(
            f"after rounding up to multiples of {block}, every layer keeps all its neurons: use a "
            "higher sparsity"
        )
    pruning = {"method": label, "kept": sum(kept), "of": sum(neurons)}
    write_narrow(file, layers, path, json.dumps({**pruning, "source": file_sha256(file.path)}))
    narrowed = [
        (file.tensors[DOWN.format(index)].kind, layer)
        for index, layer in enumerate(layers)
        if layer is not None
    ]
    rounded = sum(rounded_columns(kind, layer) for kind, layer in narrowed)
    return GgufExport(
        path=path,
        source=file.path,
        architecture=written_architecture(file, layers),
        method=label,
        neurons=tuple(neurons),
        requested=tuple(requested or kept),
        written=written,
        block=block,
        compensated=any(layer.bias is not None for _, layer in narrowed),
        kinds={kind.upper(): written_kind(kind).upper() for kind, _ in narrowed},
        rounded=rounded / max(1, sum(len(layer.ids) for _, layer in narrowed)),
        bytes_before=file.path.stat().st_size,
        bytes=path.stat().st_size,
    )


def _narrow(mask: LayerMask, block: int) -> NarrowLayer:
    """Return the neurons to write, and their number rounded up to a multiple of ``block``."""
    width = min(math.ceil(mask.kept / block) * block, mask.width)
    return NarrowLayer(mask.ids.cpu(), width, mask.bias)
