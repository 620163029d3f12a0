"""A digest of the function that a model computes: the same for equal models, another for others.

It covers the content of all parameters and buffers; of every module, its class, the code of its
``forward`` and its plain attributes (eps, scaling, activation functions); and the configuration.
The layout of weights in memory does not matter, nor does an attached run.  Neither do hooks: they
mostly watch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.cache import DIGITS, key_of
from dart_llm.models.agreement import Replacement

ROW = 1024
"""Bytes that are summed up together."""

SUMS = 8
"""Sums of each row, each with other factors."""

FACTOR = 63
"""Largest factor: pairs of products fit 16 bits, in which some CPUs add them."""

ROWS = 1 << 14
"""Rows at a time where sums are made in float32."""

ASIDE = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "initializer_range"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "problem_type"),
    *("id2label", "label2id", "chunk_size_feed_forward", "pretraining_tp", "quantization_config"),
)
"""Entries of a configuration that do not change what a causal model computes from its weights."""

STATE = (
    *("forward", "training", "gradient_checkpointing", "max_seq_len_cached", "config"),
    "save_pretrained",
)
"""Attributes of modules that are covered elsewhere, or do not change what is computed."""


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits.  Reads all weights once, at about the speed of memory.

    Offloaded weights count by names and shapes alone.
    """
    digest = hashlib.sha256(_settings(model).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {_about(module)}".encode())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {digest_of(tensor)}".encode())
    return digest.hexdigest()[:DIGITS]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _settings(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ""
    values = config.get_text_config().to_dict()
    kept = {name: value for name, value in values.items() if name not in ASIDE and name[0] != "_"}
    return json.dumps(kept, sort_keys=True, default=str)


def digest_of(tensor: Tensor) -> str:
    """A digest of a tensor's shape, dtype and every bit, however it lies in memory."""
    about = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_meta:
        return about
    if hasattr(tensor, "__tensor_flatten__"):  # packed weights: what they are made of
        names, context = tensor.__tensor_flatten__()
        return key_of(about, str(context), [digest_of(getattr(tensor, name)) for name in names])
    raw = tensor.detach().contiguous().flatten().view(torch.int8)
    whole = len(raw) - len(raw) % ROW
    digest = hashlib.sha256(about.encode())
    if whole:
        sums = _row_sums(raw[:whole].view(-1, ROW))
        digest.update(sums.cpu().contiguous().numpy().tobytes())
    digest.update(raw[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _row_sums(rows: Tensor) -> Tensor:
    """``rows @ factors``, exact: [n, ROW] int8 to [n, SUMS] int32."""
    factors = _factors().to(rows.device)
    if rows.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch._int_mm(rows, factors)
    parts = [  # no sum exceeds 2^23: float32 is exact, in any order and however it multiplies
        (part.float() @ factors.float()).to(torch.int32) for part in torch.split(rows, ROWS)
    ]
    return torch.cat(parts)


@functools.cache
def _factors() -> Tensor:
    """[ROW, SUMS] int8 from -63 to 63, never 0: no change of one byte goes unnoticed."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(1, FACTOR + 1, (ROW, SUMS), generator=generator)
    signs = 1 - 2 * torch.randint(2, (ROW, SUMS), generator=generator)
    return (drawn * signs).to(torch.int8)


def _about(module: nn.Module) -> str:
    kind = type(module)
    attributes = vars(module)
    forward = attributes.get("forward", kind.forward)
    forward = attributes.get("_old_forward", forward)  # accelerate's first
    settings = {
        name: plain(value)
        for name, value in sorted(attributes.items())
        if name[0] != "_" and name not in STATE and not isinstance(value, Replacement)
    }
    return repr([kind.__module__, kind.__qualname__, plain(forward), settings])


def plain(value: object, depth: int = 4) -> object:
    """A value without its address: itself, the code of a function, its type."""
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
    """The module's name; of this package only the file's, so that moving a file changes nothing."""
    package, _, path = module.partition(".")
    return f"{package}.{path.rpartition('.')[2]}" if package == "dart_llm" else module


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a function that names itself before it is made
        return False


@functools.cache
def _code(code: CodeType) -> str:
    return key_of(code.co_code, code.co_names, [_constant(constant) for constant in code.co_consts])


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _code(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value
