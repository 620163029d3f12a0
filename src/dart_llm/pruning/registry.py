"""The one place that lists everything that can be chosen by name.

A built-in is one line in a table below, imported on first use.  Others register with
``SCORES.register("name", score)``, in a file that ``--plugin`` names (``plugins``) too, or through
the entry-point group that the registry names.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning import plugins

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
        plugins.load()
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
            raise UnknownName(self.kind, name, names, plugins.hint())
        return name

    def get(self, name: str) -> Any:
        """The object behind ``name``, imported on first use; raises ``UnknownName``."""
        if self._read_file and name.startswith(SETTING):
            return _imported(self._read_file)(name)
        return self.get_listed(name)

    def get_listed(self, name: str) -> Any:
        """As ``get``, for a name that comes over the network: it opens no file."""
        if name not in (names := self.names()):
            raise UnknownName(self.kind, name, names, plugins.hint())
        if name not in self._objects:
            self._objects[name] = _imported(self._lazy[name])
        return self._objects[name]


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _table(module: str, names: str, attribute: Callable[[str], str] = str) -> dict[str, str]:
    """Where the objects of these names are; ``attribute``: their name there, of name_name."""
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
