"""A screened output head: rough scores for all vocabulary entries, exact scores for the best few.

Here a *score* is a logit.  The *screen* is a 4-bit copy of the head's rows, projected onto the
eigenvectors (*directions*) of E[h h'], where h is a hidden state.  A decode step reads only the
directions in which its hidden state is large.  Entries whose rough score is within a threshold of
the best rough score are scored again by the head itself; all other entries keep rough scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.models.packed import PackedTensor

RUN, UNIT, GROUP = 4096, 64, 32
"""``RUN``: vocabulary entries per *run*, whose entries are stored together.  ``UNIT``: entries per
unit of a run.  ``GROUP``: directions that share a scale when a hidden state is rounded."""

MIDDLE, LEVELS = 7.5, 16
"""A weight is its scale times (level - ``MIDDLE``), with levels 0 to ``LEVELS`` - 1."""

STEPS = (0.28, 0.335, 0.40)
"""Distances between levels that are tried, divided by a row's RMS; 0.335 suits a Gaussian."""

SHARE_OF_SCREEN = 0.6
"""Fraction of the bytes per token that rough scores may use; exact scores use the rest."""

WIDEST, BINS = 64.0, 4096
"""``WIDEST``: largest threshold.  ``BINS``: bins of the histogram that chooses a threshold."""

SAMPLED, FEW = 256, 16
"""``SAMPLED``: about how many hidden states choose a threshold; ``FEW`` are scored at a time."""

CHUNK = 1 << 24
"""About how many weights are projected at a time."""


def fixed_bytes(words: int, hidden: int) -> int:
    """Bytes that each token reads for the basis and for one float32 scale per vocabulary entry."""
    return 4 * (hidden * hidden + words)


def keep_of(share: float, words: int, hidden: int, nbytes: float) -> int:
    """Number of directions that a token reads if it reads a fraction ``share`` of ``nbytes``.

    The head is [words, hidden] and has ``nbytes`` bytes.  The result is a multiple of 8.  Raises
    ``ConfigError`` if fewer than ``GROUP`` directions fit, or if 8 does not divide ``hidden``.
    """
    room = SHARE_OF_SCREEN * share * nbytes - fixed_bytes(words, hidden)
    keep = min(int(room / (words / 2)), hidden) // 8 * 8
    if keep < min(GROUP, hidden) or hidden % 8:
        raise ConfigError(
            f"a head of {words} x {hidden} weights has no room for rough scores in {share:.0%} of "
            'its bytes: give a larger head.bytes, or leave head.kind at "full"'
        )
    return keep


def directions_of(states: Tensor) -> Tensor:
    """Eigenvectors of E[h h'] for ``states`` h [n, D]: rows [D, D] float32, largest value first."""
    h = states.double()
    _, vectors = torch.linalg.eigh(h.t() @ h / len(h))
    directions: Tensor = vectors.flip(1).t().float().contiguous()
    return directions


