"""The state of one sequence: PREFILL -> OBSERVE -> PRUNED (-> OBSERVE ...) -> RELEASED.

One ``SequenceState`` serves all rows of a batch, which then share masks, or one row.  No state is
stored on modules or in configurations.  See docs/method.md, "Life of a sequence".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import Detector, Rule, guards_allow
from dart_llm.pruning.masks import Masks, overlap
from dart_llm.pruning.records import Remask
from dart_llm.pruning.selection import MaskSelection, MaskSelector
from dart_llm.pruning.statistics import LayerStatistics


class Phase(StrEnum):
    """Phase of a sequence."""

    PREFILL = "prefill"
    OBSERVE = "observe"
    PRUNED = "pruned"
    RELEASED = "released"


@dataclass
class MaskSpan:
    """Consecutive decoded tokens that ran with the same keep counts.

    ``kept``: number of neurons that each layer kept; None if the tokens ran dense.  ``tokens``:
    number of tokens in all rows, without padding and rows that have ended.  ``forwards``: number of
    decode steps.  ``observed``: number of observed tokens per row.  ``length``: number of tokens
    per row, rows that have ended included; 0 if ``keep_counts`` made the counts final.
    """

    kept: tuple[int, ...] | None
    tokens: Tensor | float = 0.0
    forwards: int = 0
    observed: int = 0
    length: int = 0

    def cut(self, tokens: int) -> int:
        """Remove the last ``tokens`` tokens per row; return how many the span did not contain."""
        removed = min(tokens, self.length)
        if removed:
            self.tokens = self.tokens * ((self.length - removed) / self.length)
            self.length -= removed
        return tokens - removed


@dataclass
class SequenceState:
    """State of one sequence: a batch row, or a batch whose rows share masks.

    ``sequence``: number of the sequence in its run.  ``row``: the batch row; None for a whole
    batch.  ``rows``: number of batch rows.  ``evidence``: sums over observed tokens, per layer,
    from which masks are made.  ``decoded``: number of decoded tokens per row.
    ``tokens_to_observe``: number of dense decode tokens in the phase OBSERVE.  ``observed``: number
    of these that have run.  ``pruned_run``: tokens decoded with the current masks.
    ``last_trigger``: value of ``decoded`` at the last re-mask trigger.  ``refresh_tokens``: dense
    tokens decoded for re-masks so far.  ``in_refresh``: whether dense tokens run for a re-mask now.
    """

    config: PruneConfig
    selector: MaskSelector
    rule: Rule
    sequence: int
    row: int | None
    rows: int
    fixed_masks: Masks | None = None
    cached: int = 0
    """Number of positions in the cache before this sequence's first token."""
    phase: Phase = Phase.PREFILL
    evidence: list[LayerStatistics] = field(default_factory=list)
    detector: Detector = field(init=False)
    selection: MaskSelection | None = None
    masks: Masks | None = None
    prompt_tokens: float = 0.0
    evidence_tokens: float = 0.0
    decoded: int = 0
    observed: int = 0
    tokens_to_observe: int = 0
    cause: str = "first"
    pruned_run: int = 0
    last_trigger: int | None = None
    refresh_tokens: int = 0
    in_refresh: bool = False
    finished: bool = False
    """Whether every row has ended."""
    mask_spans: list[MaskSpan] = field(default_factory=list)
    remasks: list[Remask] = field(default_factory=list)
    mask_version: int = 0
    """Increases when masks are built, and when a trigger drops them."""

    def __post_init__(self) -> None:
        self.detector = Detector(self.rule)
        self.evidence = [LayerStatistics() for _ in self.selector.layers]

    @property
    def batch_rows(self) -> slice:
        """The batch rows that this state covers."""
        return slice(None) if self.row is None else slice(self.row, self.row + 1)

    def has_finished(self, live: Tensor | None) -> bool:
        """Whether all of the state's rows have ended.  live: [B] bool, or None if all are live."""
        if not self.finished and live is not None:
            self.finished = not bool(live[self.batch_rows].any())
        return self.finished

    def observe_prefill(self, tokens: float) -> None:
        """Count a coming prompt of ``tokens`` tokens per row; enter PREFILL if it is observed."""
        self.prompt_tokens += tokens
        self.finished = False
        if self.phase is Phase.RELEASED or self.fixed_masks is not None:
            return
        if self.phase is Phase.PRUNED:
            self._age(keep=True)
            self.cause, self.masks = "prompt", None  # runs dense until the next mask
            self.detector = Detector(self.rule)
        if self.phase is not Phase.PREFILL:
            self.observed, self.in_refresh = 0, False
        self.phase = Phase.PREFILL
        self.evidence_tokens += tokens

    def advance(self) -> Phase:
        """Advance to the coming decode forward, building masks if due; return the new phase."""
        if self._to_be_released:
            self.phase, self.masks = Phase.RELEASED, None
        elif self.selector.removes_nothing and self.fixed_masks is None:
            self.phase = Phase.RELEASED
        if self.phase is Phase.PREFILL:
            self.tokens_to_observe = self._first_length()
            self.phase, self.observed = Phase.OBSERVE, 0
        if self.ready:
            self._build()
        return self.phase

    @property
    def _to_be_released(self) -> bool:
        release = self.config.release_step
        return release is not None and self.decoded >= release

    def _first_length(self) -> int:
        """Number of dense decode tokens between a prompt and the mask that is made after it."""
        if self.fixed_masks is not None:
            return 0
        masking_step = self.config.masking_step if self.cause == "first" else 0
        if not self.selector.needs_evidence:
            return masking_step
        missing = math.ceil(self.config.min_evidence - self.evidence_tokens)
        return max(masking_step, missing, 1 if self.evidence_tokens <= 0 else 0)

    def _build(self) -> None:
        old, cause = self.masks or (self.selection.masks if self.selection else None), self.cause
        if self.fixed_masks is not None:
            pairs = zip(self.selector.layers, self.fixed_masks, strict=True)
            counts = tuple(layer.width if mask is None else mask.kept for layer, mask in pairs)
            self.selection, cause = MaskSelection(self.fixed_masks, counts, ()), "fixed"
        else:
            old_counts = None if self.selection is None else self.selection.counts
            self.selection = self.selector.select(self.evidence, old_counts)
        self.masks = self.selection.masks
        self.mask_version += 1
        self.phase, self.pruned_run, self.in_refresh = Phase.PRUNED, 0, False
        self.detector.start()
        common = None if old is None or self.config.token else overlap(old, self.masks)
        where, counts = (self.sequence, self.row, self.decoded), self.selection.counts
        self.remasks.append(Remask(*where, cause, self.evidence_tokens, counts, common))

    def count(self, tokens: int, live: Tensor | float, forwards: int = 1) -> None:
        """Count decoded tokens; ``tokens``: their number per row.

        ``live``: number of tokens in all rows, without padding and rows that have ended.
        ``forwards``: number of decode steps that the tokens count as.
        """
        pruned = self.phase is Phase.PRUNED
        span = self._span(self.selection.counts if pruned and self.selection else None)
        self._add(span, tokens, live, forwards)
        if pruned:
            self.pruned_run += tokens
        if self.phase is Phase.OBSERVE:
            span.observed += tokens
            self.observed += tokens
            self.evidence_tokens += tokens
            if self.in_refresh:
                self.refresh_tokens += tokens

    def count_dense(self, tokens: int, live: float) -> None:
        """Like ``count``, for tokens that ran dense with the prompt and were not observed."""
        self._add(self._span(None), tokens, live, 1)

    def _span(self, kept: tuple[int, ...] | None) -> MaskSpan:
        if not self.mask_spans or self.mask_spans[-1].kept != kept:
            self.mask_spans.append(MaskSpan(kept))
        return self.mask_spans[-1]

    def _add(self, span: MaskSpan, tokens: int, live: Tensor | float, forwards: int) -> None:
        span.tokens = span.tokens + live
        span.length += tokens
        span.forwards += forwards
        self.decoded += tokens

    def rewind(self, tokens: int) -> None:
        """Subtract rolled-back tokens (each row's last ``tokens``) from counts of decoded ones."""
        tokens = min(tokens, self.decoded)
        self.decoded -= tokens
        self.pruned_run = max(0, self.pruned_run - tokens)
        if self.phase is Phase.OBSERVE:
            undone = min(tokens, self.observed)
            self.observed -= undone
            self.refresh_tokens -= undone if self.in_refresh else 0
        if self.last_trigger is not None:
            self.last_trigger = min(self.last_trigger, self.decoded)
        if self.phase is Phase.RELEASED and self.decoded < (self.config.release_step or 0):
            self.phase = Phase.PREFILL if self.selection is None else Phase.PRUNED
            self.masks = None if self.selection is None else self.selection.masks
        self.detector.cut(tokens)
        for span in reversed(self.mask_spans):
            tokens = span.cut(tokens)

    def keep_counts(self) -> None:
        """Make the counts in ``mask_spans`` final: ``rewind`` does not change them any more."""
        for span in self.mask_spans:
            span.length = 0

    def may_trigger(self) -> bool:
        """Whether the guards (minimum distance, cap on dense tokens) allow a re-mask now."""
        drift, need = self.config.drift, self._refresh_length()
        guards = drift.min_distance, drift.max_dense_share, drift.allowance
        return guards_allow(self.decoded, self.last_trigger, self.refresh_tokens, need, *guards)

    def trigger(self, cause: str) -> None:
        """Change from PRUNED to OBSERVE: in all layers, the next tokens run dense."""
        self.cause, self.last_trigger = cause, self.decoded
        self._age(keep=False)
        self.phase, self.masks, self.in_refresh = Phase.OBSERVE, None, True
        self.observed, self.tokens_to_observe = 0, self._refresh_length()
        self.detector = Detector(self.rule)
        self.mask_version += 1

    def _refresh_length(self) -> int:
        return self.config.remask.observe_tokens or max(1, self.config.masking_step)

    def _age(self, keep: bool) -> None:
        """Decay or drop the evidence; ``keep``: do not drop it, since a prompt will add to it."""
        if self.config.remask.evidence == "decay":
            n = max(self.evidence_tokens, 1e-9)
            for layer in self.evidence:
                layer.decay(self.config.remask.decay, self.rows)
            self.evidence_tokens *= self.config.remask.decay * min(1.0, 256 / n)
        elif not keep:
            self.evidence = [LayerStatistics() for _ in self.evidence]
            self.evidence_tokens = 0.0

    @property
    def ready(self) -> bool:
        """Whether the next decode forward builds masks."""
        return self.phase is Phase.OBSERVE and self.observed >= self.tokens_to_observe

    def close(self) -> None:
        """End the sequence: keep only its accounting and its newest masks."""
        self.evidence, self.detector = [], Detector(self.rule)
        if self.selection is not None:
            self.selection = MaskSelection(self.selection.masks, self.selection.counts, ())

    def drop_masks(self) -> None:
        """Drop the masks too, once a newer sequence has ended; only the accounting stays."""
        self.selection = self.masks = None

    @property
    def tokens_to_mask(self) -> int:
        """Dense decode tokens that must run before the next mask; 0 if it may be built now."""
        if self.phase is Phase.PREFILL:
            return self._first_length()
        return self.tokens_to_observe - self.observed if self.phase is Phase.OBSERVE else 0

    def tokens_until_change(self) -> int | None:
        """How many tokens can be decoded until the state changes; None if there is no limit."""
        release = self.config.release_step
        if self.phase is Phase.RELEASED or self._to_be_released:
            return None
        bounds = [] if release is None else [release - self.decoded]
        if (dense := self.tokens_to_mask) > 0:
            bounds.append(dense)
        else:
            pruned = self.phase is Phase.PRUNED
            if self.rule.window:
                bounds.append(self.rule.window - pruned * self.detector.filled)
            if self.rule.interval:
                bounds.append(self.rule.interval - pruned * self.pruned_run)
        return max(1, min(bounds)) if bounds else None

    def nbytes(self) -> int:
        """Bytes of this state."""
        size = sum(layer.nbytes() for layer in self.evidence) + self.detector.nbytes()
        if self.selection is not None:
            size += sum(mask.nbytes() for mask in self.selection.masks if mask is not None)
            size += sum(score.nbytes for score in self.selection.scores)
        return size
