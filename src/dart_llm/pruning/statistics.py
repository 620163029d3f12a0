"""Computes the evidence (sums over tokens, from which masks are made) and adds learned sums.

Each layer has its own sums, float32 and detached from autograd.  Tokens are weighted: 0 for padding
and for batch rows that have ended, otherwise 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dart_llm.native.build import ops, why_not
from dart_llm.pruning.observations import LayerObservation

EPS = 1e-12

FISHER, UP = "fisher", "up"
"""Names of learned sums: squared gradients of the loss, and squared outputs of gated FFNs' up."""

REFERENCE_TOKENS = 256
"""Before sums over more tokens than this decay, they are scaled to count as this many tokens."""

PerToken = Callable[[Tensor], Tensor]
"""The function whose values a score sums over tokens: maps u [..., I] float32 to [..., I]."""


def squared(u: Tensor) -> Tensor:
    """u_i^2 of each token.  u: [..., I] float32."""
    return u.square()


def squared_share(u: Tensor) -> Tensor:
    """(u_i / ||u||_2)^2 of each token.  u: [..., I] float32."""
    return u.square() / u.square().sum(-1, keepdim=True).clamp_min(EPS)


def full_precision(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context that disables autocast on the device of ``t``."""
    kind = t.device.type
    if t.is_meta or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


@dataclass
class Sum:
    """A weighted sum over tokens, and the total weight of these tokens."""

    total: Tensor
    weight: Tensor | float = 0.0

    @property
    def divisor(self) -> Tensor | float:
        """The weight, or a tiny number instead of 0."""
        weight = self.weight
        return weight.clamp_min(EPS) if isinstance(weight, Tensor) else max(weight, EPS)

    @property
    def mean(self) -> Tensor:
        """The weighted mean."""
        return self.total / self.divisor

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` ([n] int64) of the weighted mean, [n, ...]."""
        return self.total.index_select(0, ids) / self.divisor


@dataclass
class LayerStatistics:
    """Named sums of one layer.  A run collects only the sums that it needs.

    ``score`` [I]: a score's statistic.  ``signed`` [I]: activations.  ``lost`` [I]: activations of
    each neuron, summed over the tokens that would not select it; ``losses`` [I]: the number of
    these tokens.  ``features`` [r], ``moments`` [r, r] and ``cross`` [I, r] are for low-rank
    compensation.  The scalars ``cosine`` and ``change`` are for the layer's sensitivity.
    """

    sums: dict[str, Sum] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, weight: Tensor | float) -> None:
        """Add ``total``, a sum over tokens of total weight ``weight``, to the sum ``name``."""
        before = self.sums.get(name)
        if before is None:
            self.sums[name] = Sum(total, weight)
        else:
            before.total += total
            before.weight = before.weight + weight

    def add_ema(self, values: Tensor, decay: float, weights: Tensor | None) -> None:
        """Update the score's sum by ``s <- decay * s + v`` once per position.

        v is the sum of ``values`` [B, T, I] over the batch rows with a token at that position.
        """
        if weights is None:
            weights = torch.ones(values.shape[:2], device=values.device)
        alive = weights.amax(0)
        later = alive.flip(0).cumsum(0).flip(0) - alive  # number of later tokens
        factors = decay**later * weights
        with full_precision(values):
            total, weight = torch.einsum("bt,bti->i", factors, values), factors.sum()
        old, factor = self.sums.get("score"), decay ** alive.sum()
        if old is not None:
            total, weight = old.total * factor + total, old.weight * factor + weight
        self.sums["score"] = Sum(total, weight)

    def decay(self, decay: float, rows: int) -> None:
        """Scale all sums by ``decay * min(1, 256 / n)``, so that older evidence counts less.

        n is the number of observed tokens per batch row.  Called at a re-mask or further prompt.
        """
        for name, entry in self.sums.items():
            ratio = REFERENCE_TOKENS * rows / entry.divisor
            share = ratio.clamp_max(1.0) if isinstance(ratio, Tensor) else min(1.0, ratio)
            self.sums[name] = Sum(entry.total * (decay * share), entry.weight * (decay * share))

    def mean_when_lost(self) -> Tensor:
        """Mean activation of each neuron over the tokens that would not select it, [I]."""
        return self.sums["lost"].total / self.sums["losses"].total.clamp_min(EPS)

    def nbytes(self) -> int:
        return sum(entry.total.nbytes for entry in self.sums.values())


