"""Calibrations and learned statistics: named tensors, kept in memory and on disk.

A key says which model (a digest of all that it computes with) and what decided the tensors, such as
the statistics and the tokens.  What does not decide them does not enter: one calibration serves
all sparsities, budget tables and drift rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dart_llm import cache
from dart_llm.cache import cache_folder
from dart_llm.models.checkpoint import plain
from dart_llm.pruning.statistics import Statistics

FORMAT = 5
"""Of what is collected and how: another one finds nothing of the old in the cache.

In which dtype it is computed does not enter: that is rounding.
"""

SUFFIX = ".safetensors"

MODEL_DIGITS = 12
"""Digits of the model's digest that begin a key, so that files of one model are together."""

Tensors = dict[str, Tensor]

_memory: WeakKeyDictionary[nn.Module, dict[str, Tensors]] = WeakKeyDictionary()


def key_of(model: str, *parts: object) -> str:
    """The name of what ``parts`` decide for the model of this fingerprint."""
    return f"{model[:MODEL_DIGITS]}-{cache.key_of(FORMAT, model, *parts)}"


def rule_of(statistics: Statistics) -> object:
    """The per-token statistic of a score, by its code, and its decay; None: there is none."""
    rule = plain(statistics.per_token)
    return rule if statistics.ema_decay is None else [rule, statistics.ema_decay]


def find(model: nn.Module, key: str, cache_dir: str | None) -> Tensors | None:
    """The tensors under ``key``; None when there are none.

    They stay in memory as long as the model is there, whatever folder they came from.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    kept = _of_model(model, key)
    if key not in kept:
        data = cache.read(cache_folder(cache_dir) / "calibration", key, SUFFIX)
        if data is None:
            return None
        try:  # copies: a part of the file may start anywhere, and kernels round by the address
            kept[key] = {name: tensor.clone() for name, tensor in load(data).items()}
        except (SafetensorError, ValueError):
            return None
    return kept[key]


def keep(
    model: nn.Module, key: str, cache_dir: str | None, tensors: Tensors, about: Mapping[str, str]
) -> None:
    """Keep tensors; ``about``: words for whoever looks into the file.

    Raises ``LoadError`` when the disk does not take it; it is in memory then.
    """
    from safetensors.torch import save

    _of_model(model, key)[key] = tensors
    if not any(parameter.is_meta for parameter in model.parameters()):
        folder = cache_folder(cache_dir) / "calibration"
        on_host = {name: t.contiguous().cpu() for name, t in tensors.items()}
        cache.write(folder, key, SUFFIX, save(on_host, dict(about)))


def _of_model(model: nn.Module, key: str) -> dict[str, Tensors]:
    """Entries in memory for ``model`` with its present weights; drops those of other weights."""
    kept = _memory.setdefault(model, {})
    for other in [name for name in kept if name[:MODEL_DIGITS] != key[:MODEL_DIGITS]]:
        del kept[other]
    return kept
