"""The state machine of a run: plans each forward and accounts for it, without touching the model.

The code that runs the model calls ``before_forward``, which returns what each layer must do, and
``after_forward``.  Between these two calls, ``observe`` and ``observe_signal`` receive activations.
From the activations the controller builds the evidence of each sequence: sums over tokens, from
which masks are made.

A ``PendingForward`` holds the data of one forward until it is settled.  A forward is settled when
its tokens are counted and its observations are recorded:

=================  =======================================================================
kind of forward    when the controller settles it
=================  =======================================================================
prefill            as soon as it ends; its tokens become the drift detector's reference
one decode token   as soon as it ends; the token is also checked for drift
several tokens     when the next forward begins, which shows how many of them were kept (assisted
                   decoding rolls candidate tokens back), or in ``flush``, which assumes that all
                   of them were kept
=================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dart_llm.errors import AttachError
from dart_llm.pruning.clamp import NO_CLAMP, Clamp
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
    outside_inference,
    prompt_counts,
    sinks_ahead,
    token_weights,
)
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.observations import (
    LayerObservation,
    Observations,
    ObservedForward,
    detached_copy,
)
from dart_llm.pruning.records import DriftCheck, Remask
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.sequence import Phase, SequenceState
from dart_llm.pruning.statistics import LayerStatistics
from dart_llm.pruning.weights import FfnWeights

RemaskHook = Callable[[Remask, SequenceState], None]
"""Called after masks are built, with their record and the state of their sequence."""

TokensHook = Callable[[PendingForward, int, list[SequenceState]], None]
"""Called with a forward, the number of its tokens that were kept, and all sequences' states."""


MOST_REPEATS = 64
"""Maximum number of decoded tokens that are counted together."""


