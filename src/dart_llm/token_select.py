"""Token-level selection: every token's own winners, from cheap estimates of its neurons.

The idea is that of Prox (arXiv 2607.27591) and WINA (arXiv 2505.19427); docs/method.md has the
formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dart_llm.compensation import compensation
from dart_llm.errors import ConfigError
from dart_llm.masks import LayerMask, top_ids

NO_MASK = (
    "token-level selection has no sequence mask: every token chooses its own neurons, and only "
    "their number per layer is kept"
)
"""What is said where kept neurons are asked for."""


@dataclass(frozen=True)
class TokenMask(LayerMask):
    """How many neurons of one layer every token keeps, and out of which.

    ``ids``: the candidates, ascending.  With compensation ``mean`` is m, the mean activation of
    each neuron where tokens leave it out, [I] float32, and ``bias`` is W_down m over all neurons:
    winners add (u - m) to it.  ``worth``: what a unit of activation is worth, [I] float32; None:
    the norm of the output column.
    """

    winners: int = field(kw_only=True)
    mean: Tensor | None = field(default=None, kw_only=True)
    worth: Tensor | None = field(default=None, kw_only=True)

    @property
    def kept(self) -> int:
        return self.winners

    @property
    def candidates(self) -> Tensor | None:
        """The candidates' ids, or None when all neurons are."""
        return None if len(self.ids) == self.width else self.ids

    def nbytes(self) -> int:
        held = (t for t in (self.mean, self.worth) if t is not None)
        return super().nbytes() + sum(t.numel() * t.element_size() for t in held)


def candidate_count(share: float | None, width: int, keep: int) -> int:
    """Candidates of a layer: ``share`` of its neurons, never fewer than it keeps; None: all."""
    return width if share is None else max(keep, min(width, round(share * width)))


def token_mask(
    score: Tensor,
    candidates: int,
    keep: int,
    down: Tensor,
    mean: Tensor | None,
    worth: Tensor | None = None,
) -> TokenMask:
    """``keep`` winners per token out of the ``candidates`` best by the sequence's ``score`` [I].

    down: [D, I]; mean: [I] float32, or None without compensation; worth: [I] float32, or None for
    the norms of down's columns.
    """
    width = len(score)
    every = torch.arange(width, device=score.device)
    ids = every if candidates >= width else top_ids(score, candidates)
    bias = None if mean is None else compensation(down, mean, every)
    return TokenMask(ids, width, bias, winners=keep, mean=mean, worth=worth)


def strength(estimate: Tensor, worth: Tensor) -> Tensor:
    """``abs(u~) * worth``: what leaving a neuron out would cost, [..., n] float32.

    estimate: u~ [..., n]; worth: of a unit of activation, [n].
    """
    return estimate.abs() * worth


def winner_places(strengths: Tensor, keep: int) -> Tensor:
    """Places of the ``keep`` largest of every token, ascending; ties go to the lower place.

    strengths: [..., n].  Returns [..., keep] int64.
    """
    order = strengths.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


Masks = tuple[LayerMask | None, ...]


def sequence_masks(masks: Masks) -> Masks:
    """``masks`` without those of layers whose tokens choose for themselves."""
    if not any(isinstance(mask, TokenMask) for mask in masks):
        return masks
    return tuple(None if isinstance(mask, TokenMask) else mask for mask in masks)


def plain_masks(masks: Masks) -> Masks:
    """``masks``; raises ``ConfigError`` where a layer's tokens choose for themselves."""
    if any(isinstance(mask, TokenMask) for mask in masks):
        raise ConfigError(f"{NO_MASK}: use a method with masks of the sequence, e.g. dart")
    return masks
