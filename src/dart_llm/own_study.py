"""What a model's own text shows: sums over its tokens, gradients, and bases for compensation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.activations import Seen, tap
from dart_llm.arch import describe
from dart_llm.curvature import gradients
from dart_llm.drift import SINKS
from dart_llm.errors import DartError
from dart_llm.evidence import LayerEvidence, Sum
from dart_llm.low_rank import find_basis
from dart_llm.token_statistics import Statistics
from dart_llm.weights import FfnWeights

BASIS_TOKENS = 1024
"""Tokens from which the basis of low-rank compensation is found."""


def study(
    model: Any,
    ids: Tensor,
    statistics: Statistics,
    bases: Sequence[Tensor | None],
    layers: Sequence[FfnWeights],
    say: Callable[[str], None] = lambda text: None,
    backward: bool = True,
) -> list[LayerEvidence]:
    """The sums over ids [n, T] of every layer, and in them ``basis`` [r, D] where it has one.

    ``backward``: ``curvature`` [I] too, which costs a backward pass.  Raises ``DartError`` when the
    gradients are not finite.
    """
    found = [LayerEvidence() for _ in layers]
    for evidence, basis in zip(found, bases, strict=True):
        if basis is not None:
            evidence.sums["basis"] = Sum(basis.float(), 1.0)

    def take(layer: int, seen: Seen, gradient: Tensor | None) -> None:
        with torch.no_grad():
            basis = bases[layer]
            f = None if basis is None else F.linear(seen.h, basis)
            statistics.update(found[layer], seen.u, seen.z, seen.x, seen.r, None, f)
            if gradient is not None:
                found[layer].add("curvature", gradient.flatten(0, 1).float().square(), None)

    gradients(model, ids, take, say, backward)
    for evidence in found if backward else ():
        if not bool(evidence.sums["curvature"].total.isfinite().all()):
            raise DartError(
                "the gradients of this model's own text are not finite: load it in float32 or "
                "bfloat16"
            )
        # the mean itself, so that it is held once
        evidence.sums["curvature"] = Sum(evidence.sums["curvature"].mean, 1.0)
    return found


@torch.no_grad()
def find_bases(
    model: Any, ids: Tensor, rank: int, layers: Sequence[FfnWeights]
) -> list[Tensor | None]:
    """Per layer the basis [r, D] of its FFN's input over ids [n, T], in the model's dtype.

    None where the FFN's input never reaches what is replaced while pruning: inline blocks.
    """
    if not rank:
        return [None] * len(layers)
    inline = {block.index for block in describe(model).blocks if block.inline}
    held: dict[int, list[Tensor]] = {}
    each = ids.shape[1] - SINKS
    rows = min(len(ids), max(1, -(-BASIS_TOKENS // each)))

    def take(layer: int, seen: Seen) -> None:
        held.setdefault(layer, []).append(seen.h[:, SINKS:].flatten(0, 1))

    with torch.inference_mode(False), tap(model, take):
        for part in torch.split(ids[:rows].clone(), 4):
            model(part.to(model.device), use_cache=False, logits_to_keep=1)
    bases: list[Tensor | None] = []
    for layer in layers:
        if layer.index in inline:
            bases.append(None)
            continue
        h = torch.cat(held[layer.index]).float()
        if not bool(h.isfinite().all()):
            raise DartError(f"the FFN inputs of layer {layer.index} are not finite: try float32")
        bases.append(find_basis(h, rank).to(layer.down.dtype))
    return bases
