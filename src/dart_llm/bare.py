"""Modules as they compute: without hooks, without torch.compile, and without what stands on them.

``Bare`` makes stand-ins that can be run beside the modules; ``signature`` says what decides what a
module computes beside its weights, so that what was found out once need not be asked again.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dart_llm.replacement import Replacement

HOMES = ("torch.nn.", "transformers.")
"""Packages whose modules and forwards are known."""

COMPILED = "_torchdynamo_orig_callable"
"""Where torch.compile keeps the function that it was given."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_OWN = frozenset(nn.Module().__dict__) | {"forward", "_old_forward", "_hf_hook", "layer_idx"}
"""Attributes that are no part of a signature: hooks are looked at where they matter."""

Function = Callable[..., Any]


def forward_of(module: nn.Module) -> tuple[Function, bool]:
    """The function behind a module's forward, and whether it takes the module as ``self``.

    What accelerate, torch.compile and this package put around it is left out.
    """
    held = module.__dict__
    given = held.get("_old_forward" if "_hf_hook" in held else "forward")
    found: Any = type(module).forward if given is None else given
    while True:
        inner = found.original if isinstance(found, Replacement) else getattr(found, COMPILED, None)
        if inner is None:
            break
        found = inner
    if getattr(found, "__self__", None) is module:
        return found.__func__, True
    return found, given is None


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was called on it or a part of it, in whatever way."""
    return any(map(_is_compiled, parts_of(model)))


def _is_compiled(module: nn.Module) -> bool:
    held = module.__dict__
    return (
        held.get("_compiled_call_impl") is not None
        or "_orig_mod" in module._modules
        or hasattr(held.get("forward") or type(module).forward, COMPILED)
    )


class Bare:
    """Stand-ins of modules: the same weights and forwards, in evaluation mode, without hooks.

    The modules stay untouched.  A forward that was put on one module and holds on to it runs as it
    is, with the hooks inside it.
    """

    def __init__(self) -> None:
        self._made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The stand-in of ``module``, made when first asked for."""
        module = module._modules.get("_orig_mod") or module
        known = self._made.get(id(module))
        if known is not None:
            return known
        made: nn.Module = object.__new__(type(module))
        self._made[id(module)] = made
        held = made.__dict__
        held.update(module.__dict__)
        held.update({name: OrderedDict() for name in _HOOKS}, training=False)
        held["_modules"] = {
            name: None if child is None else self.of(child)
            for name, child in module._modules.items()
        }
        function, bound = forward_of(module)
        held["forward"] = types.MethodType(function, made) if bound else function
        held["_compiled_call_impl"] = held["forward"]  # what a call runs, past every hook
        return made


@contextlib.contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """Inside, what is computed has no gradients and no autocast, and uses up no random numbers."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What decides what a module computes beside its weights and its input.

    Of it and its parts: classes, forwards, numbers and functions.  Nothing in it is kept alive.
    """
    found: list[Any] = []
    for one in parts_of(module):
        found += (weakref.ref(type(one)), weak(forward_of(one)[0]), _is_compiled(one))
        for value in [value for name, value in one.__dict__.items() if name not in _OWN]:
            if isinstance(value, (int, float, str)):
                found.append(value)
            elif callable(value) and not isinstance(value, Replacement):
                found.append(weak(value))
    return tuple(found)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` gives, in a fraction of its time."""
    found = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def weak(value: Any) -> Any:
    """A reference that is equal as long as it is the same thing, and keeps nothing alive."""
    if isinstance(value, functools.partial):
        return weak(value.func), repr(value.args), repr(value.keywords)
    try:
        return weakref.ref(getattr(value, "__func__", value))
    except TypeError:
        return id(value)
