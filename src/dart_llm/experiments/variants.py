"""Methods by name, and variants of methods from a YAML file, for studies that compare them.

A variants file maps each label to the ``PruneConfig`` settings that differ from a method's preset;
the entry ``method`` names the method (default: dart)::

    no compensation: {compensation: false}
    uniform budget: {budget: uniform}
    griffin, compensated: {method: griffin, compensation: true}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, check_name
from dart_llm.files import read_yaml
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import SEQUENCE_METHOD, words

DENSE, GRIFFIN = "dense", "griffin"

NEVER = "never"

ORACLE = " (oracle)"
"""Suffix of the label of an oracle, a variant that gets new masks at the true topic change."""


@dataclass(frozen=True)
class Variant:
    """A way to prune at any sparsity; an ``oracle`` gets new masks at the true topic change."""

    label: str
    config: PruneConfig
    oracle: bool = False

    def at(self, sparsity: float, **overrides: Any) -> PruneConfig:
        """The configuration at ``sparsity``, the fraction removed; raises ``ConfigError``."""
        try:
            return self.config.replace({"sparsity": sparsity, **overrides})
        except ConfigError as error:
            raise ConfigError(f'the variant "{self.label}" cannot be used: {error}') from None


def parse(
    methods: Sequence[str],
    file: str | None,
    common: Mapping[str, Any],
    flags: Mapping[str, str] | None = None,
) -> list[Variant]:
    """Make a variant of every method in ``methods``, then read the variants in ``file``.

    ``common``: settings for all variants.  ``flags``: settings that a variant may not set,
    each with the flag that sets it.  Raises ``ConfigError`` for a repeated label, a method that
    removes no neurons, and an invalid file or setting; ``UnknownName`` for an unknown method.
    """
    rows = [(METHODS.check(name), {"method": name}, "") for name in methods]
    if file is not None:
        rows += _read(Path(file), {"sparsity": "--sparsities", **(flags or {})})
    variants: dict[str, Variant] = {}
    for label, settings, prefix in rows:
        try:
            variant = Variant(label, _build(settings, common))
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from None
        if label in (DENSE, *variants):
            raise ConfigError(f'the label "{label}" is already used: choose another label')
        if label.endswith(ORACLE) or not label.strip():
            problem = f'is empty or ends with "{ORACLE}"'
            raise ConfigError(f'the label "{label}" {problem}: choose another label')
        variants[label] = variant
    return list(variants.values())


def _read(path: Path, flags: Mapping[str, str]) -> list[tuple[str, dict[str, Any], str]]:
    """For every variant in a file: its label, its settings, and a prefix for error messages."""
    variants = read_yaml(path)
    if not variants:
        raise ConfigError(f"the variants file {path} is empty: write LABEL: {{SETTING: VALUE}}")
    rows = []
    for label, settings in variants.items():
        name = f'the variant "{label}" of {path}'
        if settings is not None and not isinstance(settings, Mapping):
            example = f"write {label}: {{compensation: false}}"
            raise ConfigError(f"{name} must be a mapping of settings: {example}")
        for key in flags.keys() & (settings or {}).keys():
            raise ConfigError(f"{name} sets {key}, which only {flags[key]} may set: remove it")
        rows.append((str(label), dict(settings or {}), f"{name}: "))
    return rows


def _build(settings: Mapping[str, Any], common: Mapping[str, Any]) -> PruneConfig:
    method = str(settings.get("method", SEQUENCE_METHOD))
    preset: PruneConfig = METHODS.get(method)
    if preset.sparsity == 0:
        reason = "removes no neurons, and the dense model is always measured"
        raise ConfigError(f"method {method} {reason}: leave this method out")
    overrides = {key: value for key, value in settings.items() if key != "method"}
    return preset.replace({**common, **overrides})


def oracles(variants: Sequence[Variant], labels: str | None) -> list[Variant]:
    """The oracles of variants: copies without a drift rule, with new masks at the topic change.

    ``labels``: comma-separated labels, or ``none``; None means all variants with a drift rule.
    """
    configs = {variant.label: variant.config for variant in variants}
    if labels is None:
        names = [label for label, config in configs.items() if config.drift.rule != NEVER]
    else:
        names = [] if words(labels) == ["none"] else words(labels)
    for name in names:
        check_name("variant for --oracle", name, configs)
    return [
        Variant(f"{name}{ORACLE}", configs[name].replace({"drift": {"rule": NEVER}}), True)
        for name in dict.fromkeys(names)
    ]
