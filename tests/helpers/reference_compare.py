"""dart_llm beside the reference: kept neurons of every mask, logits of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dart_llm.session.run import prune
from reference import Dart, Griffin, Method, Trace, learn
from reference_model import own_text
from steps import decode as fed
from steps import selections

LOGITS = 3e-4
"""Largest difference of a float32 logit that agreement allows."""


@dataclass(frozen=True)
class Agreement:
    """How one executor's run compares with the reference's."""

    executor: str
    steps: tuple[int, ...]  # decode steps of the masks
    wanted: tuple[int, ...]  # ... and of the reference's
    kept: int  # neurons that the masks keep, all together
    differ: int  # kept by one of the two only
    logits: float  # largest difference
    spread: float  # standard deviation of the logits

    @property
    def holds(self) -> bool:
        return self.steps == self.wanted and self.differ == 0 and self.logits <= LOGITS


def settings(method: str, prior: dict[str, int], rank: int) -> dict[str, Any]:
    """What ``prune`` is told beside method, sparsity and executor."""
    return {"prior": prior, "compensation_rank": rank} if method == "dart" else {}


def method_of(
    model: Any, name: str, sparsity: float, prior: dict[str, int] | None = None, rank: int = 32
) -> Method:
    """The reference's method, which learns anew what it needs."""
    if name == "griffin":
        return Griffin(sparsity)
    return Dart(model, sparsity, learn(model, own_text(model, **(prior or {})), rank))


def compare(
    model: Any,
    ids: Tensor,
    prompt: int,
    method: str,
    sparsity: float,
    wanted: Trace,
    executor: str,
    **changes: Any,
) -> Agreement:
    """Decode ids [T] after ``prompt`` of them under ``executor``; ``wanted``: by the reference."""
    run = prune(model, method, sparsity=sparsity, executor=executor, **changes)
    masks = selections(run)
    with run:
        logits = fed(model, ids[None], prompt)[0]
    pairs = zip([ids for *_, ids in masks], [ids for _, ids in wanted.masks], strict=False)
    layers = [pair for a, b in pairs for pair in zip(a, b, strict=True)]
    sets = [(set(a.tolist()), set(b.tolist())) for a, b in layers]
    return Agreement(
        executor=run.report().executor,
        steps=tuple(step for step, *_ in masks),
        wanted=tuple(step for step, _ in wanted.masks),
        kept=sum(len(b) for _, b in sets),
        differ=sum(len(a ^ b) for a, b in sets),
        logits=float((logits - wanted.logits).abs().max()),
        spread=float(wanted.logits.std()),
    )
