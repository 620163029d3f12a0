"""What the server is started with, and what a request asks for; both validated before any forward.

A request names its settings in ``extra_args`` (``vllm_xargs`` in a request to the server):

=================  ==============================================================================
``dart``           a method of dart_llm, such as ``griffin``; ``dense`` turns the defaults off
``dart_sparsity``  fraction of FFN neurons to remove, [0, 1)
``dart_settings``  further settings of ``dart_llm.prune``, as a mapping or as its JSON text
``dart_masks``     name of a mask that the server loaded, instead of the three above
=================  ==============================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import Part, PruneConfig
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.weights import FfnWeights

PREFIX = "dart"
KEYS = ("dart", "dart_sparsity", "dart_settings", "dart_masks")

NEED_EMBEDDING = ("max", "mean", "combined", "product")
"""Scores that read the vocabulary's embedding, which this plug-in does not pass on."""


STREAM_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text")
"""Model types in which the residual stream before the FFN is known to be what a norm returns."""


class ServerSettings(Part):
    """The mapping ``dart`` of vLLM's ``--additional-config``.

    ``method``, ``sparsity`` and ``settings``: defaults of requests that do not name a method; with
    no ``method``, such requests run dense.  ``learn``: methods whose learned statistics are loaded
    (or learned, once per model) at the start.  ``cache_dir``: where these are kept; None means
    ``DART_CACHE``.  ``masks``: a masks.safetensors, to which all requests are narrowed for good.
    ``shared``: names of further mask files, which requests can choose.
    """

    called = "dart"

    method: str | None = None
    sparsity: float | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    learn: tuple[str, ...] = ()
    cache_dir: str | None = None
    masks: str | None = None
    shared: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def from_additional_config(cls, additional: Any) -> ServerSettings:
        """Read vLLM's ``additional_config``; raises ``ConfigError`` for values that do not fit."""
        part = additional.get(PREFIX, {}) if isinstance(additional, Mapping) else {}
        settings = cls.model_validate(part)
        if settings.masks is not None and (settings.method or settings.shared or settings.learn):
            raise ConfigError(
                "dart.masks narrows the model for all requests, so no request can choose its own "
                "masks: drop method, shared and learn, or give the file under shared"
            )
        if settings.method is None and (settings.sparsity is not None or settings.settings):
            raise ConfigError(
                'the default sparsity and settings need a method: "method": "griffin"'
            )
        return settings

    def learned_configs(self) -> list[PruneConfig]:
        """The configurations whose statistics are learned at the start."""
        configs = [PruneConfig.build(name) for name in self.learn]
        if self.method is not None:
            configs.append(build_config(self.method, self.sparsity, self.settings))
        return [config for config in configs if config.self_stats is not None]


@dataclass(frozen=True)
class Asked:
    """What a request asks for: masks chosen by ``config``, or the loaded mask named ``shared``."""

    config: PruneConfig
    shared: str | None = None


def build_config(method: str, sparsity: float | None, settings: Mapping[str, Any]) -> PruneConfig:
    """The configuration of a method; raises ``ConfigError`` if vLLM's requests cannot run it."""
    config = PruneConfig.build(method, sparsity=sparsity, **settings)
    if reason := _unsupported_reason(config):
        raise ConfigError(
            f"method {config.method!r} {reason}, which is not supported in vLLM: use griffin, "
            "griffin-refresh, dart-prompt or dart"
        )
    return config


def _unsupported_reason(config: PruneConfig) -> str | None:
    if config.sparsity == 0.0:
        return None
    if config.token is not None:
        return "lets every token select its own neurons"
    if config.calibration is not None:
        return "takes its masks from a calibration"
    if config.screens:
        return "screens the output head"
    if config.score.name in NEED_EMBEDDING:
        return f"ranks neurons by score {config.score.name!r}, which reads the embedding"
    if config.executor not in ("auto", "masked"):
        return f"asks for executor {config.executor!r}"
    return None


def learning_key(config: PruneConfig) -> str:
    """Identifies the learned statistics that a configuration needs."""
    parts = {"self_stats", "score", "budget", "compensation", "compensation_rank", "seed"}
    return config.model_dump_json(include=parts)


