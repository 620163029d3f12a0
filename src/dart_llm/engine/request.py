"""One request from its prompt to its answer, on a model that is attached."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.engine.decoding import Pieces, Sampler, StopFinder, logprobs
from dart_llm.engine.events import (
    BINS,
    Check,
    Likely,
    Mask,
    Masked,
    PromptToken,
    Record,
    Scores,
    Start,
    Timings,
    Token,
    Usage,
)
from dart_llm.engine.host import Conversation, PatchHost
from dart_llm.engine.requests import GenerationRequest, GenerationResult
from dart_llm.errors import ConfigError
from dart_llm.models.calls import OwnLoop
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.records import Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.session.generation import TextStream
from dart_llm.session.run import MethodOnModel

PIECE = 512
"""Prompt tokens that are read at once: between two pieces a request can be cancelled."""

SCORED_PIECE = 64
"""The same where the logits of every token are wanted, a vocabulary of numbers each."""


class Forwards:
    """Runs the attached model for ``rows`` rows of one request.  ``cache``: None: an empty one."""

    def __init__(self, model: Any, patch: Any, rows: int, cache: Any = None) -> None:
        self.cache = cache
        self._model, self._rows, self._device = model, rows, model.device
        self._loop = patch.loop = OwnLoop()

    def read(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool],
        scored: Callable[[Tensor], None] | None = None,
    ) -> Tensor | None:
        """Read prompt tokens; logits [rows, V] after the last, None when it was cancelled.

        ``scored`` is given the logits [n, V] of every n tokens that were read.
        """
        self._loop.prompt = True
        size, kept = (PIECE, 1) if scored is None else (SCORED_PIECE, 0)
        logits = None
        for start in range(0, len(ids), size):
            if cancelled():
                return None
            piece = torch.tensor([ids[start : start + size]] * self._rows, device=self._device)
            every = self._forward(piece, logits_to_keep=kept)
            logits = every[:, -1]
            if scored is not None:
                scored(every[0])
        return logits

    def decode(self, tokens: Sequence[int], live: Sequence[bool]) -> Tensor:
        """Feed one token per row; logits [rows, V].  ``live``: rows that have not ended."""
        self._loop.prompt = False
        self._loop.live = None if all(live) else torch.tensor(live, device=self._device)
        return self._forward(torch.tensor(tokens, device=self._device)[:, None])[:, -1]

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits [rows, n, V]."""
        if self.cache is not None:
            options["cache"] = self.cache
        output = self._model(ids, use_cache=True, **options)
        self.cache = output.cache
        logits: Tensor = output.logits
        return logits


# Masks in a form that a small picture needs: which parts of each layer are kept.


def mask_record(
    masks: Sequence[LayerMask | None], widths: Sequence[int], number: int, token: int
) -> Mask:
    """The record of ``masks`` (None: the layer is dense); ``widths``: neurons per layer."""
    shares = tuple(
        1.0 if mask is None else mask.kept / width
        for mask, width in zip(masks, widths, strict=True)
    )
    bins = min(BINS, *widths)
    rows = tuple(
        _row(mask, width, bins, share)
        for mask, width, share in zip(masks, widths, shares, strict=True)
    )
    return Mask(number, token, shares, rows)


