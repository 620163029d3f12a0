"""Losses of one slice or window under each protocol (docs/method.md, "Evaluation").

``decode``: the first P - 1 tokens of a slice are the prompt (dense, observed); token P and the
C - 1 that follow run as decode tokens through the live tracer, so all C predictions are pruned.
``full``, ``published`` and ``standard``: masks from a dense pass over the P prompt tokens, over the
whole slice, or over the text before the window, applied to every position of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.life import Phase
from dart_llm.likelihood import CHUNK
from dart_llm.ppl_windows import STANDARD, Window, slice_windows
from dart_llm.records import RunReport
from dart_llm.session import Run

DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class WindowLosses:
    """Per scored token of one window: its loss (nats), and whether it ran pruned."""

    losses: tuple[float, ...]
    pruned: tuple[bool, ...]


@dataclass(frozen=True)
class Scored:
    """Losses of one method: per slice, nats of each scored token; and how they came about."""

    losses: tuple[tuple[float, ...], ...]
    report: RunReport | None

    @property
    def mean_loss(self) -> float:
        """Over all scored tokens, nats."""
        flat = [loss for losses in self.losses for loss in losses]
        return sum(flat) / len(flat)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(self.mean_loss)


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats, cut where a float ends."""
    return math.exp(min(700.0, mean_loss))


def slices(ids: Tensor, count: int | None, prompt: int, scored: int) -> list[Tensor]:
    """``count`` evenly spaced windows of ``prompt + scored`` tokens; None: as many as fit.

    ids: [T] int64.  Raises ``ConfigError`` when the text is too short for one.
    """
    return [window.ids for window in slice_windows(ids, count, prompt, scored)]


def score(
    model: Any,
    run: Run | None,
    windows: Sequence[Tensor],
    prompt: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """The ``decode`` protocol over all ``windows`` ([P + C] each); ``advance(1)`` after each.

    ``prompt``: tokens P of each window that are read dense and observed.  ``run``: an attached run,
    or None for the untouched model.  Raises ``DartError`` when a loss is not finite.
    """
    results = []
    for number, ids in enumerate(windows):
        results.append(score_window(model, run, Window(ids, prompt, number)).losses)
        advance(1)
    return Scored(tuple(results), None if run is None else run.report())


@torch.inference_mode()
def score_window(
    model: Any, run: Run | None, window: Window, protocol: str = "decode", prompt: Any = None
) -> WindowLosses:
    """Losses of the scored tokens of one window.

    ``run``: an attached run, or None for the untouched model.  ``decode`` adds a sequence to it;
    the other protocols reset it first.  ``prompt``: for ``decode``, the cache of a dense pass over
    the window's prompt, which is used up; the run must need no evidence from it.  Raises
    ``DartError``, which names slice and token, when a loss is not finite.
    """
    try:
        return _score(model, run, window, protocol, prompt)
    except DartError as error:
        if type(error) is not DartError:
            raise
        raise DartError(f"{window.name}: {error}") from None


def _score(model: Any, run: Run | None, window: Window, protocol: str, prompt: Any) -> WindowLosses:
    ids = window.ids[None].to(model.device)
    if protocol == "decode":
        begin, cache = window.first - 1, prompt
        if cache is None:
            cache = model(ids[:, :begin], use_cache=True, logits_to_keep=1).cache
    else:
        begin, cache = 0, None
        if run is not None:
            _choose_masks(model, run, window, protocol)
    losses, pruned = _feed(model, run, ids, window.first, begin, cache)
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DartError(
            f"the loss of its token {window.first + bad[0]} is the first that is not finite "
            f"({float(losses[bad[0]])}): the model overflows; try dtype float32"
        )
    return WindowLosses(tuple(losses.tolist()), tuple(pruned))


def _choose_masks(model: Any, run: Run, window: Window, protocol: str) -> None:
    """Hold the masks that a dense pass over the protocol's tokens gives."""
    run.hold(None)
    asked = run.asks_for_pruning
    seen = window.ids if protocol == "published" else window.ids[: window.first]
    if protocol == STANDARD:
        assert window.before is not None
        seen = window.before
    model(seen[None].to(model.device), use_cache=True, logits_to_keep=1)
    masks = run.select()
    if asked and all(mask is None for mask in masks):
        raise ConfigError(
            f"{window.name}: the masks that were chosen remove no neuron: ask for a higher sparsity"
        )
    run.hold(masks)


def _feed(
    model: Any, run: Run | None, ids: Tensor, first: int, begin: int, cache: Any
) -> tuple[Tensor, list[bool]]:
    """Feed ``ids`` ([1, n]) from ``begin`` on, whose past lies in ``cache``, as decode tokens.

    Returns the losses of the tokens from ``first`` on, [n - first] float32, and whether each ran
    pruned.  A chunk ends where the masks can change, and its logits are gone before the next one.
    """
    losses: list[Tensor] = []
    pruned: list[bool] = []
    end = ids.shape[1] - 1
    while begin < end:
        size = min(CHUNK, end - begin)
        if run is not None:
            bound = run.tokens_until_change() if begin else run.config.release_step
            size = min(size, bound or size)
        stop = begin + size
        targets = ids[0, max(begin + 1, first) : stop + 1]
        found, cache = _chunk(model, run, ids[:, begin:stop], cache, targets)
        losses.append(found)
        pruned += [run is not None and run.phase == Phase.PRUNED] * len(targets)
        begin = stop
    return torch.cat(losses), pruned


def _chunk(
    model: Any, run: Run | None, ids: Tensor, cache: Any, targets: Tensor
) -> tuple[Tensor, Any]:
    """One decode forward.  Losses of ``targets`` ([m]), which its last m positions predict."""
    given: dict[str, Any] = {} if cache is None else {"cache": cache}
    given.update(use_cache=True, logits_to_keep=max(1, len(targets)))
    if run is None:
        output = model(ids, **given)
    else:
        with run.decoding(prompt=cache is None):
            output = model(ids, **given)
    logits = output.logits[0, : len(targets)].float()
    return F.cross_entropy(logits, targets, reduction="none"), output.cache


def ratio_interval(pruned: Scored, dense: Scored) -> tuple[float, float] | None:
    """95 % bootstrap interval over slices of ``perplexity(pruned) / perplexity(dense)``.

    Slices count by their tokens.  None with fewer than two, which say nothing of the spread.
    """
    import numpy as np

    pairs = list(zip(pruned.losses, dense.losses, strict=True))
    if len(pairs) < 2:
        return None
    gaps = np.array([sum(a) - sum(b) for a, b in pairs])
    sizes = np.array([len(a) for a, _ in pairs])
    draws = np.random.default_rng(0).integers(0, len(gaps), (DRAWS, len(gaps)))
    ratios = gaps[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(math.exp(min(700.0, low))), float(math.exp(min(700.0, high)))
