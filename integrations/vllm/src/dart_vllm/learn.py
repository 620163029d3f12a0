"""Learned statistics: read from dart_llm's cache, or learned once from self-generated text.

They are learned by transformers, on the host, before vLLM serves; the cache is the one that
``dart_llm.prune`` and the command line use, so a model that they have pruned need not learn again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dart_llm import load
from dart_llm.calibration.self_calibration import self_calibrate
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.statistics import SelfStats
from dart_llm.pruning.weights import FfnWeights, with_parts
from dart_vllm.settings import learning_key

logger = logging.getLogger("vllm.dart")

Learned = dict[str, tuple[FfnWeights, ...]]
"""Maps the key of a configuration (``learning_key``) to the layers with its statistics."""


def learned_layers(
    configs: Sequence[PruneConfig],
    layers: tuple[FfnWeights, ...],
    model_path: str,
    dtype: torch.dtype,
    cache_dir: str | None,
) -> Learned:
    """``layers`` with the statistics that each configuration needs.

    Loads the model a second time, on the host, and frees it again.  Raises ``DartError`` if the
    model cannot be loaded, or cannot learn.
    """
    if not configs:
        return {}
    model, tokenizer = load(model_path, dtype=dtype)
    view = describe(model)
    learned: Learned = {}
    with torch.inference_mode(False):
        for config in configs:
            source = view.weights(config.score.proxy_embedding, config.seed)
            found = self_calibrate(model, config, source, cache_dir, logger.info, tokenizer)
            stats = [
                _moved(layer.self_stats, own) for layer, own in zip(found, layers, strict=True)
            ]
            learned[learning_key(config)] = with_parts(layers, self_stats=stats)
    del model, view
    gc.collect()
    return learned


def _moved(stats: SelfStats | None, layer: FfnWeights) -> SelfStats | None:
    """Statistics on a layer's device, in its dtype."""
    if stats is None:
        return None
    for entry in stats.evidence.sums.values():
        entry.total = entry.total.to(layer.device)

    def move(tensor: Any) -> Any:
        return None if tensor is None else tensor.to(layer.device)

    basis = None if stats.basis is None else stats.basis.to(layer.device, layer.down.dtype)
    return replace(stats, fisher=move(stats.fisher), basis=basis)
