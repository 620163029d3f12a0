"""How much each neuron matters to the loss: squared gradients over a model's own text.

For text that the model sampled itself, the gradient of its log-likelihood is the score function,
so the mean of g^2 is the diagonal of the Fisher information of the neuron's activation.
docs/method.md, "Prior".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.activations import Seen, tap
from dart_llm.drift import SINKS

LOGITS = 1 << 26
"""Elements of the logits of one backward pass at most."""

Take = Callable[[int, Seen, Tensor | None], None]


def gradients(
    model: Any, ids: Tensor, take: Take, say: Callable[[str], None], backward: bool = True
) -> None:
    """Run ids [n, T] forward and backward through the dense model, some rows at a time.

    Without ``backward`` the same forwards alone: g is None.

    ``take(layer, seen, g)`` gets a layer's tensors, [B, T', .] without the sinks and the last
    token, and g = dL/du, [B, T', I]; L: the summed loss of the next tokens.  Parameters get no
    gradients, and every flag is what it was afterwards.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    rows = max(1, LOGITS // (ids.shape[1] * vocabulary))
    parts = torch.split(ids, rows)
    run = _backward if backward else _forward
    with torch.inference_mode(False), torch.set_grad_enabled(backward), evaluating(model):
        for number, part in enumerate(parts):
            run(model, part.clone().to(model.device), take)
            if (number + 1) % max(2, len(parts) // 8) == 0:
                say(f"learning from the model's own text: {number + 1} of {len(parts)} parts")


def _backward(model: Any, ids: Tensor, take: Take) -> None:
    held: dict[int, Seen] = {}
    with tap(model, held.__setitem__, graph=True), _reaching(model.get_input_embeddings()):
        logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        ids[:, 1:].flatten().to(logits.device),
        reduction="sum",
    )
    layers = sorted(held)
    found = torch.autograd.grad(loss, [held[layer].u for layer in layers])
    for layer, gradient in zip(layers, found, strict=True):
        take(layer, _cut(held[layer], ids), _kept(gradient, ids))


def _forward(model: Any, ids: Tensor, take: Take) -> None:
    held: dict[int, Seen] = {}
    with tap(model, held.__setitem__, graph=True):
        model(ids, use_cache=False, logits_to_keep=1)
    for layer in sorted(held):
        take(layer, _cut(held[layer], ids), None)


def _cut(seen: Seen, ids: Tensor) -> Seen:
    return Seen(*(_kept(t, ids) for t in (seen.u, seen.x, seen.z, seen.r, seen.h)))


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
