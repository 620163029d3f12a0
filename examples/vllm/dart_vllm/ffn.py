"""Stands in for the forward of a gated FFN as vLLM builds it: gate and up in one, then down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.patching.executors.triton_ffn import kernels
from dart_vllm.masks import RequestMasks


class PrunedFfn:
    """One layer's.  ``mlp`` has gate_up_proj, act_fn and down_proj, each giving (output, bias).

    Raises ``ValueError`` for weights that are quantised, or have biases.
    """

    def __init__(self, mlp: Any, layer: int, masks: RequestMasks) -> None:
        for part in (mlp.gate_up_proj, mlp.down_proj):
            weight = getattr(part, "weight", None)
            if weight is None or not weight.is_floating_point() or weight.element_size() == 1:
                raise ValueError(f"layer {layer} holds quantised weights: load the model without")
            if getattr(part, "bias", None) is not None:
                raise ValueError(f"layer {layer} has a bias: the prototype knows none")
        self.mlp, self.layer, self.masks = mlp, layer, masks
        self._down: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, D], the tokens of a step and perhaps padding behind them."""
        ids = self.masks.ids(self.layer) if len(x) == 1 else None
        return self._dense(x) if ids is None else self._gathered(x, ids)

    def _dense(self, x: Tensor) -> Tensor:
        both, _ = self.mlp.gate_up_proj(x)
        u = self.mlp.act_fn(both)
        self.masks.observe(self.layer, u)
        z, _ = self.mlp.down_proj(u)
        return z

    def _gathered(self, x: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.mlp.gate_up_proj.weight.detach().chunk(2)
        if self._down is None:  # a neuron a row; a third of the FFN's weights once more
            self._down = self.mlp.down_proj.weight.detach().t().contiguous()
        if x.is_cuda:
            both = torch.cat(kernels().rows(x, (gate, up), ids).unbind(0), -1).to(x.dtype)
            u = self.mlp.act_fn(both)
            return kernels().weighted_sum(u, self._down, ids).to(x.dtype)
        u = self.mlp.act_fn(torch.cat([F.linear(x, gate[ids]), F.linear(x, up[ids])], -1))
        return u @ self._down[ids]
