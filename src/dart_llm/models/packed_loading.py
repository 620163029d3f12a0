"""Models whose weights are low-bit: a GGUF file's, dequantised or not, or rounded ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError, DartError, LoadError, UnsupportedModel
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import describe, weight_facts
from dart_llm.models.ffn import FfnBlock, is_by_inputs, matrix_of
from dart_llm.models.gguf_file import ARCHITECTURES, BLOCKS, Stored, StoredTensor, read_gguf
from dart_llm.models.packed import NOT_SAVED, PackedTensor, pack
from dart_llm.native.build import ops


def load_gguf(
    path: Path,
    config: Any,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    packed: bool,
    **arguments: Any,
) -> nn.Module:
    """The model of a GGUF file, its norms and biases in ``dtype``.

    ``names``: of the file's tensors -> of the model's parameters; ``packed``: matrices stay in the
    file's blocks, else they are dequantised; ``arguments``: for the model, or ``from_pretrained``.
    """
    file = read_gguf(path)
    stored, tensors = ARCHITECTURES[file.architecture], file.of(names)
    model = empty_model(config, **({"dtype": dtype, **arguments} if packed else {}))
    check_fit(path.name, model, tensors)
    order = _orders(model)

    def weight(target: str) -> Tensor:
        module = model.get_submodule(target.rpartition(".")[0])
        laid = order(module) if packed else None
        return _weight(tensors[target], stored, config, dtype, laid, by_inputs=is_by_inputs(module))

    if not packed:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            weights = dict(zip(tensors, pool.map(weight, tensors), strict=True))
        kind: Any = type(model)
        loaded: Any = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, **arguments
        )
        loaded.name_or_path = loaded.config.name_or_path = config.name_or_path
        return loaded  # type: ignore[no-any-return]
    for target in tensors:
        name, _, attribute = target.rpartition(".")
        parameter = nn.Parameter(weight(target), requires_grad=False)
        setattr(model.get_submodule(name), attribute, parameter)
    tie_embeddings(model, config)
    _refuse_saving(model)
    return model.eval()


def _refuse_saving(model: Any) -> None:
    """Where there are blocks: ``save_pretrained`` writes configurations before it finds them."""
    if any(isinstance(weight, PackedTensor) for weight in model.parameters()):
        model.save_pretrained = _not_saved


def _not_saved(*_: Any, **__: Any) -> None:
    raise DartError(NOT_SAVED)


def _weight(
    tensor: StoredTensor,
    stored: Stored,
    config: Any,
    dtype: torch.dtype,
    order: str | None,
    *,
    by_inputs: bool,
) -> Tensor:
    """``order``: of a matrix that stays in blocks, None: it is dequantised; ``by_inputs``:
    transformers stores the matrix [in, out], the file [out, in].
    """
    if order and tensor.kind in BLOCKS and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        blocks = tensor.bytes().reshape(rows, -1)
        if stored.pairs:
            blocks = _by_halves(blocks, tensor.name, config)
        matrix = ops().packed_from_blocks(blocks.contiguous(), tensor.kind, rows, columns, order)
        _check_finite(tensor, "scales", *matrix.parts())
        return PackedTensor(matrix, dtype, (order == "neurons") != by_inputs)
    values = tensor.values()
    _check_finite(tensor, "weights", values)
    if stored.pairs:
        values = _by_halves(values, tensor.name, config)
    if stored.plus_one and tensor.name.endswith("norm.weight"):
        values = values.float() - 1
    transposed = by_inputs and values.dim() == 2  # of a bias there is one order
    weight = (values.t() if transposed else values).to(dtype)
    # never the file's or numpy's memory, which cannot have huge pages
    return weight.clone(memory_format=torch.contiguous_format)


def _check_finite(tensor: StoredTensor, what: str, *values: Tensor) -> None:
    if not all(bool(tensor_values.isfinite().all()) for tensor_values in values):
        raise LoadError(
            f"{tensor.path.name} is damaged: {what} of {tensor.name} are not finite; fetch it again"
        )


def _by_halves(rows: Tensor, name: str, config: Any) -> Tensor:
    """Rows of q and k in transformers' order: the halves of each head, not its pairs."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _ffn_blocks(model: nn.Module) -> tuple[FfnBlock, ...]:
    try:
        return describe(model).blocks
    except UnsupportedModel:  # pruning it reports the reason
        return ()


def _orders(model: nn.Module) -> Callable[..., str]:
    """How the rows of a matrix lie that these modules share."""
    blocks = _ffn_blocks(model)
    orders = {id(block.down): "neurons" for block in blocks}
    # of two matrices in one, the second begins in the middle of a tile
    odd = [block for block in blocks if block.fused and block.down_width % 16]
    orders |= {id(block.up): "rows" for block in odd}
    return lambda *modules: next((orders[id(m)] for m in modules if id(m) in orders), "tiles")


