"""The description and the plan of one forward, and the weights of its tokens in the evidence.

Evidence is the sums over observed tokens from which masks are made.
"""

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
    """Kind of a forward of the whole model (docs/reference.md)."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class ForwardCall:
    """One forward of the whole model, of ids with the shape [``rows``, ``tokens``].

    ``cached``: number of positions in the cache before the forward.  ``valid``: [B, T] float32, 0
    for padding, else 1; None if there is no padding.  ``live``: [B] bool, False for rows that have
    ended; None if all are live.  ``observable``: in a prefill, how many leading tokens belong to
    the prompt; None means all.  ``forced``: True if the tokens come from a fixed text (teacher
    forcing); each then counts as one decode step.
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
        """Number of leading tokens that belong to the prompt; a prefill observes these only."""
        return self.tokens if self.observable is None else min(self.tokens, self.observable)


@dataclass(frozen=True)
class ForwardPlan:
    """What the layers do in one forward.

    ``masks[sequence]`` is None if all layers run dense; else, it has None for each dense layer.
    ``observe``: whether layers pass activations to the controller.  ``signal``: whether the model
    passes the signal that the drift detector watches.  ``stream``: whether layers also pass the
    FFN's output and the residual stream before it.  ``inputs``: whether they also pass the FFN's
    input.  ``observations``: a dictionary in which each layer stores its activations [B, T, ...],
    detached; if it is None, layers call the controller instead.
    """

    observe: bool
    signal: bool
    masks: tuple[Masks | None, ...]
    stream: bool = False
    inputs: bool = False
    observations: dict[int, LayerObservation] | None = None

    @cached_property
    def dense(self) -> bool:
        return all(masks is None for masks in self.masks)


@dataclass
class PendingForward:
    """A forward that is running, or whose tokens are not counted yet; used by ``controller.py``.

    ``observing``: for each sequence, whether it observes this forward.  ``counts``: number of
    prompt tokens in each row, without padding.  ``layers``: observations by layer.  ``ended``: True
    once the forward has finished without an exception.  ``weights``: the weights of a prompt's
    tokens (see ``evidence_weights``), in a tuple; None until they are needed.  ``repeats``: number
    of later forwards of one token with the same plan, which are counted with this one; ``room``:
    how many more there may be.
    """

    call: ForwardCall
    plan: ForwardPlan
    observing: list[bool]
    counts: list[float]
    layers: dict[int, LayerObservation]
    signal: Tensor | None = None
    ended: bool = False
    weights: tuple[Tensor | None] | None = None
    repeats: int = 0
    room: int = 0

    @property
    def end(self) -> int:
        """Number of positions in the cache after the forward and its repeats."""
        return self.call.cached + self.call.tokens + self.repeats


T = TypeVar("T", Tensor, Tensor | None)


def detached(t: T) -> T:
    """``t``, detached from its autograd graph."""
    return t.detach() if t is not None and t.requires_grad else t


def outside_inference() -> AbstractContextManager[object]:
    """A context that turns inference mode off.

    Tensors created in it can be used in later forwards, whether in inference mode or not.
    """
    return torch.inference_mode(False)


def token_weights(call: ForwardCall, end: int) -> Tensor | None:
    """Weights of each row's first ``end`` tokens, [B, end] float32; None if all are 1.

    Padding and rows that have ended have weight 0.
    """
    weights = None if call.valid is None else call.valid[:, :end]
    if call.live is None:
        return weights
    alive = call.live.float()[:, None].expand(-1, end)
    return alive if weights is None else weights * alive


def prompt_counts(call: ForwardCall) -> list[float]:
    """Number of prompt tokens in each row, without padding; 0 in a decode forward."""
    if call.kind is Kind.DECODE:
        return [0.0] * call.rows
    if call.valid is None:
        return [float(call.prompt_tokens)] * call.rows
    counts: list[float] = call.valid[:, : call.prompt_tokens].sum(1).tolist()
    return counts


# The functions below decide which tokens count as evidence and enter a drift detector's reference.
# They can exclude attention sinks, the first tokens of a sequence, which draw attention whatever
# the text (docs/reference.md, "Drift").  ``lengths``: number of tokens, without padding, in each
# batch row before the forward.


def add_reference(
    states: Sequence[SequenceState], pending: PendingForward, v: Tensor, lengths: Sequence[float]
) -> None:
    """Add the signal v [B, T, D] to the detector's reference of each state that observes."""
    weights, live = (
        evidence_weights(pending.call, v.shape[1], lengths, skip=True),
        pending.call.live,
    )
    for state, observes in zip(states, pending.observing, strict=True):
        if observes:
            rows = state.batch_rows
            w = None if weights is None else weights[rows].to(v.device)
            state.detector.observe(v[rows], w, None if live is None else live[rows])


def sinks_ahead(state: SequenceState, tokens: int, lengths: Sequence[float]) -> int:
    """Number of attention sinks among the next ``tokens`` tokens of the state's shortest row."""
    return max(0, min(SINKS - int(min(lengths[state.batch_rows])), tokens))


def evidence_weights(
    call: ForwardCall, end: int, lengths: Sequence[float], skip: bool
) -> Tensor | None:
    """Weights of each row's first ``end`` tokens, [B, end]; None if all are 1.

    ``skip``: whether attention sinks have weight 0.
    """
    weights = token_weights(call, end)
    if not skip or min(lengths) >= SINKS:
        return weights
    return without_sinks(weights, lengths, call.rows, end)


def without_sinks(weights: Tensor | None, lengths: Sequence[float], rows: int, end: int) -> Tensor:
    """``weights`` [B, end], with 0 for the first ``SINKS`` tokens of each row.

    If ``weights`` is None, the other tokens have weight 1.
    """
    if weights is None:
        weights = torch.ones(rows, end, dtype=torch.float32)
    before = torch.tensor(lengths, device=weights.device)[:, None]
    return weights * (weights.cumsum(1) - 1 + before >= SINKS)
