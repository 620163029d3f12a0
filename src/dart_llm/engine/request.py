"""Runs one request: runs the model, samples tokens, decodes their text and emits records."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.engine.host import Conversation, PatchHost
from dart_llm.engine.requests import (
    Check,
    Done,
    GenerationRequest,
    Likely,
    Mask,
    Masked,
    PromptToken,
    Record,
    Sampling,
    Scores,
    Start,
    Timings,
    Token,
    Usage,
)
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.calls import OwnLoop, cache_name, cache_of
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.records import Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import TokenMask
from dart_llm.session.generation import CONTEXT, HALF, TextStream, decode_ids
from dart_llm.session.run import BoundMethod

BINS = 96  # maximum number of groups of neighbouring neurons in a mask's raster
MIN_TEMPERATURE = 1e-30  # lower temperatures would be 0 in float32
PIECE = 512  # prompt tokens per forward; a request can be cancelled between forwards
SCORED_PIECE = 64  # prompt tokens per forward if all their logits, which are large, are needed

Emit = Callable[[Record], None]


class Sampler:
    """Samples a token for every row of a request; with seed s, row i is seeded with (s, i)."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed, rows = sampling.seed, range(sampling.n)
        self._rngs = [random.Random(None if seed is None else f"{seed}/{row}") for row in rows]

    def choose(self, logits: Tensor) -> list[int]:
        """Return a token id per row of logits [n, V]; raises ``DartError`` after an overflow."""
        scores = logits.float()
        best = scores.max(-1)
        if not all(map(math.isfinite, best.values.tolist())):
            raise DartError("a logit is not finite: the model overflows; try dtype float32")
        if self.sampling.temperature == 0:
            return list(map(int, best.indices))
        temperature = max(self.sampling.temperature, MIN_TEMPERATURE)
        probabilities = torch.softmax((scores - best.values[:, None]) / temperature, -1)
        return [self._draw(row, rng) for row, rng in zip(probabilities, self._rngs, strict=True)]

    def _draw(self, probabilities: Tensor, rng: random.Random) -> int:
        """Return a token id, sampled from the likeliest tokens that together reach ``top_p``."""
        top_p = self.sampling.top_p
        order = None if top_p == 1 else probabilities.argsort(descending=True)
        sums = (probabilities if order is None else probabilities[order]).double().cumsum(0)
        if order is not None:
            sums = sums[: int(torch.searchsorted(sums, top_p)) + 1]
        index = int(torch.searchsorted(sums, rng.random() * sums[-1], right=True))
        index = min(index, len(sums) - 1)
        return index if order is None else int(order[index])


def logprobs(logits: Tensor, ids: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
    """Return per row (id, log-probability) pairs: its id in ``ids``, then the likeliest ids."""
    scores = torch.log_softmax(logits.float(), -1)
    best = scores.topk(min(count, scores.shape[-1]))
    rows = zip(ids, scores, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token, float(row[token])), *zip(top, values, strict=True)]
        for token, row, top, values in rows
    ]


class Pieces:
    """Maps token ids to the texts of single tokens.  The text of a special token is its name."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            text = decode_ids(self._tokenizer, [token], special=True)
            if text and not text[0].isspace():  # decoding may have stripped a leading space
                twice = decode_ids(self._tokenizer, [token, token], special=True)
                if twice.startswith(text) and twice.endswith(text):
                    text = twice[len(text) :]
            self._texts[token] = text
        return self._texts[token]

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return a text per token; a character of several tokens is in the text of the last."""
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
    """Ends a text before the first stop string that becomes complete.

    Text that may be the start of a stop string is held back until later tokens decide, so the
    result does not depend on how the text is split into tokens.  ``found``: True once a stop string
    is complete.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.found = False

    def add(self, text: str) -> str:
        """Add text; return the text that can be shown now.  Not to be called after ``found``."""
        text = self._pending + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._pending = True, ""
            return text[: min(ends)[1]]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """Return the text that is still held back; to be called after the last token."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Row:
    """Tokens and text of one choice, that is, of one of the ``n`` answers to a request.

    ``ends``: ids of the tokens that end a text.  ``limit``: maximum number of tokens.
    """

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...], ends: frozenset[int], limit: int
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self._ends, self._limit = ends, limit
        self._stream, self._stops = TextStream(tokenizer), StopFinder(stops)

    def add(self, token: int) -> str:
        """Add a token; return the text to show now.  The last token of the row sets ``finish``."""
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
        self.text += shown
        return shown


