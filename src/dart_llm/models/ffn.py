"""The FFN of one layer: its projections, their weights, and the formula that it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import UnsupportedModel
from dart_llm.models.packed import PackedTensor
from dart_llm.pruning.weights import FfnWeights

_PLAIN = ("Linear", "Conv1D", "FalconLinear", "NonDynamicallyQuantizableLinear")

HOMES = ("torch.nn.", "transformers.")
"""Packages whose modules and forwards are trusted to compute what their names say."""


@dataclass(frozen=True)
class FfnBlock:
    """The parts of one layer's FFN; ``LayerNames`` explains most fields.

    ``index``: number of the layer.  ``inline``: True if the projections belong to the layer itself
    (OPT).  ``x_from``: the module whose input is the residual stream that enters the FFN half of
    the layer; None means ``ffn``.  ``width_key``: ``LayerNames.width``.
    """

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
        """The module whose forward is replaced: the FFN, or the down projection if ``inline``."""
        return self.down if self.inline else self.ffn

    @property
    def down_width(self) -> int:
        """I, the number of neurons."""
        return int(matrix_of(self.down).shape[1])

    @property
    def by_inputs(self) -> bool:
        """Whether ``up`` stores its weights as [D, I], not as [I, D]."""
        return is_by_inputs(self.up)

    @property
    def offloaded(self) -> bool:
        """Whether accelerate offloads the weights between forwards."""
        return any(p.is_meta for module in self.projections for p in module.parameters())

    @property
    def projections(self) -> list[nn.Module]:
        """Gate (if there is one), up and down."""
        return [module for module in (self.gate, self.up, self.down) if module is not None]

    def check(self, model: str) -> None:
        """Raise ``UnsupportedModel`` unless all projections are floating-point linear layers."""
        for role, module in (("up", self.up), ("gate", self.gate), ("down", self.down)):
            if module is None:
                continue
            kind, weight = type(module), getattr(module, "weight", None)
            plain = type(weight) in (Tensor, nn.Parameter, PackedTensor)
            home = kind.__module__.startswith(HOMES) and kind.__name__ in _PLAIN
            if not (home and plain and weight.dtype.is_floating_point):  # type: ignore[union-attr]
                stored = type(weight).__name__
                if isinstance(weight, Tensor):
                    stored = f"{str(weight.dtype).removeprefix('torch.')} {stored}"
                raise UnsupportedModel(
                    f"{model}: the {role} projection of layer {self.index} is a "
                    f"{kind.__module__}.{kind.__name__} with weights of type {stored}, and only "
                    "plain floating-point linear layers can be pruned; load the model without "
                    "quantisation (a GGUF file with GgufConfig(dequantize=True)), or call "
                    "merge_and_unload() on a PEFT model"
                )

    def hidden(self, x: Tensor) -> Tensor:
        """The down projection's input, computed from the FFN's input x; if ``inline``, x itself."""
        if self.inline:
            return x
        if self.fused:
            gate, up = self.up(x).chunk(2, dim=-1)
            return up * self.act(gate)  # type: ignore[no-any-return]
        if self.gate is not None:
            return self.act(self.gate(x)) * self.up(x)  # type: ignore[no-any-return]
        return self.act(self.up(x))

    @property
    def plain(self) -> bool:
        """True if the FFN has no gate."""
        return self.gate is None and not self.fused

    def gate_of(self, x: Tensor) -> Tensor:
        """The gate projection of x, before the activation function.  The FFN must have a gate."""
        if self.fused:
            return self.up(x).chunk(2, dim=-1)[0]  # type: ignore[no-any-return]
        assert self.gate is not None
        return self.gate(x)  # type: ignore[no-any-return]

    def up_of(self, x: Tensor) -> Tensor:
        """The up projection of x."""
        up: Tensor = self.up(x)
        return up.chunk(2, dim=-1)[1] if self.fused else up

    def finish(self, z: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The FFN's output, from the down projection's output z and the FFN's arguments."""
        if self.adds_residual:
            rate = getattr(self.ffn, "hidden_dropout", 0.0)
            return args[1] + F.dropout(z, p=rate, training=self.ffn.training)  # type: ignore[no-any-return]
        return z if self.dropout is None else self.dropout(z)

    def matrices(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """gate [I, D] or None, up [I, D] and down [D, I], as views of the stored weights."""
        up, down = matrix_of(self.up), matrix_of(self.down)
        if self.fused:
            half = up.shape[0] // 2
            if isinstance(up, PackedTensor):
                return up.part(0, half), up.part(half, 2 * half), down
            return up[:half], up[half:], down
        return (None if self.gate is None else matrix_of(self.gate)), up, down

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Biases of gate, up and down, as views; None for a projection without bias."""
        gate, up, down = map(_bias, (self.gate, self.up, self.down))
        if self.fused and up is not None:
            gate, up = up.chunk(2)
        return gate, up, down

    def weights(self, depth: float, embedding: Tensor | None, seed: int) -> FfnWeights:
        """The weights and further data that neuron scores use (see ``FfnWeights``).

        ``depth``: position of the layer, from 0 (first) to 1 (last).
        """
        gate, up, down = self.matrices()
        stored = self.up.weight if self.by_inputs else up
        assert isinstance(stored, Tensor)
        return FfnWeights(
            self.index, depth, stored, gate, down, embedding, seed, by_inputs=self.by_inputs
        )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is a plain matrix."""
    return type(module).__name__ in _PLAIN


def is_by_inputs(module: nn.Module) -> bool:
    """Whether a projection stores its weights as [in, out]."""
    return type(module).__name__ == "Conv1D"


def matrix_of(module: nn.Module) -> Tensor:
    """The weights of a Linear or Conv1D as [out, in]; a Conv1D stores them transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_by_inputs(module) else weight


def _bias(module: nn.Module | None) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
