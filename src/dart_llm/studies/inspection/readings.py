"""Run each text once, dense; record every layer's FFN impact, activations, and evidence for masks.

x is the residual stream that enters the FFN half of a layer.  u is the input of the down projection
(one value per neuron), and z is the output of the down projection.  r is the tensor that is added
to the stream; it differs from z, for example, where a norm follows.  Evidence means the statistics
from which a method selects the neurons of a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dart_llm.calibration.self_calibration import self_calibrate
from dart_llm.errors import ConfigError
from dart_llm.experiments.artifacts import Saver
from dart_llm.models.capture import LayerActivations, capture_activations
from dart_llm.models.describe import ModelView, context_length, describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.forward import without_sinks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.statistics import EPS, LayerStatistics
from dart_llm.pruning.weights import FfnWeights
from dart_llm.studies.inspection.settings import InspectSettings, InspectText

LEVELS = {"q05": 0.05, "median": 0.5, "q95": 0.95, "max": 1.0}
"""Reported quantiles, interpolated linearly between the two nearest values."""


def spread(values: Tensor) -> dict[str, float]:
    """Mean and ``LEVELS`` over all entries of a non-empty tensor."""
    flat = values.detach().float().cpu().numpy().reshape(-1)
    levels = np.quantile(flat, list(LEVELS.values()))
    return {"mean": float(flat.mean()), **dict(zip(LEVELS, map(float, levels), strict=True))}


def impact(recorded: LayerActivations) -> dict[str, Any]:
    """How an FFN changes the residual stream: ``cosine``, ``change``, ``s`` of two vector pairs.

    ``residual`` compares the stream before and after: cos(x, x + r) and ||r|| / ||x||.  ``output``
    compares the stream with the FFN's output: cos(x, z) and ||z - x|| / ||x||.  The budgets
    ``depth-residual`` and ``depth`` weigh layers by ``s`` = (1 - mean cosine) x mean change
    (docs/reference.md, "Budgets").  Uses the first batch row and all its tokens.
    """
    x, z, r = (t[0].float() for t in (recorded.x, recorded.z, recorded.r))
    pairs = {}
    for name, y, change in (("residual", x + r, r), ("output", z, z - x)):
        size = x.norm(dim=-1).clamp_min(EPS)
        cosine = (x * y).sum(-1) / (size * y.norm(dim=-1)).clamp_min(EPS)
        relative = change.norm(dim=-1) / size
        s = float((1 - cosine.mean()) * relative.mean())
        pairs[name] = {"cosine": spread(cosine), "change": spread(relative), "s": s}
    return pairs


NEAR = 0.1
"""Activations below this fraction of their token's root mean square count as near zero."""

ENERGY = 0.9
"""``concentrated`` is the smallest fraction of neurons that together have this share of a token's
sum of squared activations."""


def activations(u: Tensor) -> dict[str, Any]:
    """Quantiles of the absolute activations u [T, I], and measures of their sparsity.

    ``zero``: fraction of exact zeros; ``near``: fraction near zero; ``concentrated``: see
    ``ENERGY``, averaged over tokens.
    """
    u = u.float()
    size, rms = u.abs(), u.square().mean(-1, keepdim=True).sqrt().clamp_min(EPS)
    energy = u.square().sort(-1, descending=True).values.cumsum(-1)
    fewest = (energy < ENERGY * energy[:, -1:]).sum(-1) + 1
    return {
        "absolute": spread(size),
        "zero": float((u == 0).float().mean()),
        "near": float((size < NEAR * rms).float().mean()),
        "concentrated": float(fewest.float().mean()) / u.shape[-1],
    }


WHOLE, FIRST, SECOND = "whole", "first", "second"
"""The parts of a text for which evidence is recorded: the whole text, and its halves."""


@dataclass(frozen=True)
class LayerReading:
    """What was recorded in one layer on one text.

    ``squares``: sum over tokens of u^2, [I].  ``signed``: mean of u over tokens, [I].  Both are
    float32 on the CPU.  ``evidence``: statistics by part of the text, on the layer's device.
    """

    impact: dict[str, Any]
    activations: dict[str, Any]
    squares: Tensor
    signed: Tensor
    evidence: dict[str, LayerStatistics]