class PruningController:
    """Updates the states of all sequences of one run."""

    def __init__(
        self,
        config: PruneConfig,
        layers: tuple[FfnWeights, ...],
        fixed_masks: Masks | None = None,
        on_remask: RemaskHook | None = None,
        clamp: Clamp = NO_CLAMP,
    ) -> None:
        self.config = config
        self.selector = MaskSelector(config, layers, clamp)
        self.rule = make_rule("never" if fixed_masks is not None else config.drift.rule)
        self.fixed_masks = fixed_masks
        self.on_remask = on_remask
        self.on_tokens: TokensHook | None = None
        self._clamp_masks = clamp.of((None,) * len(layers)) if clamp.layers else None
        """Masks that only remove clamped neurons, for steps in which a sequence has no masks."""
        self.sequences: list[SequenceState] = []
        self.finished: list[SequenceState] = []
        """Earlier sequences of the run."""
        self.checks: list[DriftCheck] = []
        self.sequence_count = self.length = 0
        self.plan = ForwardPlan(False, False, ())
        self.last_phase = Phase.PREFILL
        self._pending: PendingForward | None = None
        self._lengths: list[float] = []
        """Number of tokens, without padding, in each batch row before the current forward."""
        self._queue = Observations()

    @torch.no_grad()
    def before_forward(self, call: ForwardCall) -> ForwardPlan:
        """Settle the previous forward, then plan this one."""
        self._settle(call.cached)
        if call.cached == 0 or call.cached > self.length or not self.sequences:
            self._new_sequence(call)
        else:
            self._rewind(call.cached)
        if len(self._lengths) != call.rows:
            self._lengths = [min(self._lengths)] * call.rows
        self.length = call.cached
        prefill = call.kind is Kind.PREFILL
        if prefill or any(state.ready for state in self.sequences):
            self._add_queued()
        versions = [state.mask_version for state in self.sequences]
        counts = prompt_counts(call)
        if prefill:
            observing = self._prefill(counts)
        else:
            observing = [self._advance(state, call) for state in self.sequences]
        self._announce(versions)
        self.last_phase = Phase.PREFILL if prefill else self.sequences[0].phase
        self._pending = pending = self._make_pending(call, observing, counts)
        self.plan = pending.plan
        return self.plan

    def repeats(self, cached: int) -> bool:
        """Return whether the plan of the newest forward also holds for one more token.

        ``cached``: number of positions in the cache.  If True, the caller may run a forward of one
        token without ``before_forward``; ``after_forward`` then counts it.
        """
        pending = self._pending
        return pending is not None and pending.room > 0 and pending.ended and cached == self.length

    def _advance(self, state: SequenceState, call: ForwardCall) -> bool:
        """Advance ``state`` to the coming decode forward; return whether to observe the forward."""
        has_no_mask = state.phase in (Phase.PREFILL, Phase.OBSERVE)
        if has_no_mask and state.row is not None and state.has_finished(call.live):
            return False  # a row that has ended needs no mask
        return state.advance() is Phase.OBSERVE

    @torch.no_grad()
    def end_generate(self, cached: int) -> None:
        """End a ``generate`` call that leaves ``cached`` tokens in the KV cache.

        Later tokens were rolled back.
        """
        self._settle(cached)
        if cached:
            self._rewind(cached)

    def _rewind(self, cached: int) -> None:
        removed = self.length - cached
        if removed > 0:
            for state in self.sequences:
                state.rewind(removed)
            self._lengths = [max(0.0, n - removed) for n in self._lengths]
            self.length = cached

    def _new_sequence(self, call: ForwardCall) -> None:
        self._add_queued()
        for state in self.finished:
            state.drop_masks()
        for state in self.sequences:
            state.close()
        self.finished += self.sequences
        groups: list[tuple[int | None, int]] = [(None, call.rows)]
        if self.config.batch == "per_row":
            groups = [(row, 1) for row in range(call.rows)]
        common = self.config, self.selector, self.rule, self.sequence_count
        self.sequences = [
            SequenceState(*common, row, rows, self.fixed_masks, call.cached) for row, rows in groups
        ]
        self.sequence_count += 1
        self.length = 0
        self._lengths = [float(call.cached)] * call.rows

    def _prefill(self, counts: list[float]) -> list[bool]:
        for state in self.sequences:
            tokens = counts[state.batch_rows]
            state.observe_prefill(sum(tokens) / len(tokens))
        observes = self.fixed_masks is None and not self.selector.removes_nothing
        return [observes and state.phase is Phase.PREFILL for state in self.sequences]

    def _make_pending(
        self, call: ForwardCall, observing: list[bool], counts: list[float]
    ) -> PendingForward:
        prefill = call.kind is Kind.PREFILL
        masks = tuple(
            None if prefill else state.masks or self._clamp_masks for state in self.sequences
        )
        statistics = self.selector.statistics
        observe = any(observing) and self.selector.needs_evidence
        stream, inputs = (
            observe and needed
            for needed in (statistics.needs_stream, "features" in statistics.needs)
        )
        watched = any(observing) or any(state.phase is Phase.PRUNED for state in self.sequences)
        layers: dict[int, LayerObservation] = {}
        observations = None if not observe or prefill or stream or any(masks) else layers
        signal = bool(self.rule.window) and watched
        plan = ForwardPlan(observe, signal, masks, stream, inputs, observations)
        return PendingForward(call, plan, observing, counts, layers)

    def _announce(self, versions: list[int]) -> None:
        """Call ``on_remask`` for each state with new masks; ``versions``: earlier mask versions."""
        for state, version in zip(self.sequences, versions, strict=True):
            if self.on_remask and state.mask_version != version and state.masks is not None:
                self.on_remask(state.remasks[-1], state)

    def observe(self, layer: int, seen: LayerObservation) -> None:
        """Receive one layer's activations in the current forward."""
        pending = self._pending
        if pending is not None and pending.plan.observe and pending.call.kind is Kind.DECODE:
            pending.layers[layer] = detached_copy(seen, pending.plan.stream)
        else:
            self.observe_prompt((layer,), seen.map(lambda t: t[None]))

    def observe_prompt(self, layers: tuple[int, ...], seen: LayerObservation) -> None:
        """Receive activations [L, B, T, ...] of some layers in the current forward."""
        pending = self._pending
        if pending is None or not pending.plan.observe:
            return
        with torch.no_grad():
            end = pending.call.prompt_tokens
            if pending.weights is None:  # the same for all layers
                lengths, skip = self._lengths, self.config.skip_sinks
                pending.weights = (evidence_weights(pending.call, end, lengths, skip),)
            (weights,) = pending.weights
            part = seen.map(lambda t: t.detach()[:, :, :end])
            self._update(pending.observing, layers, part, weights)

    def observe_step(self, layers: dict[int, LayerObservation]) -> None:
        """Receive all layers' activations in a forward with one token per row.

        The tensors must not be modified later, because they are not copied.
        """
        pending = self._pending
        if pending is not None and pending.plan.observe and pending.call.kind is Kind.DECODE:
            pending.layers = layers
            return
        for layer, seen in layers.items():  # a chunk of a prompt, one token long
            self.observe(layer, seen)

    def _enqueue(self, pending: PendingForward, forward: ObservedForward) -> None:
        if not self._queue.accepts(pending.observing, forward.rows):
            self._add_queued()
        self._queue.observing = pending.observing
        self._queue.forwards.append(forward)
        if self._queue.full:
            self._add_queued()

    def _add_queued(self) -> None:
        """Add queued observations to the evidence, before masks are built or evidence decays."""
        for layers, seen, weights in self._queue.drain():
            self._update(self._queue.observing, layers, seen, weights)

    def _update(
        self,
        observing: list[bool],
        layers: tuple[int, ...],
        seen: LayerObservation,
        weights: Tensor | None,
    ) -> None:
        """Add activations of ``layers`` to the evidence of states whose ``observing`` is True."""
        with torch.inference_mode(False):
            f = read_features(seen.h, [self.selector.layers[layer] for layer in layers])
            selection = self.selector.token_selection(layers)
            for state, observes in zip(self.sequences, observing, strict=True):
                if observes:
                    rows = state.batch_rows
                    w = None if weights is None else weights[rows].to(seen.shown.device)
                    part = seen.map(lambda t, rows=rows: t[:, rows])  # type: ignore[misc]
                    features = None if f is None else f[:, rows]
                    evidence = [state.evidence[layer] for layer in layers]
                    self.selector.statistics.add(evidence, part, w, features, selection)

    def observe_signal(self, v: Tensor) -> None:
        """Receive the signal that the drift detector watches in this forward, [B, T, D]."""
        if self._pending is not None and self._pending.plan.signal:
            self._pending.signal = v.detach()

    @torch.no_grad()
    def after_forward(self) -> None:
        """Settle the forward that just ran, unless some of its tokens may still be rolled back.

        A decode forward whose plan holds for more tokens is settled with these, in one go.
        """
        pending = self._pending
        if pending is None:
            return
        if pending.ended:
            pending.repeats += 1
            pending.room -= 1
        else:
            pending.ended = True
            pending.room = self._room(pending)
        self.length = pending.end
        if pending.room == 0 and (pending.call.kind is Kind.PREFILL or pending.call.tokens == 1):
            self._settle(pending.end)

    def _room(self, pending: PendingForward) -> int:
        """Number of further tokens for which the plan of a forward of one token holds."""
        call, plan = pending.call, pending.plan
        quiet = not (plan.observe or plan.signal or self.on_tokens)
        if call.kind is Kind.PREFILL or (call.tokens, call.rows) != (1, 1) or not quiet:
            return 0
        bounds = [state.tokens_until_change() for state in self.sequences]
        return min((bound for bound in bounds if bound is not None), default=MOST_REPEATS) - 1

    def count_repeats(self) -> None:
        """Settle the forwards of one token that ``after_forward`` has not settled yet."""
        if self._pending is not None and self._pending.room:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Settle the forward that ran last, assuming that all of its tokens were kept."""
        self._settle(None)

    def _settle(self, cached: int | None) -> None:
        """Settle the pending forward, if it has ended.

        ``cached``: number of tokens still in the cache.  With None (unknown) or 0 (the cache of a
        new sequence), all of this forward's tokens count as kept.
        """
        pending, self._pending = self._pending, None
        if pending is None or not pending.ended:
            return
        call, end = pending.call, pending.end
        kept = end if cached is None or cached == 0 else min(cached, end)
        accepted = max(0, kept - call.cached)
        self.length = call.cached + accepted
        if pending.layers and accepted:
            weights = evidence_weights(call, accepted, self._lengths, self.config.skip_sinks)
            self._enqueue(pending, ObservedForward(pending.layers, call.rows, accepted, weights))
        with outside_inference():
            if self.on_tokens is not None:  # called first, because the code below may change states
                self.on_tokens(pending, accepted, self.sequences)
            if call.kind is Kind.PREFILL:
                self._settle_prefill(pending)
            elif accepted:
                self._settle_decode(pending, accepted)
        decoded = accepted if call.kind is Kind.DECODE else call.tokens - call.prompt_tokens
        counts = zip(self._lengths, pending.counts, strict=True)
        self._lengths = [n + new + decoded for n, new in counts]

    def _settle_prefill(self, pending: PendingForward) -> None:
        call = pending.call
        end = call.prompt_tokens
        if pending.signal is not None:
            add_reference(self.sequences, pending, pending.signal[:, :end], self._lengths)
        # in assisted decoding, candidate tokens that shared a forward with the prompt ran dense
        if extra := call.tokens - end:
            for state in self.sequences:
                state.count_dense(extra, float(extra * state.rows))

    def _settle_decode(self, pending: PendingForward, accepted: int) -> None:
        call = pending.call
        weights = token_weights(call, accepted)
        if pending.signal is not None:
            add_reference(self.sequences, pending, pending.signal[:, :accepted], self._lengths)
        for state in self.sequences:
            rows = state.batch_rows
            # not state.rows: generation may expand a prompt of one row to several
            count = call.rows if state.row is None else 1
            live = float(accepted * count) if weights is None else weights[rows].sum()
            pruned = state.phase is Phase.PRUNED
            state.count(accepted, live, accepted if call.forced or pending.repeats else 1)
            if pruned:
                self._watch(state, pending, accepted, rows)

    def _watch(
        self, state: SequenceState, pending: PendingForward, accepted: int, rows: slice
    ) -> None:
        """Trigger a re-mask of ``state`` if the drift rule fires and the guards allow it."""
        if self.rule.interval and state.pruned_run >= self.rule.interval:
            if state.may_trigger() and not state.has_finished(pending.call.live):
                self._add_queued()
                state.trigger("interval")
            return
        if pending.signal is None:
            return
        live = pending.call.live
        v = pending.signal[rows, sinks_ahead(state, accepted, self._lengths) : accepted]
        for check in state.detector.watch(v, None if live is None else live[rows].to(v.device)):
            allowed = check.fired and state.may_trigger()
            last = len(self.selector.layers) - 1
            self.checks += check.records(state.sequence, state.row, state.decoded, last, allowed)
            if allowed:
                self._add_queued()
                state.trigger("drift")
                break

    @torch.no_grad()
    def select(self) -> Masks:
        """Masks made from the newest sequence's evidence, one per layer; None for a dense layer.

        Raises ``AttachError`` if masks need evidence and no token has been observed.
        """
        self.flush()
        state = self.sequences[-1] if self.sequences else None
        evidence = state.evidence if state and state.evidence_tokens else None
        with torch.inference_mode(False):
            if self.selector.removes_nothing:
                return (None,) * len(self.selector.layers)
            if evidence is None and self.selector.needs_evidence:
                raise AttachError("no token has been observed yet: run a prompt first")
            empty = [LayerStatistics() for _ in self.selector.layers]
            return self.selector.select(evidence or empty).masks

    def branch(self) -> None:
        """Keep the counts of the tokens decoded so far, even if the cache becomes shorter later."""
        self.settle()
        for state in self.sequences:
            state.keep_counts()

    def tokens_until_change(self) -> int | None:
        """How many tokens can be decoded until any state changes; None if there is no limit."""
        self.settle()
        bounds = [state.tokens_until_change() for state in self.sequences]
        return min(filter(None, bounds), default=None)  # drops only None: a bound is at least 1

    def flush(self) -> None:
        """Settle the forward that ran last, and add queued observations to the evidence."""
        self.settle()
        self._add_queued()

    def all_sequences(self) -> list[SequenceState]:
        """States of the earlier sequences, then of the current ones."""
        return [*self.finished, *self.sequences]
