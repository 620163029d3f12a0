"""The cache of calibrations and learned statistics: named tensors, kept in memory and on disk.

A key identifies the model (by a digest of its weights and code) and everything else that the
tensors depend on, such as the statistics and the tokens.  Sparsity, budget tables and drift rules
are not part of the key, so one calibration serves all values of these settings.
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
"""Version of the cached tensors and of their computation; entries of other versions are not used.

A change of the dtype of the computation needs no new version, because it only changes rounding.
"""

SUFFIX = ".safetensors"

MODEL_DIGITS = 12
"""A key begins with this many digits of the model's digest, so that files are sorted by model."""

Tensors = dict[str, Tensor]

_memory: WeakKeyDictionary[nn.Module, dict[str, Tensors]] = WeakKeyDictionary()


def key_of(model: str, *parts: object) -> str:
    """The key of tensors that depend on ``parts`` and on the model with fingerprint ``model``."""
    return f"{model[:MODEL_DIGITS]}-{cache.key_of(FORMAT, model, *parts)}"


def rule_of(statistics: Statistics) -> object:
    """Identifies what a score sums, by its function's code and decay; None if it sums nothing."""
    rule = plain(statistics.per_token)
    return rule if statistics.ema_decay is None else [rule, statistics.ema_decay]


def find(model: nn.Module, key: str, cache_dir: str | None) -> Tensors | None:
    """The tensors under ``key``; None if there are none.

    Once read, the tensors stay in memory as long as the model, even if ``cache_dir`` changes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    kept = _of_model(model, key)
    if key not in kept:
        data = cache.read(cache_folder(cache_dir) / "calibration", key, SUFFIX)
        if data is None:
            return None
        try:  # clone: rounding in kernels depends on the tensors' alignment in memory
            kept[key] = {name: tensor.clone() for name, tensor in load(data).items()}
        except (SafetensorError, ValueError):
            return None
    return kept[key]


def keep(
    model: nn.Module, key: str, cache_dir: str | None, tensors: Tensors, about: Mapping[str, str]
) -> None:
    """Store tensors in memory and on disk; ``about``: metadata of the file, for human readers.

    The tensors of an offloaded model are stored only in memory.  Raises ``LoadError`` if the file
    cannot be written; even then, the tensors are in memory.
    """
    from safetensors.torch import save

    _of_model(model, key)[key] = tensors
    if not any(parameter.is_meta for parameter in model.parameters()):
        folder = cache_folder(cache_dir) / "calibration"
        on_host = {name: t.contiguous().cpu() for name, t in tensors.items()}
        cache.write(folder, key, SUFFIX, save(on_host, dict(about)))


def _of_model(model: nn.Module, key: str) -> dict[str, Tensors]:
    """The entries in memory for ``model``, after dropping those for earlier weights."""
    kept = _memory.setdefault(model, {})
    for other in [name for name in kept if name[:MODEL_DIGITS] != key[:MODEL_DIGITS]]:
        del kept[other]
    return kept
