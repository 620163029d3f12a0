"""Neuron scores (docs/reference.md, "Scores"), each of which is one decorated function.

A score is a function ``(a, weights) -> [I]``.  Its decorator's first argument is a function that
computes e_t [I] from the activations u of token t.  ``a`` is accumulated over T observed tokens: it
is ``sqrt(sum_t e_t)``, or with an ``ema_decay`` d, the average of ``sqrt(e_t)`` with weights
``d^(T-1-t)``.  With ``spread``, ``a`` is the standard deviation of u; with ``average``, the mean of
e_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.statistics import PerToken, squared, squared_share
from dart_llm.pruning.weights import FfnWeights

__all__ = ["Score", "mix_ranks", "ranks", "score", "squared", "squared_share"]


@dataclass(frozen=True)
class Score:
    """A score: ``function``; ``per_token``, which computes e_t (None if not used); ``source``."""

    function: Callable[[Tensor, FfnWeights], Tensor]
    per_token: PerToken | None
    source: str
    spread: bool = False
    """Whether ``a`` is the standard deviation of u; ``per_token`` is then ``squared``."""
    average: bool = False
    """Whether ``a`` is the mean of e_t; such means can be compared between layers."""
    needs_fisher: bool = False
    """Whether the score reads ``FfnWeights.fisher``, learned from self-generated text."""

    def __call__(self, a: Tensor, weights: FfnWeights) -> Tensor:
        """The neurons' scores, [I] float32; the largest are best.  a: [I] float32."""
        return self.function(a, weights)

    @property
    def no_decay_reason(self) -> str | None:
        """Why ``ema_decay`` does not apply to this score; None if it does."""
        if self.per_token is None:
            return "reads no activations"
        kind = "variance" if self.spread else "mean"
        return f"weighs all tokens alike, as a {kind}" if self.spread or self.average else None


def score(
    per_token: PerToken | None, source: str, **flags: bool
) -> Callable[[Callable[[Tensor, FfnWeights], Tensor]], Score]:
    """Turn a function ``(a, weights) -> [I]`` into a ``Score`` with these fields."""
    return lambda function: Score(function, per_token, source, **flags)


@score(squared, "DART, arXiv 2601.22632, the published scripts' default")
def magnitude(a: Tensor, weights: FfnWeights) -> Tensor:
    """L2 norm of the neuron's activation over the observed tokens."""
    return a


@score(squared_share, "GRIFFIN, arXiv 2404.01365, eq. 6")
def normalized(a: Tensor, weights: FfnWeights) -> Tensor:
    """L2 norm of the neuron's activation after each token is scaled to unit norm."""
    return a


@score(squared, "Wanda's criterion (arXiv 2306.11695) for whole neurons, L2")
def contribution(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the norm of the neuron's column of the down projection."""
    return a * weights.down_norm


@score(squared, "Wanda, arXiv 2306.11695, summed over the weights of a neuron's output column")
def wanda(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the L1 norm of the neuron's column of the down projection."""
    return a * weights.down_l1


@score(squared, "FLAP, arXiv 2312.11983, the fluctuation metric (WIFV)", spread=True)
def flap(a: Tensor, weights: FfnWeights) -> Tensor:
    """Variance of the activation times the squared norm of the neuron's output column."""
    return (a * weights.down_norm).square()


@score(
    squared,
    "the diagonal Fisher information of a mask on the neuron (as in arXiv 2204.09656), with the "
    "activations of the prompt and learned gradients",
    average=True,
    needs_fisher=True,
)
def fisher(a: Tensor, weights: FfnWeights) -> Tensor:
    """Mean squared activation times the mean squared loss gradient with respect to it."""
    if weights.fisher is None:
        raise RuntimeError("score fisher needs the layers' learned statistics")
    return a * weights.fisher


@score(None, "static baseline: norms of the neuron's weights")
def weight(a: Tensor, weights: FfnWeights) -> Tensor:
    """Product of the norms of the neuron's input rows and output column, without activations."""
    return weights.down_norm * weights.in_norms


@score(None, "baseline")
def random(a: Tensor, weights: FfnWeights) -> Tensor:
    """Uniform random numbers, fixed by the run's seed and the layer."""
    generator = torch.Generator().manual_seed(1_000_003 * weights.seed + weights.index)
    return torch.rand(weights.width, generator=generator).to(weights.device)


def ranks(scores: Tensor) -> Tensor:
    """The rank of each score, [I] float32: I - 1 for the largest, 0 for the smallest.

    In ties, lower indices have higher ranks, as in ``masks.top_ids``, so the top k of the ranks are
    the top k of the scores.
    """
    order = scores.sort(descending=True, stable=True).indices
    descending = torch.arange(len(scores) - 1, -1, -1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(descending).scatter_(0, order, descending)


def mix_ranks(scores: Tensor, prior: Tensor, weight: float) -> Tensor:
    """``(1 - weight) ranks(scores) + weight ranks(prior)``, [I] float32.

    This is the rank aggregation of GLASS (arXiv 2508.14302).  ``prior``: calibrated scores, [I].
    """
    by_text, by_prior = ranks(scores), ranks(prior.to(scores.device))
    return (1 - weight) * by_text + weight * by_prior


# Forward-proxy scores: dot products of a neuron's output column with the vocabulary's embeddings.

_SOURCE = "DART, arXiv 2601.22632, the published scripts' ranking methods"


def proxy(weights: FfnWeights) -> tuple[Tensor, Tensor]:
    """``FfnWeights.reach``: the largest and the mean absolute dot product, each [I] float32.

    Raises ``ConfigError`` if the embedding's rows are not as long as the FFN's output.
    """
    rows = weights.embedding
    if rows is None or rows.shape[1] != weights.hidden:
        raise ConfigError(
            "forward-proxy scores (max, mean, combined, product) need an embedding as wide as the "
            "FFN's output, which this model lacks; use another score, e.g. contribution"
        )
    return weights.reach


@score(squared, _SOURCE)
def max_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the largest absolute dot product of the output column and an embedding."""
    return a * proxy(weights)[0]


@score(squared, _SOURCE)
def mean_proxy(a: Tensor, weights: FfnWeights) -> Tensor:
    """Magnitude times the mean absolute dot product of the output column and all embeddings."""
    return a * proxy(weights)[1]


@score(squared, _SOURCE)
def combined(a: Tensor, weights: FfnWeights) -> Tensor:
    """Sum of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) + mean_proxy(a, weights)


@score(squared, _SOURCE)
def product(a: Tensor, weights: FfnWeights) -> Tensor:
    """Product of the ``max`` and the ``mean`` score."""
    return max_proxy(a, weights) * mean_proxy(a, weights)
