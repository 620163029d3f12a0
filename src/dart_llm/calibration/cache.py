"""Evidence from calibration and from a model's own text, kept in memory and on disk.

A key says which model (a digest of all that it computes with) and what decided the sums, such as
the statistics and the tokens.  What does not decide them does not enter: one calibration serves
all sparsities, budget tables and drift rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dart_llm import cache
from dart_llm.cache import cache_folder
from dart_llm.models.fingerprint import fingerprint, plain
from dart_llm.pruning.statistics import LayerStatistics, Statistics, Sum

FORMAT = 2

SUFFIX = ".safetensors"

MODEL_DIGITS = 12
"""Digits of the model's digest that begin a key, so that files of one model lie together."""

_memory: WeakKeyDictionary[nn.Module, dict[str, list[LayerStatistics]]] = WeakKeyDictionary()


def make_key(model: nn.Module, statistics: Statistics, tokens: str) -> str:
    """The name of an entry; ``tokens``: what they are, or a digest of their ids."""
    needs = sorted(statistics.beside_score)
    rule = rule_of(statistics)
    return part_key(fingerprint(model), rule, statistics.ema_decay, needs, tokens)


def part_key(model: str, *parts: object) -> str:
    """The name of what ``parts`` decide for the model of this fingerprint."""
    return f"{model[:MODEL_DIGITS]}-{cache.key_of(FORMAT, model, *parts)}"


def rule_of(statistics: Statistics) -> object:
    """The per-token statistic of a score, by its code; None: there is none."""
    return plain(statistics.per_token)


def digest_of(ids: Tensor) -> str:
    """A digest of token ids [n, length]."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()


def find(
    model: nn.Module,
    key: str,
    cache_dir: str | None,
    devices: Sequence[torch.device],
) -> list[LayerStatistics] | None:
    """The evidence under ``key``, one per layer and on its device; None when there is none.

    It stays in memory as long as the model is there, whatever folder it came from.
    """
    known = _known(model, key)
    if key not in known:
        data = cache.read(cache_folder(cache_dir) / "calibration", key, SUFFIX)
        found = None if data is None else _unpacked(data, devices)
        if found is None:
            return None
        known[key] = found
    return known[key]


def keep(
    model: nn.Module,
    key: str,
    cache_dir: str | None,
    evidence: list[LayerStatistics],
    about: Mapping[str, str],
) -> None:
    """Keep evidence; ``about``: words for whoever looks into the file.

    Raises ``LoadError`` when the disk does not take it; it is in memory then.
    """
    known = _known(model, key)
    known[key] = evidence
    if not any(parameter.is_meta for parameter in model.parameters()):
        folder = cache_folder(cache_dir) / "calibration"
        cache.write(folder, key, SUFFIX, _packed(evidence, about))


def _known(model: nn.Module, key: str) -> dict[str, list[LayerStatistics]]:
    """What is in memory of ``model`` as it is now; what it taught with other weights is dropped."""
    known = _memory.setdefault(model, {})
    for other in [one for one in known if one[:MODEL_DIGITS] != key[:MODEL_DIGITS]]:
        del known[other]
    return known


def _packed(evidence: Sequence[LayerStatistics], about: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    tensors = {}
    for layer, found in enumerate(evidence):
        for name, known in found.sums.items():
            tensors[f"{layer}.{name}.total"] = known.total.contiguous().cpu()
            tensors[f"{layer}.{name}.weight"] = torch.tensor(float(known.weight)).double()
    return save(tensors, dict(about))


def _unpacked(data: bytes, devices: Sequence[torch.device]) -> list[LayerStatistics] | None:
    """What ``_packed`` made; None where it is no such thing."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    found = [LayerStatistics() for _ in devices]
    try:
        tensors: dict[str, Any] = load(data)
        for key, total in tensors.items():
            layer, name, kind = key.split(".")
            if kind == "total":
                weight = float(tensors[f"{layer}.{name}.weight"])
                # a copy: a part of the file may start anywhere, and kernels round by the address
                total = total.to(devices[int(layer)], copy=True)
                found[int(layer)].sums[name] = Sum(total, weight)
    except (SafetensorError, KeyError, ValueError, IndexError):
        return None
    return found
