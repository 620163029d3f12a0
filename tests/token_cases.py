"""An independent account of token-level selection, by hooks on the down projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.arch import describe


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


@contextmanager
def oracle(
    model: Any, keep: int, prompt: int, mean: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """Every decode token keeps the ``keep`` largest ``abs(u - m) * norm(w)``; the others become m.

    Forwards of ``prompt`` tokens and more run dense.
    """
    handles = []
    for block in describe(model).blocks:
        weight = block.down.weight.detach()
        turned = type(block.down).__name__ == "Conv1D"
        norms = weight.float().norm(dim=1 if turned else 0)

        def keep_best(
            module: nn.Module, args: Any, norms: Tensor = norms, layer: int = block.index
        ) -> Any:
            u = args[0]
            if (u.shape[-2] if u.dim() == 3 else len(u)) >= prompt:
                return None
            m = torch.zeros_like(norms) if mean is None else mean[layer]
            flat = u.reshape(-1, u.shape[-1])
            rows = []
            for one in flat:
                kept = best(((one - m).abs() * norms).tolist(), keep)
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


@contextmanager
def mean_u(model: Any, found: dict[int, Tensor]) -> Iterator[None]:
    """Collects the mean u of each layer over the tokens of one forward."""
    handles = []
    for block in describe(model).blocks:

        def take(module: nn.Module, args: Any, layer: int = block.index) -> None:
            found[layer] = args[0].detach().reshape(-1, args[0].shape[-1]).mean(0)

        handles.append(block.down.register_forward_pre_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
