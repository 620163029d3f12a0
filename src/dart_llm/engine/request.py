"""One request from its prompt to its answer: forwards, sampling, text, masks as records."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
from dart_llm.engine.requests import GenerationRequest, GenerationResult, Sampling
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.calls import OwnLoop
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.records import Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.session.generation import CONTEXT, HALF, TextStream, decode_ids
from dart_llm.session.run import BoundMethod

FEW = 64
"""The likeliest tokens that ``top_p`` sorts first; eight times as many if they are too few."""

COLDEST = 1e-30
"""The lowest temperature: in float32 lower ones would be 0."""


class Sampler:
    """Draws for the rows of one request; row i of seed s draws the numbers of seed (s, i)."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed = sampling.seed
        self._rngs = [
            random.Random(None if seed is None else f"{seed}/{row}") for row in range(sampling.n)
        ]

    def choose(self, logits: Tensor) -> list[int]:
        """Token ids of logits [n, V]; raises ``DartError`` where they are not finite."""
        scores = logits.float()
        best = scores.max(-1)
        if not all(map(math.isfinite, best.values.tolist())):
            raise DartError("a logit is not finite: the model overflows; try dtype float32")
        if self.sampling.temperature == 0:
            ids: list[int] = best.indices.tolist()
            return ids
        temperature = max(self.sampling.temperature, COLDEST)
        probabilities = torch.softmax((scores - best.values[:, None]) / temperature, -1)
        return [self._draw(row, rng) for row, rng in zip(probabilities, self._rngs, strict=True)]

    def _draw(self, probabilities: Tensor, rng: random.Random) -> int:
        """An index of [V], by its probability."""
        point = rng.random()
        top = self.sampling.top_p
        if top >= 1:
            return _at(probabilities.double().cumsum(0), point)
        count = FEW
        while True:
            count = min(count, len(probabilities))
            likeliest = probabilities.topk(count)
            sums = likeliest.values.double().cumsum(0)
            if float(sums[-1]) >= top or count == len(probabilities):
                break
            count *= 8
        inside = min(count, int(torch.searchsorted(sums, top)) + 1)
        return int(likeliest.indices[_at(sums[:inside], point)])


def _at(sums: Tensor, point: float) -> int:
    """The index at which ``point`` in [0, 1) of the total falls in running sums [k]."""
    index = torch.searchsorted(sums, point * sums[-1], right=True)
    return min(int(index), len(sums) - 1)


def logprobs(logits: Tensor, ids: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
    """Per row of logits [n, V] its token, then the ``count`` likeliest, with log-probabilities."""
    scores = torch.log_softmax(logits.float(), -1)
    best = scores.topk(min(count, scores.shape[-1]))
    rows = zip(ids, scores, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token, float(row[token])), *zip(top, values, strict=True)]
        for token, row, top, values in rows
    ]


class Pieces:
    """The text of single tokens, special ones by their names; cached."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._find(token)
        return text

    def _find(self, token: int) -> str:
        text: str = decode_ids(self._tokenizer, [token], special=True)
        if text and not text[0].isspace():  # a first token may have lost its leading space
            twice = decode_ids(self._tokenizer, [token, token], special=True)
            if twice.startswith(text) and twice.endswith(text):
                return twice[len(text) :]
        return text

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text per token: a character of several tokens comes with its last one."""
        texts: list[str] = []
        pending: list[int] = []
        for token in ids:
            if not pending and HALF not in self[token]:
                texts.append(self[token])
                continue
            pending.append(token)
            text = decode_ids(self._tokenizer, pending, special=True)
            complete = not text.endswith(HALF) or len(pending) > CONTEXT
            texts.append(text if complete else "")
            pending = [] if complete else pending
        if pending:
            texts[-1] = decode_ids(self._tokenizer, pending, special=True)
        return texts


class StopFinder:
    """Ends a text at the first of some strings to be complete, and hides it.

    Text that may be the beginning of one is kept back until that is clear, so that the result does
    not depend on how the text was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that may be shown now; nothing more once ``found``."""
        if not self._stops:
            return text
        text = self._pending + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._pending = True, ""
            return text[: min(ends)[1]]
        shown = len(text) - max(_begun(text, stop) for stop in self._stops)
        self._pending = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """The text that was kept back: nothing will follow."""
        text, self._pending = self._pending, ""
        return text


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


PIECE = 512
"""Prompt tokens per forward: between two a request can be cancelled."""

SCORED_PIECE = 64
"""The same where the logits of every token are needed, a vocabulary of numbers each."""

Emit = Callable[[Record], None]


