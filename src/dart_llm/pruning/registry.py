"""The one place that lists everything that can be chosen by name.

A built-in is one line in a table below, imported only when it is asked for.  Outsiders register
with ``SCORES.register("name", score)``, in a file of their own (``plugins``) too, or through the
entry-point group that the registry names.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning import plugins

if TYPE_CHECKING:
    from dart_llm.pruning.budgets import Budget
    from dart_llm.pruning.config import PruneConfig
    from dart_llm.pruning.drift import Rule
    from dart_llm.pruning.scores import Score


T = TypeVar("T")


class Registry(Generic[T]):
    """Names mapped to objects, or to a lazy ``"module:attribute"``.

    ``kind``: the word for messages; ``group``: the entry-point group of other packages.
    """

    def __init__(self, kind: str, group: str, lazy: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._own = frozenset(lazy)
        self._lazy = dict(lazy)
        self._objects: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str, value: T) -> T:
        """Add ``value`` under ``name``; a name that is taken raises ``ConfigError``.

        That of an entry point is free: the module behind it may register its object by hand too.
        """
        if name in self._own or name in self._objects:
            raise ConfigError(f"{self.kind} {name!r} is already registered: take another name")
        self._objects[name] = value
        plugins.registered(self.kind, name)
        return value

    def unregister(self, name: str) -> None:
        """Take back what ``register`` added."""
        self._objects.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All known names, sorted."""
        plugins.load()
        if not self._scanned:
            self._scanned = True
            for point in entry_points(group=self.group):
                self._lazy.setdefault(point.name, point.value)
        return tuple(sorted({*self._lazy, *self._objects}))

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def check(self, name: str) -> str:
        """Return ``name`` when it is known; raise ``UnknownName`` with the near names otherwise."""
        known = self.names()
        if name not in known:
            raise UnknownName(self.kind, name, known, plugins.hint())
        return name

    def get(self, name: str) -> T:
        """The object behind ``name``, imported on first use; raises ``UnknownName``."""
        self.check(name)
        if name not in self._objects:
            module, _, attribute = self._lazy[name].partition(":")
            self._objects[name] = getattr(import_module(module), attribute)
        return self._objects[name]


def _table(module: str, names: str, attribute: Callable[[str], str] = str) -> dict[str, str]:
    """Where the objects of these names are; ``attribute``: their name there, of name_name."""
    return {
        name: f"dart_llm.pruning.{module}:{attribute(name.replace('-', '_'))}"
        for name in names.split()
    }


SETTING = "file:"
"""Begins the name of a setting that is kept in a file."""


class MethodRegistry(Registry["PruneConfig"]):
    """Methods by name, and settings that ``dart-llm tune`` kept, by ``file:`` and their path."""

    def check(self, name: str) -> str:
        if name.startswith(SETTING):
            self.get(name)
            return name
        return super().check(name)

    def get(self, name: str) -> PruneConfig:
        """Of a file anew each time: it may have changed; raises ``ConfigError`` for a bad one."""
        if not name.startswith(SETTING):
            return super().get(name)
        from dart_llm.pruning.setting_file import path_of, read_setting

        path = path_of(name)
        assert path is not None
        return read_setting(path).config

    def named(self, name: str) -> PruneConfig:
        """Of a name alone: what comes over the network opens no file."""
        return super().get(super().check(name))


METHODS = MethodRegistry(
    "method",
    "dart_llm.methods",
    _table(
        "methods",
        "dense dense-8bit dense-4bit random static wanda flap griffin griffin-refresh glass "
        "published dart dart-prompt dart-token teal teal-attention wina cats countdown prox",
        str.upper,
    ),
)
"""Methods: names of a ``PruneConfig``.  Entry-point group ``dart_llm.methods``."""

SCORES: Registry[Score] = Registry(
    "score",
    "dart_llm.scores",
    _table(
        "scores",
        "magnitude normalized contribution fisher fisher-layer wanda flap weight random combined "
        "product",
    )
    | _table("scores", "max mean", "{}_proxy".format),
)
"""Scores of neurons.  Entry-point group ``dart_llm.scores``."""

BUDGETS: Registry[Budget] = Registry(
    "budget",
    "dart_llm.budgets",
    _table("budgets", "uniform depth depth-residual energy ranked standardized")
    | _table("budgets", "global", "{}_rank".format),
)
"""Budgets of layers.  Entry-point group ``dart_llm.budgets``."""

DRIFT_RULES: Registry[Callable[..., Rule]] = Registry(
    "drift rule",
    "dart_llm.drift_rules",
    _table("drift", "published paper dart windows interval never"),
)
"""Drift rules: functions that return a ``Rule``.  Entry-point group ``dart_llm.drift_rules``."""

ALL: tuple[Registry[Any], ...] = (METHODS, SCORES, BUDGETS, DRIFT_RULES)
