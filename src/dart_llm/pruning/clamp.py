"""Clamps: neurons whose activation is fixed at a value while the model decodes.

Neuron i with activation v adds ``v W_down[:, i]`` to the FFN's output at every token.  So clamping
the neuron is the same as removing it and adding that constant.  A clamp is therefore a mask with a
bias.  Every executor supports such masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.pruning.compensation import compensation
from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.pruning.weights import FfnWeights

ClampValues = Mapping[int, Mapping[int, float]]
"""Maps a layer's number to a mapping from neuron ids to activations."""


@dataclass(frozen=True)
class LayerClamp:
    """The clamped neurons of one layer; tensors are on the layer's device.

    ``ids``: [n] int64, ascending.  ``width``: number of all neurons.  ``bias``: [D] float32, the
    clamped neurons' contribution to the FFN's output; None means 0.
    """

    ids: Tensor
    width: int
    bias: Tensor | None

    def of(self, mask: LayerMask | None) -> LayerMask:
        """``mask`` without the clamped neurons, and with ``bias`` added to the mask's bias.

        If ``mask`` is None, all other neurons are kept.  Raises ``ConfigError`` if none is kept.
        """
        if mask is None:
            mask = LayerMask(torch.arange(self.width, device=self.ids.device), self.width)
        kept = mask.ids[~torch.isin(mask.ids, self.ids)]
        if not len(kept):
            raise ConfigError(
                "masks= keeps only clamped neurons in a layer: keep more, or clamp fewer"
            )
        parts = [part for part in (mask.bias, self.bias) if part is not None]
        return replace(mask, ids=kept, bias=sum(parts[1:], parts[0]) if parts else None)


@dataclass(frozen=True)
class Clamp:
    """The clamped neurons of a model; ``layers`` maps a layer's number to its clamped neurons."""

    layers: Mapping[int, LayerClamp]

    def of(self, masks: Masks) -> Masks:
        """``masks`` without the clamped neurons, with the layers' biases added."""
        layers = self.layers
        return tuple(layers[n].of(mask) if n in layers else mask for n, mask in enumerate(masks))

    def last(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """``scores``, [I] each, with the clamped neurons ranked last."""
        return [self._filled(n, score, -torch.inf) for n, score in enumerate(scores)]

    def silent(self, layer: int, mean: Tensor) -> Tensor:
        """``mean`` activations [I] with 0 for clamped neurons, whose output is in their bias."""
        return self._filled(layer, mean, 0.0)

    def _filled(self, layer: int, values: Tensor, value: float) -> Tensor:
        clamped = self.layers.get(layer)
        return values if clamped is None else values.index_fill(0, clamped.ids, value)

    def most(self, layer: int, count: int) -> int:
        """``count``, but at most the number of neurons that are not clamped."""
        clamped = self.layers.get(layer)
        return count if clamped is None else min(count, clamped.width - len(clamped.ids))

    def without(self, layer: int, ids: Tensor) -> Tensor:
        """``ids`` without the clamped neurons."""
        clamped = self.layers.get(layer)
        return ids if clamped is None else ids[~torch.isin(ids, clamped.ids)]


NO_CLAMP = Clamp({})


def make_clamp(layers: Sequence[FfnWeights], values: ClampValues) -> Clamp:
    """The clamp that fixes activations at ``values``.

    Raises ``ConfigError`` for a layer or neuron that does not exist, and for a value that is not a
    finite float32.
    """
    layered = isinstance(values, Mapping) and all(isinstance(v, Mapping) for v in values.values())
    ids = [*values, *(n for neurons in values.values() for n in neurons)] if layered else [None]
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in ids):
        raise ConfigError("clamp= takes {layer: {neuron id: activation}}, all of them numbers")
    for number in values:
        if not 0 <= number < len(layers):
            raise ConfigError(
                f"layer {number} is out of range: this model has {len(layers)} layers"
            )
    return Clamp({n: _clamp_layer(layers[n], values[n]) for n in sorted(values) if values[n]})


def _is_float32(value: float) -> bool:
    try:
        return abs(float(value)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _clamp_layer(layer: FfnWeights, values: Mapping[int, float]) -> LayerClamp:
    number = layer.index
    if layer.down.is_meta:
        raise ConfigError(
            f"layer {number} is offloaded, so its weights cannot be read between forwards: clamp "
            "neurons of other layers, or load the model without offloading"
        )
    for neuron, value in values.items():
        if not 0 <= neuron < layer.width:
            raise ConfigError(f"layer {number} has neurons 0-{layer.width - 1}; got id {neuron}")
        if not _is_float32(value):
            raise ConfigError(
                f"neuron {neuron} of layer {number} is clamped at {value}: give a finite float32"
            )
    if len(values) == layer.width:
        raise ConfigError(f"layer {number} has no neuron that is not clamped: clamp fewer")
    ids = torch.tensor(sorted(values), device=layer.device)
    constant = torch.zeros(layer.width, device=layer.device)
    constant[ids] = torch.tensor([float(values[i]) for i in sorted(values)], device=layer.device)
    bias = compensation(layer.down, constant, ids) if bool(constant.any()) else None
    return LayerClamp(ids, layer.width, bias)
