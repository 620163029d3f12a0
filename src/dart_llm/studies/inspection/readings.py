"""One dense pass per text: impact, distributions, statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import kurtosis, skew
from torch import Tensor

from dart_llm.calibration.self_calibration import self_calibrate
from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import Saver
from dart_llm.models.capture import LayerActivations, capture_activations
from dart_llm.models.describe import ModelView, context_length, describe
from dart_llm.models.ffn import FfnBlock
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.forward import without_sinks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import EPS, LayerStatistics
from dart_llm.pruning.token_level import NO_MASK
from dart_llm.pruning.weights import FfnWeights, norms_of
from dart_llm.studies.inspection.settings import InspectSettings, InspectText

# Quantiles and moments of many numbers, as JSON-able data.

LEVELS = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
"""Quantiles that are kept."""


def quantiles(values: Tensor) -> dict[str, float]:
    """``LEVELS`` of all entries, linear between the two nearest; any shape, not empty."""
    flat = values.detach().float().cpu().numpy().reshape(-1)
    levels = np.quantile(flat, list(LEVELS.values()))
    return {name: float(value) for name, value in zip(LEVELS, levels, strict=True)}


def moments(values: Tensor) -> dict[str, float | None]:
    """``mean``, ``std`` (of the population), ``skewness``, ``kurtosis`` (excess; normal: 0).

    The last two are None where all values are equal.
    """
    flat = values.detach().double().flatten().cpu().numpy()
    std = float(flat.std())
    equal = std <= 1e-9 * max(1e-30, float(np.abs(flat).max()))
    return {
        "mean": float(flat.mean()),
        "std": std,
        "skewness": None if equal else float(skew(flat)),
        "kurtosis": None if equal else float(kurtosis(flat)),
    }


# How much each FFN changes the residual stream (docs/reference.md, "Budgets": the sensitivities).


def impact(seen: LayerActivations) -> dict[str, Any]:
    """``cosine``, ``change`` (mean, median, 5 % and 95 % over tokens) and ``s``, of two pairs.

    ``residual``, the stream before and after: cos(x, x + r) and ||r|| / ||x||.  ``output``, the
    stream and the FFN's output: cos(x, z) and ||z - x|| / ||x||.  ``s`` = (1 - mean cosine) x mean
    change is what the budgets ``depth-residual`` and ``depth`` weigh layers by.  One row; all
    tokens count.
    """
    x, z, r = (t[0].float() for t in (seen.x, seen.z, seen.r))
    pairs = {}
    for name, y, change in (("residual", x + r, r), ("output", z, z - x)):
        size = x.norm(dim=-1).clamp_min(EPS)
        cosine = (x * y).sum(-1) / (size * y.norm(dim=-1)).clamp_min(EPS)
        relative = change.norm(dim=-1) / size
        pairs[name] = {
            "cosine": _spread(cosine),
            "change": _spread(relative),
            "s": float((1 - cosine.mean()) * relative.mean()),
        }
    return pairs


def _spread(values: Tensor) -> dict[str, float]:
    kept = quantiles(values)
    return {"mean": float(values.mean()), **{n: kept[n] for n in ("median", "q05", "q95")}}


# Distributions: norms of the neurons' weights, and the activations on a text, per layer.

NEAR = (0.01, 0.1)
"""An activation counts as near zero below these shares of its token's root mean square."""

HELD = 0.9
"""The share of a token's squared activations whose fewest neurons are counted."""


