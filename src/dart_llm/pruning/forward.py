"""ForwardCall in, ForwardPlan out; which tokens count (sinks, padding, ended rows)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from dart_llm.pruning.drift import SINKS
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.sequence import SequenceState


class Kind(StrEnum):
    """What a root forward is (docs/reference.md)."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ForwardCall:
    """One root forward. ``cached`` tokens lie in the cache, [``rows``, ``tokens``] are new.

    ``valid``: [B, T] float32, 0 for padding, or None.  ``live``: [B] bool, False for rows that
    have ended, or None.  ``observable``: leading tokens of a prefill that belong to the prompt.
    ``forced``: tokens of a fixed text stand for decode steps of one token each.
    """

    kind: Kind
    cached: int
    tokens: int
    rows: int
    valid: Tensor | None = None
    live: Tensor | None = None
    observable: int | None = None
    forced: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Leading tokens that a prefill observes."""
        return self.tokens if self.observable is None else min(self.tokens, self.observable)


@dataclass(frozen=True)
class ForwardPlan:
    """What the layers do in one forward: ``masks[sequence][layer]``, None where dense.

    ``observe``: hand on what is seen; ``signal``: hand on what drift watches; ``stream``: the
    FFN's output and the stream before it too; ``inputs``: the FFN's input too, where low-rank
    compensation reads it.  ``into``: where dense layers put what they saw by themselves,
    [B, T, ...] outside any graph; None: the controller does.
    """

    observe: bool
    signal: bool
    masks: tuple[Masks | None, ...]
    stream: bool = False
    inputs: bool = False
    into: dict[int, LayerObservation] | None = None

    @cached_property
    def dense(self) -> bool:
        return all(masks is None for masks in self.masks)


@dataclass
class PendingForward:
    """A forward that runs, or ran and is not settled; private to ``controller.py``.

    ``observing``: one flag per sequence.  ``counts``: prompt tokens of each row, padding left out.
    ``ended``: False while the forward runs, and for ever if it raised.
    """

    call: ForwardCall
    plan: ForwardPlan
    observing: list[bool]
    counts: list[float]
    layers: dict[int, LayerObservation]
    signal: Tensor | None = None
    ended: bool = False


T = TypeVar("T", Tensor, Tensor | None)


def detached(t: T) -> T:
    """``t`` outside any graph."""
    return t.detach() if t is not None and t.requires_grad else t


def outside_inference() -> AbstractContextManager[object]:
    """Tensors made inside can be used in later forwards of any mode."""
    return torch.inference_mode(False)


def token_weights(call: ForwardCall, end: int) -> Tensor | None:
    """[B, end] float32 token weights, or None when all are 1."""
    weights = None if call.valid is None else call.valid[:, :end]
    if call.live is None:
        return weights
    alive = call.live.float()[:, None].expand(-1, end)
    return alive if weights is None else weights * alive


def prompt_counts(call: ForwardCall) -> list[float]:
    """Prompt tokens of each row in one forward, padding left out; 0 in a decode forward."""
    if call.kind is Kind.DECODE:
        return [0.0] * call.rows
    if call.valid is None:
        return [float(call.prompt_tokens)] * call.rows
    counts: list[float] = call.valid[:, : call.prompt_tokens].sum(1).tolist()
    return counts


# Which tokens count as evidence, and for a drift detector's reference.  Attention sinks are left
# out: they draw attention whatever they say (docs/reference.md, "Drift").
# ``lengths``: unpadded tokens of each row before the forward.


def add_reference(
    states: Sequence[SequenceState], pending: PendingForward, v: Tensor, lengths: Sequence[float]
) -> None:
    """Hand v [B, T, D] to the detectors of the states that observe."""
    weights, live = (
        evidence_weights(pending.call, v.shape[1], lengths, skip=True),
        pending.call.live,
    )
    for state, wanted in zip(states, pending.observing, strict=True):
        if wanted:
            rows = state.batch_rows
            w = None if weights is None else weights[rows].to(v.device)
            state.detector.observe(v[rows], w, None if live is None else live[rows])


def sinks_ahead(state: SequenceState, tokens: int, lengths: Sequence[float]) -> int:
    """How many of the next ``tokens`` are attention sinks (of the shortest row)."""
    return max(0, min(SINKS - int(min(lengths[state.batch_rows])), tokens))


def evidence_weights(
    call: ForwardCall, end: int, lengths: Sequence[float], skip: bool
) -> Tensor | None:
    """Weights of a forward's first ``end`` tokens: [B, end], or None for all ones.

    ``skip``: sinks weigh nothing.
    """
    weights = token_weights(call, end)
    if not skip or min(lengths) >= SINKS:
        return weights
    return without_sinks(weights, lengths, call.rows, end)


def without_sinks(weights: Tensor | None, lengths: Sequence[float], rows: int, end: int) -> Tensor:
    """Token weights [B, end] (None: all ones) with 0 where a token is one of its row's first."""
    if weights is None:
        weights = torch.ones(rows, end, dtype=torch.float32)
    before = torch.tensor(lengths, device=weights.device)[:, None]
    return weights * (weights.cumsum(1) - 1 + before >= SINKS)
