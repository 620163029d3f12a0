"""One FFN block by the native kernels: kept neurons are read where they lie, by an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.ffn import FfnBlock, bias_of
from dart_llm.layout import Layout
from dart_llm.masks import LayerMask
from dart_llm.native_build import ops
from dart_llm.token_ffn import TokenFfn
from dart_llm.token_select import TokenMask

FEW = 32
"""Vectors up to which the kernel is used; more are a matrix product on rows that are gathered."""

ACTS: Mapping[int, Callable[[Tensor], Tensor]] = {
    0: F.silu,
    1: F.gelu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: F.relu,
    4: lambda x: F.relu(x).square(),
}
"""Activations that the kernels know, by number; kernels.h has the same."""


@dataclass(frozen=True)
class Kept:
    """What the kernels run for one mask.

    ``ids``: [k] int32, None for all; ``bias``: [D] float32; ``basis``, ``features``: [r, D];
    ``choice``: by what each token chooses out of ``ids``, None where it runs them all.
    """

    ids: Tensor | None = None
    bias: Tensor | None = None
    basis: Tensor | None = None
    features: Tensor | None = None
    choice: Any = None

    def nbytes(self) -> int:
        held = (self.ids, self.bias, self.features)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def act_number(act: Callable[[Tensor], Tensor]) -> int | None:
    """Which of ``ACTS`` an activation is, found by what it does; None where it is another."""
    grid = torch.linspace(-6, 6, 193)
    try:
        found = act(grid)
    except (RuntimeError, TypeError):
        return None
    same = (n for n, known in ACTS.items() if torch.allclose(found, known(grid), atol=1e-5))
    return next(same, None)


def why_not_block(block: FfnBlock) -> str:
    """Why the kernels cannot run ``block``: "", or a clause."""
    if block.inline:
        return "has no FFN module of its own"
    if block.offloaded:
        return "is offloaded"
    down = block.down.weight
    if not isinstance(down, Tensor) or down.device.type != "cpu":
        return "is not on the CPU"
    if down.dtype not in (torch.float32, torch.bfloat16):
        return f"is {str(down.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    used = [part for part in (block.gate, block.up, block.down) if part is not None]
    if not all(isinstance(part.weight, nn.Parameter) for part in used):
        return "has weights that are computed from others"
    gate, up, _ = block.matrices()
    if not up.is_contiguous() and not block.by_inputs:
        return "stores its up projection by inputs"
    if gate is not None and not gate.is_contiguous():
        return "stores its gate by inputs"
    if act_number(block.act) is None:
        return "has an activation that they do not know"
    return ""


class NativeFfn:
    """The kept neurons of one block; a new mask is a new index."""

    def __init__(self, block: FfnBlock, layout: Layout) -> None:
        reason = why_not_block(block)
        number = act_number(block.act)
        if reason or number is None:
            raise ConfigError(
                f"executor native cannot run layer {block.index}, which {reason}: use "
                "executor compact or masked"
            )
        self.block, self.act = block, number
        self._run: Any = ops().ffn.default
        gate, up, down = block.matrices()
        with torch.no_grad():
            self.down = layout.neuron_rows(down.t().detach(), _parameter(block.down)).detach()
            self.up = up.detach()
            if block.by_inputs:
                self.up = layout.neuron_rows(self.up, _parameter(block.up)).detach()
        self.gate = None if gate is None else gate.detach()
        self.gate_bias, self.up_bias = self._biases()
        self.token: TokenFfn | None = None
        self.unload()

    def unload(self) -> None:
        """Hold no mask."""
        self.mask: LayerMask | None = None
        self.kept = Kept()

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        up = bias_of(self.block.up)
        if up is not None and self.block.fused:
            first, second = up.detach().chunk(2)
            return first, second
        gate = bias_of(self.block.gate)
        return (None if gate is None else gate.detach()), None if up is None else up.detach()

    def everything(self) -> Kept:
        """All neurons."""
        bias = bias_of(self.block.down)
        return Kept(bias=None if bias is None else bias.detach().float())

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Take over a mask; a no-op when it is in force already."""
        if mask is self.mask:
            return
        with torch.inference_mode(False):
            own, linear = bias_of(self.block.down), mask.low_rank
            parts = [t.detach().float() for t in (own, mask.bias) if t is not None]
            bias = sum(parts[1:], parts[0]).contiguous() if parts else None
            ids = None if len(mask.ids) == mask.width else mask.ids.to(torch.int32)
            basis = features = None
            if linear is not None:
                basis, features = linear.basis.contiguous(), linear.out.t().contiguous()
            choice = self._choice(mask) if isinstance(mask, TokenMask) else None
            self.kept = Kept(ids, bias, basis, features, choice)
        self.mask = mask

    def _choice(self, mask: TokenMask) -> Any:
        """What the kernels read to choose ``mask.winners`` neurons by the low-bit copies."""
        assert self.token is not None
        copies, mean = self.token.copies, mask.mean
        up, gate = copies[-1], copies[0] if len(copies) == 2 else None
        worth = self.token.norms if mask.worth is None else mask.worth
        return torch.classes.dart_llm.Choice(
            None if gate is None else gate.levels,
            None if gate is None else gate.scales,
            up.levels,
            up.scales,
            worth.float().contiguous(),
            None if mean is None else mean.float().contiguous(),
            [up.inputs, up.bits, up.group, mask.winners],
        )

    def run(self, x: Tensor) -> tuple[None, Tensor]:
        """z from the kept neurons alone.  x: [..., D]; of one token where tokens choose."""
        flat = x.reshape(-1, x.shape[-1])
        many = len(flat) > FEW or torch.compiler.is_compiling()  # which traces no native call
        z = self._product(flat) if many else self._kernel(flat)
        return None, z.reshape(x.shape)

    def _kernel(self, x: Tensor) -> Tensor:
        kept = self.kept
        z: Tensor = self._run(
            x.detach().contiguous(),
            self.gate,
            self.up,
            self.down,
            self.gate_bias,
            self.up_bias,
            kept.ids,
            kept.bias,
            kept.basis,
            kept.features,
            kept.choice,
            self.act,
        )
        return z

    def _product(self, x: Tensor) -> Tensor:
        """As ``_kernel``, for many vectors: their products are worth a copy of the rows."""
        kept, ids = self.kept, self.kept.ids
        up = F.linear(x, _rows(self.up, ids), _rows(self.up_bias, ids))
        if self.gate is not None:
            gate = F.linear(x, _rows(self.gate, ids), _rows(self.gate_bias, ids))
            u = ACTS[self.act](gate) * up
        else:
            u = ACTS[self.act](up)
        z: Tensor = u @ _rows(self.down, ids)
        if kept.bias is not None:
            z = z + kept.bias.to(z.dtype)
        if kept.basis is not None and kept.features is not None:
            z = z + F.linear(x, kept.basis) @ kept.features
        return z

    def nbytes(self) -> int:
        """Bytes held for the mask in force, beside the mask itself."""
        return self.kept.nbytes()


@overload
def _rows(matrix: Tensor, ids: Tensor | None) -> Tensor: ...


@overload
def _rows(matrix: Tensor | None, ids: Tensor | None) -> Tensor | None: ...


def _rows(matrix: Tensor | None, ids: Tensor | None) -> Tensor | None:
    return matrix if matrix is None or ids is None else matrix[ids]


def _parameter(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
