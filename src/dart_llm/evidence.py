"""What is remembered of the observed tokens: weighted sums per layer, float32, detached.

Token weights are 1 for a real token of a live row and 0 for padding and finished rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dart_llm.observations import Seen
from dart_llm.scores import EPS, PerToken

CHUNK_ELEMENTS = 1 << 24
"""Tokens are processed in chunks of at most this many float32 elements."""

TOGETHER = 1 << 18
"""Layers are added together up to so many elements: what lies in between stays in the caches."""

REFERENCE_TOKENS = 256
"""Decayed evidence weighs at most as much as this many tokens before the decay."""


def full_precision(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, products on the device of ``t`` are not rounded by an autocast of the caller's."""
    kind = t.device.type
    if t.is_meta or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


@dataclass
class Sum:
    """A weighted sum over tokens and its weight."""

    total: Tensor
    weight: Tensor | float = 0.0

    @property
    def mean(self) -> Tensor:
        """The weighted mean."""
        if isinstance(self.weight, Tensor):
            return self.total / self.weight.clamp_min(EPS)
        return self.total / max(self.weight, EPS)


@dataclass
class LayerEvidence:
    """Named sums of one layer: ``score`` [I], ``signed`` [I], ``squares`` [I] and scalars.

    ``lost`` [I] holds the activations of neurons where a token would not choose them, ``losses``
    [I] how often that was.  For low-rank compensation also ``features`` [r], ``moments`` [r, r]
    and ``cross`` [I, r].
    """

    sums: dict[str, Sum] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        """Add per-token ``values`` [T] or [T, I]; ``weights``: [T] or None for all ones."""
        _add([self], name, values[None], weights)

    def more(self, name: str, part: Tensor, weight: Tensor | float) -> None:
        """Add a sum over tokens and its weight."""
        known = self.sums.get(name)
        if known is None:
            self.sums[name] = Sum(part, weight)
        else:
            known.total += part
            known.weight = known.weight + weight

    def add_ema(self, values: Tensor, decay: float, weights: Tensor | None) -> None:
        """``s <- d s + a`` over the tokens of [B, T, I] in order, rows summed."""
        tokens = values.shape[1]
        if weights is None:
            later = torch.arange(tokens - 1, -1, -1, device=values.device)
            factors = (decay ** later.float()).expand(len(values), tokens)
            shift: Tensor | float = float(decay**tokens)
        else:
            alive = weights.amax(0)
            later = alive.flip(0).cumsum(0).flip(0) - alive
            factors = decay**later * weights
            shift = decay ** alive.sum()
        with full_precision(values):
            part, weight = torch.einsum("bt,bti->i", factors, values), factors.sum()
        known = self.sums.get("score")
        if known is None:
            self.sums["score"] = Sum(part, weight)
        else:
            known.total = known.total * shift + part
            known.weight = known.weight * shift + weight

    def fade(self, decay: float, rows: int) -> None:
        """Scale all sums by ``decay * min(1, 256 / n)``, n = tokens per row seen so far."""
        for known in self.sums.values():
            if isinstance(known.weight, float):
                factor: Tensor | float = decay * min(
                    1.0, REFERENCE_TOKENS * rows / max(known.weight, EPS)
                )
            else:
                ratio = REFERENCE_TOKENS * rows / known.weight.clamp_min(EPS)
                factor = decay * ratio.clamp_max(1.0)
            known.total = known.total * factor
            known.weight = known.weight * factor

    def mean_when_lost(self) -> Tensor:
        """Mean activation of each neuron over the tokens that would leave it out, [I]."""
        return self.sums["lost"].total / self.sums["losses"].total.clamp_min(EPS)

    def nbytes(self) -> int:
        return sum(known.total.numel() * known.total.element_size() for known in self.sums.values())


Layers = Sequence[LayerEvidence]
"""What is remembered of some layers, in the order of the first dimension of what is added."""