def mask_record(
    masks: Sequence[LayerMask | None], widths: Sequence[int], number: int, token: int
) -> Mask:
    """Return a ``Mask`` record of ``masks``, one mask per layer; None is a dense layer.

    ``widths``: number of neurons in each layer.  ``number`` and ``token``: as in ``Mask``.
    """
    layers = list(zip(masks, widths, strict=True))
    shares = tuple(1.0 if mask is None else mask.kept / width for mask, width in layers)
    bins = min(BINS, *widths)
    raster = []
    for (mask, width), share in zip(layers, shares, strict=True):
        kept = [share] * bins
        if mask is not None and not isinstance(mask, TokenMask):
            counts = torch.bincount(mask.ids.cpu() * bins // width, minlength=bins)
            edges = -(torch.arange(bins + 1) * -width // bins)  # the first neuron of each group
            kept = (counts.double() / edges.diff()).tolist()
        raster.append(bytes(round(255 * value) for value in kept))
    return Mask(number, token, shares, tuple(raster))


class Request:
    """The state of one request; only the result of ``conversation`` is kept afterwards."""

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
        room = math.inf if context is None else context - len(ask.ids) + 1
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(ask.ids)} tokens but the model's context holds {context}: "
                "shorten it"
            )
        limit = int(min(sampling.max_tokens, room))
        self._rows = [Row(host.tokenizer, sampling.stop, ends, limit) for _ in range(sampling.n)]
        self._sampler = Sampler(sampling)
        self._widths = [layer.width for layer in method.layers]
        self._new_masks: list[tuple[Remask, tuple[LayerMask | None, ...]]] = []
        self._masks = self._checks = self._cached = 0
        self._first_time = 0.0
        self._loop = OwnLoop()
        self._cache: Any = None
        self.controller: Any = None
        """A ``PruningController``; None before ``run`` and after ``release``."""

    def run(self, earlier: Conversation | None, emit: Emit, cancelled: Callable[[], bool]) -> Done:
        """Answer the request; ``earlier``: the conversation that the prompt continues, or None."""
        self._emit, self._cancelled = emit, cancelled
        self._began = self._last_time = time.perf_counter()
        emit(self._start())
        if earlier is None:
            self.controller = self.method.controller(self._on_remask)
        else:
            self._cached = earlier.shared(self.ask.ids)
            earlier.crop(self._cached)
            self.controller, self._cache = earlier.controller, earlier.cache
            self.controller.on_remask = self._on_remask
        self.host.serve(self.controller)
        self.host.patch.loop = self._loop
        with torch.no_grad():
            logits = self._read_prompt()
            while logits is not None and not self._add_tokens(logits):
                logits = self._decode()
        for row in self._rows:
            row.finish = row.finish or "cancelled"
        return self._result()

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
            tuple(self._widths),
            tuple(PromptToken(id, text) for id, text in prompt),
        )

    def _read_prompt(self) -> Tensor | None:
        """Run the prompt's tokens that are not cached.

        Return logits [rows, V] for the first answer token.  Return None if the request was
        cancelled, or if no answer token was requested.
        """
        ids, sampling, logits = self.ask.ids, self.ask.sampling, None
        scored, scores = sampling.prompt_logprobs, list[tuple[float, tuple[Likely, ...]]]()
        size = SCORED_PIECE if scored else PIECE
        for start in range(self._cached, len(ids), size):
            if self._cancelled():
                return None
            piece = torch.tensor([ids[start : start + size]] * len(self._rows))
            all_logits = self._forward(piece, logits_to_keep=0 if scored else 1)
            logits = all_logits[:, -1]
            if scored:
                following = ids[start + 1 : start + 1 + size]
                pairs = logprobs(all_logits[0, : len(following)], following, sampling.logprobs or 0)
                scores += map(self._likely, pairs)
        if scored:
            values, tops = [value for value, _ in scores], [top for _, top in scores]
            self._emit(Scores((None, *values), ((), *tops)))
        if sampling.max_tokens:
            return logits
        for row in self._rows:
            row.finish = "length"
        return None

    def _decode(self) -> Tensor:
        """Run the last token of each row; return the logits [rows, V] of the next token."""
        live = [row.finish is None for row in self._rows]
        self._loop.prompt = False
        self._loop.live = None if all(live) else torch.tensor(live, device=self.host.model.device)
        ids = torch.tensor([[row.tokens[-1]] for row in self._rows])
        alone = len(ids) == 1 and self._cache is not None
        logits = self.host.patch.decode(ids, self._cache) if alone else None
        return self._forward(ids)[:, -1] if logits is None else logits

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        """Run ids [rows, n]; return logits [rows, n, V], or of the last ``logits_to_keep`` ids."""
        if self._cache is not None:
            options[cache_name()] = self._cache
        model = self.host.model
        output = model(ids.to(model.device), use_cache=True, **options)
        self._cache = cache_of(output)
        logits: Tensor = output.logits
        return logits

    def _on_remask(self, remask: Remask, state: SequenceState) -> None:
        self._new_masks.append((remask, state.masks or ()))

    def _add_tokens(self, logits: Tensor) -> bool:
        """Sample and emit a token for each unfinished row; return True if the request has ended."""
        self._emit_events()
        tokens = self._sampler.choose(logits)
        count = self.ask.sampling.logprobs
        scores = None if count is None else logprobs(logits, tokens, count)
        phase = "dense" if self.method.dense else str(self.controller.last_phase)
        phase, now = phase if self._rows[0].tokens else "prefill", time.perf_counter()
        self._first_time = self._first_time or now
        seconds, self._last_time = now - self._last_time, now
        for choice, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if row.finish is not None:
                continue
            index, text = len(row.tokens), row.add(token)
            logprob, top = (None, None) if scores is None else self._likely(scores[choice])
            piece = self._pieces[token]
            self._emit(Token(choice, index, token, text, piece, phase, logprob, top, seconds))
        return all(row.finish for row in self._rows) or self._cancelled()

    def _likely(self, scores: list[tuple[int, float]]) -> tuple[float, tuple[Likely, ...]]:
        """Return a token's log-probability and the likeliest tokens, from a row of ``logprobs``."""
        top = (Likely(id, self._pieces[id], value) for id, value in scores[1:])
        return scores[0][1], tuple(top)

    def _emit_events(self) -> None:
        """Emit the drift checks and the new masks since the last call."""
        for check in self.controller.checks[self._checks :]:
            self._emit(Check(check))
        self._checks = len(self.controller.checks)
        index = max(len(row.tokens) for row in self._rows)
        for remask, masks in self._new_masks:
            self._masks += 1
            self._emit(Masked(remask))
            self._emit(mask_record(masks, self._widths, self._masks, index))
        self._new_masks = []

    def _result(self) -> Done:
        rows, first = self._rows, self._first_time or time.perf_counter()
        decoded = sum(max(0, len(row.tokens) - 1) for row in rows)
        read, decoding = len(self.ask.ids) - self._cached, max(0.0, self._last_time - first)
        return Done(
            self._name,
            tuple(row.finish or "" for row in rows),
            tuple(row.text for row in rows),
            Usage(len(self.ask.ids), sum(len(row.tokens) for row in rows), self._cached),
            Timings(read, 1e3 * (first - self._began), decoded, 1e3 * decoding),
            self.host.report(self.method, self.controller),
            tuple(tuple(row.tokens) for row in rows),
        )

    def release(self) -> None:
        """Free activations and cache now, because a reference cycle would keep them for longer."""
        controller = self.controller
        if controller is not None:
            controller.on_remask, controller.plan = None, ForwardPlan(False, False, ())
            controller.sequences, controller.finished, controller.checks = [], [], []
        self.controller = self._cache = None
        self._loop.cache = None

    def conversation(self) -> Conversation | None:
        """Return the conversation that a later request can continue; None without an answer."""
        tokens, controller = self._rows[0].tokens, self.controller
        if not tokens or controller is None:
            return None
        self.controller = controller.on_remask = None
        ids = [*self.ask.ids, *tokens[:-1]]
        result = Conversation(self.method, controller, self._cache, ids, len(self.ask.ids))
        result.reset_accounting()
        return result
