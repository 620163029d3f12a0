"""Lists everything that can be chosen by name: methods, scores, budgets and rules.

Each built-in object is an entry in a table below and is imported on first use.  Others are added by
``SCORES.register("name", score)``, which a ``--plugin`` file may call, or through the entry-point
group of the registry.
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
"""Prefix of a method's name; the rest of such a name is the path of a setting file."""


class Registry:
    """Maps names to objects.

    ``kind``: the word for such an object in messages.  ``group``: the entry-point group through
    which other packages add objects.  ``lazy``: built-in objects as ``"module:attribute"``,
    imported on first use.  ``read_file``: in the same form, the function that returns the object
    for a name with the prefix ``SETTING``; "" if there is none.
    """

    def __init__(self, kind: str, group: str, lazy: dict[str, str], read_file: str = "") -> None:
        self.kind, self.group = kind, group
        self._built_in = frozenset(lazy)
        self._lazy = dict(lazy)
        self._objects: dict[str, Any] = {}
        self._read_file = read_file
        self._scanned = False

    def register(self, name: str, value: Any) -> Any:
        """Add ``value`` under ``name``; raises ``ConfigError`` if the name is taken.

        An entry point's name does not count as taken: its module may register the object as well.
        """
        if name in self._built_in or name in self._objects:
            raise ConfigError(f"{self.kind} {name!r} is already registered: use another name")
        self._objects[name] = value
        return value

    def is_built_in(self, name: str) -> bool:
        return name in self._built_in

    def unregister(self, name: str) -> None:
        """Remove an object that ``register`` added."""
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
        """Return ``name`` if it exists; else raise ``UnknownName``, which lists similar names."""
        if self._read_file and name.startswith(SETTING):
            self.get(name)
        elif name not in (names := self.names()):
            raise UnknownName(self.kind, name, names, plugin_hint())
        return name

    def get(self, name: str) -> Any:
        """The object called ``name``, imported on first use; raises ``UnknownName``."""
        if self._read_file and name.startswith(SETTING):
            return _imported(self._read_file)(name)
        return self.get_listed(name)

    def get_listed(self, name: str) -> Any:
        """Like ``get``, but never opens a setting file; use it for names from the network."""
        if name not in (names := self.names()):
            raise UnknownName(self.kind, name, names, plugin_hint())
        if name not in self._objects:
            self._objects[name] = _imported(self._lazy[name])
        return self._objects[name]


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _table(module: str, names: str, attribute: Callable[[str], str] = str) -> dict[str, str]:
    """Maps names to import paths; ``attribute``: function from a name to the module's attribute."""
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
        "dart-token teal teal-attention wina cats gate countdown prox",
        str.upper,
    ),
    "dart_llm.pruning.setting_file:method_of",
)
"""Methods: named ``PruneConfig``s.  Entry-point group ``dart_llm.methods``."""

SCORES = Registry(
    "score",
    "dart_llm.scores",
    _table(
        "scores",
        "magnitude normalized contribution fisher wanda flap weight random combined product",
    )
    | _table("scores", "max mean", "{}_proxy".format),
)
"""Neuron ``Score``s.  Entry-point group ``dart_llm.scores``."""

BUDGETS = Registry(
    "budget", "dart_llm.budgets", _table("budgets", "uniform depth energy ranked standardized")
)
"""Layer ``Budget``s.  Entry-point group ``dart_llm.budgets``."""

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
        "gate": "dart_llm.pruning.token_rules.gate:Gate",
        "countdown": "dart_llm.pruning.token_rules.countdown:Countdown",
        "teal": "dart_llm.pruning.token_rules.teal:Teal",
        "teal-attention": "dart_llm.pruning.token_rules.teal:TealAttention",
        "wina": "dart_llm.pruning.token_rules.wina:Wina",
    },
)
"""Per-token rules: ``TokenRule`` classes.  Entry-point group ``dart_llm.token_rules``."""

ALL: tuple[Registry, ...] = (METHODS, SCORES, BUDGETS, DRIFT_RULES, TOKEN_RULES)


# A plug-in is a Python file that registers scores, budgets, rules or methods.  ``--plugin`` sets an
# environment variable, so that the processes that a study starts load the file too.

PLUGIN = "DART_PLUGIN"

_digests: dict[str, str] = {}
"""SHA-256 digests, by path, of the plug-ins that were loaded or are being loaded."""


def use_plugin(path: Path) -> None:
    """Load the plug-in ``path`` in this process and in those that it starts.

    Raises ``ConfigError`` if the file is missing or raises an exception.
    """
    os.environ[PLUGIN] = str(path.expanduser().resolve())
    load_plugin()


def load_plugin() -> None:
    """Load the plug-in that ``DART_PLUGIN`` names, unless loaded; raises like ``use_plugin``."""
    path = os.environ.get(PLUGIN, "")
    if not path or path in _digests:
        return
    name = f"dart_llm_plugin_{Path(path).stem}"
    try:
        _digests[path] = file_sha256(Path(path))
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError("its name must end in .py")
        module = sys.modules[name] = module_from_spec(spec)  # so that its classes can be pickled
        spec.loader.exec_module(module)
    except Exception as error:
        _digests.pop(path, None)
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the plug-in {path} cannot be loaded: {what}") from error


def plugin_hint() -> str:
    """A hint for messages about unknown names; "" if a plug-in was given."""
    return "" if os.environ.get(PLUGIN) else "add your own with --plugin FILE"


def plugin_digest() -> dict[str, str]:
    """Maps ``plugin`` to the loaded plug-ins' digests, stored with results; {} without plug-ins."""
    load_plugin()
    return {"plugin": " ".join(sorted(_digests.values()))} if _digests else {}
