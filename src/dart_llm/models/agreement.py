"""Whether modules compute what stands in their place: one small step of both is compared.

What runs a pruned FFN is a formula (gate, up, activation, down) on its projections, or on their
weights.  An FFN that computes something else would silently become another one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as everywhere

from dart_llm.errors import AttachError, UnsupportedModel
from dart_llm.models.ffn import FfnBlock

# What stands on an attached model in place of its own methods.


class NotCopied:
    """What hangs on an attached model: a copy would go on running the original's weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AttachError(
            "this model is being pruned, so it cannot be copied or pickled: leave the block first, "
            "or call dart_llm.restore(model)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})


class Replacement(NotCopied):
    """A method of an attached module; once ``end`` was called, the method that it stood for."""

    def __init__(self, original: Callable[..., Any], make: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.make = original, make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(self.original, *args, **kwargs)

    def end(self) -> None:
        """Whoever kept this (tools that wrap a forward, shallow copies) calls the original now."""
        self.make = _plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.make is not _plain:
            return super().__deepcopy__(memo)
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.make is not _plain:
            return super().__reduce_ex__(protocol)
        return _itself, (self.original,)


def _plain(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _itself(original: Any) -> Any:
    return original


# Modules as they compute: without hooks, without torch.compile, and without what stands on them.
#
# ``Bare`` makes stand-ins that can be run beside the modules; ``signature`` says what decides what
# a module computes beside its weights, so that what was found out once need not be asked again.


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

_CHANGES = frozenset({"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"})
"""Attributes by which a module computes otherwise than its class."""

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


def signature(module: nn.Module, parts: Sequence[nn.Module] | None = None) -> tuple[Any, ...]:
    """What decides what a module computes beside its weights and its input.

    Of it and its parts: classes, forwards, numbers and functions.  Nothing in it is kept alive.
    ``parts``: ``parts_of(module)``, where they are known.
    """
    found: list[Any] = []
    classes: dict[type, tuple[Any, ...]] = {}
    for one in parts_of(module) if parts is None else parts:
        held, kind = one.__dict__.copy(), type(one)  # another thread may attach meanwhile
        if not _CHANGES.isdisjoint(held) or "_orig_mod" in one._modules:
            found += _computes(one)
        elif kind in classes:  # most parts of a model are of few classes
            found += classes[kind]
        else:
            found += classes.setdefault(kind, _computes(one))
        for value in [value for name, value in held.items() if name not in _OWN]:
            # a configuration, asked by isinstance for its class, takes long to answer
            if issubclass(type(value), (int, float, str)):
                found.append(value)
            elif callable(value) and not isinstance(value, Replacement):
                found.append(weak(value))
    return tuple(found)


def _computes(module: nn.Module) -> tuple[Any, ...]:
    return weakref.ref(type(module)), weak(forward_of(module)[0]), _is_compiled(module)


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


TRUSTED = ("dart_llm.", "transformers.", "torch.")
"""Packages whose hooks are known to change nothing, or to keep a weight what it is."""

TOKENS = 2
"""Vectors that an FFN is compared on."""

_LEAST, _ROUNDINGS = 1e-5, 4.0
"""What may lie between two ways to compute the same: the larger of these, in units of the largest
value; the second counts roundings of the dtype."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was found of one FFN.

    ``parts``: its forward is the formula on its projections; ``weights``: these are plain products
    with their weights.
    """

    parts: bool
    weights: bool


_known: deque[tuple[Any, Agreement]] = deque(maxlen=256)
"""By what decides it; FFNs that are alike but for their weights are compared once."""


def same(found: Any, expected: Tensor) -> bool:
    """Whether two results differ by no more than the rounding of their dtype explains."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype or not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    a, b = (t.float().nan_to_num(0, 0, 0) for t in (found, expected))
    room = max(_LEAST, _ROUNDINGS * torch.finfo(expected.dtype).eps)
    return bool((a - b).abs().max() <= room * b.abs().max())


def check_ffns(model: str, blocks: Sequence[FfnBlock]) -> None:
    """Raise ``UnsupportedModel`` for FFNs that are not what their parts make, or are one module."""
    for block in blocks:
        block.check(model)
    owner: dict[int, int] = {}
    for block in blocks:
        kind = type(block.ffn).__name__
        first = owner.setdefault(id(block.host), block.index)
        if first != block.index:
            raise UnsupportedModel(
                f"{model}: layers {first} and {block.index} share one FFN ({kind}), and every "
                "layer is pruned for itself: give each a copy of its own (copy.deepcopy)"
            )
        if not agreement(block).parts:
            gated = block.gate is not None or block.fused
            steps = "gate, up, activation, down" if gated else "up, activation, down"
            raise UnsupportedModel(
                f"{model}: the FFN of layer {block.index} ({kind}) computes something else than "
                f"{steps}: dart-llm cannot prune it"
            )


def weights_unsupported_reason(block: FfnBlock, known: bool = False) -> str:
    """Why a block's weights cannot stand for its projections: "", or a clause.

    ``masked`` runs the modules themselves; every other executor goes by their weights.  ``known``:
    they could before, and nothing but hooks has changed.
    """
    called = [*block.projections, *([block.act] if isinstance(block.act, nn.Module) else [])]
    if any(map(_has_hooks, called)):
        return "has hooks on its projections or its activation"
    if known:
        return ""
    if not all(forward_of(part)[0].__module__.startswith(HOMES) for part in block.projections):
        return "has a projection with a forward of its own"
    return "" if agreement(block).weights else "has projections that are no plain linear layers"


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's hooks run before or after ``module``."""
    held = (
        module._forward_hooks,
        module._forward_pre_hooks,
        everywhere._global_forward_hooks,
        everywhere._global_forward_pre_hooks,
    )
    return any(
        not str(getattr(hook, "__module__", "")).startswith(TRUSTED)
        for hooks in held
        for hook in hooks.values()
    )


def agreement(block: FfnBlock) -> Agreement:
    """What a block computes, compared with what would stand for it."""
    if block.inline:  # what is replaced there is a projection, and its own forward runs
        return Agreement(True, True)
    weight: Any = block.up.weight
    act = signature(block.act) if isinstance(block.act, nn.Module) else block.act
    key = (signature(block.ffn), act, block.fused, weight.dtype, weight.device.type)
    for known, found in tuple(_known):
        if known == key:
            return found
    found = _known_by_name(block) if block.offloaded else _compare(block)
    _known.appendleft((key, found))
    return found


def _known_by_name(block: FfnBlock) -> Agreement:
    """Of weights that are elsewhere: whether FFN and forward are transformers' own."""
    names = type(block.ffn).__module__, forward_of(block.ffn)[0].__module__
    return Agreement(all(name.startswith(HOMES) for name in names), True)


def _compare(block: FfnBlock) -> Agreement:
    own = _stand_in(block)
    gate, up, down = own.matrices()
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(1, TOKENS, size, generator=generator, device="cpu").to(up)
        for size in (up.shape[1], down.shape[0])
    )
    given = (x, residual) if own.adds_residual else (x,)
    with unnoticed(up.device):
        u = own.hidden(x)
        z = own.down(u)
        try:
            found = own.ffn(*given)
        except Exception:  # it wants something else than x
            return Agreement(False, False)
        parts = same(found, own.finish(z, given))
        return Agreement(parts, same(z, _by_weights(own, x, gate, up, down)))


def _by_weights(own: FfnBlock, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """z as ``compact`` computes it, from all neurons."""
    first, second, third = own.biases()
    u = F.linear(x, up, second)
    u = own.act(u) if gate is None else own.act(F.linear(x, gate, first)) * u
    return F.linear(u, down, third)


def _stand_in(block: FfnBlock) -> FfnBlock:
    """``block`` with modules that call no hooks."""
    bare = Bare()
    names = ("ffn", "up", "gate", "down", "act", "dropout")
    parts = {name: part for name in names if isinstance(part := getattr(block, name), nn.Module)}
    made: dict[str, Any] = {name: bare.of(part) for name, part in parts.items()}
    return dataclasses.replace(block, **made)
