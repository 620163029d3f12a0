"""The one place that lists everything that can be chosen by name.

A built-in is one line in a table below, imported on first use.  Others register with
``SCORES.register("name", score)``, in a file that ``--plugin`` names too, or through
the entry-point group that the registry names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import file_sha256

SETTING = "file:"
"""Begins the name of a method whose setting is kept in a file."""


class Registry:
    """Names mapped to objects, or to a lazy ``"module:attribute"``.

    ``kind``: the word for messages; ``group``: the entry-point group of other packages.
    ``read_file``: lazy too, the function of names that begin with ``SETTING``; "": there is none.
    """

    def __init__(self, kind: str, group: str, lazy: dict[str, str], read_file: str = "") -> None:
        self.kind, self.group = kind, group
        self._built_in = frozenset(lazy)
        self._lazy = dict(lazy)
        self._objects: dict[str, Any] = {}
        self._read_file = read_file
        self._scanned = False

    def register(self, name: str, value: Any) -> Any:
        """Add ``value`` under ``name``; a name that is taken raises ``ConfigError``.

        That of an entry point is free: the module behind it may register its object by hand too.
        """
        if name in self._built_in or name in self._objects:
            raise ConfigError(f"{self.kind} {name!r} is already registered: take another name")
        self._objects[name] = value
        return value

    def unregister(self, name: str) -> None:
        """Take back what ``register`` added."""
        self._objects.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All listed names, sorted."""
        load_plugin()
        if not self._scanned:
            self._scanned = True
            for point in entry_points(group=self.group):
                self._lazy.setdefault(point.name, point.value)
        return tuple(sorted({*self._lazy, *self._objects}))

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def check(self, name: str) -> str:
        """Return ``name`` where there is an object; raise ``UnknownName`` with the near names."""
        if self._read_file and name.startswith(SETTING):
            self.get(name)
        elif name not in (names := self.names()):
            raise UnknownName(self.kind, name, names, plugin_hint())
        return name

    def get(self, name: str) -> Any:
        """The object behind ``name``, imported on first use; raises ``UnknownName``."""
        if self._read_file and name.startswith(SETTING):
            return _imported(self._read_file)(name)
        return self.get_listed(name)

    def get_listed(self, name: str) -> Any:
        """Like ``get``, for names received over the network: opens no file."""
        if name not in (names := self.names()):
            raise UnknownName(self.kind, name, names, plugin_hint())
        if name not in self._objects:
            self._objects[name] = _imported(self._lazy[name])
        return self._objects[name]


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _table(module: str, names: str, attribute: Callable[[str], str] = str) -> dict[str, str]:
    """Register import paths of objects; ``attribute``: the name there, from name_name."""
    return {
        name: f"dart_llm.pruning.{module}:{attribute(name.replace('-', '_'))}"
        for name in names.split()
    }


METHODS = Registry(
    "method",
    "dart_llm.methods",
    _table(
        "methods",
        "dense random static wanda flap griffin griffin-refresh glass published dart dart-prompt "
        "dart-token teal teal-attention wina cats countdown prox",
        str.upper,
    ),
    "dart_llm.pruning.setting_file:method_of",
)
"""Methods: names of a ``PruneConfig``.  Entry-point group ``dart_llm.methods``."""

SCORES = Registry(
    "score",
    "dart_llm.scores",
    _table(
        "scores",
        "magnitude normalized contribution fisher wanda flap weight random combined product",
    )
    | _table("scores", "max mean", "{}_proxy".format),
)
"""``Score``s of neurons.  Entry-point group ``dart_llm.scores``."""

BUDGETS = Registry(
    "budget", "dart_llm.budgets", _table("budgets", "uniform depth energy ranked standardized")
)
"""``Budget``s of layers.  Entry-point group ``dart_llm.budgets``."""

DRIFT_RULES = Registry(
    "drift rule",
    "dart_llm.drift_rules",
    _table("drift", "published paper dart windows interval never"),
)
"""Drift rules: functions that return a ``Rule``.  Entry-point group ``dart_llm.drift_rules``."""

TOKEN_RULES = Registry(
    "token rule",
    "dart_llm.token_rules",
    {
        "low-bit": "dart_llm.pruning.token_rules.low_bit:LowBit",
        "prox": "dart_llm.pruning.token_rules.prox:Prox",
        "cats": "dart_llm.pruning.token_rules.cats:Cats",
        "countdown": "dart_llm.pruning.token_rules.countdown:Countdown",
        "teal": "dart_llm.pruning.token_rules.teal:Teal",
        "teal-attention": "dart_llm.pruning.token_rules.teal:TealAttention",
        "wina": "dart_llm.pruning.token_rules.wina:Wina",
    },
)
"""``TokenRule`` classes, by which tokens select.  Entry-point group ``dart_llm.token_rules``."""

ALL: tuple[Registry, ...] = (METHODS, SCORES, BUDGETS, DRIFT_RULES, TOKEN_RULES)


# One Python file of scores, budgets, rules and methods, named by ``--plugin`` or a variable; the
# variable is how processes that a study starts know the file too.

PLUGIN = "DART_PLUGIN"

_digests: dict[str, str] = {}
"""sha256 of the files that were loaded, or are being loaded, by their path."""


def use_plugin(path: Path) -> None:
    """Load ``path``, here and in processes that are started from here.

    Raises ``ConfigError`` for a file that is missing or fails.
    """
    os.environ[PLUGIN] = str(path.expanduser().resolve())
    load_plugin()


def load_plugin() -> None:
    """Load the file that the variable names, once; raises as ``use_plugin``."""
    path = os.environ.get(PLUGIN, "")
    if not path or path in _digests:
        return
    name = f"dart_llm_plugin_{Path(path).stem}"
    try:
        _digests[path] = file_sha256(Path(path))
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError("its name must end in .py")
        module = sys.modules[name] = module_from_spec(spec)  # its classes can be pickled
        spec.loader.exec_module(module)
    except Exception as error:
        _digests.pop(path, None)
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the plug-in {path} cannot be loaded: {what}") from error


def plugin_hint() -> str:
    """What a message about an unknown name adds where no file was given; else ""."""
    return "" if os.environ.get(PLUGIN) else "one of your own: --plugin FILE"


def plugin_digest() -> dict[str, str]:
    """``plugin``: sha256 of the files that were loaded, for what depends on them."""
    load_plugin()
    return {"plugin": " ".join(sorted(_digests.values()))} if _digests else {}
