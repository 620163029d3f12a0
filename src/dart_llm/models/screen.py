"""A screened output head: rough scores of all words, exact ones for the few that can matter.

The head's rows are written in the leading eigenvectors of E[h h'], where most of a hidden state h
lies, and kept there in Q4_0.  Words whose rough score comes within a threshold of the best are
scored again by the head itself; the others keep their rough scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.models.packed import PackedTensor, pack
from dart_llm.models.quantised import through
from dart_llm.native.build import why_not

BLOCK, BLOCK_BYTES = 32, 18
"""Weights of a block of Q4_0, and its bytes."""

SHARE_OF_SCREEN = 0.6
"""Of the bytes that may be read, those of the rough scores; the others are exact rows."""

WIDEST, BINS = 64.0, 4096
"""Thresholds end here: a word that lies so far below the best has no chance at all."""

SAMPLED, FEW = 256, 16
"""Hidden states that set a threshold; and how many are scored at a time."""

CHUNK = 1 << 24
"""Weights that are turned at a time."""


def rank_of(share: float, words: int, hidden: int, row_bytes: float) -> int:
    """Directions of the rough scores of a head [words, hidden] of which ``share`` is to be read.

    ``row_bytes``: of one of its rows, as stored.  Raises ``ConfigError`` where no block fits.
    """
    room = SHARE_OF_SCREEN * share * row_bytes
    each = BLOCK_BYTES + 4 * BLOCK * hidden / words  # a block of a word, and its part of the basis
    rank = min(int(room / each), hidden // BLOCK) * BLOCK
    if not rank:
        raise ConfigError(
            f"a head of {words} x {hidden} weights has no room for rough scores in {share:.0%} of "
            "its bytes: give a larger share, or leave it as it is"
        )
    return rank


def directions_of(states: Tensor) -> Tensor:
    """Eigenvectors of E[h h'] as rows [D, D] float32, the largest first; states [n, D]."""
    h = states.double()
    _, vectors = torch.linalg.eigh(h.t() @ h / len(h))
    found: Tensor = vectors.flip(1).t().float().contiguous()
    return found


@dataclass(frozen=True)
class Screen:
    """Rough scores of V words.

    ``basis``: [r, D] float32.  ``rows``: [V, r] float32, in blocks where native kernels read them.
    ``threshold``: words that come so near the best rough score are scored exactly.
    """

    basis: Tensor
    rows: Tensor
    threshold: float

    @classmethod
    def of(cls, weight: Tensor, states: Tensor, share: float) -> Screen:
        """Of a head [V, D] of whose bytes ``share`` is to be read, basis and exact rows included.

        ``states`` [n, D]: what the head gets to read; the share is the mean over them.  Raises
        ``ConfigError`` where not even a block of directions fits.
        """
        words, hidden = weight.shape
        rank = rank_of(share, words, hidden, weight.nbytes / words)
        return cls.along(weight, directions_of(states)[:rank], states, share, weight.nbytes)

    @classmethod
    def along(
        cls, weight: Tensor, basis: Tensor, states: Tensor, share: float, nbytes: float
    ) -> Screen:
        """As ``of``, in the directions ``basis``; ``nbytes``: of the head as it is stored."""
        device = weight.device
        basis = basis.to(device)
        made = cls(basis, turned(weight, basis), WIDEST)
        gaps = Gaps()
        some = states[:: max(1, len(states) // SAMPLED)]
        for few in torch.split(some, FEW):
            gaps.add(made.rough(few.to(device)))
        rows = (share - made.nbytes() / nbytes) * len(weight)
        return cls(basis, made.rows, gaps.threshold(rows))

    def rough(self, h: Tensor) -> Tensor:
        """Scores [n, V] float32 of hidden states h [n, D]."""
        return F.linear(F.linear(h.float(), self.basis), self.rows)

    def near(self, rough: Tensor) -> Tensor:
        """Which words [n, V] are scored exactly."""
        return rough >= rough.amax(-1, keepdim=True) - self.threshold

    def nbytes(self) -> int:
        """Bytes that it holds, all of which a token reads."""
        rows = self.rows.shape[0] * self.rows.shape[1] // BLOCK * BLOCK_BYTES
        return int(self.basis.nbytes + rows)


class Gaps:
    """How far words lie below the best one of their token."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.tokens = 0

    def add(self, rough: Tensor) -> None:
        """Of scores [n, V]."""
        gaps = rough.amax(-1, keepdim=True) - rough
        self.counts += torch.histc(gaps.float(), BINS, 0, WIDEST).double().cpu()
        self.tokens += len(rough)

    def threshold(self, rows: float) -> float:
        """The largest gap within which at most ``rows`` words lie on average."""
        within = self.counts.cumsum(0) / max(1, self.tokens)
        return int((within <= rows).sum()) * WIDEST / BINS


def turned(weight: Tensor, basis: Tensor) -> Tensor:
    """weight [V, D] in the directions ``basis`` [r, D], rounded to Q4_0: [V, r] float32.

    In blocks where native kernels read them; elsewhere the values that blocks hold.
    """
    made = torch.cat([F.linear(piece.float(), basis) for piece in _pieces(weight)])
    if weight.device.type == "cpu" and not why_not():
        return pack(made, "q4_0", "tiles")
    return through(made, "Q4_0")


def _pieces(weight: Any) -> Iterator[Tensor]:
    step = max(1, CHUNK // weight.shape[1])
    for at in range(0, len(weight), step):
        end = min(at + step, len(weight))
        packed = isinstance(weight, PackedTensor)
        yield weight.dequantise(at, end) if packed else weight.detach()[at:end]


def divergence(full: Tensor, found: Tensor) -> Tensor:
    """KL(full || found) of scores [n, V]: [n] in nats."""
    known, other = full.float().log_softmax(-1), found.float().log_softmax(-1)
    return (known.exp() * (known - other)).sum(-1).clamp_min(0)
