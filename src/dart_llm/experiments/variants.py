"""Methods by name, and variants of methods from a YAML file, for studies that compare them.

A variants file maps labels to changes of a ``PruneConfig``; ``method`` names the preset to change
(default: dart)::

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
from dart_llm.settings import MASKED, words

DENSE, GRIFFIN = "dense", "griffin"

NEVER = "never"

ORACLE = " (oracle)"
"""Suffix of a variant that is re-masked at the true topic change, not by its detector."""


@dataclass(frozen=True)
class Variant:
    """A way to prune, at any sparsity.  ``oracle``: re-masked at the true topic change."""

    label: str
    config: PruneConfig
    oracle: bool = False

    def at(self, sparsity: float, **changes: Any) -> PruneConfig:
        """The configuration at ``sparsity``, the fraction removed; raises ``ConfigError``."""
        try:
            return self.config.replace({"sparsity": sparsity, **changes})
        except ConfigError as error:
            raise ConfigError(f'the variant "{self.label}" cannot be used: {error}') from None


def parse(
    methods: Sequence[str],
    file: str | None,
    changes: Mapping[str, Any],
    flags: Mapping[str, str] | None = None,
) -> list[Variant]:
    """Methods by name, then the variants of ``file``.

    ``changes``: settings for all configurations.  ``flags``: settings that a variant may not set,
    each with the flag that sets it.  Raises ``ConfigError`` for a repeated label, a method that
    removes nothing, and an invalid file or setting; ``UnknownName`` for an unknown method.
    """
    rows = [(METHODS.check(name), {"method": name}, "") for name in methods]
    if file is not None:
        rows += _read(Path(file), {"sparsity": "--sparsities", **(flags or {})})
    variants: dict[str, Variant] = {}
    for label, settings, prefix in rows:
        try:
            variant = Variant(label, _build(settings, changes))
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from None
        if label in (DENSE, *variants):
            raise ConfigError(f'the label "{label}" is taken: give each variant its own label')
        if label.endswith(ORACLE) or not label.strip():
            raise ConfigError(f'"{label}" cannot be the label of a variant: choose another label')
        variants[label] = variant
    return list(variants.values())


def _read(path: Path, flags: Mapping[str, str]) -> list[tuple[str, dict[str, Any], str]]:
    """The label, changes and error-message prefix of every variant in a file."""
    variants = read_yaml(path)
    if not variants:
        raise ConfigError(f"the variants file {path} is empty: write LABEL: {{SETTING: VALUE}}")
    rows = []
    for label, changes in variants.items():
        name = f'the variant "{label}" of {path}'
        if changes is not None and not isinstance(changes, Mapping):
            raise ConfigError(f"{name} has no settings: write {label}: {{compensation: false}}")
        for key in flags.keys() & (changes or {}).keys():
            raise ConfigError(f"{name} sets the {key}, which only {flags[key]} may set: drop it")
        rows.append((str(label), dict(changes or {}), f"{name}: "))
    return rows


def _build(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> PruneConfig:
    method = str(settings.get("method", MASKED))
    preset: PruneConfig = METHODS.get(method)
    if preset.sparsity == 0:
        raise ConfigError(f"method {method} removes nothing, and dense runs anyway: leave it out")
    return preset.replace({**changes, **{k: v for k, v in settings.items() if k != "method"}})


def oracles(variants: Sequence[Variant], labels: str | None) -> list[Variant]:
    """Variants that are re-masked at the true topic change.

    ``labels``: comma-separated labels, or ``none``; None: all variants with a drift rule.
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
