"""A GGUF file as a model whose matrices stay in the file's blocks: mapped, and repacked."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dart_llm.errors import LoadError, UnsupportedModel
from dart_llm.models.describe import describe
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.gguf import BLOCKS
from dart_llm.models.packed import PackedTensor, pack, packed_from
from dart_llm.native.build import ops

NORMS_LESS_ONE = frozenset({"gemma", "gemma2", "gemma3"})
"""Architectures whose files hold norms with the one added that transformers adds by itself."""

ROTARY_PAIRS = frozenset({"llama"})
"""Architectures whose files hold the rows of q and k by rotary pairs (llama.cpp's order)."""

SPREAD = 0.02
"""Standard deviation of random weights, as transformers draws them."""

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3", "gemma2", "gemma3"})
"""Architectures whose files differ from transformers' weights in nothing but that."""

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of metadata that take a fixed number of bytes, as ``struct`` names them."""

STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file: ``shape`` in torch's order, and where its bytes lie."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def bytes(self) -> Tensor:
        data = np.fromfile(self.path, np.uint8, count=self.size, offset=self.begin)
        return torch.from_numpy(data)


class _Header:
    """Reads a GGUF file's metadata and its table of tensors, in the file's order.

    gguf's own reader takes seconds for the words of a large vocabulary, which are passed over here.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    def text(self) -> str:
        length = self.take("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8")

    def value(self) -> Any:
        """A metadata value; None for an array."""
        kind = self.take("I")
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"metadata of type {kind}")
        each, count = self.take("IQ")
        if each in SCALARS:
            self.at += count * struct.calcsize(f"<{SCALARS[each]}")
        elif each != STRING:
            raise ValueError(f"an array of type {each}")
        for _ in range(count if each == STRING else 0):
            self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        return None

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch's order, number of the type, and place in the data."""
        name = self.text()
        sizes = [self.take("Q") for _ in range(self.take("I"))]
        if not sizes or 0 in sizes:
            raise ValueError(f"tensor {name} without weights")
        kind, place = self.take("IQ")
        return name, tuple(reversed(sizes)), kind, place


def read_tensors(path: Path) -> tuple[str, dict[str, StoredTensor]]:
    """The architecture and the tensors of a file, none of them read yet.

    Raises ``LoadError``, before anything is allocated, for a file that is cut off, a type that
    is not known, and rows that do not divide into blocks; it names the tensor.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LoadError(f"{path} is not a GGUF file; give a folder, or a file that is one")
    try:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        header = _Header(data)
        _, version, count, facts = header.take("4sIQQ")
        if version not in (2, 3):
            raise LoadError(f"{path.name} is a GGUF file of version {version}, not of 2 or 3")
        metadata = {header.text(): header.value() for _ in range(facts)}
        entries = [header.entry() for _ in range(count)]
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"an alignment of {align}")
    except (struct.error, ValueError, OSError, OverflowError) as error:
        raise LoadError(
            f"{path.name} is not a complete GGUF file; fetch it again and compare its size"
        ) from error
    start = (header.at + align - 1) // align * align
    stored = (_stored(path, start, len(data), *entry) for entry in entries)
    return str(metadata.get("general.architecture")), {one.name: one for one in stored}


def _stored(
    path: Path, start: int, end: int, name: str, shape: tuple[int, ...], number: int, place: int
) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise LoadError(f"{path.name}: tensor {name} is of the unknown type {number}") from error
    weights, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % weights:
        raise LoadError(
            f"{path.name}: tensor {name} has rows of {shape[-1]} weights, no multiple of the "
            f"{weights} of a block of {kind.name}"
        )
    wanted = math.prod(shape) // weights * size
    there = max(0, min(wanted, end - start - place))
    if there != wanted:
        raise LoadError(
            f"{path.name} is cut off: tensor {name} takes {wanted} bytes, and the file holds "
            f"{there} of them; fetch it again and compare its size"
        )
    return StoredTensor(path, name, kind.name.lower(), shape, start + place, wanted)


def load_packed(
    path: Path, config: Any, dtype: torch.dtype, names: Mapping[str, str], **arguments: Any
) -> nn.Module:
    """The model of a GGUF file, its matrices in the file's blocks; norms and biases in ``dtype``.

    ``names``: of the file's tensors -> of the model's parameters; ``arguments``: for the model.
    """
    architecture, stored = read_tensors(path)
    model = _empty(config, dtype, arguments)
    _tie(model, config)
    found = {names[name]: tensor for name, tensor in stored.items() if name in names}
    _check_fit(path.name, model, found)
    order = _orders(model)
    for target, tensor in found.items():
        module_name, _, attribute = target.rpartition(".")
        module = model.get_submodule(module_name)
        weight = _weight(tensor, architecture, config, dtype, order(module))
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
    _tie(model, config)
    return model.eval()


def _empty(config: Any, dtype: torch.dtype, arguments: Mapping[str, Any]) -> nn.Module:
    """The model without its weights; its buffers are there."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(config, dtype=dtype, **arguments)
    return model


