"""A setting that ``dart-llm tune`` chose for a model, kept in a file: ``file:setting.yaml``.

It can be named wherever a method can.  The file has what was measured, for people, and
``setting``: ``weights`` (their format, as ``load`` takes it), ``method``, and what else differs
from the method's preset, as in a variants file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.files import read_yaml, write_text
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS, SETTING

HEAD = '# Found by dart-llm tune; use it by --method file:{name}, or prune(model, "file:{name}").\n'

SECTIONS = ("origin", "model", "measured", "setting")

LAST = "complete"
"""The last key of a file that ``save`` wrote: one that was cut off would be another setting."""


@dataclass(frozen=True)
class KeptSetting:
    """``weights``: as ``load`` takes it; None: as they come.

    ``model``: the checkpoint that was measured: name, sha256, parameters.  ``measured``: loss, time
    and what they were measured on.  ``origin``: date and version.
    """

    config: PruneConfig
    weights: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write as YAML, whole; raises ``ResultsError`` where that cannot be."""
        import yaml

        path = Path(path)
        setting = {"weights": self.weights, **changes_of(self.config)}
        parts = {**{name: dict(getattr(self, name)) for name in SECTIONS[:-1]}, "setting": setting}
        text = yaml.safe_dump({**parts, LAST: True}, sort_keys=False, width=100)
        with contextlib.suppress(OSError):  # the next step says what is wrong with it
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, HEAD.format(name=path.name) + text)
        return path


def changes_of(config: PruneConfig) -> dict[str, Any]:
    """``method``, and what differs from its preset; of parts only what differs in them."""
    preset = METHODS.get(config.method).to_dict()
    changes: dict[str, Any] = {"method": config.method}
    for name, value in config.to_dict().items():
        before = preset.get(name)
        if value == before:
            continue
        if isinstance(value, Mapping):
            usual = before if isinstance(before, Mapping) else {}
            value = {key: new for key, new in value.items() if new != usual.get(key, ...)}
        changes[name] = value
    return changes


def path_of(method: str) -> Path | None:
    """The file behind ``file:...``; None for the name of a method."""
    if not method.startswith(SETTING):
        return None
    return Path(os.path.expanduser(method[len(SETTING) :]))  # not Path's: it fails for no user


def read_setting(path: Path) -> KeptSetting:
    """Raises ``ConfigError``, one sentence, for a file that is missing or has no setting."""
    again = f"by dart-llm tune --save {path}"
    if not path.is_file():
        raise ConfigError(
            f"there is no setting file {path}: dart-llm tune --save {path} writes one"
        )
    data = read_yaml(path)
    setting = data.get("setting")
    if not isinstance(setting, Mapping) or "method" not in setting:
        raise ConfigError(
            f"{path} is not a setting file, for it has no setting with a method: write one {again}"
        )
    if SECTIONS[0] in data and data.get(LAST) is not True:
        raise ConfigError(
            f"{path} is cut off, for its last line, {LAST}: true, is missing: write it again "
            f"{again}"
        )
    changes = {str(name): value for name, value in setting.items()}
    method, weights = changes.pop("method"), changes.pop("weights", None)
    sections = {name: data.get(name) or {} for name in SECTIONS[:-1]}
    for name, value in sections.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} in {path} must hold names and values")
    if not isinstance(method, str) or method.startswith(SETTING):
        raise ConfigError(f"the setting in {path} names no method: write one of dart-llm methods")
    if not (weights is None or isinstance(weights, str)):
        raise ConfigError(f"weights in {path} must be a word as --weights takes it, not {weights}")
    try:
        config = PruneConfig.build(method, **changes)
    except ConfigError as error:
        raise ConfigError(f"the setting in {path}: {error}") from None
    return KeptSetting(config, weights, **sections)


def kept_setting(method: str) -> KeptSetting | None:
    """The setting behind ``file:...``; None for the name of a method."""
    path = path_of(method)
    return None if path is None else read_setting(path)


def method_of(method: str) -> PruneConfig:
    """The configuration behind ``file:...``, read anew each time: it may have changed."""
    return read_setting(Path(str(path_of(method)))).config
