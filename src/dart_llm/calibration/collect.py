"""What token ids show of a dense model: sums over tokens, squared gradients, bases, last states.

For text that the model sampled itself, the gradient of its log-likelihood is the score function, so
the mean of g^2 is the diagonal of the Fisher information of the neuron's activation
(docs/reference.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.calibration.progress import Advance, forwards, ignore, layer_ticks, part_of
from dart_llm.errors import DartError
from dart_llm.models.capture import LayerActivations, capture_activations
from dart_llm.models.describe import decoder_of, describe
from dart_llm.pruning.compensation import find_basis
from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.statistics import LayerStatistics, Statistics, Sum, summed
from dart_llm.pruning.weights import FfnWeights

LOGITS = 1 << 24
"""Elements of the logits of one backward pass at most."""

BATCH = 8
"""Sequences of one forward without a backward pass."""

BACKWARD = 3
"""Work of a forward and its backward pass, in forwards."""

FISHER = "fisher"
"""The sum of squared gradients."""

Take = Callable[[int, LayerActivations, Tensor | None], None]


def rows_at_once(model: Any, length: int, backward: bool = True) -> int:
    """Sequences of ``length`` tokens that go forward (and backward) together."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, LOGITS // (length * vocabulary)) if backward else BATCH


@dataclass(frozen=True)
class Needs:
    """What ``collect`` sums over the tokens of a text.

    ``bases``: per layer [r, D], what ``features`` are read by; none: no features.  ``fisher``: the
    squared gradients too, which costs a backward pass.  ``inner``: without the first tokens of each
    sequence, the attention sinks, and the last one, which predicts nothing.
    """

    statistics: Statistics
    bases: Sequence[Tensor | None] = ()
    fisher: bool = False
    inner: bool = False


def collect(
    model: Any, ids: Tensor, needs: Needs, advance: Advance = ignore
) -> list[LayerStatistics]:
    """The sums over ids [n, T] of every layer of the dense model.

    Raises ``DartError`` when the gradients are not finite.
    """
    devices = [block.matrices()[-1].device for block in describe(model).blocks]
    parts = torch.split(ids, rows_at_once(model, ids.shape[1], needs.fisher))
    kept = slice(SINKS, ids.shape[1] - 1) if needs.inner else slice(None)

    def batches() -> Iterator[list[LayerStatistics]]:
        for number, part in enumerate(parts):
            evidence = [LayerStatistics() for _ in devices]

            def take(layer: int, seen: LayerActivations, gradient: Tensor | None) -> None:
                basis = needs.bases[layer] if needs.bases else None
                _add(needs.statistics, evidence[layer], seen, basis)  # noqa: B023 - called here
                if gradient is not None:
                    squares = gradient.flatten(0, 1).float().square()
                    evidence[layer].add(FISHER, squares.sum(0), float(len(squares)))  # noqa: B023

            run_forward(model, part, take, part_of(advance, number, len(parts)), needs.fisher, kept)
            yield evidence

    with torch.inference_mode(False), evaluating(model):
        evidence_sums = summed(batches(), devices)
    for layer in evidence_sums if needs.fisher else ():
        mean = layer.sums[FISHER].mean
        if not bool(mean.isfinite().all()):
            raise DartError(
                "the gradients of this model's self-generated text are not finite: load it in "
                "float32 or bfloat16"
            )
        layer.sums[FISHER] = Sum(mean, 1.0)
    return evidence_sums


@torch.no_grad()
def _add(
    statistics: Statistics, evidence: LayerStatistics, seen: LayerActivations, basis: Tensor | None
) -> None:
    features = None if basis is None else F.linear(seen.h, basis.to(seen.h.dtype))[None]
    part = LayerObservation(seen.u, None, seen.z, seen.x).map(lambda t: t[None])
    statistics.add([evidence], part, None, features)


