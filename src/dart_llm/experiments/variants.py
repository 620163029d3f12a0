"""What ``dart-llm bench quality`` compares: methods by name, and variants from a YAML file.

A variants file maps labels to changes of a ``PruneConfig``; ``method`` names the preset that they
change (default: dart)::

    no compensation: {compensation: false}
    uniform budget: {budget: uniform}
    griffin, compensated: {method: griffin, compensation: true}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import read_yaml
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS

DENSE, GRIFFIN = "dense", "griffin"

NEVER = "never"

ORACLE = " (oracle)"
"""Ends the label of a variant that is re-masked at the known moment instead of by its detector."""


@dataclass(frozen=True)
class Variant:
    """One way to prune, at any sparsity.  ``oracle``: told the moment of the change of topic."""

    label: str
    config: PruneConfig
    oracle: bool = False

    def at(self, sparsity: float) -> PruneConfig:
        """The configuration at ``sparsity``, the fraction to remove."""
        return self.config.replace({"sparsity": sparsity})


def parse(
    methods: str,
    file: str | None,
    oracle: str | None,
    changes: Mapping[str, Any],
    sparsity: float,
) -> tuple[Variant, ...]:
    """The variants in order, GRIFFIN first, those that are told the moment last.

    ``oracle``: labels with commas between them, or ``none``; None: all whose drift rule is live.
    ``changes``: what is set on every configuration.  ``sparsity``: one that each must accept.
    Raises ``ConfigError`` for a name that does not exist or occurs twice, for a method that
    removes nothing, and for a file or a setting that cannot be used.
    """
    found = [Variant(GRIFFIN, _build(GRIFFIN, {}, changes))]
    for name in (word.strip() for word in methods.split(",")):
        if name and name != GRIFFIN:
            _add(found, Variant(METHODS.check(name), _build(name, {}, changes)))
    for label, own in (read_variants(Path(file)) if file else {}).items():
        try:
            config = _build(str(own.get("method", "dart")), own, changes)
        except ConfigError as error:
            raise ConfigError(f'the variant "{label}" of {file}: {error}') from None
        _add(found, Variant(label, config))
    for one in found:
        try:
            one.at(sparsity)
        except ConfigError as error:
            raise ConfigError(f'the variant "{one.label}" takes no sparsity: {error}') from None
    return (*found, *_oracles(found[1:], oracle))


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """Labels and changes of a variants file; raises ``ConfigError`` when it cannot be used."""
    found: dict[str, dict[str, Any]] = {}
    for label, changes in read_yaml(path).items():
        if changes is not None and not isinstance(changes, Mapping):
            raise ConfigError(
                f'the variant "{label}" of {path} must hold settings: write '
                f"{label}: {{compensation: false}}"
            )
        if "sparsity" in (changes or {}):
            raise ConfigError(
                f'the variant "{label}" of {path} sets a sparsity, which --sparsities does: drop it'
            )
        found[str(label)] = dict(changes or {})
    if not found:
        raise ConfigError(f"the variants file {path} is empty: write LABEL: {{SETTING: VALUE}}")
    return found


def _build(method: str, own: Mapping[str, Any], changes: Mapping[str, Any]) -> PruneConfig:
    preset = METHODS.get(method)
    if preset.sparsity == 0:
        raise ConfigError(
            f"method {method} removes nothing, and the gap to dense is what is measured: leave it "
            "out"
        )
    given = {key: value for key, value in own.items() if key != "method"}
    return preset.replace({**changes, **given})


def _add(found: list[Variant], one: Variant) -> None:
    if one.label in (DENSE, *(other.label for other in found)):
        raise ConfigError(f'the label "{one.label}" is taken: give each variant its own')
    if one.label.endswith(ORACLE) or not one.label.strip():
        raise ConfigError(f'"{one.label}" cannot be the label of a variant: give it another one')
    found.append(one)


def _oracles(found: Sequence[Variant], asked: str | None) -> list[Variant]:
    known = {one.label: one for one in found}
    if asked is None:
        names = [one.label for one in found if one.config.drift.rule != NEVER]
    else:
        names = [word.strip() for word in asked.split(",") if word.strip()]
        names = [] if names == ["none"] else names
    for name in names:
        if name not in known:
            raise UnknownName("variant for --oracle", name, known)
    return [
        Variant(f"{name}{ORACLE}", known[name].config.replace({"drift": {"rule": NEVER}}), True)
        for name in dict.fromkeys(names)
    ]
