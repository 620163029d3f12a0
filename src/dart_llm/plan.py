"""What is said of a forward (``Call``), and what is answered (``Plan``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from dart_llm.masks import LayerMask
from dart_llm.observations import Seen


class Kind(StrEnum):
    """What a root forward is (docs/method.md)."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Call:
    """One root forward. ``cached`` tokens lie in the cache, [``rows``, ``tokens``] are new.

    ``valid``: [B, T] float32, 0 for padding, or None.  ``live``: [B] bool, False for rows that
    have ended, or None.  ``observable``: leading tokens of a prefill that belong to the prompt.
    """

    kind: Kind
    cached: int
    tokens: int
    rows: int
    valid: Tensor | None = None
    live: Tensor | None = None
    observable: int | None = None
    forced: bool = False
    """Whether tokens of a known text stand for decode steps of one token each."""

    @property
    def prompt_tokens(self) -> int:
        """Leading tokens that a prefill observes."""
        return self.tokens if self.observable is None else min(self.tokens, self.observable)


@dataclass(frozen=True)
class Plan:
    """What the layers do in one forward: ``masks[life][layer]``, None where dense.

    ``observe``: hand on what is seen; ``stream``: the stream before and after the FFN too;
    ``inputs``: the FFN's input too, where low-rank compensation reads it.  ``into``: where dense
    layers put what they saw by themselves, [B, T, ...] outside any graph; None: the tracer does.
    """

    observe: bool
    features: bool
    masks: tuple[tuple[LayerMask | None, ...] | None, ...]
    stream: bool = False
    inputs: bool = False
    into: dict[int, Seen] | None = None

    @cached_property
    def dense(self) -> bool:
        return all(masks is None for masks in self.masks)


@dataclass
class Held:
    """Tokens of the running (or not yet settled) forward; ``observing``: one flag per life."""

    call: Call
    observing: list[bool]
    layers: dict[int, Seen]
    counts: list[float]
    """Prompt tokens of each row in this forward, padding left out."""
    feature: Tensor | None = None
    read: list[int] = field(default_factory=list)
    """Tokens of a decode forward on which sensitivities are read."""
    own: Tensor | None = None
    """Which of these each life reads itself, [lives, n]; None: all."""
    ended: bool = False
    """False while the forward runs, and for ever if it raised."""


T = TypeVar("T", Tensor, Tensor | None)


def bare(t: T) -> T:
    """``t`` outside any graph."""
    return t.detach() if t is not None and t.requires_grad else t


def token_weights(call: Call, end: int) -> Tensor | None:
    """[B, end] float32 token weights, or None when all are 1."""
    weights = None if call.valid is None else call.valid[:, :end]
    if call.live is None:
        return weights
    alive = call.live.float()[:, None].expand(-1, end)
    return alive if weights is None else weights * alive


def prompt_counts(call: Call) -> list[float]:
    """Prompt tokens of each row in one forward, padding left out; 0 in a decode forward."""
    if call.kind is Kind.DECODE:
        return [0.0] * call.rows
    if call.valid is None:
        return [float(call.prompt_tokens)] * call.rows
    counts: list[float] = call.valid[:, : call.prompt_tokens].sum(1).tolist()
    return counts