def run_forward(
    model: Any,
    ids: Tensor,
    take: Take,
    advance: Advance = ignore,
    backward: bool = True,
    kept: slice = slice(None),
) -> None:
    """One forward of ids [B, T] through the dense model, and one backward pass.

    ``take(layer, seen, g)`` gets a layer's tensors, [B, T', .] of the tokens ``kept``, and
    g = dL/du, [B, T', I]; L: the summed loss of the next tokens; without ``backward`` None.
    Parameters get no gradients, and every flag is what it was afterwards.
    """
    ids = ids.clone().to(model.device)

    def cut(t: Tensor) -> Tensor:
        return t.detach().reshape(len(ids), -1, t.shape[-1])[:, kept]

    def hand_on(layer: int, seen: LayerActivations, gradient: Tensor | None = None) -> None:
        tensors = (seen.u, seen.x, seen.z, seen.r, seen.h)
        take(
            layer,
            LayerActivations(*map(cut, tensors)),
            gradient if gradient is None else cut(gradient),
        )

    if not backward:
        with torch.no_grad(), capture_activations(model, hand_on), layer_ticks(model, advance):
            model(ids, use_cache=False, logits_to_keep=1)
        return
    captured: dict[int, LayerActivations] = {}
    with torch.enable_grad():
        with (
            capture_activations(model, captured.__setitem__, graph=True),
            _in_graph(model.get_input_embeddings()),
            layer_ticks(model, lambda share: advance(share / BACKWARD)),
        ):
            logits = model(ids, use_cache=False).logits
        layers = sorted(captured)
        gradients = _gradients(logits, ids, [captured[n].u for n in layers], advance)
    for layer, gradient in zip(layers, gradients, strict=True):
        hand_on(layer, captured.pop(layer), gradient)


def _gradients(
    logits: Tensor, ids: Tensor, inputs: Sequence[Tensor], advance: Advance
) -> Sequence[Tensor]:
    """Of the summed loss of the next tokens, by each of ``inputs``."""
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        ids[:, 1:].flatten().to(logits.device),
        reduction="sum",
    )

    def tick(share: float) -> Callable[[Tensor], None]:
        return lambda gradient: advance((1 + (BACKWARD - 1) * share) / BACKWARD)

    for layer, u in enumerate(inputs):
        u.register_hook(tick(1 - layer / len(inputs)))  # type: ignore[no-untyped-call]
    return torch.autograd.grad(loss, inputs)


@contextlib.contextmanager
def _in_graph(embedding: nn.Module) -> Iterator[None]:
    """Inside, what the embedding returns is part of the graph, also of frozen weights."""

    def attach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handle = embedding.register_forward_hook(attach)
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
"""Tokens from which the basis of low-rank compensation is computed."""


@torch.no_grad()
def find_bases(
    model: Any,
    ids: Tensor,
    rank: int,
    layers: Sequence[FfnWeights],
    advance: Advance = ignore,
) -> list[Tensor | None]:
    """Per layer the basis [r, D] of its FFN's input over ids [n, T], in the model's dtype.

    None where the FFN's input never reaches what is replaced while pruning: inline blocks.
    """
    if not rank:
        return [None] * len(layers)
    inline = {block.index for block in describe(model).blocks if block.inline}
    inputs: dict[int, list[Tensor]] = {}
    rows = min(len(ids), max(1, -(-BASIS_TOKENS // (ids.shape[1] - SINKS))))

    def take(layer: int, seen: LayerActivations) -> None:
        inputs.setdefault(layer, []).append(seen.h[:, SINKS:].flatten(0, 1))

    with torch.inference_mode(False), capture_activations(model, take):
        forwards(model, torch.split(ids[:rows].clone(), 4), part_of(advance, 0, 2))
    bases: list[Tensor | None] = []
    for number, layer in enumerate(layers):
        advance(0.5 + 0.5 * number / len(layers))
        if layer.index in inline:
            bases.append(None)
            continue
        h = torch.cat(inputs[layer.index]).float()
        if not bool(h.isfinite().all()):
            raise DartError(f"the FFN inputs of layer {layer.index} are not finite: try float32")
        bases.append(find_basis(h, rank).to(layer.down.dtype))
    return bases


@torch.no_grad()
def last_states(model: Any, ids: Tensor, advance: Advance = ignore) -> Tensor:
    """What the head reads of ids [n, T]: [n T, D] on the host, in the model's dtype."""
    states: list[Tensor] = []
    width = model.get_output_embeddings().weight.shape[1]

    def take(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0].detach().reshape(-1, width).cpu())

    handle = decoder_of(model).register_forward_hook(take)
    try:
        forwards(model, torch.split(ids, 4), advance)
    finally:
        handle.remove()
    if not all(bool(part.isfinite().all()) for part in states):
        raise DartError("the model's last hidden states are not finite: try dtype float32")
    return torch.cat(states)