def _row(mask: LayerMask | None, width: int, bins: int, share: float) -> bytes:
    if mask is None or isinstance(mask, TokenMask):
        return bytes([round(255 * share)]) * bins
    kept = torch.bincount(mask.ids.cpu() * bins // width, minlength=bins).tolist()
    edges = [-(-width * at // bins) for at in range(bins + 1)]  # the first neuron of each group
    return bytes(
        round(255 * count / (end - start))
        for count, start, end in zip(kept, edges, edges[1:], strict=False)
    )


class Row:
    """Tokens and text of one choice.

    ``ends``: tokens that end a text; ``limit``: tokens that it may have.
    """

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...], ends: frozenset[int], limit: int
    ) -> None:
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._ends, self._limit = ends, limit
        self._stream, self._stops = TextStream(tokenizer), StopFinder(stops)
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """What was shown."""
        return "".join(self._texts)

    def add(self, token: int) -> str:
        """Take one token; what became readable with it.  Sets ``finish`` when it was the last."""
        self.tokens.append(token)
        ended, full = token in self._ends, len(self.tokens) >= self._limit
        text = "" if ended else self._stream.add(token)
        if ended or full:
            text += self._stream.end()
        shown = self._stops.add(text)
        if self._stops.found or ended:
            self.finish = "stop"
        elif full:
            self.finish = "length"
        if self.finish:
            shown += self._stops.end()
        self._texts.append(shown)
        return shown


Emit = Callable[[Record], None]


class Request:
    """State of one request; nothing of it outlives it but what ``keep`` gives away."""

    def __init__(
        self,
        host: PatchHost,
        ready: MethodOnModel,
        ask: GenerationRequest,
        pieces: Pieces,
        name: str,
        ends: frozenset[int],
    ) -> None:
        self.host, self.ready, self.ask, self._pieces, self._name = host, ready, ask, pieces, name
        sampling = ask.sampling
        context = host.context
        room = sampling.max_tokens if context is None else context - len(ask.ids) + 1
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ask.ids)} tokens and the model's context holds {context}: "
                "shorten it"
            )
        limit = min(sampling.max_tokens, room)
        self._rows = [Row(host.tokenizer, sampling.stop, ends, limit) for _ in range(sampling.n)]
        self._sampler = Sampler(sampling)
        self._new: list[tuple[Remask, tuple[LayerMask | None, ...]]] = []
        self._masks = self._seen = self._cached = 0
        self._first = 0.0
        self.controller: PruningController | None = None
        self._forwards: Forwards | None = None

    def run(
        self, going_on: Conversation | None, emit: Emit, cancelled: Callable[[], bool]
    ) -> GenerationResult:
        """Answer; ``going_on``: the conversation that this prompt extends."""
        self._emit, self._cancelled = emit, cancelled
        self._began = self._clock = time.perf_counter()
        emit(self._start())
        controller = self.controller = self._take_over(going_on)
        self.host.serve(controller)
        rows = len(self._rows)
        cache = None if going_on is None else going_on.cache
        forwards = self._forwards = Forwards(self.host.model, self.host.patch, rows, cache)
        with torch.no_grad():
            logits = self._read(forwards, cancelled)
            while logits is not None and not self._step(logits):
                last = [row.tokens[-1] for row in self._rows]
                logits = forwards.decode(last, [row.finish is None for row in self._rows])
        for row in self._rows:
            row.finish = row.finish or "cancelled"
        return self._answer()

    def _read(self, forwards: Forwards, cancelled: Callable[[], bool]) -> Tensor | None:
        """The prompt; logits [rows, V] of the first token, None where none is to come."""
        sampling, ids = self.ask.sampling, self.ask.ids
        if not sampling.prompt_logprobs:
            return forwards.read(ids[self._cached :], cancelled)
        known: list[list[tuple[int, float]]] = []

        def score(logits: Tensor) -> None:
            following = ids[len(known) + 1 :][: len(logits)]
            known.extend(logprobs(logits[: len(following)], following, sampling.logprobs or 0))

        logits = forwards.read(ids, cancelled, score)
        if logits is None:
            return None
        told = [self._likely(one) for one in known]
        self._emit(Scores((None, *(one for one, _ in told)), ((), *(top for _, top in told))))
        if sampling.max_tokens:
            return logits
        for row in self._rows:
            row.finish = "length"
        return None

    @property
    def _seen_by(self) -> PruningController:
        assert self.controller is not None
        return self.controller

    def _take_over(self, going_on: Conversation | None) -> PruningController:
        if going_on is None:
            return self.ready.controller(self._remasked)
        self._cached = going_on.shared(self.ask.ids)
        going_on.crop(self._cached)
        going_on.controller.on_remask = self._remasked
        return going_on.controller

    def _remasked(self, remask: Remask, state: SequenceState) -> None:
        self._new.append((remask, state.masks or ()))

    def _step(self, logits: Tensor) -> bool:
        """Choose a token for every row that goes on; whether none does, or nobody listens."""
        self._emit_events()
        tokens = self._sampler.choose(logits)
        count = self.ask.sampling.logprobs
        known = None if count is None else logprobs(logits, tokens, count)
        phase, now = self._phase(), time.perf_counter()
        self._first = self._first or now
        seconds, self._clock = now - self._clock, now
        for choice, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if row.finish is not None:
                continue
            index, text = len(row.tokens), row.add(token)
            chance, top = (None, None) if known is None else self._likely(known[choice])
            piece = self._pieces[token]
            record = Token(choice, index, token, text, piece, phase, chance, top, seconds)
            self._emit(record)
        return all(row.finish for row in self._rows) or self._cancelled()

    def _likely(self, known: list[tuple[int, float]]) -> tuple[float, tuple[Likely, ...]]:
        return known[0][1], tuple(Likely(id, self._pieces[id], value) for id, value in known[1:])

    def _phase(self) -> str:
        if not self._rows[0].tokens:
            return "prefill"
        return "dense" if self.ready.dense else str(self._seen_by.last_phase)

    def _emit_events(self) -> None:
        """What the last forward brought beside its token."""
        controller = self._seen_by
        for check in controller.checks[self._seen :]:
            self._emit(Check(check))
        self._seen = len(controller.checks)
        if not self._new:
            return
        new, self._new = self._new, []
        index = max(len(row.tokens) for row in self._rows)
        widths = [layer.width for layer in self.ready.layers]
        for remask, masks in new:
            self._masks += 1
            self._emit(Masked(remask))
            self._emit(mask_record(masks, widths, self._masks, index))

    def _start(self) -> Start:
        ready, ids = self.ready, self.ask.ids
        prompt = zip(ids, self._pieces.of(ids), strict=True)
        return Start(
            self._name,
            self.host.name,
            ready.config.method,
            ready.asked,
            ready.config.to_dict(),
            self.host.executor_of(ready.config),
            len(ready.layers),
            tuple(layer.width for layer in ready.layers),
            tuple(PromptToken(id, text) for id, text in prompt),
        )

    def _answer(self) -> GenerationResult:
        end = time.perf_counter()
        first = self._first or end
        made = sum(len(row.tokens) for row in self._rows)
        decoded = sum(max(0, len(row.tokens) - 1) for row in self._rows)
        read = len(self.ask.ids) - self._cached
        return GenerationResult(
            self._name,
            tuple(row.text for row in self._rows),
            tuple(tuple(row.tokens) for row in self._rows),
            tuple(row.finish or "" for row in self._rows),
            Usage(len(self.ask.ids), made, self._cached),
            Timings(read, 1e3 * (first - self._began), decoded, 1e3 * (self._clock - first)),
            self.host.report(self.ready, self._seen_by),
        )

    def let_go(self) -> None:
        """Drop what was seen and the cache now: this and its controller refer to each other."""
        controller = self.controller
        if controller is not None:
            controller.on_remask, controller.plan = None, ForwardPlan(False, False, ())
            controller.sequences, controller.finished, controller.checks = [], [], []
        self.controller = self._forwards = None

    def keep(self) -> Conversation | None:
        """What a next turn can go on from; None when not even the prompt was read."""
        tokens, controller, forwards = self._rows[0].tokens, self.controller, self._forwards
        if not tokens or controller is None or forwards is None:
            return None
        self.controller = None
        ids = [*self.ask.ids, *tokens[:-1]]
        controller.on_remask = None
        kept = Conversation(self.ready, controller, forwards.cache, ids, len(self.ask.ids))
        kept.forget_accounts()
        return kept
