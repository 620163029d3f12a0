"""Setting files: YAML files with a setting that ``dart-llm tune`` chose for a model.

The name ``file:setting.yaml`` can be used instead of a method's name.  The mapping ``setting`` of
the file has ``weights`` (a weight format, as for ``load``), ``method``, and all settings that
differ from the method's preset.  The rest of the file documents the measurement.
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

METADATA = ("origin", "model", "measured")
"""The file's keys besides ``setting``."""


@dataclass(frozen=True)
class KeptSetting:
    """The content of a setting file: a configuration and how it was measured.

    ``weights``: the weight format, as for ``load``; None means the checkpoint's format.  ``model``:
    name, sha256 and parameters of the measured checkpoint.  ``measured``: the loss, the time, the
    text and the machine of the measurement.  ``origin``: date and version.
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
        metadata = {name: dict(getattr(self, name)) for name in METADATA}
        setting = {"weights": self.weights, **changes_of(self.config)}
        with contextlib.suppress(OSError):  # write_text will raise the error
            path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({**metadata, "setting": setting}, sort_keys=False, width=100)
        write_text(path, HEAD.format(name=path.name) + text)
        return path


def changes_of(config: PruneConfig) -> dict[str, Any]:
    """``method`` and the settings, also within groups, that differ from the method's preset."""
    preset = METHODS.get(config.method).to_dict()
    changes: dict[str, Any] = {"method": config.method}
    for name, value in config.to_dict().items():
        default = preset.get(name)
        if isinstance(value, Mapping) and value != default:
            defaults = default or {}
            value = {key: new for key, new in value.items() if new != defaults.get(key, ...)}
        if value != default:
            changes[name] = value
    return changes


def path_of(method: str) -> Path | None:
    """The path in ``file:...``; None if ``method`` is a method's name."""
    if not method.startswith(SETTING):
        return None
    # not Path.expanduser, which raises an exception for a user that does not exist
    return Path(os.path.expanduser(method[len(SETTING) :]))


def read_setting(path: Path) -> KeptSetting:
    """Read a setting file; raises ``ConfigError`` if it does not exist or is not valid."""
    if not path.is_file():
        raise ConfigError(
            f"there is no setting file {path}: dart-llm tune --save {path} writes one"
        )
    data = read_yaml(path)
    setting, metadata = data.get("setting"), {name: data.get(name) or {} for name in METADATA}
    changes = dict(setting) if isinstance(setting, Mapping) else {}
    method, weights = changes.pop("method", None), changes.pop("weights", None)
    if (
        not isinstance(method, str)
        or method.startswith(SETTING)
        or not isinstance(weights, str | None)
        or not all(isinstance(value, Mapping) for value in metadata.values())
    ):
        raise ConfigError(
            f"{path} is not a setting file: its setting must name a method, and its weights, if "
            f"any, must be a value of --weights; write one with dart-llm tune --save {path}"
        )
    try:
        config = PruneConfig.build(method, **{str(name): value for name, value in changes.items()})
    except ConfigError as error:
        raise ConfigError(f"the setting in {path}: {error}") from None
    return KeptSetting(config, weights, **metadata)


def kept_setting(method: str) -> KeptSetting | None:
    """The setting in the file that ``file:...`` names; None if ``method`` is a method's name."""
    path = path_of(method)
    return None if path is None else read_setting(path)


def method_of(method: str) -> PruneConfig:
    """The configuration in ``file:...``, read at every call because the file may have changed."""
    return read_setting(Path(str(path_of(method)))).config
