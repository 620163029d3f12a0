"""Which sums over tokens a configuration needs, how they are made, and what a prior adds to them.

Sums are weighted, per layer, float32 and detached.  Token weights are 1 for a real token of a live
row and 0 for padding and finished rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.scores import EPS, PerToken

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
    def divisor(self) -> Tensor | float:
        """The weight, never 0."""
        weight = self.weight
        return weight.clamp_min(EPS) if isinstance(weight, Tensor) else max(weight, EPS)

    @property
    def mean(self) -> Tensor:
        """The weighted mean."""
        return self.total / self.divisor

    def rows(self, ids: Tensor) -> Tensor:
        """The weighted means of some rows, [n, ...]; ids: [n] int64."""
        return self.total.index_select(0, ids) / self.divisor


@dataclass
class LayerStatistics:
    """Named sums of one layer: ``score`` [I], ``signed`` [I], ``squares`` [I] and scalars.

    ``lost`` [I] holds the activations of neurons where a token would not choose them, ``losses``
    [I] how often that was.  For low-rank compensation also ``features`` [r], ``moments`` [r, r]
    and ``cross`` [I, r].
    """

    sums: dict[str, Sum] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        """Add per-token ``values`` [T] or [T, I]; ``weights``: [T] or None for all ones."""
        add_sums([self], name, values[None], weights)

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

    def decay(self, decay: float, rows: int) -> None:
        """Scale all sums by ``decay * min(1, 256 / n)``, n = tokens per row seen so far."""
        for known in self.sums.values():
            ratio = REFERENCE_TOKENS * rows / known.divisor
            most = ratio.clamp_max(1.0) if isinstance(ratio, Tensor) else min(1.0, ratio)
            factor = decay * most
            known.total = known.total * factor
            known.weight = known.weight * factor

    def mean_when_lost(self) -> Tensor:
        """Mean activation of each neuron over the tokens that would leave it out, [I]."""
        return self.sums["lost"].total / self.sums["losses"].total.clamp_min(EPS)

    def nbytes(self) -> int:
        return sum(known.total.numel() * known.total.element_size() for known in self.sums.values())


Layers = Sequence[LayerStatistics]
"""What is remembered of some layers, in the order of the first dimension of what is added."""


def add_sums(evidence: Layers, name: str, values: Tensor, weights: Tensor | None) -> None:
    """Add per-token values [L, T] or [L, T, I] of some layers; weights: [T] or None."""
    weight: Tensor | float = float(values.shape[1]) if weights is None else weights.sum()
    if weights is None:
        parts = values.sum(1)
    else:
        with full_precision(values):
            parts = torch.einsum("t,lt...->l...", weights, values)
    add_parts(evidence, name, parts, weight)


def add_parts(evidence: Layers, name: str, parts: Tensor, weight: Tensor | float) -> None:
    """Add sums over tokens [L, ...] of some layers, and the tokens' weight."""
    for one, part in zip(evidence, parts.unbind(0), strict=True):
        one.more(name, part, weight)


def summed(parts: Iterable[Layers], devices: Sequence[torch.device]) -> list[LayerStatistics]:
    """The evidence of several texts, layer by layer, on ``devices``.

    Added up in float64 on the host, for thousands of tokens come together.
    """
    totals: list[dict[str, tuple[Tensor, float]]] = [{} for _ in devices]
    for evidence in parts:
        for total, found in zip(totals, evidence, strict=True):
            for name, known in found.sums.items():
                part, weight = known.total.cpu().double(), float(known.weight)
                old = total.get(name)
                total[name] = (part, weight) if old is None else (old[0] + part, old[1] + weight)
    return [
        LayerStatistics({name: Sum(t.float().to(device), w) for name, (t, w) in total.items()})
        for total, device in zip(totals, devices, strict=True)
    ]


@dataclass(frozen=True)
class LayerPrior:
    """What is learnt once of a layer, from text that the model wrote (docs/method.md, "Prior").

    ``evidence``: the sums of a run, over that text.  ``curvature``: [I] float32, mean squared
    gradient of the loss by u_i; None where the run does not read it.  ``basis``: [r, D] in the
    model's dtype, directions of the FFN's input that low-rank compensation reads; None: it has no
    such compensation.
    """

    evidence: LayerStatistics
    curvature: Tensor | None = None
    basis: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes held."""
        held = [t for t in (self.curvature, self.basis) if t is not None]
        return self.evidence.nbytes() + sum(t.numel() * t.element_size() for t in held)


def pooled(observed: LayerStatistics, prior: LayerPrior | None, tokens: float) -> LayerStatistics:
    """``observed`` and the prior, which weighs as much as ``tokens`` observed tokens.

    Returns new sums; a prior of None, or of no tokens, leaves what was observed.
    """
    if prior is None or tokens <= 0:
        return observed
    found = dict(observed.sums)
    for name, known in prior.evidence.sums.items():
        share, seen = tokens / float(known.divisor), found.get(name)
        if seen is None:
            found[name] = Sum(share * known.total, tokens)
        else:
            there = known.total.to(seen.total.device)
            found[name] = Sum(torch.add(seen.total, there, alpha=share), seen.weight + tokens)
    return LayerStatistics(found)


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
        return torch.stack([pruned_indicator(one, worth, keep) for one, worth, keep in each])


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
        evidence: LayerStatistics,
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
        self.add(
            [evidence], LayerObservation(*parts), weights, None if f is None else f[None], choice
        )

    def add(
        self,
        evidence: Layers,
        seen: LayerObservation,
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

    def score_input(self, evidence: LayerStatistics, width: int, device: torch.device) -> Tensor:
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


def pruned_indicator(u: Tensor, worth: Tensor, keep: float) -> Tensor:
    """1 where a token would leave a neuron out, else 0: u [T, I] float32; worth [I].

    A token keeps the share ``keep`` of the neurons, those of the largest ``abs(u_i) * worth_i``;
    of equals at the border it leaves out all.
    """
    lost = u.shape[-1] - max(1, round(keep * u.shape[-1]))
    if not lost:
        return torch.zeros_like(u)
    score = u.abs() * worth
    return (score <= _nth_smallest(score, lost)).to(u.dtype)


def _nth_smallest(values: Tensor, number: int) -> Tensor:
    """The ``number``-th smallest of each row, [T, 1]; values [T, I]."""
    if values.device.type != "cpu":
        return values.kthvalue(number, -1, keepdim=True).values
    # a sixth of the time of torch's own, which a prompt would feel
    found = np.partition(values.detach().numpy(), number - 1, -1)
    return torch.from_numpy(found[:, number - 1 : number])


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
