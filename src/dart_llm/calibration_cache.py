"""Evidence from calibration, kept in memory and on disk.

The key is what decides the sums: the weights, the statistics and the tokens.  Sparsity, budget
table and compensation do not enter, so one calibration serves them all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dart_llm.cache import cache_folder, make_folder
from dart_llm.errors import LoadError
from dart_llm.evidence import LayerEvidence, Sum
from dart_llm.token_statistics import Statistics

FORMAT = 1
SAMPLES = 64
ASIDE = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "initializer_range"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "problem_type"),
    *("id2label", "label2id", "chunk_size_feed_forward", "pretraining_tp", "quantization_config"),
)
"""Entries of a configuration that do not change what a causal model computes from its weights."""
_memory: WeakKeyDictionary[nn.Module, dict[str, list[LayerEvidence]]] = WeakKeyDictionary()


def make_key(model: nn.Module, statistics: Statistics, tokens: str) -> str:
    """The name of an entry; ``tokens``: what they are, or a digest of their ids."""
    rule = statistics.per_token
    name = "none" if rule is None else f"{rule.__module__}.{getattr(rule, '__qualname__', rule)}"
    needs = sorted(statistics.beside_score)
    parts = [FORMAT, fingerprint(model), name, statistics.ema_decay, needs, tokens]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A digest of what the model computes with.

    Of all weights, per parameter an exact sum of its bits and some of its values; and of the
    configuration, which says what is computed with them (activation, rotary embedding, ...).
    """
    digest = hashlib.sha256(_settings(model).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # offloaded: only its name and shape are known here
            continue
        flat = parameter.detach().contiguous().flatten()
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            flat.element_size()
        ]
        bits = flat.view(integers)
        sample = bits[:: max(1, len(bits) // SAMPLES)].tolist()
        digest.update(f"{int(bits.sum(dtype=torch.int64))} {sample}".encode())
    return digest.hexdigest()


def _settings(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ""
    known = config.get_text_config().to_dict()
    kept = {name: value for name, value in known.items() if name not in ASIDE and name[0] != "_"}
    return json.dumps(kept, sort_keys=True, default=str)


def digest_of(ids: Tensor) -> str:
    """A digest of token ids [n, length]."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()


def find(
    model: nn.Module, key: str, cache_dir: str | None, devices: Sequence[torch.device]
) -> list[LayerEvidence] | None:
    """The evidence under ``key``, one per layer and on its device; None when there is none."""
    known = _memory.setdefault(model, {})
    if key not in known:
        found = _read(_path(key, cache_dir), devices)
        if found is None:
            return None
        known[key] = found
    return known[key]


def keep(
    model: nn.Module,
    key: str,
    cache_dir: str | None,
    evidence: list[LayerEvidence],
    about: Mapping[str, str],
) -> None:
    """Keep evidence; ``about``: words for whoever looks into the file.

    Raises ``LoadError`` when the disk does not take it; it is in memory then.
    """
    _memory.setdefault(model, {})[key] = evidence
    if not any(parameter.is_meta for parameter in model.parameters()):
        _write(_path(key, cache_dir), evidence, about)


def _path(key: str, cache_dir: str | None) -> Path:
    return cache_folder(cache_dir) / "calibration" / f"{key}.safetensors"


def _write(path: Path, evidence: Sequence[LayerEvidence], about: Mapping[str, str]) -> None:
    from safetensors.torch import save

    tensors = {}
    for layer, found in enumerate(evidence):
        for name, known in found.sums.items():
            tensors[f"{layer}.{name}.total"] = known.total.contiguous().cpu()
            tensors[f"{layer}.{name}.weight"] = torch.tensor(float(known.weight)).double()
    make_folder(path.parent)
    scratch = path.with_name(f".tmp-{path.stem}-{os.getpid()}")
    try:
        scratch.write_bytes(save(tensors, dict(about)))
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise LoadError(f"cannot write into {path.parent}: {error.strerror or error}") from None


def _read(path: Path, devices: Sequence[torch.device]) -> list[LayerEvidence] | None:
    """What ``_write`` wrote; None for a file that is missing, damaged or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Any] = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    found = [LayerEvidence() for _ in devices]
    for key, total in tensors.items():
        layer, name, kind = key.split(".")
        if kind == "total":
            weight = float(tensors[f"{layer}.{name}.weight"])
            # a copy: a part of the file may start anywhere, and kernels round by the address
            total = total.to(devices[int(layer)], copy=True)
            found[int(layer)].sums[name] = Sum(total, weight)
    return found
