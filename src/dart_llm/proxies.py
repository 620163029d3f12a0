"""Forward proxies: how far a neuron's output column reaches towards the vocabulary.

Static per layer: computed once per model and kept (learn.py).
"""

from __future__ import annotations

from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.scores import score, squared
from dart_llm.weights import FfnWeights

_SOURCE = "DART, arXiv 2601.22632, the published scripts' ranking methods"


def proxy(weights: FfnWeights) -> tuple[Tensor, Tensor]:
    """``FfnWeights.reach``: the largest and the mean, each [I], float32.

    Raises ``ConfigError`` when the model's embedding has another width than the FFN's output.
    """
    rows = weights.embedding
    if rows is None or rows.shape[1] != weights.hidden:
        raise ConfigError(
            "forward-proxy scores (max, mean, combined, product) need an embedding as wide as the "
            "FFN's output, which this model lacks; use another score, e.g. contribution"
        )
    return weights.reach


@score(squared, _SOURCE, reach=True)
def max_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the neuron's largest reach towards a vocabulary row."""
    return a * proxy(weights)[0]


@score(squared, _SOURCE, reach=True)
def mean_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the neuron's mean reach towards the vocabulary rows."""
    return a * proxy(weights)[1]


@score(squared, _SOURCE, reach=True)
def combined(a: Tensor, weights: FfnWeights) -> Tensor:
    """Sum of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) + mean_proxy(a, weights)


@score(squared, _SOURCE, reach=True)
def product(a: Tensor, weights: FfnWeights) -> Tensor:
    """Product of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) * mean_proxy(a, weights)