Layers = Sequence[LayerStatistics]
"""The sums of some layers; a tensor that is added to them has the layers as first dimension."""


def add_sums(evidence: Layers, name: str, values: Tensor, weights: Tensor | None) -> None:
    """Sum ``values`` over the tokens, and add the result to the sum ``name`` of each layer.

    values: [L, T] or [L, T, I], for L layers.  weights: [T], or None if all are 1.
    """
    weight: Tensor | float = float(values.shape[1]) if weights is None else weights.sum()
    if weights is None:
        totals = values.sum(1)
    else:
        with full_precision(values):
            totals = torch.einsum("t,lt...->l...", weights, values)
    add_totals(evidence, name, totals, weight)


def add_totals(evidence: Layers, name: str, totals: Tensor, weight: Tensor | float) -> None:
    """Add ``totals`` [L, ...], L layers' sums over tokens, and these tokens' total ``weight``."""
    for layer, total in zip(evidence, totals.unbind(0), strict=True):
        layer.add(name, total, weight)


def summed(parts: Iterable[Layers], devices: Sequence[torch.device]) -> list[LayerStatistics]:
    """Add the evidence of several batches, layer by layer; ``devices``: one per layer.

    The sums are added in float64 on the host, because there are thousands of tokens.
    """
    totals = [LayerStatistics() for _ in devices]
    for evidence in parts:
        for total, layer in zip(totals, evidence, strict=True):
            for name, entry in layer.sums.items():
                wide = entry.total.to("cpu", torch.float64, copy=True)
                total.add(name, wide, float(entry.weight))
    for total, device in zip(totals, devices, strict=True):
        for entry in total.sums.values():
            entry.total = entry.total.float().to(device)
    return totals


def to_tensors(evidence: Layers) -> dict[str, Tensor]:
    """All sums and weights as named tensors, for a file."""
    tensors = {}
    for number, layer in enumerate(evidence):
        for name, entry in layer.sums.items():
            tensors[f"{number}.{name}"] = entry.total
            tensors[f"{number}.{name}.weight"] = torch.tensor(float(entry.weight)).double()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], layers: int) -> list[LayerStatistics]:
    """The reverse of ``to_tensors``; raises ``KeyError``, ``ValueError`` or ``IndexError``."""
    evidence = [LayerStatistics() for _ in range(layers)]
    for key in tensors:
        number, name, *weight = key.split(".")
        if not weight:
            total_weight = float(tensors[f"{key}.weight"])
            evidence[int(number)].sums[name] = Sum(tensors[key], total_weight)
    return evidence


@dataclass(frozen=True)
class SelfStats:
    """Statistics of a layer, learned once from text that the model generates (docs/reference.md).

    ``evidence``: sums over that text.  ``fisher``: [I] float32, mean squared gradient of the loss
    with respect to the activation u_i.  ``basis``: [r, D] in the model's dtype, the directions on
    which the FFN's input is projected; the r results are its features, for low-rank compensation.
    A statistic that the run does not need is None.
    """

    evidence: LayerStatistics
    fisher: Tensor | None = None
    basis: Tensor | None = None

    def nbytes(self) -> int:
        tensors = [t for t in (self.fisher, self.basis) if t is not None]
        return self.evidence.nbytes() + sum(t.nbytes for t in tensors)


def pooled(observed: LayerStatistics, learned: SelfStats | None, tokens: float) -> LayerStatistics:
    """``observed`` plus the learned sums, which are rescaled to count as ``tokens`` tokens.

    Returns new sums, or ``observed`` itself if ``learned`` is None or ``tokens`` is 0.
    """
    if learned is None or tokens <= 0:
        return observed
    sums = dict(observed.sums)
    for name, entry in learned.evidence.sums.items():
        factor, seen = tokens / float(entry.divisor), sums.get(name)
        if seen is None:
            sums[name] = Sum(factor * entry.total, tokens)
        else:
            total = torch.add(seen.total, entry.total.to(seen.total.device), alpha=factor)
            sums[name] = Sum(total, seen.weight + tokens)
    return LayerStatistics(sums)