def weight_norms(blocks: Sequence[FfnBlock]) -> list[dict[str, Any]]:
    """Per layer and matrix the distribution over neurons of the L2 norms of their weights.

    A neuron's weights are its row of gate and up and its column of down.  Raises ``ConfigError``
    when a layer is offloaded.
    """
    return [
        {name: {**quantiles(norms), **moments(norms)} for name, norms in _norms(block).items()}
        for block in blocks
    ]


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
    square; ``holds``: the smallest share of neurons that has ``HELD`` of a token's squared
    activations, mean over tokens.
    """
    u = u.float()
    size, rms = u.abs(), u.square().mean(-1, keepdim=True).sqrt().clamp_min(EPS)
    energy = u.square().sort(-1, descending=True).values.cumsum(-1)
    fewest = (energy < HELD * energy[:, -1:]).sum(-1) + 1
    return {
        "absolute": quantiles(size),
        "moments": moments(u),
        "zero": float((u == 0).float().mean()),
        "near": {f"{level:g}": float((size < level * rms).float().mean()) for level in NEAR},
        "holds": float(fewest.float().mean()) / u.shape[-1],
    }


WHOLE, FIRST, SECOND = "whole", "first", "second"
"""Parts of a text that evidence is kept of: all of it, and its halves."""


@dataclass(frozen=True)
class LayerReading:
    """One layer on one text of T tokens.

    ``squares``: sum over tokens of u^2, [I]; ``signed``: mean of u, [I]; ``evidence`` by part of
    the text; ``centre``: mean of x without the first tokens (sinks), [D]; ``stream``: x, [T, D], of
    the selected layer alone.  float32 on the host, evidence on the layer's device.
    """

    impact: dict[str, Any]
    activations: dict[str, Any]
    squares: Tensor
    signed: Tensor
    evidence: dict[str, LayerStatistics]
    centre: Tensor
    stream: Tensor | None


@dataclass
class Readings:
    """A model and the texts that are looked at; each text is read once, when it is needed."""

    model: Any
    tokenizer: Any
    settings: InspectSettings
    texts: Sequence[InspectText] = ()
    saver: Saver | None = None
    _read: dict[int, list[LayerReading]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.view: ModelView = describe(self.model)
        self.layer = self._layer()
        self.ids = [self._ids(text) for text in self.texts]

    def _layer(self) -> int:
        count, layer = len(self.view.blocks), self.settings.layer
        if layer is None:
            return count - 1
        if not 0 <= layer < count:
            raise ConfigError(f"--layer {layer} is out of range: this model has {count} layers")
        return layer

    def _ids(self, text: InspectText) -> Tensor:
        """[T]; special tokens as the tokenizer adds them."""
        ids: Tensor = self.tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]
        limit = min(self.settings.max_tokens, context_length(self.model) or len(ids))
        if len(ids) < 2:
            raise ConfigError(f"text {text.title} has {len(ids)} token(s): give a longer one")
        return ids[:limit]

    @cached_property
    def selector(self) -> MaskSelector:
        """The method that selects a text's neurons; ``ConfigError`` where it reads no text."""
        config = self.settings.prune_config()
        layers = self.view.weights(config.score.proxy_embedding, config.seed)
        selector = MaskSelector(_choosing(config), layers)
        if selector.removes_nothing:
            return selector
        return MaskSelector(config, self.knowing(config, layers))

    def knowing(self, config: PruneConfig, layers: Sequence[FfnWeights]) -> tuple[FfnWeights, ...]:
        """The layers with what ``config`` reads of the model: cached, or learned now."""
        cache_dir = self.settings.cache_dir
        return self_calibrate(self.model, config, layers, cache_dir, tokenizer=self.tokenizer)

    def reading(self, text: int) -> list[LayerReading]:
        """What every layer did on text 0 or 1."""
        if text not in self._read:
            self._read[text] = self._pass(text)
        return self._read[text]

    @torch.inference_mode()
    def _pass(self, text: int) -> list[LayerReading]:
        readings: dict[int, LayerReading] = {}
        selector = None
        with contextlib.suppress(ConfigError):  # raised where masks are requested
            selector = self.selector

        def take(layer: int, seen: LayerActivations) -> None:
            readings[layer] = self._layer_reading(layer, seen, selector)

        inspected, saver = self.texts[text], self.saver
        name = inspected.label.lower()
        keep = contextlib.nullcontext() if saver is None else saver.recording(name, inspected.text)
        with capture_activations(self.model, take), keep:
            self.model(self.ids[text][None].to(self.model.device), logits_to_keep=1)
        return [readings[index] for index in range(len(self.view.blocks))]

    def _layer_reading(
        self, layer: int, seen: LayerActivations, selector: MaskSelector | None
    ) -> LayerReading:
        u, x = seen.u[0].float(), seen.x[0].float()
        evidence = {} if selector is None else _evidence(seen, selector)
        return LayerReading(
            impact(seen),
            activations(u),
            u.square().sum(0).cpu(),
            u.mean(0).cpu(),
            evidence,
            (x[SINKS:] if len(x) > SINKS else x).mean(0).cpu(),
            x.cpu() if layer == self.layer else None,
        )

    def evidence(self, text: int, part: str = WHOLE) -> list[LayerStatistics]:
        """What ``selector`` needs to know of a part of a text, per layer."""
        self.selector  # noqa: B018 - raises where there is none
        return [layer.evidence[part] for layer in self.reading(text)]


def _choosing(config: PruneConfig) -> PruneConfig:
    """``config`` if it selects neurons by a text."""
    if config.method == "dense":
        raise ConfigError(f'method "{config.method}" removes no neuron: give one that does')
    if config.token is not None:
        raise ConfigError(f'method "{config.method}": {NO_MASK}; give another, e.g. griffin')
    if config.calibration is not None or SCORES.get(config.score.name).per_token is None:
        raise ConfigError(
            f'method "{config.method}" with score "{config.score.name}" does not select neurons by '
            "the text alone: give one that does, e.g. griffin"
        )
    return config


def _evidence(seen: LayerActivations, selector: MaskSelector) -> dict[str, LayerStatistics]:
    middle = seen.u.shape[1] // 2
    spans = {WHOLE: slice(None), FIRST: slice(0, middle), SECOND: slice(middle, None)}
    evidence = {}
    for part, span in spans.items():
        u, z, x = (t[None, :, span] for t in (seen.u, seen.z, seen.x))
        weights = None
        if selector.config.skip_sinks:
            weights = without_sinks(None, [float(span.start or 0)], 1, u.shape[2]).to(u.device)
        evidence[part] = LayerStatistics()
        selector.statistics.add([evidence[part]], LayerObservation(u, None, z, x), weights)
    return evidence