def _tie(model: Any, config: Any) -> None:
    if config.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _check_fit(file: str, model: nn.Module, found: Mapping[str, StoredTensor]) -> None:
    """Raise ``LoadError`` where the tensors are not the model's, before any is read."""
    for target, tensor in found.items():
        wanted = tuple(model.get_parameter(target).shape)
        if tensor.shape != wanted:
            raise LoadError(
                f"{file}: tensor {tensor.name} is {list(tensor.shape)}, and the model's {target} "
                f"is {list(wanted)}"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in found]:
        raise LoadError(f"{file} lacks {len(missing)} of the model's weights, such as {missing[0]}")


def _weight(
    tensor: StoredTensor, architecture: str, config: Any, dtype: torch.dtype, order: str
) -> Tensor:
    if tensor.kind in BLOCKS and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        blocks = tensor.bytes().reshape(rows, -1)
        blocks = _reordered(blocks, tensor.name, architecture, config)
        matrix = ops().packed_from_blocks(blocks.contiguous(), tensor.kind, rows, columns, order)
        if not all(bool(part.isfinite().all()) for part in matrix.parts()):
            raise LoadError(
                f"{tensor.path.name} is damaged: scales of {tensor.name} are no numbers; "
                "fetch it again"
            )
        return PackedTensor(matrix, dtype, order == "neurons")
    values = _plain(tensor).reshape(tensor.shape)
    values = _reordered(values, tensor.name, architecture, config)
    if architecture in NORMS_LESS_ONE and tensor.name.endswith("norm.weight"):
        values = values.float() - 1
    return values.to(dtype).contiguous()


def _plain(tensor: StoredTensor) -> Tensor:
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if tensor.kind in kinds:
        return tensor.bytes().view(kinds[tensor.kind])
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(
        dequantize(tensor.bytes().numpy(), GGMLQuantizationType[tensor.kind.upper()])
    )


def _reordered(rows: Tensor, name: str, architecture: str, config: Any) -> Tensor:
    """Rows of q and k in transformers' order: the halves of each head, not its pairs."""
    if architecture not in ROTARY_PAIRS or (".attn_q." not in name and ".attn_k." not in name):
        return rows
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _ffn_blocks(model: nn.Module) -> tuple[FfnBlock, ...]:
    try:
        return describe(model).blocks
    except UnsupportedModel:  # whoever prunes it is told why
        return ()


def _orders(model: nn.Module) -> Callable[..., str]:
    """How the rows of a matrix lie that these modules share: those of FFNs are read one by one."""
    blocks = _ffn_blocks(model)
    rows = {id(one): "rows" for block in blocks for one in block.projections}
    known = rows | {id(block.down): "neurons" for block in blocks}
    return lambda *modules: next((known[id(m)] for m in modules if id(m) in known), "tiles")


def round_weights(model: nn.Module, kind: str) -> list[str]:
    """Round the matrices of ``model`` to blocks in place, one after the other; names of those kept.

    Rows that are no multiple of 32 stay as they are, and with them the other matrices of an FFN.
    """
    blocks, order = _ffn_blocks(model), _orders(model)
    mixed = [one for block in blocks if _is_odd(*block.projections) for one in block.projections]
    kept = []
    for names, modules in _matrices(model):
        weight: Any = modules[0].weight
        if _is_odd(*modules) or any(module in mixed for module in modules):
            kept += names
            continue
        made = pack(weight, kind, order(*modules))
        _put(made, modules)
    return kept


def _put(matrix: Tensor, modules: Sequence[Any]) -> None:
    """Let ``modules`` share ``matrix`` as their weight."""
    parameter = nn.Parameter(matrix, requires_grad=False)
    for module in modules:
        module.weight = parameter


def _is_odd(*modules: nn.Module) -> bool:
    """Whether rows of one of them do not divide into blocks."""
    shapes: list[Any] = [module.weight for module in modules]
    return any(weight.shape[1] % 32 for weight in shapes)


def _matrices(model: nn.Module) -> list[tuple[list[str], list[nn.Module]]]:
    """The modules that hold each matrix, and their names."""
    found: dict[int, tuple[list[str], list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            names, modules = found.setdefault(id(module.weight), ([], []))
            names.append(name)
            modules.append(module)
    return list(found.values())


def _drawn(width: int, begin: int, end: int) -> Tensor:
    return torch.randn(end - begin, width).mul_(SPREAD)


def random_packed(config: Any, kind: str, dtype: torch.dtype, **arguments: Any) -> nn.Module:
    """A model of random weights in blocks of ``kind``, made matrix by matrix.

    ``arguments``: for the model.  Norms are 1, biases 0; draws from torch's global generator.
    """
    model = _empty(config, dtype, arguments)
    order = _orders(model)
    for _, modules in _matrices(model):
        weight: Any = modules[0].weight
        drawn = functools.partial(_drawn, weight.shape[1])
        made = packed_from(drawn, weight, kind, order(*modules))
        _put(made, modules)
    for name, one in list(model.named_parameters()):
        if one.is_meta:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            module_name, _, attribute = name.rpartition(".")
            plain = nn.Parameter(fill(one.shape, dtype=dtype), requires_grad=False)
            setattr(model.get_submodule(module_name), attribute, plain)
    return model.eval()