CHUNK_ELEMENTS = 1 << 24
"""Maximum number of float32 elements in a chunk of tokens that is processed at once."""

TOGETHER = 1 << 18
"""Maximum number of activations in layers that are processed together, to fit a CPU's cache."""


class TokenSelection(NamedTuple):
    """What per-token selection needs in some layers.

    ``saliency``: [L, I], factor by which each neuron's activation is multiplied to rank it.
    ``keeps``: for each layer, the share of its neurons that each token selects.
    """

    saliency: Tensor
    keeps: tuple[float, ...]

    def of(self, layers: slice) -> TokenSelection:
        """The same data, for only some of the layers."""
        return TokenSelection(self.saliency[layers], self.keeps[layers])

    def losers(self, u: Tensor) -> Tensor:
        """A tensor like u [L, T, I]: 1 where a token would not select a neuron, else 0."""
        layers = zip(u, self.saliency, self.keeps, strict=True)
        return torch.stack([pruned_indicator(*layer) for layer in layers])

    def sums(self, u: Tensor, weights: Tensor | None) -> Tensor:
        """Sums over the tokens: of u², ``signed``, ``lost``, ``losses`` (``LayerStatistics``).

        u: [L, T, I] float32; weights: [T], or None if all are 1.  Returns [4, L, I].
        """
        if u.device.type == "cpu" and not why_not():  # prompts would take a third longer
            kept = [max(1, round(keep * u.shape[-1])) for keep in self.keeps]
            tensors = u.detach().contiguous(), self.saliency.float().contiguous()
            by = torch.ones(u.shape[1]) if weights is None else weights
            sums: Tensor = ops().selection_sums(*tensors, kept, by)
            return sums
        lost = self.losers(u)
        parts = torch.stack([u.square(), u, u * lost, lost])
        return parts.sum(2) if weights is None else torch.einsum("t,slt...->sl...", weights, parts)


