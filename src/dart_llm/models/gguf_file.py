"""Reads GGUF files: metadata, table of tensors, and settings that transformers does not read.

Without these settings a model would give wrong results, because it would use wrong rotary angles
or no attention window.  A GGUF file stores quantised weights in *blocks*: groups of 32 or 256
weights that share a scale.
"""

from __future__ import annotations

import functools
import math
import re
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

if TYPE_CHECKING:  # not imported by commands that read no file
    from torch import Tensor

STRING, ARRAY = 8, 9
"""GGUF's type numbers for metadata values that are strings or lists."""

BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""Block types (formats of quantised weights) that the native kernels read."""

ROUNDED = ("q8_0", "q4_0", "q4_1")
"""Block types to which weights of other types can be rounded."""

PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Tensor types that are torch dtypes; maps GGUF's names to torch's names."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file, with ``shape`` in torch's order.

    ``begin``: offset of the tensor's bytes in the file.  ``size``: number of bytes.  ``kind``: the
    storage type in lower case, such as ``q4_1``.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def is_known(self) -> bool:
        """Whether the values can be read: gguf cannot dequantise all types that it lists."""
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
        """The stored bytes, uint8 [size]."""
        import numpy as np
        import torch

        data = np.fromfile(self.path, np.uint8, count=self.size, offset=self.begin)
        return torch.from_numpy(data)

    def values(self) -> Tensor:
        """The values: dequantised, or in the stored dtype if ``kind`` is in ``PLAIN``."""
        import torch

        if self.kind in PLAIN:
            return self.bytes().view(getattr(torch, PLAIN[self.kind])).reshape(self.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind.upper()]
        return torch.from_numpy(dequantize(self.bytes().numpy(), kind)).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    ``metadata`` maps keys to values, with None in place of each list.  ``tensors``: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``."""
        return str(self.metadata.get("general.architecture"))

    @property
    def types(self) -> dict[str, int]:
        """Number of weights of each storage type: ``{"Q4_1": 106168320, "F32": 35136}``."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.kind.upper()] += math.prod(tensor.shape)
        return dict(counts)

    @property
    def quantisation(self) -> str:
        """The type that the file states, such as ``Q4_K_M``, or else all types of its weights."""
        from gguf import LlamaFileType

        try:
            name = LlamaFileType(self.metadata.get("general.file_type", -1)).name
        except ValueError:
            return ", ".join(sorted(self.types))
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")

    @property
    def float32_bytes(self) -> int:
        """Size of the dequantised weights in float32."""
        return 4 * sum(self.types.values())

    def of(self, names: Mapping[str, str]) -> dict[str, StoredTensor]:
        """Tensors by name in the model; ``names`` maps names in the file to names in the model."""
        return {names[name]: tensor for name, tensor in self.tensors.items() if name in names}

    def fact(self, name: str) -> Any:
        """The metadata value ``{architecture}.{name}``; None if the file has none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str) -> Any:
        """``fact(name)`` if it is a positive number, else None."""
        value = self.fact(name)
        return value if isinstance(value, int | float) and 0 < value < math.inf else None


LONG = 256
"""Metadata lists of at most this length are read; longer ones belong to a tokenizer."""


