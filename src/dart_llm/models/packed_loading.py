"""Builds models from GGUF files, quantised or dequantised, and rounds the weights of models.

Quantised weights are stored in *blocks*: groups of weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import DartError, LoadError, UnsupportedModel
from dart_llm.models.describe import describe
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
    """The model of a GGUF file; weights that are not quantised have ``dtype``.

    ``names`` maps tensors in the file to parameters of the model.  ``packed``: True if matrices
    stay quantised; otherwise they are dequantised.  ``arguments``: further arguments for
    ``from_config`` if ``packed``, else for ``from_pretrained``.
    """
    file = read_gguf(path)
    stored, tensors = ARCHITECTURES[file.architecture], file.of(names)
    model = empty_model(config, **({"dtype": dtype, **arguments} if packed else {}))
    check_fit(path.name, model, tensors)
    order = _orders(model)

    def weight(target: str) -> Tensor:
        module = model.get_submodule(target.rpartition(".")[0])
        kept = order(module) if packed else None
        return _weight(tensors[target], stored, config, dtype, kept, by_inputs=is_by_inputs(module))

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
    """Make ``save_pretrained`` raise an error before it has written any file."""
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
    """One weight of a file, converted to transformers' conventions (see ``Stored``).

    ``order``: memory layout of a matrix that stays quantised; None to dequantise it.
    ``by_inputs``: True if transformers stores the matrix [in, out]; the file stores [out, in].
    """
    if order and tensor.kind in BLOCKS and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        blocks = tensor.bytes().reshape(rows, -1)
        if stored.pairs:
            blocks = _by_halves(blocks, tensor.name, config)
        matrix = ops().packed_from_blocks(blocks.contiguous(), tensor.kind, rows, columns, order)
        _check_finite(tensor, "scales", *matrix.parts())
        return PackedTensor(matrix, dtype, by_inputs)
    values = tensor.values()
    _check_finite(tensor, "weights", values)
    if stored.pairs:
        values = _by_halves(values, tensor.name, config)
    if stored.plus_one and tensor.name.endswith("norm.weight"):
        values = values.float() - 1
    transposed = by_inputs and values.dim() == 2  # biases are not transposed
    weight = (values.t() if transposed else values).to(dtype)
    # cloned, because mapped files and numpy's memory cannot be moved to huge pages
    return weight.clone(memory_format=torch.contiguous_format)


def _check_finite(tensor: StoredTensor, what: str, *values: Tensor) -> None:
    if not all(bool(tensor_values.isfinite().all()) for tensor_values in values):
        raise LoadError(
            f"{tensor.path.name} is damaged: {what} of {tensor.name} are not finite; download it "
            "again"
        )


def _by_halves(rows: Tensor, name: str, config: Any) -> Tensor:
    """``rows`` reordered for transformers: in q and k, rotary pairs are then half a head apart."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _ffn_blocks(model: nn.Module) -> tuple[FfnBlock, ...]:
    try:
        return describe(model).blocks
    except UnsupportedModel:  # an attempt to prune the model reports the reason
        return ()


def _orders(model: nn.Module) -> Callable[..., str]:
    """A function of the modules that share a matrix; it returns the matrix's memory layout."""
    blocks = _ffn_blocks(model)
    # the second half of a fused matrix would begin in the middle of a tile
    by_rows = {id(block.up) for block in blocks if block.fused and block.down_width % 16}
    return lambda *modules: "rows" if any(id(m) in by_rows for m in modules) else "tiles"


def round_weights(model: nn.Module, kind: str) -> list[str]:
    """Round the matrices of ``model`` to block type ``kind``, in place.

    Returns the names of matrices that are not rounded: matrices whose rows do not divide into
    blocks of 32, and all matrices of an FFN that contains such a matrix.
    """
    blocks, order = _ffn_blocks(model), _orders(model)
    excluded = [
        m for block in blocks if _has_partial_blocks(*block.projections) for m in block.projections
    ]
    unchanged = []
    for names, modules in _matrices(model):
        if _has_partial_blocks(*modules) or any(module in excluded for module in modules):
            unchanged += names
            continue
        _put(pack(matrix_of(modules[0]), kind, order(*modules)), modules)
    _refuse_saving(model)
    return unchanged


def _put(matrix: Tensor, modules: Sequence[Any]) -> None:
    """Make ``matrix`` [out, in] the shared weight of ``modules``."""
    weight = matrix.t() if is_by_inputs(modules[0]) else matrix
    parameter = nn.Parameter(weight, requires_grad=False)
    for module in modules:
        module.weight = parameter


def _has_partial_blocks(*modules: nn.Module) -> bool:
    """Whether the rows of at least one module's matrix do not divide into blocks of 32."""
    return any(matrix_of(module).shape[1] % 32 for module in modules)


def _matrices(model: nn.Module) -> list[tuple[list[str], list[nn.Module]]]:
    """For each matrix but position embeddings: names of modules that share it, and the modules."""
    matrices: dict[int, tuple[list[str], list[nn.Module]]] = {}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module is embedding or is_by_inputs(module):
            names, modules = matrices.setdefault(id(module.weight), ([], []))
            names.append(name)
            modules.append(module)
    return list(matrices.values())


def empty_model(config: Any, **arguments: Any) -> nn.Module:
    """A model without weights, but with its buffers and tied embeddings."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, **arguments)
    tie_embeddings(model, config)
    return model


def tie_embeddings(model: Any, config: Any) -> None:
    """Tie the output head to the input embedding if the configuration says so."""
    if config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def check_fit(file: str, model: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``LoadError`` if the tensors do not fit the model; no tensor is read.

    ``tensors`` maps parameters of the model to tensors in the file.
    """
    for target, tensor in tensors.items():
        expected = tuple(model.get_parameter(target).shape)
        if len(expected) == 2 and is_by_inputs(model.get_submodule(target.rpartition(".")[0])):
            expected = expected[::-1]
        if tensor.shape != expected:
            raise LoadError(
                f"{file}: tensor {tensor.name} has shape {list(tensor.shape)}, but the model's "
                f"{target} has {list(expected)}; download the file again"
            )
        if not tensor.is_known:
            raise LoadError(
                f"{file}: tensor {tensor.name} has type {tensor.kind.upper()}, which "
                "cannot be read; give a file with another quantisation"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in tensors]:
        raise LoadError(
            f"{file} is missing {len(missing)} of the model's weights, such as {missing[0]}"
        )
