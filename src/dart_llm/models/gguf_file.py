"""GGUF files: their metadata, and the table of their tensors."""

from __future__ import annotations

import functools
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import LoadError

if TYPE_CHECKING:  # which commands that read no file do without
    from torch import Tensor

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

BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""Low-bit block types that the native kernels read."""

ROUNDED = ("q8_0", "q4_0", "q4_1")
"""Block types that weights of another dtype can be rounded to."""

PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Types of tensors that are torch's own."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file: ``shape`` in torch's order, and where its bytes lie."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def is_known(self) -> bool:
        """Whether its numbers can be read: gguf names more types than it reads."""
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind.upper()]
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def bytes(self) -> Tensor:
        import numpy as np
        import torch

        data = np.fromfile(self.path, np.uint8, count=self.size, offset=self.begin)
        return torch.from_numpy(data)

    def values(self) -> Tensor:
        """Dequantised; in the file's dtype where that is one of ``PLAIN``."""
        import torch

        if self.kind in PLAIN:
            return self.bytes().view(getattr(torch, PLAIN[self.kind])).reshape(self.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind.upper()]
        return torch.from_numpy(dequantize(self.bytes().numpy(), kind)).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """``metadata``: only single values, None for lists; ``tensors``: by their names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    @property
    def types(self) -> dict[str, int]:
        """Number of weights of each storage type: ``{"Q4_1": 106168320, "F32": 35136}``."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.kind.upper()] += math.prod(tensor.shape)
        return dict(counts)

    @property
    def file_type(self) -> str:
        """The file's stated type, such as ``Q4_K_M``; empty where there is none."""
        number = self.metadata.get("general.file_type")
        return file_type_name(number) if isinstance(number, int) else ""

    @property
    def quantisation(self) -> str:
        """The file's quantisation for people: ``Q4_1``, or ``Q4_K, Q6_K mix``."""
        return quantisation_name(self.types, self.file_type)

    @property
    def float32_bytes(self) -> int:
        """Size of the weights once they are dense."""
        return 4 * sum(self.types.values())

    def of(self, names: Mapping[str, str]) -> dict[str, StoredTensor]:
        """Tensors by a model's names; ``names``: of the file's -> of the model's."""
        return {names[name]: tensor for name, tensor in self.tensors.items() if name in names}

    def fact(self, name: str) -> Any:
        """The architecture's metadata under ``name``, None if there is none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str) -> Any:
        """The same, where it is a number above 0."""
        value = self.fact(name)
        return value if isinstance(value, int | float) and 0 < value < math.inf else None


class _Header:
    """Reads a GGUF file's metadata and its table of tensors, in the file's order.

    gguf's reader takes seconds for the tokens of a large vocabulary, which are skipped here.
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
        kind, offset = self.take("IQ")
        return name, tuple(reversed(sizes)), kind, offset


LONG = 256
"""Elements of a list above which it is a vocabulary's, or its merges: layers are fewer."""


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Inside the block transformers reads a configuration from a GGUF file in about a second.

    gguf's reader makes two arrays of every token, 17 s for a vocabulary of 262,144, of which a
    configuration needs the length; here it keeps only the length of long lists (transformers
    reads the tokens of a tokenizer by itself).  And the table of tensor names is made once, not
    for every module.
    """
    import numpy as np

    gguf: Any = import_module("gguf")

    class Quick(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = struct.unpack_from("<IQ", memoryview(self.data), orig_offs)
            if count <= LONG or kind == ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            header = _Header(self.data)
            header.at = orig_offs - 4  # where its type is
            header.value()
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8]
            return header.at - orig_offs, [np.zeros(1, np.uint8)], [0] * count, types

    whole = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = Quick, functools.cache(whole[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = whole


def read_gguf(path: Path) -> GgufFile:
    """Metadata and table of tensors of a file; no tensor is read yet.

    Raises ``LoadError``, before anything is allocated, for a file that is cut off, a type that
    is not known, rows that do not divide into blocks, and tensors that overlap; it names them.
    """
    import numpy as np

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
        if not entries:
            raise ValueError("no tensors")
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"an alignment of {align}")
    except (struct.error, ValueError, OSError, OverflowError) as error:
        raise LoadError(
            f"{path.name} is not a complete GGUF file; fetch it again and compare its size"
        ) from error
    start = (header.at + align - 1) // align * align
    stored = [_stored(path, start, len(data), *entry) for entry in entries]
    by_place = sorted(stored, key=lambda tensor: tensor.begin)
    for tensor, after in pairwise(by_place):
        if after.begin < tensor.begin + tensor.size:
            raise LoadError(
                f"{path.name} is damaged: tensors {tensor.name} and {after.name} overlap; fetch it "
                "again"
            )
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in stored})


def _stored(
    path: Path, start: int, end: int, name: str, shape: tuple[int, ...], number: int, offset: int
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
    there = max(0, min(wanted, end - start - offset))
    if there != wanted:
        raise LoadError(
            f"{path.name} is cut off: tensor {name} takes {wanted} bytes, and the file holds "
            f"{there} of them; fetch it again and compare its size"
        )
    return StoredTensor(path, name, kind.name.lower(), shape, start + offset, wanted)


def file_type_name(number: int) -> str:
    """The name behind ``general.file_type``: ``Q4_1`` for 3; empty when it is not known."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_")
    except ValueError:
        return ""


def quantisation_name(types: Mapping[str, int], named: str) -> str:
    """The file type's name where a storage type has that name, else the storage types."""
    low_bit = sorted(name for name in types if name not in ("F32", "F16", "BF16"))
    if not low_bit:
        return max(types, key=lambda name: types[name], default="none")
    if named in low_bit or len(low_bit) == 1:
        return named if named in low_bit else low_bit[0]
    return f"{', '.join(low_bit)} mix"
