"""Log-likelihoods of continuations under the three protocols (docs/reference.md, "Protocols").

A protocol says which tokens select the masks and which tokens run pruned.  One dense pass over a
context serves all continuations of that context; continuations with the same masks run as rows of
one batch.  ``Scorer`` answers lm-eval's requests, counts tokens, and stores the result of each
context as a part, so that an interrupted run can resume.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.forced_decoding import feed
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.parts import Part, UnitStore, check_pruned, finished_part
from dart_llm.models.calls import cache_of
from dart_llm.pruning.records import merge_reports, without_sequences
from dart_llm.session.run import BoundMethod, Run

SHORT = 16
"""Contexts with fewer tokens are scored dense: they are too short to select masks from."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The score of a continuation.

    ``losses``: the loss of each token (nats).  ``greedy``: True if every token had the top logit.
    """

    losses: tuple[float, ...]
    greedy: bool

    @property
    def logprob(self) -> float:
        return -math.fsum(self.losses)


@torch.inference_mode()
def score_context(
    model: Any,
    run: Run | None,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    protocol: str = "decode",
    batch_size: int = 8,
) -> tuple[list[Likelihood], list[dict[str, Any]]]:
    """Score ``continuations`` after ``context``, all as non-empty sequences of token ids.

    ``run`` is an attached run, which is reset first, or None for the untouched model.
    ``batch_size`` is the number of rows per forward.  Returns one likelihood per continuation, and
    the reports of the pruned runs (``RunReport.to_dict``).  Raises ``ConfigError`` if a sequence is
    empty, and ``DartError`` if a loss is not finite.
    """
    if not context or not all(continuations):
        raise ConfigError("a likelihood needs at least one context and one continuation token")
    scoring = _Scoring(model, run, tuple(context), _group(continuations), max(1, batch_size))
    if run is None:
        scoring.decode()
    else:
        run.hold(None)
        scores = {"published": scoring.published, "full": scoring.full}
        scores.get(protocol, scoring.decode)()
        scoring.reports.append(run.report().to_dict())
    return [scoring.result(tuple(tokens)) for tokens in continuations], scoring.reports


Row = tuple[Tokens, tuple[Tokens, ...]]
"""Tokens to feed after the context, and continuations to score: the fed tokens plus one more."""


def _group(continuations: Sequence[Sequence[int]]) -> list[Row]:
    """Group continuations into rows: those that differ only in their last token share a row."""
    rows: dict[Tokens, list[Tokens]] = {}
    for tokens in dict.fromkeys(map(tuple, continuations)):
        rows.setdefault(tokens[:-1], []).append(tokens)
    return [(fed, tuple(group)) for fed, group in rows.items()]


def decoded_tokens(continuations: Sequence[Sequence[int]]) -> int:
    """The number of decode tokens that ``score_context`` feeds under the protocol ``decode``."""
    return sum(1 + len(fed) for fed, _ in _group(continuations))


@dataclass
class _Scoring:
    """Scores the continuations of one context; collects their losses and argmax matches."""

    model: Any
    run: Run | None
    context: Tokens
    rows: list[Row]
    batch_size: int
    losses: dict[Tokens, list[Tensor]] = field(default_factory=dict)
    greedy: dict[Tokens, list[Tensor]] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def result(self, continuation: Tokens) -> Likelihood:
        losses = torch.cat(self.losses[continuation])
        if not bool(losses.isfinite().all()):
            raise DartError("a loss is not finite: the model overflows; try dtype float32")
        greedy = bool(torch.cat(self.greedy[continuation]).all())
        return Likelihood(tuple(losses.tolist()), greedy)

    def decode(self) -> None:
        """Score under ``decode``: the prompt (the context without its last token) runs dense.

        All later tokens are decode tokens.
        """
        prompt, last = self.context[:-1], self.context[-1:]
        prompt_cache = cache_of(self._forward(prompt)) if prompt else None
        batches = self._batches()
        for number, batch in enumerate(batches):
            if self.run is not None and number:
                self.run.branch()
            is_last = number == len(batches) - 1
            cache = prompt_cache if is_last else copy.deepcopy(prompt_cache)
            if cache is not None and len(batch) > 1:
                cache.batch_repeat_interleave(len(batch))
            self._feed(batch, [last + fed for fed, _ in batch], cache, len(prompt), 0)

    def full(self) -> None:
        """Score under ``full``: a dense pass over the context selects masks for every position."""
        assert self.run is not None
        self._forward(self.context)
        self.run.hold(self.run.select())
        for batch in self._batches():
            self._feed_with_context(batch)

    def published(self) -> None:
        """Score under ``published``: masks selected from context and answer apply to both."""
        assert self.run is not None
        for fed, continuation in ((fed, tokens) for fed, group in self.rows for tokens in group):
            if self.losses:
                self.reports.append(self.run.report().to_dict())
            self.run.hold(None)
            self._forward(self.context + continuation)
            self.run.hold(self.run.select())
            self._feed_with_context([(fed, (continuation,))])

    def _forward(self, tokens: Tokens) -> Any:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model(ids, use_cache=True, logits_to_keep=1)

    def _batches(self) -> list[Sequence[Row]]:
        starts = range(0, len(self.rows), self.batch_size)
        return [self.rows[start : start + self.batch_size] for start in starts]

    def _feed_with_context(self, rows: Sequence[Row]) -> None:
        fed = [self.context + fed for fed, _ in rows]
        self._feed(rows, fed, None, 0, len(self.context) - 1)

    def _feed(
        self, rows: Sequence[Row], fed: Sequence[Tokens], cache: Any, cached: int, first: int
    ) -> None:
        """Feed each row's tokens ``fed``, right-padded, after ``cache``.

        ``cached``: number of tokens in ``cache``.  ``first``: index of the fed token whose logits
        predict the first continuation token.
        """

        def add_losses(start: int, logits: Tensor) -> None:
            for index, (_, group) in enumerate(rows):
                for continuation in group:
                    if start - first < len(continuation):
                        self._add(logits[index], continuation, start - first)

        width, device = max(map(len, fed)), self.model.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in fed], device=device)
        valid = None  # an attention mask, needed only if a row is padded
        if any(len(row) < width for row in fed):
            ones = [[1] * (cached + len(row)) + [0] * (width - len(row)) for row in fed]
            valid = torch.tensor(ones, device=device)
        feed(self.model, self.run, ids, cache, add_losses, first=first, cached=cached, mask=valid)

    def _add(self, logits: Tensor, continuation: Tokens, start: int) -> None:
        """Add losses from logits [n, V]; the first predicts the continuation's token ``start``."""
        targets = torch.tensor(continuation[start : start + len(logits)], device=logits.device)
        logits = logits[: len(targets)]
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        self.losses.setdefault(continuation, []).append(loss)
        self.greedy.setdefault(continuation, []).append(logits.argmax(-1) == targets)


