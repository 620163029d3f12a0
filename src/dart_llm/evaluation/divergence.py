"""A window scored beside another model's predictions of the same tokens: losses and KL."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.evaluation.perplexity import finite_losses, predict
from dart_llm.evaluation.windows import Window
from dart_llm.models.screen import divergence
from dart_llm.session.run import Run


class Compared(NamedTuple):
    """Means over the scored tokens of one window, nats: ``loss``, and KL(reference || this)."""

    loss: float
    kl: float
    tokens: int


@torch.inference_mode()
def reference_logits(model: Any, window: Window) -> Tensor:
    """What the untouched model predicts of a window's scored tokens, decoded: [C, V] float32."""
    found: list[Tensor] = []
    predict(model, None, window, lambda logits, expected: found.append(logits.float()))
    return torch.cat(found)


@torch.inference_mode()
def compare_window(model: Any, run: Run | None, window: Window, reference: Tensor) -> Compared:
    """One window under the ``decode`` protocol; ``reference``: [C, V] as of ``reference_logits``.

    ``run``: an attached run, or None for the untouched model.  Raises ``DartError`` where a loss is
    not finite.
    """
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    done = 0

    def take(logits: Tensor, expected: Tensor) -> None:
        nonlocal done
        scores, known = logits.float(), reference[done : done + len(expected)]
        losses.append(F.cross_entropy(scores, expected, reduction="none"))
        divergences.append(divergence(known.to(scores.device), scores))
        done += len(expected)

    predict(model, run, window, take)
    found = finite_losses(torch.cat(losses), window)
    kls = torch.cat(divergences).tolist()
    return Compared(math.fsum(found) / len(found), math.fsum(kls) / len(kls), len(found))
