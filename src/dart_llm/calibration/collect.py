"""What a model's own text shows: sums over its tokens, squared gradients, bases for compensation.

For text that the model sampled itself, the gradient of its log-likelihood is the score function, so
the mean of g^2 is the diagonal of the Fisher information of the neuron's activation
(docs/method.md, "Prior").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.calibration.progress import Advance, forwards, layer_ticks, nothing, part_of
from dart_llm.errors import DartError
from dart_llm.models.capture import LayerActivations, capture_activations
from dart_llm.models.describe import describe
from dart_llm.pruning.compensation import find_basis
from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.statistics import LayerStatistics, Statistics, Sum
from dart_llm.pruning.weights import FfnWeights

LOGITS = 1 << 24
"""Elements of the logits of one backward pass at most."""

BACKWARD = 3
"""Work of a forward and its backward pass, in forwards."""

Take = Callable[[int, LayerActivations, Tensor | None], None]


def rows_at_once(model: Any, length: int) -> int:
    """Sequences of ``length`` tokens that go forward and backward together."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, LOGITS // (length * vocabulary))


def gradients(
    model: Any, ids: Tensor, take: Take, advance: Advance = nothing, backward: bool = True
) -> None:
    """Run ids [n, T] forward and backward through the dense model, some rows at a time.

    Without ``backward`` the same forwards alone: g is None.

    ``take(layer, seen, g)`` gets a layer's tensors, [B, T', .] without the sinks and the last
    token, and g = dL/du, [B, T', I]; L: the summed loss of the next tokens.  Parameters get no
    gradients, and every flag is what it was afterwards.
    """
    parts = torch.split(ids, rows_at_once(model, ids.shape[1]))
    with torch.inference_mode(False), torch.set_grad_enabled(backward), evaluating(model):
        for number, part in enumerate(parts):
            here = part_of(advance, number, len(parts))
            _pass(model, part.clone().to(model.device), take, here, backward)


def _pass(model: Any, ids: Tensor, take: Take, advance: Advance, backward: bool) -> None:
    """One forward of ids [B, T], and one backward; ``take`` gets what the layers saw."""
    held: dict[int, LayerActivations] = {}
    reaching = _reaching(model.get_input_embeddings()) if backward else contextlib.nullcontext()
    forward = (lambda share: advance(share / BACKWARD)) if backward else advance
    ticks = layer_ticks(model, forward)
    with capture_activations(model, held.__setitem__, graph=True), reaching, ticks:
        last = {} if backward else {"logits_to_keep": 1}
        output = model(ids, use_cache=False, **last)
    layers = sorted(held)
    gradients: Sequence[Tensor | None] = [None] * len(layers)
    if backward:
        logits = output.logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            ids[:, 1:].flatten().to(logits.device),
            reduction="sum",
        )
        for layer in layers:
            u: Any = held[layer].u
            u.register_hook(_tick(advance, 1 - layer / len(layers)))
        gradients = torch.autograd.grad(loss, [held[layer].u for layer in layers])
    for layer, gradient in zip(layers, gradients, strict=True):
        seen = (held[layer].u, held[layer].x, held[layer].z, held[layer].r, held[layer].h)
        own = LayerActivations(*(_kept(t, ids) for t in seen))
        take(layer, own, None if gradient is None else _kept(gradient, ids))


def _tick(advance: Advance, share: float) -> Callable[[Tensor], None]:
    """A hook on a gradient that says which share of the backward pass is done."""
    return lambda gradient: advance((1 + (BACKWARD - 1) * share) / BACKWARD)


def _kept(t: Tensor, ids: Tensor) -> Tensor:
    """t of the tokens that are learnt from, [B, T', .]."""
    return t.detach().reshape(len(ids), -1, t.shape[-1])[:, SINKS : ids.shape[1] - 1]


@contextlib.contextmanager
def _reaching(embedding: nn.Module) -> Iterator[None]:
    """Inside, what the embedding gives out is part of the graph, also of frozen weights."""

    def reach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handle = embedding.register_forward_hook(reach)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module drops anything out; every module's flag is what it was afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


BASIS_TOKENS = 1024
"""Tokens from which the basis of low-rank compensation is found."""


def collect_statistics(
    model: Any,
    ids: Tensor,
    statistics: Statistics,
    bases: Sequence[Tensor | None],
    layers: Sequence[FfnWeights],
    advance: Advance = nothing,
    backward: bool = True,
) -> list[LayerStatistics]:
    """The sums over ids [n, T] of every layer, and in them ``basis`` [r, D] where it has one.

    ``backward``: ``curvature`` [I] too, which costs a backward pass.  Raises ``DartError`` when the
    gradients are not finite.
    """
    found = [LayerStatistics() for _ in layers]
    for evidence, basis in zip(found, bases, strict=True):
        if basis is not None:
            evidence.sums["basis"] = Sum(basis.float(), 1.0)

    def take(layer: int, seen: LayerActivations, gradient: Tensor | None) -> None:
        with torch.no_grad():
            basis = bases[layer]
            f = None if basis is None else F.linear(seen.h, basis.to(seen.h.dtype))
            statistics.update(found[layer], seen.u, seen.z, seen.x, seen.r, None, f)
            if gradient is not None:
                found[layer].add("curvature", gradient.flatten(0, 1).float().square(), None)

    gradients(model, ids, take, advance, backward)
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
    model: Any,
    ids: Tensor,
    rank: int,
    layers: Sequence[FfnWeights],
    advance: Advance = nothing,
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

    def take(layer: int, seen: LayerActivations) -> None:
        held.setdefault(layer, []).append(seen.h[:, SINKS:].flatten(0, 1))

    with torch.inference_mode(False), capture_activations(model, take):
        parts = torch.split(ids[:rows].clone(), 4)
        for _ in forwards(model, parts, part_of(advance, 0, 2)):
            pass
    bases: list[Tensor | None] = []
    for number, layer in enumerate(layers):
        advance(0.5 + 0.5 * number / len(layers))
        if layer.index in inline:
            bases.append(None)
            continue
        h = torch.cat(held[layer.index]).float()
        if not bool(h.isfinite().all()):
            raise DartError(f"the FFN inputs of layer {layer.index} are not finite: try float32")
        bases.append(find_basis(h, rank).to(layer.down.dtype))
    return bases
