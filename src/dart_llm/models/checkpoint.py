"""Describes a loaded model: metadata for every result, size in memory, and a digest.

Quantised weights are stored as in GGUF files, in *blocks*: groups of weights that share a scale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dart_llm.cache import DIGITS, key_of
from dart_llm.errors import LoadError
from dart_llm.files import file_sha256, read_json, size_text
from dart_llm.hub import weight_files
from dart_llm.models.agreement import Replacement
from dart_llm.models.gguf_file import read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HASH_UP_TO = 20_000_000_000
"""Maximum total bytes of weight files for a checksum; reading larger files takes minutes."""

READ = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")
"""Patterns of the files that are read besides the weights: configuration, tokenizer, code."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to load, and the arguments with which transformers reads it."""

    name: str
    source: str
    reference: str
    """The argument of ``from_pretrained``: a folder or a hub id."""
    path: Path | None = None
    quantisation: str | None = None
    """Quantisation of the file's weights; None means that the model's configuration states it."""
    sha256: str | None = None
    """Checksum of the file; None means that it is computed from ``path`` when needed."""
    revision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the model's ``from_pretrained``."""
    file: Path | None = None
    """The GGUF file with the tensors to load; the configuration is in the folder ``reference``."""
    packed: bool = False
    """True if the weights stay quantised as in ``file``."""

    @property
    def blocks(self) -> Path | None:
        """The GGUF file whose quantised weights the model keeps; None if it keeps none."""
        return self.file if self.packed else None


_LOADED: WeakKeyDictionary[PreTrainedModel, Checkpoint] = WeakKeyDictionary()


def remember(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Remember the checkpoint of ``model`` while the model exists, without setting an attribute."""
    _LOADED[model] = checkpoint


def blocks_file(model: PreTrainedModel) -> Path | None:
    """The GGUF file whose quantised weights ``model`` keeps; None if it keeps none."""
    checkpoint = _LOADED.get(model)
    return checkpoint.blocks if checkpoint else None


def checkpoint_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Name, source, path, revision, quantisation, sha256, dtype and parameter count of ``model``.

    ``sha256`` is the checksum of the weight file or of the converted GGUF file.  If there are
    several files, it is the checksum of their ``sha256sum`` lines in alphabetical order.  Unknown
    values are None.  For a model that ``load`` did not make, the checksum is unknown, and file
    quantisation is known only from the configuration.  ``weights`` exists only if matrices are
    quantised; it is ``Q4_1 as in the file`` or ``rounded to Q8_0``, for example.
    """
    checkpoint = _LOADED.get(model)
    weight_format, stated = _weight_format(model, checkpoint), _stated_quantisation(model)
    if checkpoint is None:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        path = Path(name) if Path(name).is_dir() else None
        revision = getattr(model.config, "_commit_hash", None)
        checkpoint = Checkpoint(name, "not loaded by dart_llm", name, path, revision=revision)
        quantisation, sha256 = stated, None
    else:
        path = checkpoint.path
        quantisation = checkpoint.quantisation or stated or "none"
        sha256 = checkpoint.sha256 or (weights_sha256(path) if path else None)
    return {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "path": str(path) if path else None,
        "revision": checkpoint.revision,
        "file_quantisation": quantisation,
        "sha256": sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"weights": weight_format} if weight_format else {}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _weight_format(model: nn.Module, checkpoint: Checkpoint | None) -> str | None:
    """How the matrices of ``model`` are quantised, as text; None if they are not."""
    from dart_llm.models.packed import PackedTensor

    packed = [weight for weight in model.parameters() if isinstance(weight, PackedTensor)]
    kinds = ", ".join(sorted({str(weight.matrix.type()).upper() for weight in packed}))
    if checkpoint is not None and checkpoint.packed and packed:
        return f"{checkpoint.quantisation or kinds} as in the file"
    return f"rounded to {kinds}" if packed else None


def weights_sha256(folder: Path) -> str | None:
    """The checksum of a folder's weight files (see ``checkpoint_facts``); None if unknown."""
    files = _weight_files(folder)
    too_large = sum(path.stat().st_size for path in files) > HASH_UP_TO
    return None if too_large else _sums(files)


def contents(folder: Path) -> dict[str, str]:
    """Digests of a folder: ``model`` of the weights, and ``model_files`` of the ``READ`` files.

    Weights of more than ``HASH_UP_TO`` bytes are identified by the sizes, times and inode numbers
    of their files.
    """
    files = sorted(path for name in READ for path in folder.glob(name) if path.is_file())
    states = [(path.name, *_state(path)) for path in _weight_files(folder)]
    weights = weights_sha256(folder) or (f"states of files {states}" if states else None)
    digests = {"model": weights, "model_files": _sums(files)}
    return {name: digest for name, digest in digests.items() if digest}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _sums(files: Sequence[Path]) -> str | None:
    """The sha256 of one file, or of several files' ``sha256sum`` lines; None without files."""
    sums = {path.name: _sha256(path) for path in files}
    if len(sums) < 2:
        return next(iter(sums.values()), None)
    lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _stated_quantisation(model: PreTrainedModel) -> str | None:
    """The quantisation method in the model's configuration, if any."""
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


@functools.lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _state: tuple[int, ...]) -> str:
    """The sha256 of a file; a file whose ``_state`` has changed is read again."""
    return file_sha256(path)


