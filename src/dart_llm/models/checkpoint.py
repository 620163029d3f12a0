"""Checkpoints: the facts that every number is reported with, digests, and size in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from dart_llm.errors import LoadError
from dart_llm.files import file_sha256, read_json, size_text
from dart_llm.hub import weight_files
from dart_llm.models.gguf_file import read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HASH_UP_TO = 20_000_000_000
"""Bytes of weight files above which no checksum is computed: reading them takes minutes."""

READ = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")
"""Files of a checkpoint beside its weights that are read: configuration, tokenizer, code."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint before it is loaded: what it is, and how transformers is to read it."""

    name: str
    source: str
    reference: str
    """What ``from_pretrained`` is given: a folder or a hub id."""
    path: Path | None = None
    quantisation: str | None = None
    """Of the file's weights; ``None`` means that the model's configuration says."""
    sha256: str | None = None
    """Of the file; ``None`` means that it is computed from ``path`` when needed."""
    revision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the model's ``from_pretrained``."""
    file: Path | None = None
    """The GGUF file whose tensors are read at every load; ``reference`` has the configuration."""
    packed: bool = False
    """Whether the blocks of ``file`` are kept."""

    @property
    def blocks(self) -> Path | None:
        """The GGUF file whose blocks are kept."""
        return self.file if self.packed else None


_LOADED: WeakKeyDictionary[PreTrainedModel, Checkpoint] = WeakKeyDictionary()


def remember(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Keep what ``model`` was loaded from, for as long as the model lives; nothing is set on it."""
    _LOADED[model] = checkpoint


def blocks_file(model: PreTrainedModel) -> Path | None:
    """The GGUF file whose blocks are the weights of ``model``."""
    checkpoint = _LOADED.get(model)
    return None if checkpoint is None else checkpoint.blocks


def checkpoint_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Name, source, path, revision, file quantisation, sha256, dtype and parameters of ``model``.

    ``sha256`` is that of the weight file, or of the GGUF it was converted from; with several files
    it is that of their ``sha256sum`` lines in alphabetical order.  Unknown facts are ``None``: a
    model that ``load`` did not make has no checksum and, without a quantisation in its
    configuration, no file quantisation.  ``weights`` is there where matrices are stored in
    blocks: ``Q4_1 as in the file``, or ``rounded to Q8_0``.
    """
    checkpoint = _LOADED.get(model)
    weight_format = _weight_format(model, checkpoint)
    current = {
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"weights": weight_format} if weight_format else {}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    stated = _stated_quantisation(model)
    if checkpoint is None:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return {
            "name": name,
            "source": "not loaded by dart_llm",
            "path": name if Path(name).is_dir() else None,
            "revision": getattr(model.config, "_commit_hash", None),
            "file_quantisation": stated,
            "sha256": None,
            **current,
        }
    path = checkpoint.path
    return {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "path": str(path) if path else None,
        "revision": checkpoint.revision,
        "file_quantisation": checkpoint.quantisation or stated or "none",
        "sha256": checkpoint.sha256 or (weights_sha256(path) if path else None),
        **current,
    }


def _weight_format(model: nn.Module, checkpoint: Checkpoint | None) -> str | None:
    """How the matrices of ``model`` are stored in blocks, for people; None where none is."""
    from dart_llm.models.packed import PackedTensor

    packed = [weight for weight in model.parameters() if isinstance(weight, PackedTensor)]
    kinds = ", ".join(sorted({str(weight.matrix.type()).upper() for weight in packed}))
    if checkpoint is not None and checkpoint.packed and packed:
        return f"{checkpoint.quantisation or kinds} as in the file"
    return f"rounded to {kinds}" if packed else None


def weights_sha256(folder: Path) -> str | None:
    """The checksum of a folder's weight files, as ``checkpoint_facts`` describes it."""
    files = _weight_files(folder)
    if sum(path.stat().st_size for path in files) > HASH_UP_TO:
        return None
    return _sums(files)


def contents(folder: Path) -> dict[str, str]:
    """Digests of a folder: ``model``, its weights, and ``model_files``, everything else.

    Weights of more than ``HASH_UP_TO`` bytes are identified by the sizes and times of their files.
    """
    weights, files = _weight_files(folder), sorted(p for n in READ for p in folder.glob(n))
    states = [(path.name, *_state(path)) for path in weights]
    digests = {
        "model": weights_sha256(folder) or (f"states of files {states}" if states else None),
        "model_files": _sums([path for path in files if path.is_file()]),
    }
    return {name: digest for name, digest in digests.items() if digest}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _sums(files: Sequence[Path]) -> str | None:
    """The sha256 of one file, or of the ``sha256sum`` lines of several; None of none."""
    sums = {path.name: _sha256(path) for path in files}
    if len(sums) < 2:
        return next(iter(sums.values()), None)
    lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _stated_quantisation(model: PreTrainedModel) -> str | None:
    """The quantisation method that the model's configuration names, if it names one."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def _sha256(path: Path) -> str:
    blob = path.resolve()  # the hub's cache names large files by their sha256
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return _remembered_sha256(blob, _state(blob))


@lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _state: tuple[int, ...]) -> str:
    return file_sha256(path)


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's contents; nobody can set the time of change back."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


_tokenizers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def remember_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """``tokenizer`` belongs to ``model``: calibration makes openings for the model with it."""
    _tokenizers[model] = tokenizer


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of ``model``: remembered, or read from where the model came from; or None."""
    tokenizer = _tokenizers.get(model)
    name = getattr(model, "name_or_path", "")
    if tokenizer is None and name:
        from transformers import AutoTokenizer

        with contextlib.suppress(Exception):  # whatever is wrong there: callers do without
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
            remember_tokenizer(model, tokenizer)
    return tokenizer


# Size in memory, and whether that is free, before a weight is read.

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights that loading turns into the model's dtype, as safetensors names them."""

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

ROUNDED_BYTES = {"q8_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}
"""Bytes of a weight that is rounded to blocks."""


@dataclass(frozen=True)
class Size:
    """Memory of a checkpoint's weights.

    ``words``: their format, for people; ``others``: bytes of smaller formats by their flags.
    """

    bytes: int
    words: str
    others: Mapping[str, int]

    def __str__(self) -> str:
        return f"{size_text(self.bytes)} {self.words}"


def weights_size(checkpoint: Checkpoint, dtype: Any, weights: str) -> Size | None:
    """``dtype``: a torch dtype or "auto"; ``weights``: of ``loading.weight_format``.

    None where the files do not state it, or are not there yet.
    """
    if checkpoint.blocks is not None:
        stored = read_gguf(checkpoint.blocks).tensors.values()
        return Size(sum(tensor.size for tensor in stored), "in the file's blocks", {})
    if checkpoint.file is not None:
        gguf = read_gguf(checkpoint.file)
        name = str(dtype).removeprefix("torch.").replace("auto", "bfloat16")
        packed = {"--weights file": sum(tensor.size for tensor in gguf.tensors.values())}
        return Size(WIDTHS.get(name, 4) * gguf.float32_bytes // 4, f"in {name}", packed)
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
    """Weights of a folder's safetensors files by type, and the bytes of all other tensors."""
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
            header = json.loads(data.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error):
        return {}
    if not isinstance(header, dict):
        return {}
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _configured(folder: Path) -> str:
    """The dtype that a folder's configuration names; "" where it names none."""
    config = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "")
