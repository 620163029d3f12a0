"""The masks of running requests, and what one step of the engine does with them.

Nothing here knows vLLM: a request is a name, and its tokens are positions.  Each request has a
``PruningController``, which sees the request's tokens as if the request ran alone.

Tokens can run twice: after a preemption, vLLM computes a request's tokens again.  Positions that
have run before are not observed again, and use the masks with which they ran the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dart_llm.pruning.accounting import Costs, run_report
from dart_llm.pruning.config import USER_MASKS, PruneConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardCall, ForwardPlan, Kind
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.records import RunReport
from dart_llm.pruning.weights import FfnWeights


class Unexpected(RuntimeError):
    """vLLM scheduled tokens in a way that this plug-in does not prune correctly."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a step with the same masks; ``masks``: one per layer, None if dense.

    ``request`` observes these tokens; None if they are not observed.
    """

    tokens: slice
    masks: Masks | None
    request: PrunedRequest | None = None

    @property
    def count(self) -> int:
        return int(self.tokens.stop - self.tokens.start)


class PrunedRequest:
    """One request that is pruned: its controller, and the masks of the positions that have run."""

    def __init__(
        self,
        config: PruneConfig,
        layers: tuple[FfnWeights, ...],
        prompt: int,
        fixed_masks: Masks | None = None,
    ) -> None:
        """``prompt``: number of the prompt's tokens."""
        self.controller = PruningController(config, layers, fixed_masks)
        self.prompt = prompt
        self.done = 0
        """Number of positions that have run."""
        self._history: list[tuple[int, Masks | None]] = []
        """The first position of each mask that was used, ascending."""
        self._next = 0
        """``done`` after the forward that is running."""

    def plan(self, first: int, count: int, start: int) -> Iterator[Span]:
        """Plan ``count`` tokens from position ``first``; ``start``: their place in the step.

        Raises ``Unexpected`` for tokens that follow positions which have never run here.
        """
        if first > self.done:
            raise Unexpected(
                f"{first - self.done} tokens of a pruned request came from a cache, so that their "
                "activations are unknown"
            )
        end = first + count
        for position, stop, masks in self._replayed(first, min(end, self.done)):
            yield Span(slice(start + position - first, start + stop - first), masks)
        self._next = max(end, self.done)
        if end > self.done:
            masks = self._advance(end)
            yield Span(slice(start + self.done - first, start + count), masks, self)

    def _replayed(self, first: int, end: int) -> Iterator[tuple[int, int, Masks | None]]:
        """Yield the spans of positions that ran before: first, end and masks."""
        changes: list[tuple[int, Masks | None]] = [(0, None), *self._history]
        stops = [position for position, _ in changes[1:]] + [end]
        for (position, masks), stop in zip(changes, stops, strict=True):
            if max(position, first) < min(stop, end):
                yield max(position, first), min(stop, end), masks

    def _advance(self, end: int) -> Masks | None:
        """Tell the controller of the tokens from ``done`` to ``end``; return their masks."""
        count, decodes = end - self.done, self.done >= self.prompt
        if end > self.prompt and (not decodes or count > 1):
            raise Unexpected(f"{count} tokens were scheduled at once after a prompt's end")
        if not decodes or not self.controller.repeats(self.done):
            kind = Kind.DECODE if decodes else Kind.PREFILL
            self.controller.before_forward(ForwardCall(kind, self.done, count, rows=1))
        (masks,) = self.controller.plan.masks
        if masks is not None and not any(masks):
            masks = None
        last = self._history[-1][1] if self._history else None
        if masks is not last:
            self._history.append((self.done, masks))
        return masks

    def used_masks(self) -> list[Masks]:
        """All masks with which this request ran."""
        return [masks for _, masks in self._history if masks is not None]

    @property
    def forward(self) -> ForwardPlan:
        """What the running forward passes to the controller."""
        return self.controller.plan

    def observe(self, layer: int, seen: LayerObservation) -> None:
        """Receive a layer's activations of this request's tokens, with tensors [1, T, ...]."""
        if self.done >= self.prompt:  # decoded tokens are queued, and the step reuses its buffers
            seen = seen.map(Tensor.clone)
        self.controller.observe(layer, seen)

    def end_forward(self) -> None:
        """Count the tokens of the forward that has run."""
        if self._next > self.done:
            self.controller.after_forward()
            self.done = self._next

    def report(self, layers: tuple[FfnWeights, ...], total_bytes: int) -> RunReport:
        """The accounting of the request so far; ``total_bytes``: bytes of the model's weights."""
        controller, config = self.controller, self.controller.config
        controller.flush()
        fixed = controller.fixed_masks is not None
        costs = Costs(layers, total_bytes, config.compensation)
        method = USER_MASKS if fixed else config.method
        requested = None if fixed else config.target
        states = controller.all_sequences()
        return run_report(states, costs, "masked", 0, method, requested)


@dataclass
class Step:
    """One forward of the engine: the spans of pruned requests; all other tokens are dense.

    ``tokens``: number of tokens, without padding.
    """

    tokens: int
    spans: list[Span] = field(default_factory=list)

    @property
    def shared(self) -> Masks | None:
        """The masks of every token of the step; None if tokens differ, or some are dense."""
        masked = [span for span in self.spans if span.masks is not None]
        if not masked or sum(span.count for span in masked) != self.tokens:
            return None
        first = masked[0].masks
        return first if all(span.masks is first for span in masked) else None

    def masked(self) -> list[Span]:
        """Spans with masks."""
        return [span for span in self.spans if span.masks is not None]

    def observed(self, what: str) -> list[tuple[PrunedRequest, slice]]:
        """Requests that pass on ``what`` of this step's tokens: "observe" or "signal"."""
        return [
            (span.request, span.tokens)
            for span in self.spans
            if span.request is not None and getattr(span.request.forward, what)
        ]


class RunningRequests:
    """All running requests that are pruned, by name; None for those that are dense."""

    def __init__(self) -> None:
        self.requests: dict[str, PrunedRequest | None] = {}
        self.replayed = 0
        """Number of tokens of pruned requests that ran again, after preemptions."""

    def plan(self, tokens: Iterable[tuple[str, int, int]]) -> Step:
        """Plan a step.

        ``tokens``: for each request of the batch in order, its name, the position of its first
        token, and the number of its tokens.
        """
        step = Step(0)
        for name, first, count in tokens:
            request = self.requests[name]  # an unknown request must not be answered dense
            if request is not None:
                self.replayed += max(0, min(first + count, request.done) - first)
                step.spans += request.plan(first, count, step.tokens)
            step.tokens += count
        return step

    def end(self, step: Step) -> None:
        """Count the tokens of a step that has run."""
        for span in step.spans:
            if span.request is not None:
                span.request.end_forward()

    def drop(self, names: Iterable[str]) -> Mapping[str, PrunedRequest]:
        """Forget requests; return those that were pruned."""
        dropped = {name: self.requests.pop(name, None) for name in names}
        return {name: request for name, request in dropped.items() if request is not None}