@dataclass(frozen=True)
class Screen:
    """Computes a rough score of each vocabulary entry v, given a hidden state h.

    The score is ``by[v] * sum over i of (levels[v, i] - 7.5) * (basis h)[i]``.  ``basis``: [D, D]
    float32, each eigenvector times the RMS of the head's rows along it.  ``levels``: [V / 4096, D,
    2048] uint8, two levels per byte; see ``Directions`` in native/csrc/packed.h.  ``by``: [V]
    float32 scales, padded to whole runs.  ``words``: V.  ``keep``: number of directions that a
    token reads; it reads those with the largest absolute values in ``basis h``.  ``threshold``:
    entries whose rough score is at most this far below the best are scored exactly.
    """

    basis: Tensor
    levels: Tensor
    by: Tensor
    words: int
    keep: int
    threshold: float

    @classmethod
    def of(
        cls, weight: Tensor, states: Tensor, share: float, nbytes: float | None = None
    ) -> Screen:
        """A screen of the head ``weight`` [V, D].

        On average over ``states`` [n, D], which are inputs of the head, a token reads a fraction
        ``share`` of the head's bytes in total.  ``nbytes``: stored size of the head; None means the
        size of ``weight``.  Raises ``ConfigError`` as ``keep_of`` does.
        """
        nbytes = float(weight.nbytes) if nbytes is None else nbytes
        words, hidden = weight.shape
        keep = keep_of(share, words, hidden, nbytes)
        axes = directions_of(states).to(weight.device)
        screen = cls(*_projected(weight, axes, states), words, keep, WIDEST)
        batches = torch.split(states[:: max(1, len(states) // SAMPLED)], FEW)
        rough = (screen.rough(batch.to(weight.device)) for batch in batches)
        rows = (share - screen.nbytes() / nbytes) * words
        return replace(screen, threshold=threshold_for(rough, rows))

    def rough(self, h: Tensor) -> Tensor:
        """Rough scores [n, V] float32 of hidden states h [n, D]."""
        along = self.along(F.linear(h.float(), self.basis))
        parts = []
        for at, levels in enumerate(self.levels):
            values = _plain(levels).float() - MIDDLE
            parts.append(F.linear(along, values) * self.by[at * RUN : (at + 1) * RUN])
        return torch.cat(parts, 1)[:, : self.words]

    def along(self, z: Tensor) -> Tensor:
        """z [n, D] with each row's ``keep`` largest values rounded to 8 bits, and 0 elsewhere."""
        ids = z.abs().topk(self.keep, -1, sorted=False).indices.sort(-1).values
        groups = F.pad(z.gather(1, ids), (0, -self.keep % GROUP)).reshape(len(z), -1, GROUP)
        scales = groups.abs().amax(-1, keepdim=True) / 127
        levels = torch.where(scales > 0, groups / scales, 0.0).round()
        return torch.zeros_like(z).scatter(1, ids, (levels * scales).flatten(1)[:, : self.keep])

    def near(self, rough: Tensor) -> Tensor:
        """[n, V] bool: True for the entries to score exactly."""
        return rough >= rough.amax(-1, keepdim=True) - self.threshold

    def nbytes(self) -> int:
        """Bytes of the screen that a token reads."""
        return fixed_bytes(self.words, len(self.basis)) + self.words * self.keep // 2

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the screen."""
        return self.basis, self.levels, self.by


def threshold_for(rough: Iterable[Tensor], rows: float) -> float:
    """The largest threshold with which at most ``rows`` entries per token are scored exactly.

    This holds on average over ``rough``, which yields batches of rough scores [n, V].
    """
    counts, steps = torch.zeros(BINS, dtype=torch.float64), 0
    for scores in rough:
        gaps = scores.amax(-1, keepdim=True) - scores
        counts += torch.histc(gaps.float(), BINS, 0, WIDEST).double().cpu()
        steps += len(scores)
    within = counts.cumsum(0) / max(1, steps)
    return int((within <= rows).sum()) * WIDEST / BINS


def _projected(weight: Tensor, axes: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``basis``, ``levels`` and ``by`` for a head ``weight`` [V, D]; ``axes`` [D, D]: unit rows.

    Each vocabulary entry and each direction has a scale.  Rounding errors along a direction are
    weighted by the mean square of ``states`` [n, D] along this direction.
    """
    squares = torch.zeros(len(axes), device=axes.device)
    for piece in _pieces(weight):
        squares += F.linear(piece.float(), axes).square().sum(0)
    sizes = (squares / len(weight)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    basis = axes * sizes[:, None]
    strength = F.linear(states.float().to(axes.device), basis).square().mean(0)
    levels, by = [], []
    for piece in _pieces(weight):
        piece_levels, scales = _rounded(F.linear(piece.float(), axes) / sizes, strength)
        padding = (0, 0, 0, -len(piece_levels) % RUN)
        levels += [_packed(run) for run in torch.split(F.pad(piece_levels, padding), RUN)]
        by.append(F.pad(scales, padding[2:]))
    return basis, torch.stack(levels), torch.cat(by)


def _rounded(rows: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [n, D] uint8 and scales [n] of ``rows``; ``strength`` [D]: squared errors' factors."""
    spread = rows.square().mean(1, keepdim=True).sqrt()
    spread = spread.clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(spread[:, 0], -torch.inf)
    levels, scales = torch.zeros_like(rows), torch.zeros_like(best)
    for step in STEPS:
        tried = (rows / (spread * step) + MIDDLE).round_().clamp_(0, LEVELS - 1)
        centred = tried - MIDDLE
        fit, norm = (rows * centred) @ strength, centred.square() @ strength
        gained = fit.square() / norm  # with scale fit / norm, the squared error falls by this
        better = gained > best
        levels = torch.where(better[:, None], tried, levels)
        scales = torch.where(better, fit / norm, scales)
        best = torch.maximum(best, gained)
    return levels.byte(), scales


def _places() -> Tensor:
    """[UNIT]: each entry's place in its unit, so that kernels read four directions at once."""
    word = torch.arange(UNIT)
    return word % 16 // 4 * 16 + word // 16 * 4 + word % 4


def _packed(levels: Tensor) -> Tensor:
    """Levels [RUN, D] uint8 of a run, packed two per byte as [D, RUN / 2]."""
    units = levels.t().reshape(-1, RUN // (2 * UNIT), 2, UNIT)
    units = units[..., _places().argsort().to(levels.device)]
    return (units[:, :, 0] | units[:, :, 1] << 4).flatten(1).contiguous()


def _plain(packed: Tensor) -> Tensor:
    """Inverse of ``_packed``: levels [RUN, D] uint8."""
    both = packed.reshape(len(packed), -1, 1, UNIT)
    units = torch.cat([both & 15, both >> 4], 2)[..., _places().to(packed.device)]
    return units.flatten(1).t()


def _pieces(weight: Any) -> Iterator[Tensor]:
    step = max(1, CHUNK // weight.shape[1] // RUN) * RUN
    for at in range(0, len(weight), step):
        end = min(at + step, len(weight))
        packed = isinstance(weight, PackedTensor)
        yield weight.dequantise(at, end) if packed else weight.detach()[at:end]


def divergence(full: Tensor, approximate: Tensor) -> Tensor:
    """KL(full || approximate) in nats [n], from scores [n, V]."""
    log_full, log_approximate = full.float().log_softmax(-1), approximate.float().log_softmax(-1)
    return (log_full.exp() * (log_full - log_approximate)).sum(-1).clamp_min(0)
