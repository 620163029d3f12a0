"""An independent account of token-level selection, by hooks on the down projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.models.describe import describe
from dart_llm.patching.executors.token_ffn import TokenFfn
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.token_level import TokenMask
from prior_cases import SMALL

LEARNT = PruneConfig.build("dart-token", prior=SMALL)
"""The preset, but for a prior that is learnt in no time."""

PLAIN = LEARNT.replace(
    {"score": "normalized", "prior": None, "skip_sinks": False, "compensation": False}
)
"""The preset without what it learns: norms rank, the losers stand at 0."""


class Exact:
    """Stands for a low-bit copy and loses nothing."""

    def __init__(self, matrix: Tensor, bits: int, group: int) -> None:
        self.matrix, self.bits, self.group = matrix, bits, group
        self.shape = tuple(matrix.shape)

    def product(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return F.linear(x.float(), (self.matrix if rows is None else self.matrix[rows]).float())

    def dense(self, rows: Any = slice(None)) -> Tensor:
        return self.matrix[rows].float()

    def nbytes(self) -> int:
        return 0


def best(strengths: list[float], keep: int) -> list[int]:
    """Places of the largest, ascending; of equal ones the lower."""
    order = sorted(range(len(strengths)), key=lambda place: (-strengths[place], place))
    return sorted(order[:keep])


Winners = dict[int, list[Tensor]]
"""Per layer, what its tokens chose, in order."""


@contextmanager
def kept_winners(found: Winners) -> Iterator[None]:
    """Collects what is chosen."""
    choose = TokenFfn.winners

    def winners(self: TokenFfn, x: Tensor, mask: TokenMask) -> Tensor:
        ids = choose(self, x, mask)
        found.setdefault(self.block.index, []).append(ids)
        return ids

    with mock.patch.object(TokenFfn, "winners", winners):
        yield


@contextmanager
def same_winners(wanted: Winners, shares: list[float]) -> Iterator[None]:
    """Chooses ``wanted``; collects the share of it that would have been chosen anyway."""
    choose, left = TokenFfn.winners, {layer: iter(ids) for layer, ids in wanted.items()}

    def winners(self: TokenFfn, x: Tensor, mask: TokenMask) -> Tensor:
        own, ids = choose(self, x, mask), next(left[self.block.index])
        shares.append(float(torch.isin(own, ids).float().mean()))
        return ids.reshape(own.shape)

    with mock.patch.object(TokenFfn, "winners", winners):
        yield
    assert all(next(ids, None) is None for ids in left.values()), "as many tokens chose"


@contextmanager
def oracle(
    model: Any,
    keep: int,
    prompt: int,
    mean: dict[int, Tensor] | None = None,
    worth: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Every decode token keeps the ``keep`` largest ``abs(u) * worth``; the others become m.

    ``worth`` None: the norms of the output columns.  Forwards of ``prompt`` tokens and more run
    dense.
    """
    handles = []
    for block in describe(model).blocks:
        value = _norms(block) if worth is None else worth[block.index]

        def keep_best(
            module: nn.Module, args: Any, value: Tensor = value, layer: int = block.index
        ) -> Any:
            u = args[0]
            if (u.shape[-2] if u.dim() == 3 else len(u)) >= prompt:
                return None
            m = torch.zeros_like(value) if mean is None else mean[layer]
            flat = u.reshape(-1, u.shape[-1])
            rows = []
            for one in flat:
                kept = best((one.abs() * value).tolist(), keep)
                row = m.clone()
                row[kept] = one[kept]
                rows.append(row)
            return (torch.stack(rows).reshape(u.shape),)

        handles.append(block.down.register_forward_pre_hook(keep_best))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norms(block: Any) -> Tensor:
    weight = block.down.weight.detach().float()
    norms: Tensor = weight.norm(dim=1 if type(block.down).__name__ == "Conv1D" else 0)
    return norms


@contextmanager
def lost_u(
    model: Any,
    keep: int,
    found: dict[int, tuple[Tensor, Tensor]],
    worth: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Collects per layer, over the tokens of one forward, the losers' u [I] and their number [I].

    A token's losers: all but the ``keep`` largest ``abs(u) * worth``, as in ``oracle``.
    """
    handles = []
    for block in describe(model).blocks:
        value = _norms(block) if worth is None else worth[block.index]

        def take(
            module: nn.Module, args: Any, value: Tensor = value, layer: int = block.index
        ) -> None:
            total, number = torch.zeros_like(value), torch.zeros_like(value)
            for one in args[0].detach().reshape(-1, args[0].shape[-1]):
                kept = best((one.abs() * value).tolist(), keep)
                lost = [place for place in range(len(one)) if place not in kept]
                total[lost] += one[lost]
                number[lost] += 1
            found[layer] = total, number

        handles.append(block.down.register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
