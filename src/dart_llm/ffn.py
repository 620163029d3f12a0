"""One FFN block, and the ways to run it: dense, observed, masked, compact.

Every executor takes the block's input x [..., D] and returns ``(u, z)``: the down projection's
input [..., I] (None where it is not complete) and its output [..., D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import UnsupportedModel
from dart_llm.low_rank import LowRank
from dart_llm.masks import LayerMask
from dart_llm.weights import FfnWeights

_PLAIN = ("Linear", "Conv1D", "FalconLinear", "NonDynamicallyQuantizableLinear")
_HOMES = ("torch.nn.", "transformers.")
"""Packages whose classes of these names hold plain matrices."""


@dataclass(frozen=True)
class FfnBlock:
    """The parts of one layer's FFN.  ``inline``: the layer holds the projections (OPT)."""

    index: int
    ffn: nn.Module
    up: nn.Module
    gate: nn.Module | None
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    fused: bool
    inline: bool
    adds_residual: bool
    dropout: nn.Module | None
    x_from: nn.Module | None
    post_norm: nn.Module | None
    width_key: str | None

    @property
    def host(self) -> nn.Module:
        """The module whose forward is replaced: the FFN, or the down projection when inline."""
        return self.down if self.inline else self.ffn

    @property
    def down_width(self) -> int:
        """Number of neurons I."""
        return int(_matrix(self.down).shape[1])

    @property
    def by_inputs(self) -> bool:
        """Whether ``up`` stores its weights [D, I]."""
        return type(self.up).__name__ == "Conv1D"

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps the weights elsewhere between forwards."""
        modules = (self.up, self.gate, self.down)
        return any(
            p.is_meta for module in modules if module is not None for p in module.parameters()
        )

    def check(self, model: str) -> None:
        """Raise ``UnsupportedModel`` for packed, quantised or LoRA-wrapped projections."""
        for role, module in (("up", self.up), ("gate", self.gate), ("down", self.down)):
            if module is None:
                continue
            kind, where = type(module), f"{model}, layer {self.index}, {role} projection"
            if kind.__module__.startswith("peft."):
                raise UnsupportedModel(
                    f"{where}: found {kind.__module__}.{kind.__name__}; call merge_and_unload() "
                    "on the PEFT model first"
                )
            weight: Any = getattr(module, "weight", None)
            plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype.is_floating_point
            home = kind.__module__.startswith(_HOMES) and kind.__name__ in _PLAIN
            if not home or not plain:
                found = f"{kind.__module__}.{kind.__name__} with {type(weight).__name__} weights"
                raise UnsupportedModel(
                    f"{where}: found {found}; only plain floating-point linear layers are pruned "
                    "(load without quantisation, a GGUF file with GgufConfig(dequantize=True))"
                )

    def hidden(self, x: Tensor) -> Tensor:
        """u: the down projection's input."""
        if self.inline:
            return x
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return up * self.act(gate)  # type: ignore[no-any-return]
        if self.gate is not None:
            return self.act(self.gate(x)) * self.up(x)  # type: ignore[no-any-return]
        return self.act(self.up(x))

    def finish(self, z: Tensor, args: tuple[Any, ...]) -> Tensor:
        """What the FFN's forward returns for the down projection's output z."""
        if self.adds_residual:
            rate = getattr(self.ffn, "hidden_dropout", 0.0)
            return args[1] + F.dropout(z, p=rate, training=self.ffn.training)  # type: ignore[no-any-return]
        return z if self.dropout is None else self.dropout(z)

    def matrices(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate [I, D] or None, up [I, D], down [D, I]; views, whatever the layout."""
        up, down = _matrix(self.up), _matrix(self.down)
        if self.fused:
            half = up.shape[0] // 2
            return up[:half], up[half:], down
        return (None if self.gate is None else _matrix(self.gate)), up, down

    def weights(self, depth: float, embedding: Tensor | None, seed: int) -> FfnWeights:
        gate, up, down = self.matrices()
        stored = self.up.weight if self.by_inputs else up
        assert isinstance(stored, Tensor)
        return FfnWeights(
            self.index, depth, stored, gate, down, embedding, seed, by_inputs=self.by_inputs
        )


def _matrix(module: nn.Module) -> Tensor:
    """[out, in] weights of a Linear, or of a Conv1D, which stores them transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def bias_of(module: nn.Module | None) -> Tensor | None:
    """The bias of a projection; None where it has none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


Project = Callable[[Tensor], Tensor]


def run_masked(
    block: FfnBlock,
    project: Project,
    x: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    linear: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense arithmetic with u multiplied by ``mask`` ([I] or [B, 1, I]; None: all ones)."""
    u = block.hidden(x)
    z = project(u if mask is None else u * mask)
    z = z if bias is None else z + bias
    return u, (z if linear is None else z + linear(x))


class CompactFfn:
    """Copies of one block's kept rows and columns, refilled in place on every re-mask.

    ``rows``: [k or 2k, D], gate above up; ``columns``: [D, k].
    """

    def __init__(self, block: FfnBlock) -> None:
        self.block = block
        self.unload()

    def unload(self) -> None:
        """Hold no copies."""
        self.mask: LayerMask | None = None
        self.rows = self.columns = self.row_bias = self.bias = None  # type: Tensor | None
        self.linear: LowRank | None = None
        self.own_bias = False

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Copy the neurons that ``mask`` keeps; a no-op when they are loaded already."""
        if mask is self.mask:
            return
        gate, up, down = self.block.matrices()
        parts = [up] if gate is None else [gate, up]
        k, hidden = mask.kept, down.shape[0]
        with torch.inference_mode(False):
            self.rows = _buffer(self.rows, (len(parts) * k, up.shape[1]), up)
            self.columns = _buffer(self.columns, (hidden, k), down)
            for index, part in enumerate(parts):
                torch.index_select(
                    part.detach(), 0, mask.ids, out=self.rows[index * k : (index + 1) * k]
                )
            torch.index_select(down.detach(), 1, mask.ids, out=self.columns)
            self._load_biases(mask)
            self._load_linear(mask)
        self.mask = mask

    def _load_linear(self, mask: LayerMask) -> None:
        new = mask.low_rank
        if new is None:
            self.linear = None
            return
        old = None if self.linear is None else self.linear.out
        out = _buffer(old, tuple(new.out.shape), new.out).copy_(new.out)
        self.linear = LowRank(new.basis, out)

    def _load_biases(self, mask: LayerMask) -> None:
        block = self.block
        inputs = [block.up] if block.gate is None else [block.gate, block.up]
        biases = [bias_of(module) for module in inputs]
        if biases[0] is not None:
            ids = torch.cat([mask.ids, mask.ids + mask.width]) if block.fused else mask.ids
            rows = torch.cat([b.detach()[ids] for b in biases if b is not None])
            self.row_bias = _buffer(self.row_bias, tuple(rows.shape), rows).copy_(rows)
        down = bias_of(block.down)
        if mask.bias is None:
            self.bias, self.own_bias = (None if down is None else down.detach()), False
            return
        assert self.columns is not None
        total = mask.bias if down is None else down.detach().float() + mask.bias
        known = self.bias if self.own_bias else None
        self.bias = _buffer(known, tuple(total.shape), self.columns).copy_(total)
        self.own_bias = True

    def run(self, x: Tensor) -> tuple[None, Tensor]:
        """z from the kept neurons alone."""
        assert self.rows is not None and self.columns is not None
        hidden = F.linear(x, self.rows, self.row_bias)
        if self.block.fused:
            gate, up = hidden.chunk(2, dim=-1)
            u = up * self.block.act(gate)
        elif self.block.gate is not None:
            gate, up = hidden.chunk(2, dim=-1)
            u = self.block.act(gate) * up
        else:
            u = self.block.act(hidden)
        z = F.linear(u, self.columns, self.bias)
        return None, (z if self.linear is None else z + self.linear(x))

    def nbytes(self) -> int:
        out = None if self.linear is None else self.linear.out
        held = (self.rows, self.columns, self.row_bias, self.bias if self.own_bias else None, out)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def _buffer(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if old is not None and old.shape == shape and old.dtype == like.dtype:
        return old
    return torch.empty(shape, dtype=like.dtype, device=like.device)
