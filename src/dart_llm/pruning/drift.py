"""Drift: has the attention output moved away from where the masks were made?

Rules as data, the detector, and guards on re-masking.  ``v``: output of the last layer's attention
after its output projection, before the residual add.  Means of non-overlapping windows of W tokens
are compared by cosine with the centroid c of the observed tokens (DART, arXiv 2601.22632;
docs/reference.md, "Drift").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dart_llm.pruning.records import DriftCheck
from dart_llm.pruning.registry import DRIFT_RULES

SINKS = 4
"""The first tokens of a sequence (attention sinks) never enter the centroid or a window."""

MIN_WINDOWS = 4
"""Windows needed for a reference; with fewer the detector arms on the first of PRUNED."""

MAX_WINDOWS = 128
"""Window means remembered for mu and sigma: the newest ones, so that memory is bounded."""

Compare = Callable[[Tensor, Tensor], Tensor]
"""Similarity of two means [..., D] over D: [...]; 1 for equal ones, 0 where one of them is zero."""


def cosine(mean: Tensor, others: Tensor) -> Tensor:
    """The rules' similarity."""
    return cosine_similarity(mean, others, dim=-1)


@dataclass(frozen=True)
class Rule:
    """W tokens per window; a window is low under ``threshold(mu, sigma)``; trigger at ``count``.

    ``threshold``: of mean and standard deviation of the reference's similarities, [B] float32 each,
    one number per batch row.  ``window`` 0: no window is ever formed.  ``interval``: trigger after
    that many pruned tokens.
    """

    window: int
    threshold: Callable[[Tensor, Tensor], Tensor] | None
    count: int
    interval: int = 0


def published() -> Rule:
    """W = 5, theta = mu - max(0.1 sigma, 0.1), one low window (the published scripts)."""
    return Rule(5, lambda mu, sigma: mu - (0.1 * sigma).clamp_min(0.1), 1)


def windows(tokens: int, low: int, k: float) -> Rule:
    """W tokens, N low windows, theta = mu - K sigma: "windows W N K"."""
    return Rule(tokens, lambda mu, sigma: mu - k * sigma, low)


def paper() -> Rule:
    """W = 10, theta = mu - 0.5 sigma, three low windows (a secondary account of the paper)."""
    return windows(10, 3, 0.5)


def dart() -> Rule:
    """W = 10, theta = mu - 1.5 sigma, three low windows (this project; docs/drift.md)."""
    return windows(10, 3, 1.5)


def interval(tokens: int = 64) -> Rule:
    """A new mask every N pruned tokens, whatever the text does."""
    return Rule(0, None, 0, interval=tokens)


def never() -> Rule:
    """Masks are never rebuilt."""
    return Rule(0, None, 0)


def make_rule(text: str) -> Rule:
    """The rule behind a validated ``drift.rule`` setting, e.g. ``paper`` or ``interval 64``."""
    name, *numbers = text.split()
    rule: Rule = DRIFT_RULES.get(name)(*(int(n) if n.isdecimal() else float(n) for n in numbers))
    return rule


@dataclass
class Check:
    """One completed window of every row: similarity [B], threshold [B] (None: arming), live [B]."""

    window: int
    similarity: list[float]
    threshold: list[float] | None
    live: list[bool]
    counter: int
    fired: bool

    def records(
        self, sequence: int, row: int | None, step: int, layer: int, allowed: bool
    ) -> list[DriftCheck]:
        """One record per live row; ``row``: the batch row of a detector of one row, or None."""
        state = "suppressed" if self.fired and not allowed else "armed"
        state = "arming" if self.threshold is None else state
        thresholds: Sequence[float | None] = self.threshold or [None] * len(self.similarity)
        rows = zip(self.similarity, thresholds, self.live, strict=True)
        return [
            DriftCheck(
                *(sequence, index if row is None else row, step, layer, self.window),
                *(similarity, threshold, self.counter, allowed, state),
            )
            for index, (similarity, threshold, live) in enumerate(rows)
            if live
        ]


