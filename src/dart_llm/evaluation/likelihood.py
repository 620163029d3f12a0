"""Log-likelihoods of continuations under the three protocols (docs/reference.md, "Protocols").

One dense pass over the prompt serves all continuations of a context; continuations that share the
masks run as the rows of one batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.forced_decoding import feed
from dart_llm.session.run import Run

SHORT = 16
"""Contexts of fewer tokens are scored dense: too little to choose masks from."""


@dataclass(frozen=True)
class Likelihood:
    """One continuation: the loss of each of its tokens (nats), and whether all were the argmax."""

    losses: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        return -math.fsum(self.losses)


@torch.inference_mode()
def score_context(
    model: Any,
    run: Run | None,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    protocol: str = "decode",
    batch_size: int = 8,
) -> tuple[list[Likelihood], list[dict[str, Any]]]:
    """Score ``continuations`` after ``context``; token ids, none of them empty.

    ``run``: an attached run, which is reset first, or None for the untouched model.
    ``batch_size``: rows of one forward.  Returns one likelihood per continuation, and the reports
    (``RunReport.to_dict``) of what ran pruned.  Raises ``DartError`` when a loss is not finite.
    """
    if not context or not all(continuations):
        raise ConfigError("a likelihood needs at least one context and one continuation token")
    task = _Task(model, run, tuple(context), _group(continuations))
    if run is not None:
        run.hold(None)
    if run is not None and protocol == "published":
        _published(task)
    elif run is not None and protocol == "full":
        _full(task, batch_size)
    else:
        _decode(task, batch_size)
    if run is not None:
        task.reports.append(run.report().to_dict())
    return [task.result(tuple(continuation)) for continuation in continuations], task.reports


Row = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Tokens to feed after the context, and the continuations whose tokens they predict."""


def _group(continuations: Sequence[Sequence[int]]) -> list[Row]:
    """Continuations that differ in their last token alone are one row."""
    rows: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for one in dict.fromkeys(tuple(c) for c in continuations):
        rows.setdefault(one[:-1], []).append(one)
    return [(fed, tuple(group)) for fed, group in rows.items()]


def decoded_tokens(continuations: Sequence[Sequence[int]]) -> int:
    """Decode tokens that ``score_context`` feeds under the protocol ``decode``."""
    return sum(1 + len(fed) for fed, _ in _group(continuations))


@dataclass
class _Task:
    """One context in progress: losses and argmax hits per continuation."""

    model: Any
    run: Run | None
    context: tuple[int, ...]
    rows: list[Row]
    losses: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    greedy: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def add(self, logits: Tensor, continuation: tuple[int, ...], start: int) -> None:
        """logits: [n, V], which predict the continuation's tokens from ``start`` on."""
        targets = torch.tensor(continuation[start : start + len(logits)], device=logits.device)
        logits = logits[: len(targets)]
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        self.losses.setdefault(continuation, []).append(loss)
        self.greedy.setdefault(continuation, []).append(logits.argmax(-1) == targets)

    def result(self, continuation: tuple[int, ...]) -> Likelihood:
        losses = torch.cat(self.losses[continuation])
        if not bool(losses.isfinite().all()):
            raise DartError("a loss is not finite: the model overflows; try dtype float32")
        greedy = bool(torch.cat(self.greedy[continuation]).all())
        return Likelihood(tuple(losses.tolist()), greedy)


def _decode(task: _Task, size: int) -> None:
    """The context without its last token is the prompt; what follows runs as decode tokens."""
    prompt, last = task.context[:-1], task.context[-1:]
    cache = None
    if prompt:
        ids = _ids(task.model, [prompt])
        cache = task.model(ids, use_cache=True, logits_to_keep=1).cache
    batches = _batches(task.rows, size)
    for number, batch in enumerate(batches):
        if task.run is not None and number:
            task.run.branch()
        own = cache if number == len(batches) - 1 else copy.deepcopy(cache)
        if own is not None and len(batch) > 1:
            own.batch_repeat_interleave(len(batch))
        _feed(task, batch, [last + fed for fed, _ in batch], own, len(prompt), 0)


def _full(task: _Task, size: int) -> None:
    """Masks from a dense pass over the context, applied to every position."""
    assert task.run is not None
    task.model(_ids(task.model, [task.context]), use_cache=True, logits_to_keep=1)
    task.run.hold(task.run.select())
    for batch in _batches(task.rows, size):
        fed = [task.context + fed for fed, _ in batch]
        _feed(task, batch, fed, None, 0, len(task.context) - 1)


def _published(task: _Task) -> None:
    """Masks from, and applied to, the whole scored text, the answer included."""
    assert task.run is not None
    for fed, continuation in ((fed, one) for fed, group in task.rows for one in group):
        if task.losses:
            task.reports.append(task.run.report().to_dict())
        task.run.hold(None)
        whole = task.context + continuation
        task.model(_ids(task.model, [whole]), use_cache=True, logits_to_keep=1)
        task.run.hold(task.run.select())
        row = [(fed, (continuation,))]
        _feed(task, row, [task.context + fed], None, 0, len(task.context) - 1)


def _feed(
    task: _Task,
    rows: Sequence[Row],
    fed: Sequence[tuple[int, ...]],
    cache: Any,
    cached: int,
    first: int,
) -> None:
    """Feed right-padded rows after ``cached`` tokens, which lie in ``cache``.

    The logits of fed token ``first`` predict the first continuation token.
    """

    def take(start: int, logits: Tensor) -> None:
        for index, (_, group) in enumerate(rows):
            for continuation in group:
                if start - first < len(continuation):
                    task.add(logits[index], continuation, start - first)

    ids, valid = _ids(task.model, fed), _valid(task.model, fed, cached)
    feed(task.model, task.run, ids, cache, take, first=first, cached=cached, mask=valid)


def _batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    size = max(1, size)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _ids(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)


def _valid(model: Any, rows: Sequence[Sequence[int]], cached: int) -> Tensor | None:
    """The attention mask [B, cached + T]; None when no row is padded."""
    width = max(len(row) for row in rows)
    if all(len(row) == width for row in rows):
        return None
    return torch.tensor(
        [[1] * (cached + len(row)) + [0] * (width - len(row)) for row in rows], device=model.device
    )
