"""A window scored beside another model's predictions of the same tokens: losses and KL."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.evaluation.forced_decoding import CHUNK
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
def reference_logits(model: Any, window: Window, prompt: Any = None) -> Tensor:
    """What the untouched model predicts of a window's scored tokens, decoded: [C, V] float32."""
    chunks: list[Tensor] = []

    def take(logits: Tensor, expected: Tensor) -> None:
        chunks.append(logits.float())

    predict(model, None, window, take, prompt=prompt)
    return torch.cat(chunks)


@torch.inference_mode()
def read_prompt(model: Any, window: Window) -> Any:
    """The cache of a dense pass over the window's prompt, but for its last token."""
    ids = window.ids[None, : window.first - 1].to(model.device)
    return model(ids, use_cache=True, logits_to_keep=1).cache


@torch.inference_mode()
def compare_window(
    model: Any, run: Run, window: Window, reference: Tensor, prompt: Any = None
) -> Compared:
    """One window under the ``decode`` protocol; ``reference``: [C, V] as of ``reference_logits``.

    ``run``: attached; under ``native`` every token is one whole step, which is what will run, and
    the faster way on weights in blocks.  ``prompt``: as of ``score_window``.  Raises ``DartError``
    where a loss is not finite.
    """
    chunk = 1 if run.executor == "native" else CHUNK
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    done = 0

    def take(logits: Tensor, expected: Tensor) -> None:
        nonlocal done
        scores = logits.float()
        dense = reference[done : done + len(expected)]
        losses.append(F.cross_entropy(scores, expected, reduction="none"))
        divergences.append(divergence(dense.to(scores.device), scores))
        done += len(expected)

    predict(model, run, window, take, prompt=prompt, chunk=chunk)
    nats = finite_losses(torch.cat(losses), window)
    kls = torch.cat(divergences).tolist()
    return Compared(math.fsum(nats) / len(nats), math.fsum(kls) / len(kls), len(nats))
