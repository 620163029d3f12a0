"""Which sums over tokens a configuration needs, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.evidence import LayerEvidence, Layers, add_parts, add_sums, full_precision
from dart_llm.observations import Seen
from dart_llm.scores import EPS, PerToken

CHUNK_ELEMENTS = 1 << 24
"""Tokens are processed in chunks of at most this many float32 elements."""

TOGETHER = 1 << 18
"""Layers are added together up to so many elements: what lies in between stays in the caches."""


@dataclass(frozen=True)
class Choice:
    """How tokens of some layers choose, if they choose for themselves.

    ``worth``: [L, I], what a unit of each neuron's activation is worth; ``keeps``: the share of its
    neurons that a token keeps, per layer.
    """

    worth: Tensor
    keeps: tuple[float, ...]

    def of(self, layers: slice) -> Choice:
        """That of some of the layers."""
        return Choice(self.worth[layers], self.keeps[layers])

    def losers(self, u: Tensor) -> Tensor:
        """``losers`` of every layer; u: [L, T, I]."""
        each = zip(u, self.worth, self.keeps, strict=True)
        return torch.stack([losers(one, worth, keep) for one, worth, keep in each])


@dataclass(frozen=True)
class Statistics:
    """Which sums a configuration needs, and how to add one forward's tokens to them.

    ``needs`` holds any of ``signed`` (compensation), ``features`` (its low-rank part),
    ``sensitivity``, ``sensitivity-residual``, ``squares`` (budget ``global``) and ``lost``
    (compensation where tokens choose).  ``spread``: scores take the standard deviation of u;
    ``average``: the mean of the per-token statistic.
    """

    per_token: PerToken | None
    ema_decay: float | None
    needs: frozenset[str]
    spread: bool = False
    average: bool = False

    @property
    def beside_score(self) -> frozenset[str]:
        """What is summed beside the score's statistic: ``needs``, and the means for ``spread``."""
        return self.needs | ({"signed"} if self.spread else set())

    @property
    def needs_stream(self) -> bool:
        """Whether x and r, beside u and z, must be captured."""
        return bool(self.needs & {"sensitivity", "sensitivity-residual", "squares"})

    def update(
        self,
        evidence: LayerEvidence,
        u: Tensor,
        z: Tensor,
        x: Tensor | None,
        r: Tensor | None,
        weights: Tensor | None,
        f: Tensor | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Add tokens of one layer; parts as below, tensors without their first dimension.

        Raises ``RuntimeError`` when x and r are needed and missing.
        """
        parts = (t if t is None else t[None] for t in (u, None, z, x, r))
        if self.needs_stream and (x is None or r is None):
            raise RuntimeError("x and r were not captured")
        self.add([evidence], Seen(*parts), weights, None if f is None else f[None], choice)

    def add(
        self,
        evidence: Layers,
        seen: Seen,
        weights: Tensor | None,
        f: Tensor | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Add tokens of some layers: parts [L, B, T, ...] of ``seen`` that are there.

        f: [L, B, T, F] features of the FFN's input; weights: [B, T] float32 or None; ``choice``:
        needed for ``lost``.
        """
        if (u := seen.u) is not None:
            step = max(1, TOGETHER // max(1, u[0].numel()))
            for start in range(0, len(u), step):
                part = slice(start, start + step)
                own = None if f is None else f[part]
                chosen = None if choice is None else choice.of(part)
                self._add_neurons(evidence[part], u[part], weights, own, chosen)
        if self.needs_stream and seen.z is not None and seen.x is not None and seen.r is not None:
            flat = None if weights is None else weights.flatten()
            x, z, r = (t.flatten(1, 2).float() for t in (seen.x, seen.z, seen.r))
            self._stream(evidence, x, z, r, flat)

    def _add_neurons(
        self,
        evidence: Layers,
        u: Tensor,
        weights: Tensor | None,
        f: Tensor | None,
        choice: Choice | None,
    ) -> None:
        step = max(1, CHUNK_ELEMENTS // (u.shape[0] * u.shape[1] * u.shape[3]))
        for start in range(0, u.shape[2], step):
            part = slice(start, start + step)
            w = None if weights is None else weights[:, part]
            some = u[:, :, part].float()
            self._neurons(evidence, some, w, choice)
            if f is not None and "features" in self.needs:
                _add_features(evidence, some, f[:, :, part].float(), w)

    def _neurons(
        self, evidence: Layers, u: Tensor, weights: Tensor | None, choice: Choice | None
    ) -> None:
        flat = u.flatten(1, 2)
        w = None if weights is None else weights.flatten()
        if self.per_token is not None and self.ema_decay is not None:
            for one, own in zip(evidence, self.per_token(u).sqrt(), strict=True):
                one.add_ema(own, self.ema_decay, weights)
        elif self.per_token is not None:
            add_sums(evidence, "score", self.per_token(flat), w)
        if "signed" in self.needs or self.spread:
            add_sums(evidence, "signed", flat, w)
        if "squares" in self.needs:
            add_sums(evidence, "squares", flat.square(), w)
        if "lost" in self.needs and choice is not None:
            lost = choice.losers(flat)
            add_sums(evidence, "lost", flat * lost, w)
            add_sums(evidence, "losses", lost, w)

    def _stream(self, evidence: Layers, x: Tensor, z: Tensor, r: Tensor, w: Tensor | None) -> None:
        size = x.norm(dim=-1).clamp_min(EPS)
        if "sensitivity" in self.needs:
            _add_sensitivity(evidence, "", x, z, z - x, size, w)
        if "sensitivity-residual" in self.needs:
            _add_sensitivity(evidence, "-residual", x, x + r, r, size, w)
        if "squares" in self.needs:
            z2, r2 = z.square().sum(-1), r.square().sum(-1)
            add_sums(evidence, "gain", r2 / z2.clamp_min(EPS), w)
            add_sums(evidence, "stream", size.square(), w)

    def score_input(self, evidence: LayerEvidence, width: int, device: torch.device) -> Tensor:
        """The accumulated statistic ``a`` that score functions take: [I], float32."""
        if self.per_token is None:
            return torch.zeros(width, device=device)
        known = evidence.sums["score"]
        if self.spread:
            variance = known.mean - evidence.sums["signed"].mean.square()
            return variance.clamp_min(0).sqrt()
        if self.average or self.ema_decay is not None:
            return known.mean
        return known.total.sqrt()


def losers(u: Tensor, worth: Tensor, keep: float) -> Tensor:
    """1 where a token would leave a neuron out, else 0: u [T, I] float32; worth [I].

    A token keeps the share ``keep`` of the neurons, those of the largest ``abs(u_i) * worth_i``.
    """
    count = max(1, round(keep * u.shape[-1]))
    best = (u.abs() * worth).topk(count, dim=-1).indices
    return torch.ones_like(u).scatter_(-1, best, 0.0)


def _add_features(evidence: Layers, u: Tensor, f: Tensor, weights: Tensor | None) -> None:
    """Sums of f, f f^T and u f^T; u: [L, B, T, I], f: [L, B, T, F], both float32."""
    u, f = u.flatten(1, 2), f.flatten(1, 2)
    w = None if weights is None else weights.flatten()
    add_sums(evidence, "features", f, w)
    weight: Tensor | float = float(f.shape[1]) if w is None else w.sum()
    weighted = f if w is None else f * w[:, None]
    with full_precision(f):
        add_parts(evidence, "moments", f.mT @ weighted, weight)
        add_parts(evidence, "cross", u.mT @ weighted, weight)


def _add_sensitivity(
    evidence: Layers,
    suffix: str,
    x: Tensor,
    y: Tensor,
    change: Tensor,
    size: Tensor,
    w: Tensor | None,
) -> None:
    cosine = (x * y).sum(-1) / (size * y.norm(dim=-1)).clamp_min(EPS)
    add_sums(evidence, f"cosine{suffix}", cosine, w)
    add_sums(evidence, f"change{suffix}", change.norm(dim=-1) / size, w)
