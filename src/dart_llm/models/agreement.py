"""Checks that FFNs compute what their replacements compute, and wraps methods of pruned models.

A model is *attached* while dart-llm prunes it.  An attached FFN is computed by a formula (gate, up,
activation, down), which calls the projections or reads their weights.  If the original FFN computed
something else, the model's outputs would silently change.  So each FFN is compared with the formula
before it is replaced.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as everywhere

from dart_llm.errors import AttachError, UnsupportedModel
from dart_llm.models.ffn import HOMES, FfnBlock


class NotCopied:
    """Refuses to be copied or pickled, because a copied model would run the original weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AttachError(
            "this model is being pruned, so it cannot be copied or pickled: leave the block first, "
            "or call dart_llm.restore(model)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})


class Replacement(NotCopied):
    """Replaces a method of an attached module; after ``end`` it calls the original method.

    ``make``: the function that runs instead; it gets the original method and the call's arguments.
    """

    def __init__(self, original: Callable[..., Any], make: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.make: Callable[..., Any] | None = make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (make := self.make) is None:  # read once: another thread may call ``end``
            return self.original(*args, **kwargs)
        return make(self.original, *args, **kwargs)

    def end(self) -> None:
        """From now on run the original, even when wrappers or shallow copies call this object."""
        self.make = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return super().__deepcopy__(memo) if self.make else copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.make else (_identity, (self.original,))


def _identity(original: Any) -> Any:
    return original


COMPILED = "_torchdynamo_orig_callable"
"""The attribute in which torch.compile keeps the original function."""

_HOOKS = [name for name in nn.Module().__dict__ if name.startswith("_forward_")]
"""Attributes of a module that contain its forward hooks."""

_UNSIGNED = frozenset(nn.Module().__dict__) | {"forward", "_old_forward", "_hf_hook", "layer_idx"}
"""Attributes that ``signature`` ignores; hooks are checked separately (``_has_hooks``)."""


def forward_of(module: nn.Module) -> tuple[Callable[..., Any], bool]:
    """The function behind a module's forward, and whether it takes the module as ``self``.

    Wrappers of accelerate, torch.compile and this package are removed from the function.
    """
    attributes = module.__dict__
    forward = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    function: Any = type(module).forward if forward is None else forward
    while isinstance(function, Replacement) or hasattr(function, COMPILED):
        wrapped = isinstance(function, Replacement)
        function = function.original if wrapped else getattr(function, COMPILED)
    if getattr(function, "__self__", None) is module:
        return function.__func__, True
    return function, forward is None


def is_patched(module: nn.Module) -> bool:
    """Whether something other than accelerate or this package has replaced ``module.forward``."""
    forward = module.__dict__.get("forward")
    trusted = forward is None or isinstance(forward, Replacement)
    return not trusted and "_hf_hook" not in module.__dict__


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was called on ``model`` or one of its modules."""
    return any(map(_is_compiled, parts_of(model)))


def _is_compiled(module: nn.Module) -> bool:
    attributes = module.__dict__
    return (
        attributes.get("_compiled_call_impl") is not None
        or "_orig_mod" in module._modules
        or hasattr(attributes.get("forward") or type(module).forward, COMPILED)
    )


class UnhookedView:
    """Makes shallow copies of modules, which share the weights but run without hooks.

    The copies are in evaluation mode and are not compiled; the originals are not modified.  If a
    module's forward was replaced by a function that is not a method of the module, the copy calls
    this function, so hooks inside it still run.
    """

    def __init__(self) -> None:
        self._copies: dict[int, nn.Module] = {}

    def copy_of(self, module: nn.Module) -> nn.Module:
        """The copy of ``module``; the first call makes it."""
        module = module._modules.get("_orig_mod") or module
        if id(module) in self._copies:
            return self._copies[id(module)]
        copied: nn.Module = object.__new__(type(module))
        self._copies[id(module)] = copied
        attributes = copied.__dict__
        attributes.update(module.__dict__)
        attributes.update({name: OrderedDict() for name in _HOOKS}, training=False)
        attributes["_modules"] = {
            name: None if child is None else self.copy_of(child)
            for name, child in module._modules.items()
        }
        function, bound = forward_of(module)
        attributes["forward"] = types.MethodType(function, copied) if bound else function
        attributes["_compiled_call_impl"] = attributes["forward"]  # runs instead of every hook
        return copied


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run the block without autograd and autocast, and restore the RNG state afterwards."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def signature(module: nn.Module, without: Sequence[nn.Module] = ()) -> tuple[Any, ...]:
    """Everything that determines a module's output, apart from weights and input.

    The tuple has the classes, forwards, numbers, strings and functions of ``module`` and all its
    submodules except those in ``without``.  Classes and functions are weak references.
    """
    entries: list[Any] = []
    for part in parts_of(module):
        if any(part is other for other in without):
            continue
        attributes = part.__dict__.copy()  # another thread may attach a model meanwhile
        entries += [weakref.ref(type(part)), weak(forward_of(part)[0]), _is_compiled(part)]
        for value in [value for name, value in attributes.items() if name not in _UNSIGNED]:
            # isinstance would be slow for configuration objects
            if issubclass(type(value), (int, float, str)):
                entries.append(value)
            elif callable(value) and not isinstance(value, Replacement):
                entries.append(weak(value))
    return tuple(entries)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The same modules as ``module.modules()``, collected several times faster."""
    parts = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in parts:
                parts[id(child)] = child
                waiting.append(child)
    return list(parts.values())


def weak(value: Any) -> Any:
    """A key that identifies an object but does not keep it alive; one object always has one key."""
    if isinstance(value, functools.partial):
        return weak(value.func), repr(value.args), repr(value.keywords)
    try:
        return weakref.ref(getattr(value, "__func__", value))
    except TypeError:
        return id(value)


TRUSTED = ("dart_llm.", "transformers.", "torch.")
"""Prefixes of modules whose hooks are trusted not to change outputs or weights."""

TOKENS = 2
"""Number of input vectors with which an FFN is compared to the formula."""

_TOLERANCE, _ROUNDINGS = 1e-5, 4.0
"""How far two computations of one result may differ, relative to the largest absolute value: by
``_TOLERANCE``, or by ``_ROUNDINGS`` times the dtype's machine epsilon if that is more."""


class Agreement(NamedTuple):
    """Result of the comparison of an FFN with the formula.

    ``parts``: True if the FFN's forward gives the same output as the formula that calls the FFN's
    projections.  ``weights``: True if calling the projections gives the same output as plain
    products with their weights.
    """

    parts: bool
    weights: bool


_compared: deque[tuple[Any, Agreement]] = deque(maxlen=256)
"""Earlier results and the signatures of their FFNs: only one FFN per signature is compared."""


def same(result: Any, expected: Tensor, layers: int = 1) -> bool:
    """Whether two results differ no more than by the rounding errors of ``layers`` layers."""
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return False
    if result.dtype != expected.dtype or not torch.equal(result.isfinite(), expected.isfinite()):
        return False
    a, b = (t.float().nan_to_num(0, 0, 0) for t in (result, expected))
    tolerance = layers * max(_TOLERANCE, _ROUNDINGS * torch.finfo(expected.dtype).eps)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def check_ffns(model: str, blocks: Sequence[FfnBlock]) -> None:
    """Raise ``UnsupportedModel`` if two layers share an FFN or one does not compute the formula."""
    owner: dict[int, int] = {}
    for block in blocks:
        block.check(model)
        kind = type(block.ffn).__name__
        first = owner.setdefault(id(block.host), block.index)
        if first != block.index:
            raise UnsupportedModel(
                f"{model}: layers {first} and {block.index} share one FFN ({kind}), but every "
                "layer is pruned separately: give each layer a copy of its own (copy.deepcopy)"
            )
    for block in blocks:
        if not agreement(block).parts:
            steps = "up, activation, down" if block.plain else "gate, up, activation, down"
            raise UnsupportedModel(
                f"{model}: the FFN of layer {block.index} ({type(block.ffn).__name__}) computes "
                f"something other than {steps}: dart-llm cannot prune it"
            )


def weights_unsupported_reason(block: FfnBlock, attached: bool = False) -> str | None:
    """Why executors cannot read an FFN's weights directly, as a clause; None if they can.

    The ``masked`` executor calls the projections; every other executor reads their weights.
    ``attached``: True if the model is attached and its weights were readable before; then only the
    projections' hooks and forwards are checked again.
    """
    called = [*block.projections, *([block.act] if isinstance(block.act, nn.Module) else [])]
    if any(map(_has_hooks, called)):
        return "has hooks on its projections or its activation"
    if not all(forward_of(part)[0].__module__.startswith(HOMES) for part in block.projections):
        return "has a projection with a changed forward"
    plain = not any(map(is_patched, block.projections)) if attached else agreement(block).weights
    return None if plain else "has projections that are not plain linear layers"


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks from outside the ``TRUSTED`` packages run before or after ``module``."""
    local = (module._forward_hooks, module._forward_pre_hooks)
    for hooks in (*local, everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        if not all(str(getattr(h, "__module__", "")).startswith(TRUSTED) for h in hooks.values()):
            return True
    return False


def agreement(block: FfnBlock) -> Agreement:
    """Compare an FFN with the formula that replaces it; results are cached by signature."""
    if block.inline:  # only the down projection is replaced, and its original forward runs
        return Agreement(True, True)
    weight: Any = block.up.weight
    act = signature(block.act) if isinstance(block.act, nn.Module) else block.act
    key = (signature(block.ffn), act, block.fused, weight.dtype, weight.device.type)
    for earlier, result in tuple(_compared):
        if earlier == key:
            return result
    if block.offloaded:  # without weights there is nothing to compare: trust only known classes
        homes = type(block.ffn).__module__, forward_of(block.ffn)[0].__module__
        result = Agreement(all(home.startswith(HOMES) for home in homes), True)
    else:
        result = _compare(block)
    _compared.appendleft((key, result))
    return result


def _compare(block: FfnBlock) -> Agreement:
    view = UnhookedView()
    names = ("ffn", "up", "gate", "down", "act", "dropout")
    parts = {name: part for name in names if isinstance(part := getattr(block, name), nn.Module)}
    copies: dict[str, Any] = {name: view.copy_of(part) for name, part in parts.items()}
    copied = dataclasses.replace(block, **copies)
    (gate, up, down), (gate_bias, up_bias, down_bias) = copied.matrices(), copied.biases()
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(1, TOKENS, size, generator=generator, device="cpu").to(up)
        for size in (up.shape[1], down.shape[0])
    )
    args = (x, residual) if copied.adds_residual else (x,)
    with isolated(up.device):
        z = copied.down(copied.hidden(x))
        try:
            output = copied.ffn(*args)
        except Exception:  # the forward needs other arguments
            return Agreement(False, False)
        u = F.linear(x, up, up_bias)
        u = copied.act(u) if gate is None else copied.act(F.linear(x, gate, gate_bias)) * u
        by_weights = F.linear(u, down, down_bias)
        return Agreement(same(output, copied.finish(z, args)), same(z, by_weights))
