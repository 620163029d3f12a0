"""A model for work on many tokens (learning), on CPUs that multiply 16-bit matrices slowly."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dart_llm.models.float32_products import Float32Products, is_emulated
from dart_llm.models.packed import PackedTensor
from dart_llm.native.memory import available

WORTH = 2
"""How often the memory of a copy must be free."""


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[Any]:
    """What to run many tokens on in place of ``model``.

    Where torch emulates products in the model's dtype: its float32 copy, or, where memory is short,
    the model itself, matrix by matrix in float32.  Both compute the same but for rounding, and
    inside neither computes gradients of weights.
    """
    if not is_emulated(model):
        yield model
    elif can_copy(model):
        yield float32_copy(model).requires_grad_(False)
    else:
        with Float32Products(), _frozen(model):
            yield model


def can_copy(model: Any) -> bool:
    """Whether a float32 copy of ``model`` leaves enough memory, and would be one."""
    if any(one.is_meta for one in model.parameters()):
        return False
    return available() >= WORTH * copy_bytes(model)


def copy_bytes(model: Any) -> int:
    """Bytes of a float32 copy of ``model``."""
    return sum(4 * one.numel() for one in model.parameters())


def float32_copy(model: Any) -> Any:
    """A copy of ``model`` in float32, weights in blocks dequantised, tied weights still tied."""
    known: dict[int, Any] = {}  # weights are not copied twice, in blocks and out of them
    for one in model.parameters():
        plain = one.dequantise() if isinstance(one, PackedTensor) else one.detach()
        wide = plain.to(torch.float32, copy=True)
        known[id(one)] = nn.Parameter(wide, requires_grad=one.requires_grad)
    return copy.deepcopy(model, known).float()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no weight wants a gradient: those of activations are computed alone."""
    wanted = [one for one in model.parameters() if one.requires_grad]
    try:
        for one in wanted:
            one.requires_grad = False
        yield
    finally:
        for one in wanted:
            one.requires_grad = True
