"""How large a checkpoint is in memory, and whether that is free, before a weight is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import LoadError
from dart_llm.files import size_text
from dart_llm.hub import weight_files
from dart_llm.models.gguf_file import read_gguf

if TYPE_CHECKING:
    from dart_llm.models.checkpoint import Checkpoint

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights that loading turns into the model's dtype, as safetensors names them."""

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

ROUNDED_BYTES = {"q8_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}
"""Bytes of a weight that is rounded to blocks."""


@dataclass(frozen=True)
class Size:
    """Of a checkpoint's weights in memory.

    ``words``: how they are stored there; ``others``: bytes of what takes less, by its flag.
    """

    bytes: int
    words: str
    others: Mapping[str, int]

    def __str__(self) -> str:
        return f"{size_text(self.bytes)} {self.words}"


def weights_size(checkpoint: Checkpoint, dtype: Any, weights: str) -> Size | None:
    """``dtype``: a torch dtype or "auto"; ``weights``: as ``loading.held_as`` says.

    None where the files do not say, or are not there yet.
    """
    if checkpoint.blocks is not None:
        stored = read_gguf(checkpoint.blocks).tensors.values()
        return Size(sum(one.size for one in stored), "in the file's blocks", {})
    if checkpoint.file is not None:
        known = read_gguf(checkpoint.file)
        name = str(dtype).removeprefix("torch.").replace("auto", "bfloat16")
        packed = {"--weights file": sum(one.size for one in known.tensors.values())}
        return Size(WIDTHS.get(name, 4) * known.float32_bytes // 4, f"in {name}", packed)
    if file := checkpoint.arguments.get("gguf_file"):
        size = read_gguf(Path(checkpoint.reference) / file).float32_bytes
        return Size(size, "in float32", {})
    folder = checkpoint.path if checkpoint.source == "hub" else Path(checkpoint.reference)
    if folder is None or not folder.is_dir():
        return None
    counts, others = _stored(folder)
    if not counts:
        return None
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = _configured(folder) or FLOATS[max(counts, key=counts.__getitem__)]
    total = sum(counts.values())
    size = WIDTHS.get(name, 4) * total + others
    rounded = {f"--weights {kind}": int(each * total) for kind, each in ROUNDED_BYTES.items()}
    if weights in ROUNDED_BYTES:
        # read from the files one after the other, unless all of them change their dtype before
        as_stored = {FLOATS[kind] for kind in counts} == {name}
        size = rounded[f"--weights {weights}"] if as_stored else size
        return Size(size, f"in {weights}" if as_stored else f"in {name}, to be rounded", {})
    narrow = {} if WIDTHS.get(name, 4) == 2 else {"--dtype bfloat16": 2 * total + others}
    return Size(size, f"in {name}", {**narrow, **rounded})


def stored_size(count: int) -> Size:
    """Of files that are not there yet, ``count`` bytes: weights take 16 bits or more."""
    rounded = {f"--weights {kind}": int(each * count / 2) for kind, each in ROUNDED_BYTES.items()}
    return Size(count, "as stored", rounded)


def check_room(name: str, size: Size) -> None:
    """Raise ``LoadError`` where less memory is free than a model takes; it names what fits."""
    from dart_llm.native.memory import available

    free = available()
    if size.bytes <= free:
        return
    fitting = [f"{flag} ({size_text(n)})" for flag, n in size.others.items() if n <= free]
    way = f"give {fitting[0]}" if fitting else "give a smaller model"
    raise LoadError(
        f"{name} needs {size_text(size.bytes)} of memory {size.words}, and "
        f"{size_text(max(0, free))} are free: {way}, or end what takes the rest"
    )


def _stored(folder: Path) -> tuple[dict[str, int], int]:
    """Weights of a folder's safetensors files by type, and the bytes of what is no such number."""
    counts, others = dict[str, int](), 0
    for name in weight_files(path.name for path in sorted(folder.iterdir())):
        if not name.endswith(".safetensors"):
            return {}, 0
        for tensor in _header(folder / name).values():
            kind, shape, (begin, end) = (tensor[key] for key in ("dtype", "shape", "data_offsets"))
            if kind in FLOATS:
                counts[kind] = counts.get(kind, 0) + math.prod(shape)
            else:
                others += end - begin
    return counts, others


def _header(file: Path) -> dict[str, Any]:
    """Tensors of a safetensors file; none where it is damaged, which loading reports."""
    try:
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            found = json.loads(data.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error):
        return {}
    return (
        {k: v for k, v in found.items() if k != "__metadata__"} if isinstance(found, dict) else {}
    )


def _configured(folder: Path) -> str:
    """The dtype that a folder's configuration names; "" where it names none."""
    try:
        known = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return (
        str(known.get("dtype") or known.get("torch_dtype") or "") if isinstance(known, dict) else ""
    )
