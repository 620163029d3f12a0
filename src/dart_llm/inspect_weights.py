"""Distributions: norms of the neurons' weights, and the activations on a text, per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.ffn import FfnBlock
from dart_llm.inspect_numbers import distribution, histogram, quantiles
from dart_llm.scores import EPS
from dart_llm.weights import norms_of

NEAR = (0.01, 0.1)
"""An activation counts as near zero below these shares of its token's root mean square."""

HELD = 0.9
"""The share of a token's squared activations whose fewest neurons are counted."""


def weights(blocks: Sequence[FfnBlock]) -> dict[str, Any]:
    """Per layer and matrix the distribution over neurons of the L2 norms of their weights.

    A neuron's weights are its row of gate and up and its column of down.  ``histogram`` counts the
    norms in equal bins over ``range[matrix]``, the same for all layers: from the lowest 0.5 % to
    the highest 99.5 % quantile of any layer; the end bins hold the few beyond.  Raises
    ``ConfigError`` when a layer is offloaded.
    """
    norms = [_norms(block) for block in blocks]
    ranges = {name: _range([layer[name] for layer in norms]) for name in norms[0]}
    layers = [
        {
            name: {**distribution(values), "histogram": histogram(values, *ranges[name])}
            for name, values in layer.items()
        }
        for layer in norms
    ]
    return {"range": ranges, "layers": layers}


def _range(layers: Sequence[Tensor]) -> tuple[float, float]:
    ends = [torch.quantile(norms, torch.tensor([0.005, 0.995]).to(norms)) for norms in layers]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _norms(block: FfnBlock) -> dict[str, Tensor]:
    if block.offloaded:
        raise ConfigError(
            f"layer {block.index} is offloaded, so its weights cannot be read: load the model "
            "without offloading, or leave weights and neurons out"
        )
    gate, up, down = (None if m is None else m.detach() for m in block.matrices())
    assert up is not None and down is not None
    parts = (("gate", gate, 1), ("up", up, 1), ("down", down, 0))
    return {name: norms_of(matrix, dim) for name, matrix, dim in parts if matrix is not None}


def activations(u: Tensor) -> dict[str, Any]:
    """Of u [T, I]: quantiles of its absolute values, moments of u itself, and how sparse it is.

    ``zero``: share of exact zeros; ``near``: shares below ``NEAR`` of the token's root mean
    square; ``holds``: the smallest share of neurons that holds ``HELD`` of a token's squared
    activations, mean over tokens.
    """
    u = u.float()
    size, rms = u.abs(), u.square().mean(-1, keepdim=True).sqrt().clamp_min(EPS)
    energy = u.square().sort(-1, descending=True).values.cumsum(-1)
    fewest = (energy < HELD * energy[:, -1:]).sum(-1) + 1
    return {
        "absolute": quantiles(size),
        "moments": {k: v for k, v in distribution(u).items() if k in _MOMENTS},
        "zero": float((u == 0).float().mean()),
        "near": {f"{level:g}": float((size < level * rms).float().mean()) for level in NEAR},
        "holds": float(fewest.float().mean()) / u.shape[-1],
    }


_MOMENTS = ("mean", "std", "skewness", "kurtosis")
