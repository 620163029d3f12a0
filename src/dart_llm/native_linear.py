"""The projections outside the FFNs by the native kernels, for the few vectors of a decode step.

torch's products of one vector with a small matrix take several times what their bytes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.bare import forward_of
from dart_llm.ffn import FfnBlock
from dart_llm.native_build import ops
from dart_llm.native_ffn import FEW

PLAIN = "torch.nn.modules.linear"
"""Where the forward is that the kernel stands for."""


class NativeLinear:
    """One linear layer while its model is attached."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._run: Any = ops().linear.default

    def run(self, original: Callable[..., Any], x: Tensor) -> Tensor:
        """Its forward; what the kernel does not serve, the module's own one does."""
        weight, size = self.module.weight, x.shape[-1]
        few = 0 < x.numel() <= FEW * size and x.dtype == weight.dtype and size == weight.shape[1]
        if torch.compiler.is_compiling():  # it traces no native call
            return original(x)  # type: ignore[no-any-return]
        if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return original(x)  # type: ignore[no-any-return]
        bias = self.module.bias
        y: Tensor = self._run(x.reshape(-1, size).contiguous(), weight, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def native_linears(model: nn.Module, blocks: tuple[FfnBlock, ...]) -> Iterator[NativeLinear]:
    """The linear layers of ``model`` that the kernel can run, those of its FFNs left out."""
    used = [part for block in blocks for part in (block.up, block.gate, block.down)]
    taken = {id(part) for part in used}
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in taken:
            continue
        plain = "forward" not in module.__dict__ and forward_of(module)[0].__module__ == PLAIN
        if plain and not hasattr(module, "_hf_hook") and _readable(module.weight):
            yield NativeLinear(module)


def _readable(weight: Any) -> bool:
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return known and type(weight) is nn.Parameter and weight.is_contiguous()
