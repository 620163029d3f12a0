"""Forward proxies: how far a neuron's output column reaches towards the vocabulary.

Static per layer and computed once per weight matrix: V x D x I products, in chunks of V.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.scores import score, squared
from dart_llm.weights import FfnWeights

CHUNK = 4096
_SOURCE = "DART, arXiv 2601.22632, the published scripts' ranking methods"

_Source = tuple[weakref.ref[Tensor], int]
"""A tensor and its version: in-place changes raise the version."""

_cache: dict[tuple[int, int], tuple[tuple[_Source, _Source], tuple[Tensor, Tensor]]] = {}


def proxy(weights: FfnWeights) -> tuple[Tensor, Tensor]:
    """``max_v |w_i . e_v|`` and ``mean_v |w_i . e_v|``, each [I], float32.

    ``w_i``: column i of the down projection; ``e_v``: row v of the embedding that the run chose.
    Raises ``ConfigError`` when the model's embedding has another width than the FFN's output.
    """
    rows = weights.embedding
    if rows is None or rows.shape[1] != weights.hidden:
        raise ConfigError(
            "forward-proxy scores (max, mean, combined, product) need an embedding as wide as the "
            "FFN's output, which this model lacks; use another score, e.g. contribution"
        )
    owner = weights.down if weights.down._base is None else weights.down._base
    key = (owner.data_ptr(), rows.data_ptr())
    known = _cache.get(key)
    if known and all(
        source() is tensor and version == _version(tensor)
        for (source, version), tensor in zip(known[0], (owner, rows), strict=True)
    ):
        return known[1]
    result = _compute(weights.down.detach(), rows.detach())
    forget = weakref.ref(owner, lambda _: _cache.pop(key, None))
    sources = ((forget, _version(owner)), (weakref.ref(rows), _version(rows)))
    _cache[key] = (sources, result)
    return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _compute(down: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    high = torch.zeros(down.shape[1], device=down.device)
    total = torch.zeros(down.shape[1], device=down.device)
    columns = down.float()
    for chunk in torch.split(rows, CHUNK):
        reach = (chunk.to(down.device).float() @ columns).abs()
        high = torch.maximum(high, reach.amax(0))
        total += reach.sum(0)
    return high, total / len(rows)


@score(squared, _SOURCE)
def max_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the neuron's largest reach towards a vocabulary row."""
    return a * proxy(weights)[0]


@score(squared, _SOURCE)
def mean_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the neuron's mean reach towards the vocabulary rows."""
    return a * proxy(weights)[1]


@score(squared, _SOURCE)
def combined(a: Tensor, weights: FfnWeights) -> Tensor:
    """Sum of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) + mean_proxy(a, weights)


@score(squared, _SOURCE)
def product(a: Tensor, weights: FfnWeights) -> Tensor:
    """Product of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) * mean_proxy(a, weights)
