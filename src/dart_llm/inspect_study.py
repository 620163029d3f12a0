"""One pass of a text through the dense model, and what is kept of it per layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dart_llm.activations import Seen, tap
from dart_llm.activations_files import Saver
from dart_llm.arch import ModelView, context_length, describe
from dart_llm.config import PruneConfig
from dart_llm.drift import SINKS
from dart_llm.errors import ConfigError
from dart_llm.evidence import LayerEvidence
from dart_llm.inspect_layers import impact
from dart_llm.inspect_texts import InspectText
from dart_llm.inspect_weights import activations
from dart_llm.learn import learn
from dart_llm.reference import without_sinks
from dart_llm.select import Selector, check_fits
from dart_llm.settings_inspect import InspectSettings
from dart_llm.token_select import NO_MASK
from dart_llm.weights import FfnWeights

WHOLE, FIRST, SECOND = "whole", "first", "second"
"""Parts of a text that evidence is kept of: all of it, and its halves."""


@dataclass(frozen=True)
class LayerReading:
    """One layer on one text of T tokens.

    ``squares``: sum over tokens of u^2, [I]; ``signed``: mean of u, [I]; ``evidence`` by part of
    the text; ``centre``: mean of x without the first tokens (sinks), [D]; ``stream``: x, [T, D], of
    the chosen layer alone.  float32 on the host, evidence on the layer's device.
    """

    impact: dict[str, Any]
    activations: dict[str, Any]
    squares: Tensor
    signed: Tensor
    evidence: dict[str, LayerEvidence]
    centre: Tensor
    stream: Tensor | None


@dataclass
class Study:
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
        count, asked = len(self.view.blocks), self.settings.layer
        if asked is None:
            return count - 1
        if not 0 <= asked < count:
            raise ConfigError(f"--layer {asked} is out of range: this model has {count} layers")
        return asked

    def _ids(self, text: InspectText) -> Tensor:
        """[T]; special tokens as the tokenizer adds them."""
        ids: Tensor = self.tokenizer(text.text, return_tensors="pt", verbose=False).input_ids[0]
        limit = min(self.settings.max_tokens, context_length(self.model) or len(ids))
        if len(ids) < 2:
            raise ConfigError(f"text {text.title} has {len(ids)} token(s): give a longer one")
        return ids[:limit]

    @cached_property
    def selector(self) -> Selector:
        """The method that chooses a text's neurons; ``ConfigError`` where none would do so."""
        config = self.settings.prune_config()
        layers = self.view.weights(config.score.proxy_embedding, config.seed)
        found = check_fits(_choosing(config), layers)
        if found.removes_nothing:
            return found
        return check_fits(config, self.knowing(config, layers))

    def knowing(self, config: PruneConfig, layers: Sequence[FfnWeights]) -> tuple[FfnWeights, ...]:
        """The layers with what ``config`` reads of the model: found, or learnt and kept."""
        cache_dir = self.settings.cache_dir
        return learn(self.model, config, layers, cache_dir, tokenizer=self.tokenizer)

    def reading(self, text: int) -> list[LayerReading]:
        """What every layer did on text 0 or 1."""
        if text not in self._read:
            self._read[text] = self._pass(text)
        return self._read[text]

    @torch.inference_mode()
    def _pass(self, text: int) -> list[LayerReading]:
        found: dict[int, LayerReading] = {}
        selector = self._may_select()

        def take(layer: int, seen: Seen) -> None:
            found[layer] = self._layer_reading(layer, seen, selector)

        given, saver = self.texts[text], self.saver
        name = given.label.lower()
        keep = contextlib.nullcontext() if saver is None else saver.recording(name, given.text)
        with tap(self.model, take), keep:
            self.model(self.ids[text][None].to(self.model.device), logits_to_keep=1)
        return [found[index] for index in range(len(self.view.blocks))]

    def _may_select(self) -> Selector | None:
        try:
            return self.selector
        except ConfigError:  # said where masks are asked for: other sections need none
            return None

    def _layer_reading(self, layer: int, seen: Seen, selector: Selector | None) -> LayerReading:
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

    def evidence(self, text: int, part: str = WHOLE) -> list[LayerEvidence]:
        """What ``selector`` needs to know of a part of a text, per layer."""
        self.selector  # noqa: B018 - raises where there is none
        return [layer.evidence[part] for layer in self.reading(text)]


def _choosing(config: PruneConfig) -> PruneConfig:
    """``config`` when it chooses neurons by a text."""
    from dart_llm.registry import SCORES

    if config.method == "dense" or config.weight_bits is not None:
        raise ConfigError(f'method "{config.method}" removes no neuron: give one that does')
    if config.token is not None:
        raise ConfigError(f'method "{config.method}": {NO_MASK}; give another, e.g. griffin')
    if config.calibration is not None or SCORES.get(config.score.name).per_token is None:
        raise ConfigError(
            f'method "{config.method}" with score "{config.score.name}" does not choose neurons by '
            "the text alone: give one that does, e.g. griffin"
        )
    return config


def _evidence(seen: Seen, selector: Selector) -> dict[str, LayerEvidence]:
    middle = seen.u.shape[1] // 2
    spans = {WHOLE: slice(None), FIRST: slice(0, middle), SECOND: slice(middle, None)}
    found = {}
    for part, span in spans.items():
        u, z, x, r = (t[:, span] for t in (seen.u, seen.z, seen.x, seen.r))
        weights = None
        if selector.config.skip_sinks:
            weights = without_sinks(None, [float(span.start or 0)], 1, u.shape[1]).to(u.device)
        found[part] = LayerEvidence()
        selector.statistics.update(found[part], u, z, x, r, weights)
    return found