class Forwards:
    """Runs the attached model for ``rows`` rows of one request.  ``cache``: None: an empty one."""

    def __init__(self, model: Any, patch: Any, rows: int, cache: Any = None) -> None:
        self.cache = cache
        self._model, self._rows, self._device = model, rows, model.device
        self._loop = patch.loop = OwnLoop()

    def read_prompt(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool],
        on_logits: Callable[[Tensor], None] | None = None,
    ) -> Tensor | None:
        """Logits [rows, V] after the last token of ``ids``, None when it was cancelled.

        ``on_logits`` gets the logits [n, V] of every n tokens that were read.
        """
        self._loop.prompt = True
        size, kept = (PIECE, 1) if on_logits is None else (SCORED_PIECE, 0)
        last = None
        for start in range(0, len(ids), size):
            if cancelled():
                return None
            piece = torch.tensor([ids[start : start + size]] * self._rows, device=self._device)
            logits = self._forward(piece, logits_to_keep=kept)
            last = logits[:, -1]
            if on_logits is not None:
                on_logits(logits[0])
        return last

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


def mask_record(
    masks: Sequence[LayerMask | None], widths: Sequence[int], number: int, token: int
) -> Mask:
    """The record of ``masks`` (None: the layer is dense); ``widths``: neurons per layer."""
    shares = tuple(
        1.0 if mask is None else mask.kept / width
        for mask, width in zip(masks, widths, strict=True)
    )
    bins = min(BINS, *widths)
    raster = tuple(
        _raster_row(mask, width, bins, share)
        for mask, width, share in zip(masks, widths, shares, strict=True)
    )
    return Mask(number, token, shares, raster)


def _raster_row(mask: LayerMask | None, width: int, bins: int, share: float) -> bytes:
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

    ``ends``: tokens that end a text; ``limit``: the largest number of tokens.
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
        """The text that was returned by ``add``."""
        return "".join(self._texts)

    def add(self, token: int) -> str:
        """Add a token; the text that became readable.  Sets ``finish`` when it was the last."""
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


