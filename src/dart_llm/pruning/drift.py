"""Drift: has the text moved away from the tokens that the masks were made from?

The module has the drift rules, the detector, and guards that limit re-masks.  The detector watches
a signal ``v`` of each token: the last layer's attention output (before the residual add) or the
last hidden state.  It cuts pruned tokens into windows of W tokens.  By cosine similarity, it
compares each window's mean with the mean over a reference, usually the tokens that the masks were
made from (DART, arXiv 2601.22632; docs/reference.md, "Drift").  The detector is armed once the
reference has enough windows to give a threshold.
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
"""Tokens at the start of a sequence (attention sinks) that no reference or window includes."""

MIN_WINDOWS = 4
"""Number of windows that a reference needs; with too few, the first pruned windows are used."""

MAX_WINDOWS = 128
"""Number of newest observed windows that give mu and sigma; older ones are dropped."""

Compare = Callable[[Tensor, Tensor], Tensor]
"""Similarities [...] of the vectors in two tensors [..., D]; must not depend on their norms."""


def cosine(mean: Tensor, others: Tensor) -> Tensor:
    """The cosine similarity, which all rules use; 0 where a vector is zero."""
    return cosine_similarity(mean, others, dim=-1)


@dataclass(frozen=True)
class Rule:
    """When masks are rebuilt: when a counter of low windows reaches ``count``, or at intervals.

    ``window``: number W of tokens per window; 0 means no windows.  A window is low if its
    similarity is below ``threshold(mu, sigma)``, where mu and sigma are the mean and standard
    deviation of the similarities of the reference's windows, [B] float32, one per batch row.
    ``interval``: number of pruned tokens between triggers; 0 means no intervals.
    """

    window: int
    threshold: Callable[[Tensor, Tensor], Tensor] | None
    count: int
    interval: int = 0


def published() -> Rule:
    """One window of 5 tokens below mu - max(0.1 sigma, 0.1) (the published scripts)."""
    return Rule(5, lambda mu, sigma: mu - (0.1 * sigma).clamp_min(0.1), 1)


def windows(tokens: int, low: int, k: float) -> Rule:
    """N windows of W tokens below mu - K sigma, written "windows W N K"."""
    return Rule(tokens, lambda mu, sigma: mu - k * sigma, low)


def paper() -> Rule:
    """Three windows of 10 tokens below mu - 0.5 sigma (a secondary account of the paper)."""
    return windows(10, 3, 0.5)


def dart() -> Rule:
    """Three windows of 10 tokens below mu - 1.5 sigma (this project; docs/drift.md)."""
    return windows(10, 3, 1.5)


def interval(tokens: int = 64) -> Rule:
    """A new mask every N pruned tokens, whatever the text does."""
    return Rule(0, None, 0, interval=tokens)


def never() -> Rule:
    """Masks are never rebuilt."""
    return Rule(0, None, 0)


def make_rule(text: str) -> Rule:
    """The rule for a validated ``drift.rule`` setting, such as ``paper`` or ``interval 64``."""
    name, *numbers = text.split()
    rule: Rule = DRIFT_RULES.get(name)(*(int(n) if n.isdecimal() else float(n) for n in numbers))
    return rule


@dataclass
class Check:
    """One completed window of all batch rows.

    ``window``: the window's number.  ``similarity``, ``threshold`` (None before the detector is
    armed) and ``live`` (False for rows that have ended) have one value per row.  ``counter``: the
    counter of low windows.  ``fired``: whether the counter has reached the rule's ``count``.
    """

    window: int
    similarity: list[float]
    threshold: list[float] | None
    live: list[bool]
    counter: int
    fired: bool

    def records(
        self, sequence: int, row: int | None, step: int, layer: int, allowed: bool
    ) -> list[DriftCheck]:
        """One record per live row; ``row``: the only row that is watched, or None for all rows."""
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
    """Drift detector for B batch rows; every new reference needs a new detector.

    ``observe`` collects the reference.  ``watch`` checks pruned tokens; if too few tokens were
    observed, the first pruned tokens become the reference instead.
    """

    rule: Rule
    compare: Compare = cosine
    total: Tensor | None = None
    """Sum of v over the reference's tokens, [B, D]; ``tokens``: their number, [B]."""
    tokens: Tensor | None = None
    windows: list[Tensor] = field(default_factory=list)
    """Means of the reference's windows, [B, D] each; emptied when mu and sigma are computed."""
    partial: list[Tensor] = field(default_factory=list)
    """Tokens of the window in progress, [B, t, D] each; together they are fewer than W."""
    mu: Tensor | None = None
    sigma: Tensor | None = None
    counter: int = 0
    checks: int = 0

    @property
    def armed(self) -> bool:
        return self.mu is not None

    @property
    def filled(self) -> int:
        """Number of tokens in the window in progress."""
        return sum(part.shape[1] for part in self.partial)

    def observe(self, v: Tensor, weights: Tensor | None, live: Tensor | None = None) -> None:
        """Add observed tokens to the reference.

        v: [B, T, D].  weights: [B, T], or None if all are 1.  live: [B] bool, False for rows that
        have ended; windows do not wait for tokens of these rows.
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
        """Add ``part`` [B, D], sums of v over ``tokens`` tokens per row, to the reference."""
        count = tokens if isinstance(tokens, Tensor) else part.new_full((len(part),), tokens)
        self.total = part if self.total is None else self.total + part
        self.tokens = count if self.tokens is None else self.tokens + count

    def start(self) -> None:
        """Start to watch pruned tokens: arm, or drop a reference of too few windows."""
        self.partial, self.counter = [], 0
        if self.total is not None and len(self.windows) >= MIN_WINDOWS:
            self._arm()
        else:
            self.total, self.tokens, self.windows = None, None, []

    def watch(self, v: Tensor, live: Tensor | None) -> list[Check]:
        """Check the windows that these pruned tokens complete; v: [B, T, D], live: [B] or None."""
        return [self._check(mean, live) for mean in self._fill(v.to(torch.float32, copy=True))]

    def cut(self, tokens: int) -> None:
        """Drop the last ``tokens`` tokens, which were rolled back, from the window in progress.

        Completed windows stay in the counter or in the reference.
        """
        if tokens > 0:
            remaining = max(0, self.filled - tokens)
            self.partial = [torch.cat(self.partial, 1)[:, :remaining]] if remaining else []

    def nbytes(self) -> int:
        tensors = [self.total, self.tokens, self.mu, self.sigma, *self.windows, *self.partial]
        return sum(t.nbytes for t in tensors if t is not None)

    def _fill(self, v: Tensor) -> list[Tensor]:
        """Append v [B, T, D] to the window in progress; return the means of complete windows."""
        size = self.rule.window
        if not size:
            return []
        self.partial.append(v)
        if self.filled < size:  # the usual case: nothing is copied
            return []
        tokens = torch.cat(self.partial, 1)
        end = tokens.shape[1] - tokens.shape[1] % size
        self.partial = [tokens[:, end:].clone()]  # a view would keep all tokens alive
        return [tokens[:, start : start + size].mean(1) for start in range(0, end, size)]

    def _arm(self) -> None:
        """Set mu and sigma of every row: compare each window with the reference's other tokens."""
        assert self.total is not None and self.tokens is not None
        size = self.rule.window
        stack = torch.stack(self.windows)  # [n, B, D]
        others = (self.total - size * stack) / (self.tokens[:, None] - size).clamp_min(1)
        similarity = self.compare(stack, others)
        self.mu, self.sigma = similarity.mean(0), similarity.std(0)
        self.windows = []

    def _check(self, mean: Tensor, live: Tensor | None) -> Check:
        """Compare a window's ``mean`` with the reference; until armed, add it to the reference."""
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
        limit = torch.full_like(similarity, -torch.inf) if threshold is None else threshold
        # the only transfer of this step to the host
        table = torch.stack([similarity, limit, alive]).tolist()
        rows = zip(*table, strict=True)
        low = sum(s < limit for s, limit, alive in rows if alive) > sum(table[2]) / 2
        if threshold is not None:
            self.counter = self.counter + 1 if low else max(0, self.counter - 1)
        fired = threshold is not None and self.counter >= self.rule.count
        limits, states = None if threshold is None else table[1], [bool(a) for a in table[2]]
        return Check(self.checks, table[0], limits, states, self.counter, fired)


def _compact(v: Tensor, weights: Tensor | None, live: Tensor | None) -> Tensor:
    """Each row's first T' tokens with weight 1, [B, T', D]; every live row has at least T'."""
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
    """Whether the guards allow a trigger (docs/reference.md, "Drift").  Counts are in tokens.

    ``decoded``: tokens decoded so far.  ``last``: the same at the last trigger; None if none.
    ``spent``: tokens that ran dense for earlier re-masks.  ``need``: tokens that will run dense for
    the next re-mask.  ``allowance``: tokens that may run dense besides ``max_dense_share``.
    """
    if last is not None and decoded - last < min_distance:
        return False
    if max_dense_share is None:
        return True
    return spent + need <= allowance + max_dense_share * (decoded + need)