@dataclass(frozen=True)
class Statistics:
    """Which sums a configuration needs, and how to add one forward's tokens to them.

    ``needs`` holds any of ``signed`` (compensation), ``features`` (its low-rank part),
    ``sensitivity``, ``sensitivity-residual``, ``squares`` (budget ``global``) and ``lost``
    (compensation where tokens choose; ``keep``: the share that they keep).  ``spread``:
    scores take the standard deviation of u; ``average``: the mean of the per-token statistic.
    """

    per_token: PerToken | None
    ema_decay: float | None
    needs: frozenset[str]
    spread: bool = False
    average: bool = False
    keep: float = 1.0

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
        scale: Tensor | None = None,
    ) -> None:
        """Add tokens of one layer; parts as below, without their first dimension.

        Raises ``RuntimeError`` when x and r are needed and missing.
        """
        parts = (t if t is None else t[None] for t in (u, None, z, x, r))
        known = (t if t is None else t[None] for t in (f, scale))
        if self.needs_stream and (x is None or r is None):
            raise RuntimeError("x and r were not captured")
        self.add([evidence], Seen(*parts), weights, *known)

    def add(
        self,
        evidence: Layers,
        seen: Seen,
        weights: Tensor | None,
        f: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Add tokens of some layers: parts [L, B, T, ...] of ``seen`` that are there.

        f: [L, B, T, F] features of the FFN's input; weights: [B, T] float32 or None; scale: [L, I],
        what a unit of each neuron's activation is worth.
        """
        if (u := seen.u) is not None:
            step = max(1, TOGETHER // max(1, u[0].numel()))
            for start in range(0, len(u), step):
                part = slice(start, start + step)
                own, worth = (t if t is None else t[part] for t in (f, scale))
                self._add_neurons(evidence[part], u[part], weights, own, worth)
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
        scale: Tensor | None,
    ) -> None:
        step = max(1, CHUNK_ELEMENTS // (u.shape[0] * u.shape[1] * u.shape[3]))
        for start in range(0, u.shape[2], step):
            part = slice(start, start + step)
            w = None if weights is None else weights[:, part]
            some = u[:, :, part].float()
            self._neurons(evidence, some, w, scale)
            if f is not None and "features" in self.needs:
                _add_features(evidence, some, f[:, :, part].float(), w)

    def _neurons(
        self, evidence: Layers, u: Tensor, weights: Tensor | None, scale: Tensor | None
    ) -> None:
        flat = u.flatten(1, 2)
        w = None if weights is None else weights.flatten()
        if self.per_token is not None and self.ema_decay is not None:
            for one, own in zip(evidence, self.per_token(u).sqrt(), strict=True):
                one.add_ema(own, self.ema_decay, weights)
        elif self.per_token is not None:
            _add(evidence, "score", self.per_token(flat), w)
        if "signed" in self.needs or self.spread:
            _add(evidence, "signed", flat, w)
        if "squares" in self.needs:
            _add(evidence, "squares", flat.square(), w)
        if "lost" in self.needs and scale is not None:
            lost = losers(flat, scale[:, None], self.keep)
            _add(evidence, "lost", flat * lost, w)
            _add(evidence, "losses", lost, w)

    def _stream(self, evidence: Layers, x: Tensor, z: Tensor, r: Tensor, w: Tensor | None) -> None:
        size = x.norm(dim=-1).clamp_min(EPS)
        if "sensitivity" in self.needs:
            _add_sensitivity(evidence, "", x, z, z - x, size, w)
        if "sensitivity-residual" in self.needs:
            _add_sensitivity(evidence, "-residual", x, x + r, r, size, w)
        if "squares" in self.needs:
            z2, r2 = z.square().sum(-1), r.square().sum(-1)
            _add(evidence, "gain", r2 / z2.clamp_min(EPS), w)
            _add(evidence, "stream", size.square(), w)

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


def _add(evidence: Layers, name: str, values: Tensor, weights: Tensor | None) -> None:
    """Add per-token values [L, T] or [L, T, I] of some layers; weights: [T] or None."""
    weight: Tensor | float = float(values.shape[1]) if weights is None else weights.sum()
    if weights is None:
        parts = values.sum(1)
    else:
        with full_precision(values):
            parts = torch.einsum("t,lt...->l...", weights, values)
    _more(evidence, name, parts, weight)


def _more(evidence: Layers, name: str, parts: Tensor, weight: Tensor | float) -> None:
    for one, part in zip(evidence, parts.unbind(0), strict=True):
        one.more(name, part, weight)


def _add_features(evidence: Layers, u: Tensor, f: Tensor, weights: Tensor | None) -> None:
    """Sums of f, f f^T and u f^T; u: [L, B, T, I], f: [L, B, T, F], both float32."""
    u, f = u.flatten(1, 2), f.flatten(1, 2)
    w = None if weights is None else weights.flatten()
    _add(evidence, "features", f, w)
    weight: Tensor | float = float(f.shape[1]) if w is None else w.sum()
    weighted = f if w is None else f * w[:, None]
    with full_precision(f):
        _more(evidence, "moments", f.mT @ weighted, weight)
        _more(evidence, "cross", u.mT @ weighted, weight)


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
    _add(evidence, f"cosine{suffix}", cosine, w)
    _add(evidence, f"change{suffix}", change.norm(dim=-1) / size, w)
