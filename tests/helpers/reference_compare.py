"""dart_llm beside the reference: kept neurons of every mask, logits of every token."""

from dataclasses import dataclass

from dart_llm.session.run import prune
from reference import Dart, Griffin, learn
from reference_model import own_text
from steps import decode, selections

LOGITS = 3e-4
"""Largest difference of a float32 logit that agreement allows."""


@dataclass(frozen=True)
class Agreement:
    executor: str
    steps: tuple[int, ...]  # decode steps of the masks
    wanted: tuple[int, ...]  # ... and of the reference's
    kept: int  # neurons that the masks keep, all together
    differ: int  # kept by one of the two only
    logits: float  # largest difference
    spread: float  # standard deviation of the logits

    @property
    def holds(self):
        return self.steps == self.wanted and self.differ == 0 and self.logits <= LOGITS


def method_of(model, name, sparsity, prior=None, rank=32):
    """The reference's method, which learns anew what it needs."""
    if name == "griffin":
        return Griffin(sparsity)
    return Dart(model, sparsity, learn(model, own_text(model, **(prior or {})), rank))


def compare(model, ids, prompt, method, sparsity, wanted, executor, **changes):
    """Decode ids [T] after ``prompt`` of them under ``executor``; ``wanted``: by the reference."""
    run = prune(model, method, sparsity=sparsity, executor=executor, **changes)
    masks = selections(run)
    with run:
        logits = decode(model, ids[None], prompt)[0]
    pairs = zip([ids for *_, ids in masks], [ids for _, ids in wanted.masks], strict=False)
    sets = [(set(a.tolist()), set(b.tolist())) for one in pairs for a, b in zip(*one, strict=True)]
    return Agreement(
        executor=run.report().executor,
        steps=tuple(step for step, *_ in masks),
        wanted=tuple(step for step, _ in wanted.masks),
        kept=sum(len(b) for _, b in sets),
        differ=sum(len(a ^ b) for a, b in sets),
        logits=float((logits - wanted.logits).abs().max()),
        spread=float(wanted.logits.std()),
    )