def _state(path: Path) -> tuple[int, ...]:
    """Values that change with a file's contents; programs cannot set back ``st_ctime``."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


_tokenizers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def remember_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Remember the tokenizer of ``model``, because calibration needs it to generate texts."""
    _tokenizers[model] = tokenizer


def tokenizer_of(model: Any) -> Any:
    """The remembered tokenizer, or that of the model's folder or hub id; None if unreadable."""
    tokenizer = _tokenizers.get(model)
    name = getattr(model, "name_or_path", "")
    if tokenizer is None and name:
        from transformers import AutoTokenizer

        with contextlib.suppress(Exception):  # callers do without a tokenizer
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
            remember_tokenizer(model, tokenizer)
    return tokenizer


# The size in memory, which is compared with the free memory before any weight is read.

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per weight."""

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Maps safetensors' types to torch's, for weights that loading converts to the model's dtype."""

ROUNDED_BYTES = {"q8_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}
"""Bytes per weight after rounding to a block type, including the scales."""


@dataclass(frozen=True)
class Size:
    """Memory that a checkpoint's weights need, and their format as text."""

    bytes: int
    format: str

    def __str__(self) -> str:
        return f"{size_text(self.bytes)} {self.format}"


def weights_size(checkpoint: Checkpoint, dtype: Any, weights: str) -> Size | None:
    """Memory of the weights after loading; None if it cannot be read from the files.

    ``dtype``: a torch dtype or "auto"; ``weights``: result of ``loading.weight_format``.
    """
    name = str(dtype).removeprefix("torch.")
    if checkpoint.file is not None:
        gguf = read_gguf(checkpoint.file)
        if checkpoint.packed:
            stored = sum(tensor.size for tensor in gguf.tensors.values())
            return Size(stored, "in the file's quantisation")
        name = name.replace("auto", "bfloat16")
        return Size(WIDTHS.get(name, 4) * gguf.float32_bytes // 4, f"in {name}")
    if file := checkpoint.arguments.get("gguf_file"):
        return Size(read_gguf(Path(checkpoint.reference) / file).float32_bytes, "in float32")
    folder = checkpoint.path if checkpoint.source == "hub" else Path(checkpoint.reference)
    counts, others = ({}, 0) if folder is None or not folder.is_dir() else _stored(folder)
    if folder is None or not counts:
        return None
    if name == "auto":
        config = read_json(folder / "config.json")
        configured = str(config.get("dtype") or config.get("torch_dtype") or "")
        name = configured or FLOATS[max(counts, key=counts.__getitem__)]
    total = sum(counts.values())
    size = WIDTHS.get(name, 4) * total + others
    if weights not in ROUNDED_BYTES:
        return Size(size, f"in {name}")
    # weights are rounded one at a time while they are read, unless their dtype is converted first
    if {FLOATS[kind] for kind in counts} == {name}:
        return Size(int(ROUNDED_BYTES[weights] * total), f"in {weights}")
    return Size(size, f"in {name}, to be rounded")


def check_room(name: str, size: Size) -> None:
    """Raise ``LoadError`` if a model of this ``size`` needs more memory than is free."""
    from dart_llm.native.memory import available

    free = available()
    if size.bytes > free:
        raise LoadError(
            f"{name} needs {size_text(size.bytes)} of memory {size.format}, but only "
            f"{size_text(max(0, free))} are free: use --dtype bfloat16, --weights q8_0 or q4_0 "
            "(for a GGUF file --weights file) or a smaller model, or close other programs"
        )


def _stored(folder: Path) -> tuple[dict[str, int], int]:
    """Number of weights per type in a folder's safetensors files, and about how many other bytes.

    The result is ({}, 0) if a file has another format or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    counts, others = Counter[str](), 0
    for name in weight_files(path.name for path in sorted(folder.iterdir())):
        if not name.endswith(".safetensors"):
            return {}, 0
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is not a dictionary)
                    tensor = file.get_slice(key)
                    kind, count = tensor.get_dtype(), math.prod(tensor.get_shape())
                    if kind in FLOATS:
                        counts[kind] += count
                    else:
                        others += count
        except (OSError, SafetensorError):  # loading reports it
            return {}, 0
    return dict(counts), others


# A digest of the function that a model computes: equal for equal models, different for others.
#
# It covers the content of all parameters and buffers, the configuration, and for every module the
# class, the code of ``forward`` and plain attributes (eps, scaling, activation functions).  It
# ignores the memory layout of weights, attached pruning, and hooks, most of which only read.

ROW, SUMS = 1024, 8
"""A digest splits a tensor's bytes into rows of ``ROW`` bytes.  ``SUMS`` weighted sums of each row
are computed, every sum with factors of its own."""

FACTOR = 63
"""Largest factor in these sums: some CPUs require that the sum of two products fits in 16 bits."""

ROWS = 1 << 14
"""How many rows of a digest are processed at a time if sums are computed in float32."""

ASIDE = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "initializer_range"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "problem_type"),
    *("id2label", "label2id", "chunk_size_feed_forward", "pretraining_tp", "quantization_config"),
)
"""Entries of a configuration that do not change what a causal model with given weights computes."""

STATE = (
    *("forward", "training", "gradient_checkpointing", "max_seq_len_cached", "config"),
    "save_pretrained",
)
"""Attributes of modules that are covered elsewhere or do not affect outputs."""


def fingerprint(model: nn.Module) -> str:
    """The digest of ``model``, 32 hexadecimal digits.

    All weights are read once, at about memory bandwidth.  The digest covers only names, shapes and
    dtypes of offloaded weights.
    """
    digest = hashlib.sha256(_settings(model).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {_about(module)}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {digest_of(tensor)}".encode())
    return digest.hexdigest()[:DIGITS]


def _settings(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ""
    values = config.get_text_config().to_dict()
    relevant = {key: value for key, value in values.items() if key not in ASIDE and key[0] != "_"}
    return json.dumps(relevant, sort_keys=True, default=str)


def digest_of(tensor: Tensor) -> str:
    """A digest of a tensor's shape, dtype and every bit, independent of its memory layout."""
    about = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_meta:
        return about
    if hasattr(tensor, "__tensor_flatten__"):  # packed weights: their plain tensors
        names, context = tensor.__tensor_flatten__()
        return key_of(about, str(context), [digest_of(getattr(tensor, name)) for name in names])
    raw = tensor.detach().contiguous().flatten().view(torch.int8)
    aligned = len(raw) - len(raw) % ROW
    digest = hashlib.sha256(about.encode())
    if aligned:
        sums = _row_sums(raw[:aligned].view(-1, ROW))
        digest.update(sums.cpu().contiguous().numpy().tobytes())
    digest.update(raw[aligned:].cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _row_sums(rows: Tensor) -> Tensor:
    """``rows @ factors`` without rounding: [n, SUMS] int32 from rows [n, ROW] int8."""
    factors = _factors().to(rows.device)
    if rows.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch._int_mm(rows, factors)
    parts = [  # no sum exceeds 2^23, so float32 is exact in any order of additions
        (part.float() @ factors.float()).to(torch.int32) for part in torch.split(rows, ROWS)
    ]
    return torch.cat(parts)


@functools.cache
def _factors() -> Tensor:
    """[ROW, SUMS] int8 in -63 to 63; none is 0, so that a change of any byte changes the sums."""
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.randint(1, FACTOR + 1, (ROW, SUMS), generator=generator)
    signs = 1 - 2 * torch.randint(2, (ROW, SUMS), generator=generator)
    return (magnitudes * signs).to(torch.int8)


def _about(module: nn.Module) -> str:
    """Class, forward and plain attributes of a module, as text."""
    kind = type(module)
    attributes = vars(module)
    forward = attributes.get("forward", kind.forward)
    forward = attributes.get("_old_forward", forward)  # the original under accelerate's hook
    settings = {
        name: plain(value)
        for name, value in sorted(attributes.items())
        if name[0] != "_" and name not in STATE and not isinstance(value, Replacement)
    }
    return repr([kind.__module__, kind.__qualname__, plain(forward), settings])


def plain(value: object, depth: int = 4) -> object:
    """``value`` without memory addresses: itself, a function's code, or the name of its type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return value
    if isinstance(value, Replacement):
        return plain(value.original, depth)
    if depth and isinstance(value, tuple | list):
        return [plain(item, depth - 1) for item in value]
    if isinstance(value, Tensor):
        return digest_of(value)
    if isinstance(value, functools.partial):
        return [plain(part, depth) for part in (value.func, value.args, [*value.keywords.items()])]
    function = getattr(value, "__func__", value)
    if depth and isinstance(function, FunctionType):
        return _function(function, depth - 1)
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{name}"


def _function(function: FunctionType, depth: int) -> object:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells]
    name = f"{_home(function.__module__)}.{function.__qualname__}"
    return [name, _code(function.__code__), [plain(value, depth) for value in values]]


def _home(module: str) -> str:
    """A module's name, without dart_llm's subpackages, so that moving a file changes no digest."""
    package, _, path = module.partition(".")
    return f"{package}.{path.rpartition('.')[2]}" if package == "dart_llm" else module


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a function that refers to itself while it is being defined
        return False


@functools.cache
def _code(code: CodeType) -> str:
    return key_of(code.co_code, code.co_names, [_constant(constant) for constant in code.co_consts])


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _code(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value