# lm-eval's requests as tokens, grouped by context.

Pair = tuple[Tokens, Tokens]
"""Context tokens and continuation tokens."""

Answer = tuple[float, bool]
"""A log-probability (nats), and True if every token had the top logit."""


def rolling_pairs(tokens: Sequence[int], prefix: int, prompt: int, scored: int) -> list[Pair]:
    """Split a text into pairs that together score each token once.

    ``prefix`` is a token id; ``prompt`` and ``scored`` are numbers of tokens.  The first pair has
    only ``prefix`` as context and therefore runs dense.  It scores the first ``prompt`` tokens, or
    half of the text if that is shorter.  A text with fewer than 2 * ``SHORT`` tokens is one pair.
    Each later pair scores up to ``scored`` tokens after a context of up to ``prompt`` tokens.
    """
    first = min(prompt, len(tokens) // 2) if len(tokens) >= 2 * SHORT else len(tokens)
    pairs: list[Pair] = [((prefix,), tuple(tokens[:first]))] if tokens else []
    for start in range(first, len(tokens), scored):
        context = tuple(tokens[max(0, start - prompt) : start])
        pairs.append((context, tuple(tokens[start : start + scored])))
    return pairs


class Scorer:
    """Scores contexts with one method, and stores the result of each context as a part."""

    def __init__(
        self, candidate: BoundMethod, options: MeasureOptions, parts: UnitStore, max_length: int
    ) -> None:
        self.candidate, self.options = candidate, options
        self.parts, self.max_length = parts, max_length
        self.finished: list[Part] = []
        self.short = 0
        """The number of contexts that were too short to prune and were scored dense."""
        self.at_once = False
        """True once ``likelihoods`` has scored a context with ``live`` False."""
        self._repeats = Counter[str]()

    def attached(self, likelihood: bool) -> contextlib.AbstractContextManager[Run | None]:
        """A context manager that attaches the run; it yields None for the untouched model."""
        return self.candidate.run(likelihood) or contextlib.nullcontext()

    def likelihoods(
        self,
        pairs: Sequence[Pair],
        advance: Callable[[int], None],
        names: Sequence[str],
        live: bool = False,
    ) -> list[Answer]:
        """Return an answer per pair, in order; pairs with the same context share one dense pass.

        ``advance(n)`` is called after each context, with n its number of pairs.  ``names``: for
        each pair the document's name, used in error messages.  ``live``: if True, use the
        configured settings, including drift detection; if False, the settings of likelihood tasks,
        which build masks right after the context and never re-mask.
        """
        groups: dict[Tokens, list[int]] = {}
        fitting = [self._fit(pair) for pair in pairs]
        for index, (context, _) in enumerate(fitting):
            groups.setdefault(context, []).append(index)
        self.at_once = self.at_once or not live
        any_length = self.candidate.config is None or self.options.protocol == "published"
        short = [context for context in groups if len(context) < SHORT and not any_length]
        long = [context for context in groups if len(context) >= SHORT or any_length]
        self.short += len(short)
        answers: dict[int, Answer] = {}

        def score(run: Run | None, contexts: Sequence[Tokens]) -> None:
            kind = "rolling" if live else "likelihood"
            for context in contexts:
                indices = groups[context]
                continuations = [fitting[index][1] for index in indices]
                key = self.key(kind, self.options.batch_size, context, continuations)
                make = partial(self._score, run, context, continuations, names[indices[0]])
                part = self._finish(key, make)
                answers.update(zip(indices, map(tuple, part["answers"]), strict=True))
                advance(len(indices))

        score(None, short)
        if long:
            with self.attached(likelihood=not live) as run:
                score(run, long)
        return [answers[index] for index in range(len(pairs))]

    def _finish(self, key: str, make: Callable[[], Part]) -> Part:
        self.finished.append(finished_part(self.parts, key, make))
        return self.finished[-1]

    def _fit(self, pair: Pair) -> Pair:
        """Cut the pair's context on the left so that the pair fits the model's context length."""
        context, continuation = pair
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's "
                f"context of {self.max_length}: choose another task or a shorter text"
            )
        return context[-room:], continuation

    def _score(
        self, run: Run | None, context: Tokens, continuations: Sequence[Tokens], name: str
    ) -> Part:
        model, protocol, size = self.candidate.model, self.options.protocol, self.options.batch_size
        try:
            scored, reports = score_context(model, run, context, continuations, protocol, size)
        except DartError as error:
            raise type(error)(f"{self.candidate.label}, document {name}: {error}") from error
        self._check_pruned(run, reports, len(context))
        return {
            "answers": [[likelihood.logprob, likelihood.greedy] for likelihood in scored],
            "report": without_sequences(merge_reports(reports)) if reports else None,
            "dense_tokens": decoded_tokens(continuations) if run is None else 0,
        }

    def _check_pruned(
        self, run: Run | None, reports: Sequence[dict[str, Any]], context: int
    ) -> None:
        decoded = sum(report["decoded_tokens"] for report in reports)
        dense = sum(r["decoded_tokens"] * r["dense_token_share"] for r in reports)
        check_pruned(
            run is None or not run.asks_for_pruning or not decoded or dense < decoded,
            self.candidate.label,
            f"{decoded} scored tokens of an item with {context} context tokens",
            "give a smaller --min-evidence or --masking-step, or another task",
        )

    def windows(self, tokens: Sequence[int], prefix: int) -> list[Pair]:
        """The pairs that ``rolling`` scores for a text."""
        options = self.options
        return rolling_pairs(tokens, prefix, options.prompt_tokens, options.scored_tokens)

    def rolling(
        self,
        texts: Sequence[Sequence[int]],
        prefix: int,
        advance: Callable[[int], None],
        names: Sequence[str],
    ) -> list[float]:
        """The log-likelihood of each text, with every token scored once."""
        indexed = [
            (index, pair) for index, text in enumerate(texts) for pair in self.windows(text, prefix)
        ]
        documents = [names[index] for index, _ in indexed]
        answers = self.likelihoods([pair for _, pair in indexed], advance, documents, live=True)
        totals = [0.0] * len(texts)
        for (index, _), (logprob, _) in zip(indexed, answers, strict=True):
            totals[index] += logprob
        return totals

    def generate(self, run: Run | None, content: Sequence[Any], make: Callable[[], str]) -> str:
        """Return the text for the request ``content``: the stored text, or a new one from ``make``.

        A request can be repeated to draw several samples.  A sample's seed depends only on
        ``options.seed``, the request and the number of the repetition, so that resumed runs and
        all methods draw the same random numbers.
        """
        request = json.dumps(content)
        number = self._repeats[request]
        self._repeats[request] += 1
        key = self.key("generate", number, *content)
        content_seed = json.dumps([self.options.seed, number, request])
        seed = int(hashlib.sha256(content_seed.encode()).hexdigest()[:15], 16)
        return str(self._finish(key, partial(self._generate, run, seed, make))["text"])

    def _generate(self, run: Run | None, seed: int, make: Callable[[], str]) -> Part:
        if run is not None:
            run.hold(None)
        torch.manual_seed(seed)
        text, report = make(), None
        if run is not None:
            report = without_sequences(run.report().to_dict())
            if report["decoded_tokens"] > 1:
                self._check_pruned(run, [report], report["prompt_tokens"])
        return {"text": text, "report": report, "dense_tokens": 0}

    @contextlib.contextmanager
    def generating(self, run: Run | None, context: Tensor) -> Iterator[None]:
        """A context manager in which a text is generated with the masks of the protocol.

        Under ``decode``, masks are selected while the prompt is processed.  Under other protocols,
        a dense pass over ``context`` (ids [1, T]) selects masks beforehand, which stay fixed.
        """
        if run is None or self.options.protocol == "decode":
            yield
            return
        self.candidate.model(context, use_cache=True, logits_to_keep=1)
        run.hold(run.select())
        with run.decoding(prompt=True):
            yield

    def key(self, kind: str, *content: Any) -> str:
        """A part's key, from everything that determines its value except the study's settings."""
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        return f"lm/{self.candidate.label}/{self.options.protocol}/{kind}/{digest}"