@dataclass
class Readings:
    """A model and the texts to inspect; each text is run once, when first needed."""

    model: Any
    tokenizer: Any
    settings: InspectSettings
    texts: Sequence[InspectText] = ()
    saver: Saver | None = None
    _read: dict[int, list[LayerReading]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.view: ModelView = describe(self.model)
        self.ids = [self._ids(text) for text in self.texts]

    def _ids(self, text: InspectText) -> Tensor:
        """Token ids [T], including the special tokens that the tokenizer adds."""
        ids: Tensor = self.tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]
        limit = min(self.settings.max_tokens, context_length(self.model) or len(ids))
        if len(ids) < 2:
            raise ConfigError(f"text {text.title} has {len(ids)} token(s): give a longer text")
        return ids[:limit]

    @cached_property
    def selector(self) -> MaskSelector:
        """Selects neurons from a text's evidence; raises ``ConfigError`` if the method cannot."""
        config = _check_selects_by_text(self.settings.prune_config())
        layers = self.view.weights(config.score.proxy_embedding, config.seed)
        return MaskSelector(config, self.calibrated(config, layers))

    def calibrated(
        self, config: PruneConfig, layers: Sequence[FfnWeights]
    ) -> tuple[FfnWeights, ...]:
        """The layers with the learned statistics that ``config`` needs, cached or learned now."""
        cache_dir = self.settings.cache_dir
        return self_calibrate(self.model, config, layers, cache_dir, tokenizer=self.tokenizer)

    def reading(self, text: int) -> list[LayerReading]:
        """What was recorded in all layers on text 0 (A) or 1 (B)."""
        if text not in self._read:
            self._read[text] = self._pass(text)
        return self._read[text]

    @torch.inference_mode()
    def _pass(self, text: int) -> list[LayerReading]:
        readings: dict[int, LayerReading] = {}
        selector = None
        with contextlib.suppress(ConfigError):  # ``evidence`` raises it again if masks are needed
            selector = self.selector

        def record(layer: int, recorded: LayerActivations) -> None:
            u = recorded.u[0].float()
            evidence = {} if selector is None else _evidence(recorded, selector)
            squares, signed = u.square().sum(0).cpu(), u.mean(0).cpu()
            readings[layer] = LayerReading(
                impact(recorded), activations(u), squares, signed, evidence
            )

        inspected, saver = self.texts[text], self.saver
        name = inspected.label.lower()
        saving = (
            contextlib.nullcontext() if saver is None else saver.recording(name, inspected.text)
        )
        with capture_activations(self.model, record), saving:
            self.model(self.ids[text][None].to(self.model.device), logits_to_keep=1)
        return [readings[index] for index in range(len(self.view.blocks))]

    def evidence(self, text: int, part: str = WHOLE) -> list[LayerStatistics]:
        """For each layer, the evidence of a part of a text, as ``selector`` needs it."""
        self.selector  # noqa: B018 - raises if the method ignores the text
        return [layer.evidence[part] for layer in self.reading(text)]


def _check_selects_by_text(config: PruneConfig) -> PruneConfig:
    """``config``; raises ``ConfigError`` unless it selects neurons by the sequence's text."""
    by_text = config.calibration is None and SCORES.get(config.score.name).per_token is not None
    if config.method == "dense" or config.token is not None or not by_text:
        raise ConfigError(
            f'method "{config.method}" with score "{config.score.name}" does not select the '
            "neurons of a sequence by its text alone: use one that does, e.g. griffin"
        )
    return config


def _evidence(recorded: LayerActivations, selector: MaskSelector) -> dict[str, LayerStatistics]:
    """A layer's evidence from the whole text and from each half, by part of the text."""
    middle = recorded.u.shape[1] // 2
    spans = {WHOLE: slice(None), FIRST: slice(0, middle), SECOND: slice(middle, None)}
    evidence = {}
    for part, span in spans.items():
        u, z, x = (t[None, :, span] for t in (recorded.u, recorded.z, recorded.x))
        weights = None
        if selector.config.skip_sinks:
            weights = without_sinks(None, [float(span.start or 0)], 1, u.shape[2]).to(u.device)
        evidence[part] = LayerStatistics()
        selector.statistics.add([evidence[part]], LayerObservation(u, None, z, x), weights)
    return evidence