@functools.cache
def _quick_reader() -> Any:
    """A subclass of gguf's reader that reads only the length of long lists.

    gguf's reader makes two arrays per token, which takes 17 s for a vocabulary of 262,144.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class QuickReader(GGUFReader):
        def _get_str(self, offset: int) -> Any:
            length, text = super()._get_str(offset)
            if len(text) != length[0]:
                raise ValueError("a string is cut off")
            return length, text

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            data, end = memoryview(self.data.data), orig_offs + 12
            kind, count = struct.unpack_from("<IQ", data, orig_offs)
            if count <= LONG:
                return super()._get_field_parts(orig_offs, raw_type)
            if kind == STRING:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", data, end)[0]
            else:
                number = self.gguf_scalar_to_np[GGUFValueType(kind)]
                end += count * np.dtype(number).itemsize
            if end > len(data):
                raise ValueError("a list is cut off")
            types = [GGUFValueType.ARRAY, GGUFValueType.UINT8]
            return end - orig_offs, [np.zeros(1, np.uint8)], [0] * count, types

    return QuickReader


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Make transformers read a configuration from a GGUF file in about a second.

    A configuration needs only the vocabulary's length.  The tokenizer is read separately, without
    this reader.  The table of tensor names is also built only once, not once per module.
    """
    gguf: Any = import_module("gguf")
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _quick_reader(), functools.cache(originals[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata and the table of tensors of a file, but no tensor.

    Raises ``LoadError`` for a truncated or damaged file, before memory is allocated for tensors.
    """
    import numpy as np

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LoadError(f"{path} is not a GGUF file; give a folder or a GGUF file")
    try:
        with np.errstate(all="ignore"):
            reader = _quick_reader()(path)
        stored = [_stored(path, tensor, len(reader.data)) for tensor in reader.tensors]
        if not stored:
            raise ValueError("no tensors")
        for tensor, after in pairwise(sorted(stored, key=lambda tensor: tensor.begin)):
            if after.begin < tensor.begin + tensor.size:
                raise ValueError(f"tensors {tensor.name} and {after.name} overlap")
        metadata = {
            name: None if field.types[0] == ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
    except Exception as error:  # for damaged files gguf's reader raises many kinds of errors
        reason = str(error).partition("\n")[0]
        raise LoadError(
            f"{path.name} is not a complete GGUF file ({reason}); download it again and compare "
            "its size"
        ) from error
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in stored})


def _stored(path: Path, tensor: Any, end: int) -> StoredTensor:
    """A tensor of gguf's table; raises ``ValueError`` if the tensor ends after byte ``end``."""
    from gguf import GGML_QUANT_SIZES

    shape = tuple(int(size) for size in reversed(tensor.shape))
    weights, size = GGML_QUANT_SIZES[tensor.tensor_type]
    size = math.prod(shape) // weights * size
    begin = int(tensor.data_offset)
    if not shape or not size or begin + size > end:
        raise ValueError(f"tensor {tensor.name} is cut off")
    return StoredTensor(path, tensor.name, tensor.tensor_type.name.lower(), shape, begin, size)


# How weights in files differ from transformers', and settings that transformers does not read.


@dataclass(frozen=True)
class Stored:
    """How the weights of a file differ from transformers', apart from their names.

    ``pairs``: True if the rows of q and k are in llama.cpp's order: the two rows of a rotary pair
    are adjacent, and not half a head apart as in transformers.  ``plus_one``: True if the weights
    of norms include the 1 that transformers adds when it computes a norm.
    """

    pairs: bool = False
    plus_one: bool = False


ARCHITECTURES = {
    "llama": Stored(pairs=True),
    **dict.fromkeys(("qwen2", "qwen3", "phi3", "gpt2"), Stored()),
    **dict.fromkeys(("gemma2", "gemma3"), Stored(plus_one=True)),
}
"""The architectures whose weights can stay quantised, by ``general.architecture``."""

ROPE = "rope_parameters"

LONGEST = 4096
"""Upper limit for the number of heads, a head's size, and the number of its frequencies."""

Settings = dict[str, Any]
"""Maps keys of a configuration to values as in JSON."""

SIZES = {
    "embedding_length": ("token_embd.weight", 1),
    "vocab_size": ("token_embd.weight", 0),
    "feed_forward_length": ("blk.0.ffn_down.weight", 1),
    "context_length": ("position_embd.weight", 0),
}
"""Maps metadata keys that state a size of a tensor to the tensor's name and the dimension."""

HEADS = ("key_length", "value_length", "head_count", "head_count_kv")
"""Metadata keys of the attention: sizes and numbers of heads."""

LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary settings of Llama 3.1 to 3.3; a file stores only the resulting frequency factors."""


def check_facts(file: GgufFile) -> None:
    """Raise ``LoadError`` if metadata states larger sizes than the tensors have, or too few layers.

    Without this check, a model of any size would be built before tensors and model are compared,
    and a model with too few layers would run.
    """
    layers = [re.match(r"blk\.(\d+)\.", tensor) for tensor in file.tensors]
    count = 1 + max((int(match[1]) for match in layers if match), default=-1)
    small = ("rope.dimension_count", *(f"attention.{name}" for name in HEADS))
    most = {"block_count": count, **dict.fromkeys(small, LONGEST)}
    for fact, (tensor, dimension) in SIZES.items():
        stored = file.tensors.get(tensor)
        if stored is not None and len(stored.shape) == 2:
            most[fact] = stored.shape[dimension]
    for fact, size in most.items():
        stated = file.number(fact) or 0
        if stated > size or (fact == "block_count" and 0 < stated < size):
            raise LoadError(
                f"{file.path.name} is damaged: it states {fact} {stated}, but its tensors have "
                f"{size}; download it again"
            )


def left_out(file: GgufFile) -> Settings:
    """Settings in ``file`` that transformers does not read.

    Raises ``LoadError`` if a frequency factor is invalid.
    """
    settings: Settings = {}
    if file.architecture not in ARCHITECTURES:  # its metadata may have another meaning
        return settings
    # transformers treats a Llama file with this name as a Mistral model
    mistral = file.architecture == "llama" and file.metadata.get("general.name") == "mistral"
    window = file.number("attention.sliding_window")
    if window and (mistral or file.architecture == "phi3"):
        settings["sliding_window"] = window
    if file.architecture == "gpt2":
        width, neurons = file.number("embedding_length"), file.number("feed_forward_length")
        if length := file.number("context_length"):
            settings["n_positions"] = length
        if neurons and width and neurons != 4 * width:
            settings["n_inner"] = neurons
    if rope := {**_angles(file), **_factors(file)}:
        settings[ROPE] = rope
    return settings


def complete(config: Any, settings: Settings) -> Any:
    """``config`` plus ``settings``, which ``left_out`` returns."""
    if not settings:
        return config
    values = config.to_dict()
    rope = settings.get(ROPE, {})
    before = values.get(ROPE) or {}
    if "full_attention" in before:  # layers with sliding attention keep their own angles
        after = {**before, "full_attention": {**before["full_attention"], **rope}}
    else:
        after = {**before, **rope}
    original = rope.get("original_max_position_embeddings")
    if original and "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = original
    values |= {**settings, **({ROPE: after} if rope else {})}
    return type(config).from_dict(values)


def _angles(file: GgufFile) -> Settings:
    """Rotary settings: the rotated part of a head, and scaling for long contexts."""
    settings: Settings = {}
    rotated, width = file.number("rope.dimension_count"), file.number("embedding_length")
    heads = file.number("attention.head_count")
    if file.architecture == "phi3" and rotated and width and heads and rotated * heads < width:
        settings["partial_rotary_factor"] = rotated * heads / width
    kind, factor = file.fact("rope.scaling.type"), file.number("rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        settings |= {"rope_type": kind, "factor": float(factor)}
        original = file.number("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            settings["original_max_position_embeddings"] = original
    return settings


def _factors(file: GgufFile) -> Settings:
    """Rotary settings (``llama3`` or ``longrope``) from frequency factors, if there are any."""
    factors, long, short = (
        _numbers(file, name) for name in ("freqs", "factors_long", "factors_short")
    )
    if factors:
        factor = max(factors)
        if factor == min(factors) == 1:
            return {}
        expected = _llama_3(len(factors), factor, float(file.number("rope.freq_base") or 10000.0))
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(factors, expected, strict=True)):
            return {"rope_type": "llama3", "factor": factor, **LLAMA_3}
        return _longrope(factors, factors, file.number("context_length"), 1.0)
    if not (long and short):
        return {}
    original = file.number("rope.scaling.original_context_length") or file.number("context_length")
    return _longrope(short, long, original, file.number("rope.scaling.attn_factor"))


def _numbers(file: GgufFile, name: str) -> list[float]:
    """The frequency factors in tensor ``rope_{name}.weight``; empty if there is no such tensor.

    Raises ``LoadError`` unless all factors are positive numbers.
    """
    tensor = file.tensors.get(f"rope_{name}.weight")
    if tensor is None:
        return []
    fits = tensor.is_known and math.prod(tensor.shape) <= LONGEST
    numbers = [float(number) for number in tensor.values().flatten()] if fits else []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise LoadError(
            f"{tensor.path.name} is damaged: the frequency factors in tensor {tensor.name} must "
            "be positive numbers; download it again"
        )
    return numbers


def _longrope(short: list[float], long: list[float], original: Any, attention: Any) -> Settings:
    settings: Settings = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    settings["original_max_position_embeddings"] = original
    return {**settings, **({"attention_factor": float(attention)} if attention else {})}


def _llama_3(count: int, factor: float, base: float) -> list[float]:
    """Llama 3's frequency factors, as llama.cpp's converter computes them."""
    low, high = LLAMA_3["low_freq_factor"], LLAMA_3["high_freq_factor"]
    turns = [8192 / (2 * math.pi * base ** (i / count)) for i in range(count)]
    smooth = [min(1.0, max(0.0, (turn - low) / (high - low))) for turn in turns]
    return [1 / ((1 - share) / factor + share) for share in smooth]