def round_weights(model: nn.Module, kind: str) -> list[str]:
    """Round the matrices of ``model`` to blocks in place, one after the other; names of those kept.

    Matrices whose rows are not a multiple of 32 stay, and so do the others of the same FFN.
    """
    blocks, order = _ffn_blocks(model), _orders(model)
    mixed = [m for block in blocks if _is_odd(*block.projections) for m in block.projections]
    kept = []
    for names, modules in _matrices(model):
        if _is_odd(*modules) or any(module in mixed for module in modules):
            kept += names
            continue
        _put(pack(matrix_of(modules[0]), kind, order(*modules)), modules)
    _refuse_saving(model)
    return kept


def _put(matrix: Tensor, modules: Sequence[Any]) -> None:
    """Let ``modules`` share ``matrix`` [out, in] as their weight."""
    weight = matrix.t() if is_by_inputs(modules[0]) else matrix
    parameter = nn.Parameter(weight, requires_grad=False)
    for module in modules:
        module.weight = parameter


def _is_odd(*modules: nn.Module) -> bool:
    """Whether rows of one of them do not divide into blocks."""
    return any(matrix_of(module).shape[1] % 32 for module in modules)


def _matrices(model: nn.Module) -> list[tuple[list[str], list[nn.Module]]]:
    """The modules that share each matrix, and their names; without embeddings of positions."""
    matrices: dict[int, tuple[list[str], list[nn.Module]]] = {}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module is embedding or is_by_inputs(module):
            names, modules = matrices.setdefault(id(module.weight), ([], []))
            names.append(name)
            modules.append(module)
    return list(matrices.values())


def empty_model(config: Any, **arguments: Any) -> nn.Module:
    """The model without its weights; its buffers are there, and what it ties is tied."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, **arguments)
    tie_embeddings(model, config)
    return model


def tie_embeddings(model: Any, config: Any) -> None:
    """Make the output head the input embedding, where the configuration says so."""
    if config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def check_fit(file: str, model: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``LoadError`` where the tensors are not the model's, before any is read."""
    for target, tensor in tensors.items():
        expected = tuple(model.get_parameter(target).shape)
        if len(expected) == 2 and is_by_inputs(model.get_submodule(target.rpartition(".")[0])):
            expected = expected[::-1]
        if tensor.shape != expected:
            raise LoadError(
                f"{file}: tensor {tensor.name} is {list(tensor.shape)}, and the model's {target} "
                f"is {list(expected)}"
            )
        if not tensor.is_known:
            raise LoadError(
                f"{file}: tensor {tensor.name} is of type {tensor.kind.upper()}, which "
                "cannot be read; give a file of another quantisation"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in tensors]:
        raise LoadError(
            f"{file} is missing {len(missing)} of the model's weights, such as {missing[0]}"
        )


# What rounding costs instead of pruning: copies of a model, run in its dtype.

GROUP = 32
"""Weights of a group that shares a float16 scale."""

CHUNK = 1 << 22
"""Weights that are rounded at a time."""

TRIES = 19
"""Scales that are tried for a group, around the one that fits its largest weight."""


@dataclass(frozen=True)
class RoundedModel:
    """A rounded copy, bytes that its format would take, and notes on its numbers."""

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
    sizes: dict[int, int] = {}
    kept: list[str] = []
    for names, modules in _matrices(rounded):
        if ffn and modules[0] not in projections:
            continue
        if _is_odd(*modules):
            kept += names
            continue
        rows = matrix_of(modules[0]).detach()
        width = max(8, bits) if any(module in ends for module in modules) else bits
        _put(round_symmetric(rows, width), modules)
        sizes[id(modules[0].weight)] = rows.numel() // GROUP * (GROUP * width // 8 + 2)
    facts = {
        **weight_facts(rounded, sizes),
        "weight_bits": bits,
        "weight_format": f"symmetric {bits} bits",
    }
    part = " (FFNs alone)" if ffn else " (token embedding and head 8 bits)" if bits < 8 else ""
    notes = [
        f"weights rounded through symmetric {bits} bits{part}; run dequantised, bytes are the "
        "format's"
    ]
    if kept:
        notes.append(
            f"{len(kept)} matrices stay in the model's dtype, such as {kept[0]}: their "
            f"rows are not a multiple of {GROUP} weights"
        )
    before = checkpoint_facts(model)["file_quantisation"]
    if before not in (None, "none"):
        notes.append(f"the checkpoint's weights had been rounded before ({before}) on another grid")
    return RoundedModel(rounded, facts, tuple(notes))


def round_symmetric(rows: Tensor, bits: int) -> Tensor:
    """rows [n, m] on levels -2^(bits - 1) to 2^(bits - 1) - 1 times a float16 scale per 32 weights.

    m is a multiple of 32; of several scales the one with the least squared error is taken.  The
    result keeps dtype and device.
    """
    pieces = torch.split(rows, max(1, CHUNK // rows.shape[1]))
    return torch.cat([_with_best_scales(piece, bits) for piece in pieces])


def _with_best_scales(rows: Tensor, bits: int) -> Tensor:
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
