"""The undo log of the hooks and replaced methods on a model's modules.

A signal (Ctrl-C) may raise an exception between any two instructions.  So every undo function is
logged before its change is made, stays in the log until it has run, and is harmless to run twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from dart_llm.models.agreement import Replacement


class Changes:
    """The changes that were made to an attached model, in order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._replaced: list[tuple[nn.Module, str, Replacement, Any]] = []
        """For each replaced method: the module, the method's name, the ``Replacement``, and the
        ``forward`` that the module's class had when the method was replaced."""

    def hook(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        before: bool = False,
        with_kwargs: bool = False,
    ) -> None:
        """Register ``hook`` on ``module`` as a forward hook, or as a pre-hook if ``before``."""
        self._undo.append(functools.partial(_unhook, module, hook))
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(hook, with_kwargs=with_kwargs)

    def replace(self, module: nn.Module, name: str, make: Callable[..., Any]) -> None:
        """Replace ``module``'s method ``name`` by a call of ``make(original, *args, **kwargs)``."""
        overrides = name in module.__dict__
        original = getattr(module, name)
        replacement = Replacement(original, make)

        def undo() -> None:
            if overrides:
                module.__dict__[name] = original
            else:
                module.__dict__.pop(name, None)

        self._replaced.append((module, name, replacement, type(module).forward))
        self._undo.append(undo)
        module.__dict__[name] = replacement

    def overwritten(self, root: nn.Module) -> nn.Module | None:
        """Return a submodule of ``root`` whose replaced method other code has changed, or None."""
        for module, name, _, forward in self._replaced:
            in_force = isinstance(module.__dict__.get(name), Replacement)
            if module is not root and not (in_force and type(module).forward is forward):
                return module
        return None

    def end(self) -> None:
        """From now on, all replacements call the originals, even through stored references."""
        for _, _, replacement, _ in self._replaced:
            replacement.end()

    def undo(self) -> None:
        """Undo all changes; safe to call again after an interrupt at any point."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


def _unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove ``hook`` from ``module``, if it is still there."""
    sides = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    )
    for hooks, with_kwargs in sides:
        for key in [key for key, other in hooks.items() if other is hook]:
            with_kwargs.pop(key, None)
            hooks.pop(key, None)
