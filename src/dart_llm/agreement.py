"""Whether an FFN computes what is about to stand for it: one small step of both is compared.

What runs a pruned FFN is a formula (gate, up, activation, down) on its projections, or on their
weights.  An FFN that computes something else would silently become another one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as everywhere

from dart_llm.bare import HOMES, Bare, forward_of, signature, unnoticed
from dart_llm.errors import UnsupportedModel
from dart_llm.ffn import FfnBlock, bias_of

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


def why_not_weights(block: FfnBlock) -> str:
    """Why a block's weights cannot stand for its projections: "", or a clause.

    ``masked`` runs the modules themselves; every other executor goes by their weights.
    """
    projections = [part for part in (block.gate, block.up, block.down) if part is not None]
    called = [*projections, *([block.act] if isinstance(block.act, nn.Module) else [])]
    if any(map(has_hooks, called)):
        return "has hooks on its projections or its activation"
    if not all(forward_of(part)[0].__module__.startswith(HOMES) for part in projections):
        return "has a projection with a forward of its own"
    return "" if agreement(block).weights else "has projections that are no plain linear layers"


def has_hooks(module: nn.Module) -> bool:
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
    bias = bias_of(own.up)
    first, second = (bias_of(own.gate), bias) if not own.fused or bias is None else bias.chunk(2)
    u = F.linear(x, up, second)
    u = own.act(u) if gate is None else own.act(F.linear(x, gate, first)) * u
    return F.linear(u, down, bias_of(own.down))


def _stand_in(block: FfnBlock) -> FfnBlock:
    """``block`` with modules that call no hooks."""
    bare = Bare()
    names = ("ffn", "up", "gate", "down", "act", "dropout")
    parts = {name: part for name in names if isinstance(part := getattr(block, name), nn.Module)}
    made: dict[str, Any] = {name: bare.of(part) for name, part in parts.items()}
    return dataclasses.replace(block, **made)
