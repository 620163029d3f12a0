"""A copy of a model in float32, for CPUs that multiply in nothing else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dart_llm.models.packed import PackedTensor
from dart_llm.native.memory import available

WORTH = 2
"""How often the memory of a copy must be left."""


def where_faster(model: Any) -> Any:
    """``model``, or its copy in float32 where that computes many tokens faster and fits.

    On an x86 CPU without AVX-512 torch multiplies 16-bit matrices by a loop that takes 5 to 20
    times as long as float32's product; weights in blocks are dequantised to such matrices.
    """
    if model.dtype == torch.float32 or model.device.type != "cpu" or multiplies_bfloat16():
        return model
    size = 4 * sum(one.numel() for one in model.parameters())
    return model if available() < WORTH * size else float32_copy(model)


def multiplies_bfloat16() -> bool:
    """Whether torch has a fast product of bfloat16 matrices on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def float32_copy(model: Any) -> Any:
    """A copy of ``model`` in float32, weights in blocks dequantised, tied weights still tied."""
    known: dict[int, Any] = {}  # weights are not copied twice, in blocks and out of them
    for one in model.parameters():
        plain = one.dequantise() if isinstance(one, PackedTensor) else one.detach()
        wide = plain.to(torch.float32, copy=True)
        known[id(one)] = nn.Parameter(wide, requires_grad=one.requires_grad)
    return copy.deepcopy(model, known).float()