class Request:
    """State of one request; only ``conversation`` outlives it."""

    def __init__(
        self,
        host: PatchHost,
        method: BoundMethod,
        ask: GenerationRequest,
        pieces: Pieces,
        name: str,
        ends: frozenset[int],
    ) -> None:
        self.host, self.method, self.ask, self._pieces, self._name = host, method, ask, pieces, name
        sampling, context = ask.sampling, host.context
        room = sampling.max_tokens if context is None else context - len(ask.ids) + 1
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ask.ids)} tokens and the model's context holds {context}: "
                "shorten it"
            )
        limit = min(sampling.max_tokens, room)
        self._rows = [Row(host.tokenizer, sampling.stop, ends, limit) for _ in range(sampling.n)]
        self._sampler = Sampler(sampling)
        self._new_masks: list[tuple[Remask, tuple[LayerMask | None, ...]]] = []
        self._masks = self._checks = self._cached = 0
        self._first_time = 0.0
        self._controller: PruningController | None = None
        self._forwards: Forwards | None = None

    def run(
        self, earlier: Conversation | None, emit: Emit, cancelled: Callable[[], bool]
    ) -> GenerationResult:
        """Answer; ``earlier``: the conversation that this prompt continues."""
        self._emit, self._cancelled = emit, cancelled
        self._began = self._last_time = time.perf_counter()
        emit(self._start())
        cache = None
        if earlier is None:
            self._controller = self.method.controller(self._on_remask)
        else:
            self._cached = earlier.shared(self.ask.ids)
            earlier.crop(self._cached)
            self._controller, cache = earlier.controller, earlier.cache
            self._controller.on_remask = self._on_remask
        self.host.serve(self._controller)
        rows = self._rows
        forwards = self._forwards = Forwards(self.host.model, self.host.patch, len(rows), cache)
        with torch.no_grad():
            logits = self._read_prompt(forwards)
            while logits is not None and not self._add_tokens(logits):
                last = [row.tokens[-1] for row in rows]
                logits = forwards.decode(last, [row.finish is None for row in rows])
        for row in rows:
            row.finish = row.finish or "cancelled"
        return self._result()

    @property
    def controller(self) -> PruningController:
        assert self._controller is not None
        return self._controller

    def _start(self) -> Start:
        method, ids = self.method, self.ask.ids
        prompt = zip(ids, self._pieces.of(ids), strict=True)
        return Start(
            self._name,
            self.host.name,
            method.settings.method,
            method.requested,
            method.settings.to_dict(),
            self.host.executor_of(method.settings),
            len(method.layers),
            tuple(layer.width for layer in method.layers),
            tuple(PromptToken(id, text) for id, text in prompt),
        )

    def _read_prompt(self, forwards: Forwards) -> Tensor | None:
        """Logits [rows, V] of the first token, None if no answer is wanted."""
        sampling, ids = self.ask.sampling, self.ask.ids
        if not sampling.prompt_logprobs:
            return forwards.read_prompt(ids[self._cached :], self._cancelled)
        scores: list[list[tuple[int, float]]] = []

        def score(logits: Tensor) -> None:
            following = ids[len(scores) + 1 :][: len(logits)]
            scores.extend(logprobs(logits[: len(following)], following, sampling.logprobs or 0))

        logits = forwards.read_prompt(ids, self._cancelled, score)
        if logits is None:
            return None
        likely = [self._likely(row) for row in scores]
        values, tops = [value for value, _ in likely], [top for _, top in likely]
        self._emit(Scores((None, *values), ((), *tops)))
        if sampling.max_tokens:
            return logits
        for row in self._rows:
            row.finish = "length"
        return None

    def _on_remask(self, remask: Remask, state: SequenceState) -> None:
        self._new_masks.append((remask, state.masks or ()))

    def _add_tokens(self, logits: Tensor) -> bool:
        """Sample a token for every row that has not ended; whether the answer is complete."""
        self._emit_events()
        tokens = self._sampler.choose(logits)
        count = self.ask.sampling.logprobs
        scores = None if count is None else logprobs(logits, tokens, count)
        phase, now = self._phase(), time.perf_counter()
        self._first_time = self._first_time or now
        seconds, self._last_time = now - self._last_time, now
        for choice, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if row.finish is not None:
                continue
            index, text = len(row.tokens), row.add(token)
            logprob, top = (None, None) if scores is None else self._likely(scores[choice])
            piece = self._pieces[token]
            record = Token(choice, index, token, text, piece, phase, logprob, top, seconds)
            self._emit(record)
        return all(row.finish for row in self._rows) or self._cancelled()

    def _likely(self, scores: list[tuple[int, float]]) -> tuple[float, tuple[Likely, ...]]:
        """The token's log-probability, and the likeliest tokens in its place."""
        top = (Likely(id, self._pieces[id], value) for id, value in scores[1:])
        return scores[0][1], tuple(top)

    def _phase(self) -> str:
        if not self._rows[0].tokens:
            return "prefill"
        return "dense" if self.method.dense else str(self.controller.last_phase)

    def _emit_events(self) -> None:
        """Checks and masks of the last forward."""
        for check in self.controller.checks[self._checks :]:
            self._emit(Check(check))
        self._checks = len(self.controller.checks)
        index = max(len(row.tokens) for row in self._rows)
        widths = [layer.width for layer in self.method.layers]
        for remask, masks in self._new_masks:
            self._masks += 1
            self._emit(Masked(remask))
            self._emit(mask_record(masks, widths, self._masks, index))
        self._new_masks = []

    def _result(self) -> GenerationResult:
        rows, first = self._rows, self._first_time or time.perf_counter()
        generated = sum(len(row.tokens) for row in rows)
        decoded = sum(max(0, len(row.tokens) - 1) for row in rows)
        read, decoding = len(self.ask.ids) - self._cached, self._last_time - first
        return GenerationResult(
            self._name,
            tuple(row.text for row in rows),
            tuple(tuple(row.tokens) for row in rows),
            tuple(row.finish or "" for row in rows),
            Usage(len(self.ask.ids), generated, self._cached),
            Timings(read, 1e3 * (first - self._began), decoded, 1e3 * decoding),
            self.host.report(self.method, self.controller),
        )

    def release(self) -> None:
        """Drop what was seen and the cache now: this and its controller refer to each other."""
        controller = self._controller
        if controller is not None:
            controller.on_remask, controller.plan = None, ForwardPlan(False, False, ())
            controller.sequences, controller.finished, controller.checks = [], [], []
        self._controller = self._forwards = None

    def conversation(self) -> Conversation | None:
        """What the next request of a conversation continues; None if no prompt was read."""
        tokens, controller, forwards = self._rows[0].tokens, self._controller, self._forwards
        if not tokens or controller is None or forwards is None:
            return None
        self._controller = controller.on_remask = None
        ids = [*self.ask.ids, *tokens[:-1]]
        kept = Conversation(self.method, controller, forwards.cache, ids, len(self.ask.ids))
        kept.reset_accounting()
        return kept