class Requests:
    """Reads what requests ask for.

    ``layers``: the FFNs' shapes, for settings that name layers; weights may be on the device meta.
    ``model_type``: that of the model's text configuration.
    """

    def __init__(
        self, settings: ServerSettings, layers: Sequence[FfnWeights], model_type: str
    ) -> None:
        self.settings, self.layers, self.model_type = settings, tuple(layers), model_type
        self.learned = {learning_key(config) for config in settings.learned_configs()}
        for config in settings.learned_configs():
            MaskSelector(config, self.layers)
        self.default = self.read({})

    def read(self, extra: Mapping[str, Any] | None) -> Asked | None:
        """What ``extra_args`` ask for; None means dense.

        Raises ``ConfigError`` with one sentence for values that cannot be used.
        """
        named = {key: value for key, value in (extra or {}).items() if key.startswith(PREFIX)}
        for key in named:
            if key not in KEYS:
                raise UnknownName("request argument", key, KEYS)
        named = {key: value for key, value in named.items() if value is not None}
        if named and self.settings.masks is not None:
            raise ConfigError(
                f"this server narrowed the model to {self.settings.masks} for all requests: leave "
                f"out {', '.join(named)}"
            )
        if "dart_masks" in named:
            return self._shared(named)
        return self._chosen(named)

    def _shared(self, named: Mapping[str, Any]) -> Asked:
        if len(named) > 1:
            raise ConfigError("dart_masks names a loaded mask: leave out the other dart arguments")
        name = named["dart_masks"]
        if not isinstance(name, str) or name not in self.settings.shared:
            raise UnknownName("mask", str(name), self.settings.shared)
        return Asked(PruneConfig.build("static"), name)

    def _chosen(self, named: Mapping[str, Any]) -> Asked | None:
        method = named.get("dart", self.settings.method)
        if method is None:
            if named:
                raise ConfigError(f'{next(iter(named))} needs a method, such as "dart": "griffin"')
            return None
        if not isinstance(method, str):
            raise ConfigError(f'dart = {method!r} must be the name of a method, such as "griffin"')
        is_default = method == self.settings.method
        sparsity = named.get("dart_sparsity", self.settings.sparsity if is_default else None)
        settings = _mapping(named.get("dart_settings", {}))
        if is_default:
            settings = {**self.settings.settings, **settings}
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | None):
            raise ConfigError(f"dart_sparsity = {sparsity!r} must be a number in [0, 1)")
        config = build_config(method, sparsity, settings)
        selector = MaskSelector(config, self.layers)  # raises if the settings do not fit the model
        if selector.removes_nothing:
            return None
        if selector.statistics.needs_stream and self.model_type not in STREAM_TYPES:
            raise ConfigError(
                f"budget {config.budget.name!r} reads the residual stream, which is not known in "
                f"models of type {self.model_type!r}: use another budget"
            )
        if config.self_stats is not None and learning_key(config) not in self.learned:
            raise ConfigError(
                f"method {config.method!r} with these settings needs statistics that this server "
                f'did not learn: start it with --additional-config \'{{"dart": {{"learn": '
                f'["{config.method}"]}}}}\', or use griffin'
            )
        return Asked(config)


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    taken = {"method", "sparsity", "executor", "batch"}
    if not isinstance(value, Mapping) or taken & {*value}:
        raise ConfigError(
            "dart_settings must be a mapping, or its JSON text, of settings of dart_llm.prune "
            f"other than {', '.join(sorted(taken))}"
        )
    return value


def shapes_of(text_config: Any) -> tuple[FfnWeights, ...]:
    """Layers of the right shapes without weights, from a model's text configuration."""
    count, hidden = int(text_config.num_hidden_layers), int(text_config.hidden_size)
    width = getattr(text_config, "intermediate_size", None)
    widths = [*width] if isinstance(width, list | tuple) else [width] * count
    layers = []
    for index, neurons in enumerate(widths):
        up = torch.empty((int(neurons or 1), hidden), device="meta")
        layers.append(FfnWeights(index, index / max(1, count - 1), up, up, up.t()))
    return tuple(layers)
