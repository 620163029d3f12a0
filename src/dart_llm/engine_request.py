"""One request from its prompt to its answer, on a model that is attached."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dart_llm.engine_ask import Answer, Ask
from dart_llm.engine_host import Host, Ready
from dart_llm.engine_kept import Conversation
from dart_llm.engine_loop import Forwards
from dart_llm.engine_raster import mask_record
from dart_llm.engine_records import (
    Check,
    Likely,
    Masked,
    PromptToken,
    Record,
    Scores,
    Start,
    Timings,
    Token,
    Usage,
)
from dart_llm.engine_row import Row
from dart_llm.engine_sample import Sampler, logprobs
from dart_llm.engine_text import Pieces
from dart_llm.errors import ConfigError
from dart_llm.life import Life
from dart_llm.masks import LayerMask
from dart_llm.plan import Plan
from dart_llm.records import Remask
from dart_llm.tracer import Tracer

Emit = Callable[[Record], None]


class Request:
    """State of one request; nothing of it outlives it but what ``keep`` gives away."""

    def __init__(
        self, host: Host, ready: Ready, ask: Ask, pieces: Pieces, name: str, ends: frozenset[int]
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
        self._tracer: Tracer | None = None
        self._forwards: Forwards | None = None

    def run(
        self, going_on: Conversation | None, emit: Emit, cancelled: Callable[[], bool]
    ) -> Answer:
        """Answer; ``going_on``: the conversation that this prompt extends."""
        self._emit, self._cancelled = emit, cancelled
        self._began = self._clock = time.perf_counter()
        emit(self._start())
        tracer = self._tracer = self._take_over(going_on)
        self.host.serve(tracer)
        rows = len(self._rows)
        cache = None if going_on is None else going_on.cache
        forwards = self._forwards = Forwards(self.host.model, self.host.attachment, rows, cache)
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
    def _seen_by(self) -> Tracer:
        assert self._tracer is not None
        return self._tracer

    def _take_over(self, going_on: Conversation | None) -> Tracer:
        if going_on is None:
            return self.ready.tracer(self._remasked)
        self._cached = going_on.shared(self.ask.ids)
        going_on.crop(self._cached)
        going_on.tracer.on_remask = self._remasked
        return going_on.tracer

    def _remasked(self, remask: Remask, life: Life) -> None:
        self._new.append((remask, life.masks or ()))

    def _step(self, logits: Tensor) -> bool:
        """Choose a token for every row that goes on; whether none does, or nobody listens."""
        self._tell_news()
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

    def _tell_news(self) -> None:
        """What the last forward brought beside its token."""
        tracer = self._seen_by
        for check in tracer.checks[self._seen :]:
            self._emit(Check(check))
        self._seen = len(tracer.checks)
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

    def _answer(self) -> Answer:
        end = time.perf_counter()
        first = self._first or end
        made = sum(len(row.tokens) for row in self._rows)
        decoded = sum(max(0, len(row.tokens) - 1) for row in self._rows)
        read = len(self.ask.ids) - self._cached
        return Answer(
            self._name,
            tuple(row.text for row in self._rows),
            tuple(tuple(row.tokens) for row in self._rows),
            tuple(row.finish or "" for row in self._rows),
            Usage(len(self.ask.ids), made, self._cached),
            Timings(read, 1e3 * (first - self._began), decoded, 1e3 * (self._clock - first)),
            self.host.report(self.ready, self._seen_by),
        )

    def let_go(self) -> None:
        """Drop what was seen and the cache now: this and its tracer refer to each other."""
        tracer = self._tracer
        if tracer is not None:
            tracer.on_remask, tracer.plan = None, Plan(False, False, ())
            tracer.lives, tracer.finished, tracer.checks = [], [], []
        self._tracer = self._forwards = None

    def keep(self) -> Conversation | None:
        """What a next turn can go on from; None when not even the prompt was read."""
        tokens, tracer, forwards = self._rows[0].tokens, self._tracer, self._forwards
        if not tokens or tracer is None or forwards is None:
            return None
        self._tracer = None
        ids = [*self.ask.ids, *tokens[:-1]]
        tracer.on_remask = None
        kept = Conversation(self.ready, tracer, forwards.cache, ids, len(self.ask.ids))
        kept.forget_accounts()
        return kept