@dataclass(frozen=True)
class Statistics:
    """Which sums a configuration needs; ``add`` adds the tokens of a forward to them.

    ``per_token``: the function whose values the score sums over tokens (unrelated to per-token
    selection); None if the score needs no activations.  ``needs``: other sums, any of ``signed``
    (for compensation), ``features`` (for low-rank compensation), ``sensitivity`` (for the budget
    ``depth``) and ``lost`` (for compensation under per-token selection); ``collect`` adds ``UP``.
    ``spread`` and ``average`` are as in ``Score``, ``ema_decay`` as in ``ScoreConfig``.
    """

    per_token: PerToken | None
    needs: frozenset[str]
    spread: bool = False
    average: bool = False
    ema_decay: float | None = None

    @property
    def beside_score(self) -> frozenset[str]:
        """Names of the sums besides ``score``: ``needs``, and ``signed`` if ``spread`` is True."""
        return self.needs | ({"signed"} if self.spread else set())

    @property
    def needs_stream(self) -> bool:
        """Whether the FFN's output z and the residual stream x before it must be captured."""
        return "sensitivity" in self.needs

    def add(
        self,
        evidence: Layers,
        seen: LayerObservation,
        weights: Tensor | None,
        f: Tensor | None = None,
        selection: TokenSelection | None = None,
    ) -> None:
        """Add observed tokens to the sums of L layers; ``seen`` has tensors [L, B, T, ...].

        f: [L, B, T, r], features of the FFN's input.  weights: [B, T] float32, or None if all are
        1.  ``selection``: required for the sum ``lost``.
        """
        if (u := seen.u) is not None:
            count = len(u) if self._in_one(selection) else max(1, TOGETHER // max(1, u[0].numel()))
            tokens = max(1, CHUNK_ELEMENTS // (min(count, len(u)) * u.shape[1] * u.shape[3]))
            for layers in _slices(len(u), count):
                selected = None if selection is None else selection.of(layers)
                for part in _slices(u.shape[2], tokens):
                    w = None if weights is None else weights[:, part]
                    features = None if f is None else f[layers, :, part].float()
                    chunk = u[layers, :, part].float()
                    self._add_chunk(evidence[layers], chunk, w, features, selected)
        if self.needs_stream and seen.z is not None and seen.x is not None:
            flat = None if weights is None else weights.flatten()
            x, z = seen.x.flatten(1, 2).float(), seen.z.flatten(1, 2).float()
            _add_sensitivity(evidence, x, z, flat)

    def _in_one(self, selection: TokenSelection | None) -> bool:
        """Whether ``TokenSelection.sums`` gives every sum over the activations."""
        plain = self.per_token is squared and self.ema_decay is None
        return plain and "lost" in self.needs and selection is not None

    def _add_chunk(
        self,
        evidence: Layers,
        u: Tensor,
        weights: Tensor | None,
        f: Tensor | None,
        selection: TokenSelection | None,
    ) -> None:
        flat, w = u.flatten(1, 2), None if weights is None else weights.flatten()
        if self.per_token is not None and self.ema_decay is not None:
            for layer, values in zip(evidence, self.per_token(u).sqrt(), strict=True):
                layer.add_ema(values, self.ema_decay, weights)
        elif self.per_token is not None and not self._in_one(selection):
            add_sums(evidence, "score", self.per_token(flat), w)
        if "lost" in self.needs and selection is not None:
            weight: Tensor | float = float(flat.shape[1]) if w is None else w.sum()
            with full_precision(flat):
                sums = selection.sums(flat, w)
            for name, totals in zip(("score", "signed", "lost", "losses"), sums, strict=True):
                if name != "score" or self._in_one(selection):
                    add_totals(evidence, name, totals, weight)
        elif "signed" in self.beside_score:
            add_sums(evidence, "signed", flat, w)
        if f is not None and "features" in self.needs:
            _add_features(evidence, flat, f.flatten(1, 2), w)

    def score_input(self, evidence: LayerStatistics, width: int, device: torch.device) -> Tensor:
        """The statistic accumulated over tokens, the input of score functions, [I] float32."""
        if self.per_token is None:
            return torch.zeros(width, device=device)
        score = evidence.sums["score"]
        if self.spread:
            variance = score.mean - evidence.sums["signed"].mean.square()
            return variance.clamp_min(0).sqrt()
        if self.average or self.ema_decay is not None:
            return score.mean
        return score.total.sqrt()


def pruned_indicator(u: Tensor, saliency: Tensor, keep: float) -> Tensor:
    """A tensor [T, I]: 1 where a token would not select a neuron, else 0.

    A token selects the share ``keep`` of the neurons, those with the largest ``abs(u_i) *
    saliency_i``.  It can select fewer, because neurons tied with the strongest unselected neuron
    are not selected either.  u: [T, I] float32; saliency: [I].
    """
    lost = u.shape[-1] - max(1, round(keep * u.shape[-1]))
    if not lost:
        return torch.zeros_like(u)
    strengths = u.abs() * saliency
    return (strengths <= _nth_smallest(strengths, lost)).to(u.dtype)


def _nth_smallest(values: Tensor, number: int) -> Tensor:
    """The ``number``-th smallest value of each row, [T, 1]; values: [T, I]."""
    if values.device.type != "cpu":
        return values.kthvalue(number, -1, keepdim=True).values
    # six times as fast as torch's kthvalue, which would slow prompts down
    ordered = np.partition(values.detach().numpy(), number - 1, -1)
    return torch.from_numpy(ordered[:, number - 1 : number])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _add_features(evidence: Layers, u: Tensor, f: Tensor, weights: Tensor | None) -> None:
    """Add the sums of f, f f^T and u f^T; u: [L, T, I], f: [L, T, F], float32; weights: [T]."""
    add_sums(evidence, "features", f, weights)
    weight: Tensor | float = float(f.shape[1]) if weights is None else weights.sum()
    weighted = f if weights is None else f * weights[:, None]
    with full_precision(f):
        add_totals(evidence, "moments", f.mT @ weighted, weight)
        add_totals(evidence, "cross", u.mT @ weighted, weight)


def _add_sensitivity(evidence: Layers, x: Tensor, z: Tensor, weights: Tensor | None) -> None:
    """Add the sums of cos(x, z) and ||z - x|| / ||x||; x, z: [L, T, D] float32."""
    size = x.norm(dim=-1).clamp_min(EPS)
    cosine = (x * z).sum(-1) / (size * z.norm(dim=-1)).clamp_min(EPS)
    add_sums(evidence, "cosine", cosine, weights)
    add_sums(evidence, "change", (z - x).norm(dim=-1) / size, weights)