@dataclass
class Detector:
    """State of one mask's detector over B rows.  Make a new one for every reference.

    ``observe`` collects the reference; ``watch`` takes the tokens of PRUNED.
    """

    rule: Rule
    compare: Compare = cosine
    total: Tensor | None = None
    """[B, D] sum of v over the reference's tokens; ``tokens``: [B] their number."""
    tokens: Tensor | None = None
    windows: list[Tensor] = field(default_factory=list)
    partial: list[Tensor] = field(default_factory=list)
    """[B, t, D] each: tokens of the window in progress, fewer than W in all."""
    mu: Tensor | None = None
    sigma: Tensor | None = None
    counter: int = 0
    checks: int = 0

    @property
    def armed(self) -> bool:
        return self.mu is not None

    @property
    def filled(self) -> int:
        """Tokens of the window in progress."""
        return sum(part.shape[1] for part in self.partial)

    def observe(self, v: Tensor, weights: Tensor | None, live: Tensor | None = None) -> None:
        """Add observed tokens to the reference.

        v: [B, T, D]; weights: [B, T] or None (all 1); live: [B] bool, False for rows that have
        ended: they must not hold up the windows of the others.
        """
        if not self.rule.window or not v.shape[1]:
            return
        v = v.to(torch.float32, copy=True)  # the model may write into v later
        if weights is None:
            self._count(v.sum(1), v.shape[1])
        else:
            self._count(torch.einsum("bt,btd->bd", weights, v), weights.sum(1))
        for mean in self._fill(_compact(v, weights, live)):
            self.windows = [*self.windows[1 - MAX_WINDOWS :], mean]

    def _count(self, part: Tensor, tokens: Tensor | int) -> None:
        """Add sums [B, D] of tokens to the reference."""
        count = tokens if isinstance(tokens, Tensor) else part.new_full((len(part),), tokens)
        self.total = part if self.total is None else self.total + part
        self.tokens = count if self.tokens is None else self.tokens + count

    def start(self) -> None:
        """Enter PRUNED: fix the reference if there is one; window and counter start at 0."""
        self.partial, self.counter = [], 0
        if self.total is not None and len(self.windows) >= MIN_WINDOWS:
            self._arm()
        else:
            self.total, self.tokens, self.windows = None, None, []

    def watch(self, v: Tensor, live: Tensor | None) -> list[Check]:
        """Take pruned tokens. v: [B, T, D]; live: [B] bool or None (all).  One check per window."""
        return [self._check(mean, live) for mean in self._fill(v.to(torch.float32, copy=True))]

    def cut(self, tokens: int) -> None:
        """Forget the last ``tokens`` of a window in progress (they were rolled back)."""
        if tokens > 0:
            left = max(0, self.filled - tokens)
            self.partial = [torch.cat(self.partial, 1)[:, :left]] if left else []

    def nbytes(self) -> int:
        tensors = [self.total, self.tokens, self.mu, self.sigma, *self.windows, *self.partial]
        return sum(t.nbytes for t in tensors if t is not None)

    def _fill(self, v: Tensor) -> list[Tensor]:
        """Cut [B, T, D] into windows, completing the one in progress; returns their means."""
        size = self.rule.window
        if not size:
            return []
        self.partial.append(v)
        if self.filled < size:  # most tokens: nothing is copied
            return []
        tokens = torch.cat(self.partial, 1)
        end = tokens.shape[1] - tokens.shape[1] % size
        self.partial = [tokens[:, end:].clone()]  # a view would keep all of them alive
        return [tokens[:, start : start + size].mean(1) for start in range(0, end, size)]

    def _arm(self) -> None:
        """Leave-one-out similarities of the windows give mu and sigma of every row."""
        assert self.total is not None and self.tokens is not None
        size = self.rule.window
        stack = torch.stack(self.windows)  # [n, B, D]
        others = (self.total - size * stack) / (self.tokens[:, None] - size).clamp_min(1)
        similarity = self.compare(stack, others)
        self.mu, self.sigma = similarity.mean(0), similarity.std(0)
        self.windows = []

    def _check(self, mean: Tensor, live: Tensor | None) -> Check:
        """Compare one window; while the detector is not armed, it joins the reference."""
        self.checks += 1
        mu: Tensor | None = self.mu
        threshold: Tensor | None = None
        if mu is None:
            self.windows.append(mean)
            self._count(self.rule.window * mean, self.rule.window)
        assert self.total is not None and self.tokens is not None
        if mu is None:
            similarity = self.compare(mean, self.total - self.rule.window * mean)
            if len(self.windows) >= MIN_WINDOWS:
                self._arm()
        else:
            assert self.sigma is not None and self.rule.threshold is not None
            similarity = self.compare(mean, self.total / self.tokens[:, None].clamp_min(1))
            threshold = self.rule.threshold(mu, self.sigma).expand_as(similarity)
        alive = torch.ones_like(similarity) if live is None else live.to(similarity)
        edge = torch.full_like(similarity, -torch.inf) if threshold is None else threshold
        table = torch.stack([similarity, edge, alive]).tolist()  # the step's one transfer
        rows = zip(*table, strict=True)
        low = sum(s < edge for s, edge, alive in rows if alive) > sum(table[2]) / 2
        if threshold is not None:
            self.counter = self.counter + 1 if low else max(0, self.counter - 1)
        fired = threshold is not None and self.counter >= self.rule.count
        edges, states = None if threshold is None else table[1], [bool(a) for a in table[2]]
        return Check(self.checks, table[0], edges, states, self.counter, fired)


def _compact(v: Tensor, weights: Tensor | None, live: Tensor | None) -> Tensor:
    """Real tokens of every row, moved to the front and cut to the shortest live row: [B, T', D]."""
    if weights is None:
        return v
    counts = weights.sum(1).long()
    if live is not None:
        counts = counts.where(live.to(counts.device), counts.max())
    shortest = int(counts.min())
    order = weights.sort(dim=1, descending=True, stable=True).indices[:, :shortest]
    return v.gather(1, order[..., None].expand(-1, -1, v.shape[2]))


def guards_allow(
    decoded: int,
    last: int | None,
    spent: int,
    need: int,
    min_distance: int,
    max_dense_share: float | None,
    allowance: int = 0,
) -> bool:
    """Whether the guards of a rule let a trigger through (docs/reference.md, "Drift", in tokens).

    ``decoded`` so far; ``last``: decoded at the trigger before, or None; ``spent``: dense ones on
    re-masks so far; ``need``: those of the coming one; ``allowance``: those beside the share.
    """
    if last is not None and decoded - last < min_distance:
        return False
    if max_dense_share is None:
        return True
    return spent + need <= allowance + max_dense_share * (decoded + need)
