"""The state machine of a run: forwards in, plans out; no model, no modules.

For every forward: ``begin_forward`` says what each layer shall do, ``observe`` and ``feature``
take what the layers saw, ``end_forward`` settles it.  A decode forward of several tokens is held
until the next one shows how many stayed (assisted decoding rolls back).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

import torch
from torch import Tensor

from dart_llm.pruning.compensation import read_features
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import make_rule
from dart_llm.pruning.forward import (
    ForwardCall,
    ForwardPlan,
    Kind,
    PendingForward,
    add_reference,
    evidence_weights,
    prompt_counts,
    sinks_ahead,
    token_weights,
)
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import (
    LayerObservation,
    Observations,
    detached_copy,
    sampled_per_sequence,
    sampled_tokens,
    weak_callback,
)
from dart_llm.pruning.records import DriftCheck, Remask
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.sequence import Phase, SequenceState
from dart_llm.pruning.weights import FfnWeights

RemaskHook = Callable[[Remask, SequenceState], None]


class PruningController:
    """Drives the lives of the sequences of one run."""

    def __init__(
        self,
        config: PruneConfig,
        layers: tuple[FfnWeights, ...],
        given: tuple[LayerMask | None, ...] | None = None,
        on_remask: RemaskHook | None = None,
    ) -> None:
        self.config = config
        self.selector: MaskSelector = check_fits(config, layers)
        self.rule = make_rule("never" if given is not None else config.drift.rule)
        self.given = given
        self.on_remask = on_remask
        self.lives: list[SequenceState] = []
        self.finished: list[SequenceState] = []
        self.checks: list[DriftCheck] = []
        self.sequences = 0
        self.length = 0
        self.plan = ForwardPlan(False, False, ())
        self.last_phase = Phase.PREFILL
        self._held: PendingForward | None = None
        self._real: list[float] = []
        """Tokens of each row before the forward in hand, padding left out."""
        self._queue = Observations(weak_callback(self._update))

    @torch.no_grad()
    def begin_forward(self, call: ForwardCall) -> ForwardPlan:
        """Settle the forward before, then plan this one."""
        self.settle(call.cached)
        if call.cached == 0 or call.cached > self.length or not self.lives:  # a fresh one
            self._new_sequence(call)
        else:
            self._rewind(call.cached)
        if len(self._real) != call.rows:
            self._real = [min(self._real)] * call.rows
        self.length = call.cached
        prefill = call.kind is Kind.PREFILL
        if prefill or any(life.ready for life in self.lives):
            self._queue.flush()
        before = [life.version for life in self.lives]
        counts = prompt_counts(call)
        if prefill:
            observing = self._prefill(counts)
        else:
            observing = [self._advance(life, call) for life in self.lives]
        self._announce(before)
        self.last_phase = Phase.PREFILL if prefill else self.lives[0].phase
        self._held = PendingForward(call, observing, {}, counts)
        self.plan = self._make_plan(self._held)
        return self.plan

    def _advance(self, life: SequenceState, call: ForwardCall) -> bool:
        """Whether ``life`` observes the decode forward that is about to run."""
        unmasked = life.phase in (Phase.PREFILL, Phase.OBSERVE)
        if unmasked and life.row is not None and life.ended(call.live):
            return False  # no mask for a row that has ended
        return life.advance() is Phase.OBSERVE

    @torch.no_grad()
    def end_generate(self, cached: int) -> None:
        """A token loop ended and left ``cached`` tokens: the others were rolled back."""
        self.settle(cached)
        if cached:
            self._rewind(cached)

    def _rewind(self, cached: int) -> None:
        gone = self.length - cached
        if gone > 0:
            for life in self.lives:
                life.rewind(gone)
            self._real = [max(0.0, n - gone) for n in self._real]
            self.length = cached

    def _new_sequence(self, call: ForwardCall) -> None:
        self._queue.flush()
        for life in self.finished:
            life.drop_masks()
        for life in self.lives:
            life.close()
        self.finished += self.lives
        per_row = self.config.batch == "per_row"
        alone: list[tuple[int | None, int]] = [(row, 1) for row in range(call.rows)]
        self.lives = [
            SequenceState(
                self.config, self.selector, self.rule, self.sequences, row, rows, self.given
            )
            for row, rows in (alone if per_row else [(None, call.rows)])
        ]
        self.sequences += 1
        self.length = 0
        self._real = [float(call.cached)] * call.rows

    def _prefill(self, counts: list[float]) -> list[bool]:
        for life in self.lives:
            mean = sum(counts) / len(counts) if life.row is None else counts[life.row]
            life.see_prompt(mean)
        wanted = self.given is None and not self.selector.removes_nothing
        return [wanted and life.phase is Phase.PREFILL for life in self.lives]

    def _make_plan(self, held: PendingForward) -> ForwardPlan:
        prefill, observing = held.call.kind is Kind.PREFILL, held.observing
        masks = tuple(None if prefill else life.masks for life in self.lives)
        watched = any(observing) or any(life.phase is Phase.PRUNED for life in self.lives)
        observe = any(observing) and self.selector.needs_evidence
        stream = observe and self.selector.statistics.needs_stream
        if stream and not prefill:
            seen = [life.observed for life in self.lives]
            held.read = sampled_tokens(list(compress(seen, observing)), held.call.tokens)
            stream, held.own = bool(held.read), sampled_per_sequence(seen, held.read)
        inputs = observe and "features" in self.selector.statistics.needs
        features = bool(self.rule.window) and watched
        into = None if not observe or prefill or stream or any(masks) else held.layers
        return ForwardPlan(observe, features, masks, stream, inputs, into)

    def _announce(self, before: list[int]) -> None:
        for life, version in zip(self.lives, before, strict=True):
            if self.on_remask and life.version != version and life.masks is not None:
                self.on_remask(life.remasks[-1], life)

    def observe(self, layer: int, seen: LayerObservation) -> None:
        """One layer's tokens."""
        if (held := self._held) is not None and self.plan.observe:
            if held.call.kind is Kind.DECODE:
                held.layers[layer] = detached_copy(seen, self.plan.stream)
            else:
                self._observe_prompt(held, layer, seen)

    def observe_step(self, layers: dict[int, LayerObservation]) -> None:
        """All layers of one forward of one token, in tensors that nobody changes."""
        if (held := self._held) is None or not self.plan.observe:
            return
        if held.call.kind is Kind.DECODE:
            held.layers = layers
            return
        for layer, seen in layers.items():  # a piece of a prompt, of one token
            self._observe_prompt(held, layer, seen)

    @torch.no_grad()
    def _observe_prompt(self, held: PendingForward, layer: int, seen: LayerObservation) -> None:
        end = held.call.prompt_tokens
        weights = evidence_weights(held.call, end, self._real, self.config.skip_sinks)
        parts = (None if t is None else t.detach()[None, :, :end] for t in seen)
        self._update(held.observing, (layer,), LayerObservation(*parts), weights)

    def _update(
        self,
        observing: list[bool],
        layers: tuple[int, ...],
        seen: LayerObservation,
        weights: Tensor | None,
    ) -> None:
        with torch.inference_mode(False):
            f = read_features(seen.h, [self.selector.layers[layer] for layer in layers])
            choice = self.selector.choice(layers)
            for life, wanted in zip(self.lives, observing, strict=True):
                if wanted:
                    rows = life.batch_rows
                    w = None if weights is None else weights[rows].to(seen.shown.device)
                    own = LayerObservation(*(None if t is None else t[:, rows] for t in seen))
                    part = None if f is None else f[:, rows]
                    evidence = [life.evidence[layer] for layer in layers]
                    self.selector.statistics.add(evidence, own, w, part, choice)

    def feature(self, v: Tensor) -> None:
        """The last layer's attention output of this forward: [B, T, D]."""
        if self._held is not None and self.plan.features:
            self._held.feature = v.detach()

    @torch.no_grad()
    def end_forward(self) -> None:
        """The forward ran: count it and look for drift, unless it must be held."""
        held = self._held
        if held is None:
            return
        held.ended = True
        if held.call.kind is Kind.PREFILL or held.call.tokens == 1:
            self.settle(held.call.cached + held.call.tokens)
        else:
            self.length = held.call.cached + held.call.tokens

    @torch.no_grad()
    def settle(self, cached: int | None = None) -> None:
        """Account for the forward in hand; ``cached``: tokens that stayed (None: all of them)."""
        held, self._held = self._held, None
        if held is None or not held.ended:
            return
        call = held.call
        end = call.cached + call.tokens
        stayed = end if cached is None or cached == 0 else min(cached, end)
        accepted = max(0, stayed - call.cached)
        self.length = call.cached + accepted
        weights = evidence_weights(call, accepted, self._real, self.config.skip_sinks)
        seen = held.observing, held.layers
        self._queue.add(*seen, weights, call.rows, accepted, held.read, held.own)
        with torch.inference_mode(False):
            if call.kind is Kind.PREFILL:
                self._settle_prefill(held)
            elif accepted:
                self._settle_decode(held, accepted)
        decoded = accepted if call.kind is Kind.DECODE else call.tokens - call.prompt_tokens
        self._real = [n + new + decoded for n, new in zip(self._real, held.counts, strict=True)]

    def _settle_prefill(self, held: PendingForward) -> None:
        call = held.call
        end = call.prompt_tokens
        if held.feature is not None:
            add_reference(self.lives, held, held.feature[:, :end], self._real)
        if extra := call.tokens - end:
            for life in self.lives:  # candidate tokens that rode along with the prompt ran dense
                phase, life.phase = life.phase, Phase.RELEASED
                life.count(extra, float(extra * life.rows))
                life.phase = phase

    def _settle_decode(self, held: PendingForward, accepted: int) -> None:
        call = held.call
        weights = token_weights(call, accepted)
        if held.feature is not None:
            add_reference(self.lives, held, held.feature[:, :accepted], self._real)
        for life in self.lives:
            rows = life.batch_rows
            count = call.rows if life.row is None else 1
            live = float(accepted * count) if weights is None else weights[rows].sum()
            pruned = life.phase is Phase.PRUNED
            life.count(accepted, live, accepted if call.forced else 1)
            if pruned:
                self._watch(life, held, accepted, rows)

    def _watch(self, life: SequenceState, held: PendingForward, accepted: int, rows: slice) -> None:
        if self.rule.interval and life.pruned_run >= self.rule.interval:
            if life.may_trigger() and not life.ended(held.call.live):
                self._queue.flush()
                life.trigger("interval")
            return
        if held.feature is None:
            return
        live = held.call.live
        v = held.feature[rows, sinks_ahead(life, accepted, self._real) : accepted]
        for check in life.detector.watch(v, None if live is None else live[rows].to(v.device)):
            allowed = check.fired and life.may_trigger()
            last = len(self.selector.layers) - 1
            self.checks += check.records(life.sequence, life.row, life.decoded, last, allowed)
            if allowed:
                self._queue.flush()
                life.trigger("drift")
                break

    @torch.no_grad()
    def select(self) -> tuple[LayerMask | None, ...]:
        """The masks that the evidence of the newest sequence gives now; None: dense."""
        self.flush()
        life = self.lives[-1] if self.lives else None
        with torch.inference_mode(False):
            return self.selector.preview(life.evidence if life and life.evidence_tokens else None)

    def branch(self) -> None:
        """Tokens decoded so far are no longer taken back by a shorter cache."""
        self.settle()
        for life in self.lives:
            life.keep_counts()

    def tokens_until_change(self) -> int | None:
        """Tokens that the next decode forward may hold before any state can change."""
        self.settle()
        bounds = [life.tokens_until_change() for life in self.lives]
        return min(filter(None, bounds), default=None)  # a bound is at least 1

    def flush(self) -> None:
        """Account for everything that was seen."""
        self.settle()
        self._queue.flush()

    def all_lives(self) -> list[SequenceState]:
        """Finished and running lives, in order."""
        return [*self.finished, *self.lives]
