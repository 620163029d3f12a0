"""Setting files: a setting that ``dart-llm tune`` chose for a model, named ``file:setting.yaml``.

Such a name can be used instead of a method's.  The file has the measurements, for people, and
``setting``: ``weights`` (a format, as in ``load``), ``method``, and all that differs from the
method's preset, as in a variants file.
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

HEAD = '# Written by dart-llm tune.  Use --method file:{name}, or prune(model, "file:{name}").\n'

FACTS = ("origin", "model", "measured")


@dataclass(frozen=True)
class KeptSetting:
    """A configuration and its ``weights`` format, as in ``load``; None: that of the checkpoint.

    ``model``: the measured checkpoint: name, sha256, parameters.  ``measured``: loss, time, and
    text and machine of the measurement.  ``origin``: date and version.
    """

    config: PruneConfig
    weights: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write as YAML, atomically; raises ``ResultsError`` if that fails."""
        import yaml

        path = Path(path)
        facts = {name: dict(getattr(self, name)) for name in FACTS}
        setting = {"weights": self.weights, **changes_of(self.config)}
        with contextlib.suppress(OSError):  # the next step reports the reason
            path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({**facts, "setting": setting}, sort_keys=False, width=100)
        write_text(path, HEAD.format(name=path.name) + text)
        return path


def changes_of(config: PruneConfig) -> dict[str, Any]:
    """``method``, and settings that differ from its preset, also within parts."""
    preset = METHODS.get(config.method).to_dict()
    changes: dict[str, Any] = {"method": config.method}
    for name, value in config.to_dict().items():
        before = preset.get(name)
        if isinstance(value, Mapping) and value != before:
            usual = before or {}
            value = {key: new for key, new in value.items() if new != usual.get(key, ...)}
        if value != before:
            changes[name] = value
    return changes


def path_of(method: str) -> Path | None:
    """The path in ``file:...``; None for the name of a method."""
    if not method.startswith(SETTING):
        return None
    return Path(os.path.expanduser(method[len(SETTING) :]))  # Path's raises for an unknown user


def read_setting(path: Path) -> KeptSetting:
    """The setting in a file; raises ``ConfigError`` if it is missing or has no setting."""
    if not path.is_file():
        raise ConfigError(
            f"there is no setting file {path}: dart-llm tune --save {path} writes one"
        )
    data = read_yaml(path)
    setting, facts = data.get("setting"), {name: data.get(name) or {} for name in FACTS}
    changes = dict(setting) if isinstance(setting, Mapping) else {}
    method, weights = changes.pop("method", None), changes.pop("weights", None)
    if (
        not isinstance(method, str)
        or method.startswith(SETTING)
        or not isinstance(weights, str | None)
        or not all(isinstance(value, Mapping) for value in facts.values())
    ):
        raise ConfigError(
            f"{path} is not a setting file: its setting must name a method, and weights as "
            f"--weights takes them; write one by dart-llm tune --save {path}"
        )
    try:
        config = PruneConfig.build(method, **{str(name): value for name, value in changes.items()})
    except ConfigError as error:
        raise ConfigError(f"the setting in {path}: {error}") from None
    return KeptSetting(config, weights, **facts)


def kept_setting(method: str) -> KeptSetting | None:
    """The setting in ``file:...``; None for the name of a method."""
    path = path_of(method)
    return None if path is None else read_setting(path)


def method_of(method: str) -> PruneConfig:
    """The configuration in ``file:...``, read again each time: the file may have changed."""
    return read_setting(Path(str(path_of(method)))).config
