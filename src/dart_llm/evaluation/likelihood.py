"""Log-likelihoods of continuations under the three protocols (docs/reference.md, "Protocols").

One dense pass over the prompt serves all continuations of a context; continuations that share the
masks run as the rows of one batch.  ``Scorer`` answers lm-eval's requests with them, resumes, and
counts.
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
from dart_llm.pruning.records import merge_reports, without_sequences
from dart_llm.session.run import BoundMethod, Run

SHORT = 16
"""Contexts of fewer tokens are scored dense: too little to choose masks from."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """One continuation: the loss of each of its tokens (nats), and whether all were the argmax."""

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
    """Score ``continuations`` after ``context``; token ids, none of them empty.

    ``run``: an attached run, which is reset first, or None for the untouched model.
    ``batch_size``: rows of one forward.  Returns one likelihood per continuation, and the reports
    (``RunReport.to_dict``) of what ran pruned.  Raises ``DartError`` when a loss is not finite.
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
    return [scoring.result(tuple(each)) for each in continuations], scoring.reports


Row = tuple[Tokens, tuple[Tokens, ...]]
"""Tokens to feed after the context, and the continuations whose tokens they predict."""


def _group(continuations: Sequence[Sequence[int]]) -> list[Row]:
    """Continuations that differ in their last token alone are one row."""
    rows: dict[Tokens, list[Tokens]] = {}
    for tokens in dict.fromkeys(tuple(each) for each in continuations):
        rows.setdefault(tokens[:-1], []).append(tokens)
    return [(fed, tuple(group)) for fed, group in rows.items()]


def decoded_tokens(continuations: Sequence[Sequence[int]]) -> int:
    """Decode tokens that ``score_context`` feeds under the protocol ``decode``."""
    return sum(1 + len(fed) for fed, _ in _group(continuations))


@dataclass
class _Scoring:
    """One context in progress: losses and argmax hits per continuation."""

    model: Any
    run: Run | None
    context: Tokens
    rows: list[Row]
    size: int
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
        """The context without its last token is the prompt; what follows runs as decode tokens."""
        prompt, last = self.context[:-1], self.context[-1:]
        prompt_cache = self._read(prompt).cache if prompt else None
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
        """Masks from a dense pass over the context, applied to every position."""
        assert self.run is not None
        self._read(self.context)
        self.run.hold(self.run.select())
        for batch in self._batches():
            self._feed_whole(batch)

    def published(self) -> None:
        """Masks from, and applied to, the whole scored text, the answer included."""
        assert self.run is not None
        for fed, continuation in ((fed, each) for fed, group in self.rows for each in group):
            if self.losses:
                self.reports.append(self.run.report().to_dict())
            self.run.hold(None)
            self._read(self.context + continuation)
            self.run.hold(self.run.select())
            self._feed_whole([(fed, (continuation,))])

    def _read(self, tokens: Tokens) -> Any:
        ids = torch.tensor([tokens], device=self.model.device)
        return self.model(ids, use_cache=True, logits_to_keep=1)

    def _batches(self) -> list[Sequence[Row]]:
        starts = range(0, len(self.rows), self.size)
        return [self.rows[start : start + self.size] for start in starts]

    def _feed_whole(self, rows: Sequence[Row]) -> None:
        fed = [self.context + fed for fed, _ in rows]
        self._feed(rows, fed, None, 0, len(self.context) - 1)

    def _feed(
        self, rows: Sequence[Row], fed: Sequence[Tokens], cache: Any, cached: int, first: int
    ) -> None:
        """Feed right-padded rows after ``cached`` tokens, which lie in ``cache``.

        The logits of fed token ``first`` predict the first continuation token.
        """

        def take(start: int, logits: Tensor) -> None:
            for index, (_, group) in enumerate(rows):
                for continuation in group:
                    if start - first < len(continuation):
                        self._add(logits[index], continuation, start - first)

        width, device = max(map(len, fed)), self.model.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in fed], device=device)
        valid = None  # an attention mask only where a row is padded
        if any(len(row) < width for row in fed):
            ones = [[1] * (cached + len(row)) + [0] * (width - len(row)) for row in fed]
            valid = torch.tensor(ones, device=device)
        feed(self.model, self.run, ids, cache, take, first=first, cached=cached, mask=valid)

    def _add(self, logits: Tensor, continuation: Tokens, start: int) -> None:
        """logits: [n, V], which predict the continuation's tokens from ``start`` on."""
        targets = torch.tensor(continuation[start : start + len(logits)], device=logits.device)
        logits = logits[: len(targets)]
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        self.losses.setdefault(continuation, []).append(loss)
        self.greedy.setdefault(continuation, []).append(logits.argmax(-1) == targets)


# lm-eval's requests in tokens: grouped by context, resumed, accounted.

Pair = tuple[Tokens, Tokens]
"""Context tokens and continuation tokens."""

Answer = tuple[float, bool]
"""Log-probability (nats) and whether every token was the argmax."""


def rolling_pairs(tokens: Sequence[int], prefix: int, prompt: int, scored: int) -> list[Pair]:
    """A text as pairs that score each token once.

    The first tokens have no context but ``prefix`` and so run dense; every later window takes
    ``prompt`` tokens of left context, unscored, before its ``scored`` tokens.  A text shorter than
    two prompts is halved.
    """
    first = min(prompt, len(tokens) // 2) if len(tokens) >= 2 * SHORT else len(tokens)
    pairs: list[Pair] = [((prefix,), tuple(tokens[:first]))] if tokens else []
    for start in range(first, len(tokens), scored):
        context = tuple(tokens[max(0, start - prompt) : start])
        pairs.append((context, tuple(tokens[start : start + scored])))
    return pairs


class Scorer:
    """Scores contexts of one candidate; keeps each finished context as a part."""

    def __init__(
        self, candidate: BoundMethod, options: MeasureOptions, parts: UnitStore, max_length: int
    ) -> None:
        self.candidate, self.options = candidate, options
        self.parts, self.max_length = parts, max_length
        self.finished: list[Part] = []
        self.short = 0
        """Contexts that were scored dense because they are short."""
        self.at_once = False
        """Whether anything was scored under the settings of likelihood tasks."""
        self._repeats = Counter[str]()

    def attached(self, likelihood: bool) -> contextlib.AbstractContextManager[Run | None]:
        """The candidate's run, to be entered; of the untouched model nothing."""
        return self.candidate.run(likelihood) or contextlib.nullcontext()

    def likelihoods(
        self,
        pairs: Sequence[Pair],
        advance: Callable[[int], None],
        names: Sequence[str],
        live: bool = False,
    ) -> list[Answer]:
        """One answer per pair, in order; pairs of the same context share its prompt pass.

        ``advance(n)`` is called after each context with its number of pairs.  ``names``: each
        pair's document, for errors.  ``live``: the run's own settings, drift included, not those
        of likelihood tasks.
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
                wanted = [fitting[index][1] for index in indices]
                key = self.key(kind, self.options.batch_size, context, wanted)
                make = partial(self._score, run, context, wanted, names[indices[0]])
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
        """The pair with its context shortened from the left to the model's length."""
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
            "answers": [[each.logprob, each.greedy] for each in scored],
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
        """What ``rolling`` scores of one text."""
        options = self.options
        return rolling_pairs(tokens, prefix, options.prompt_tokens, options.scored_tokens)

    def rolling(
        self,
        texts: Sequence[Sequence[int]],
        prefix: int,
        advance: Callable[[int], None],
        names: Sequence[str],
    ) -> list[float]:
        """The log-likelihood of each text, all of its tokens scored once."""
        owned = [
            (index, pair) for index, text in enumerate(texts) for pair in self.windows(text, prefix)
        ]
        documents = [names[index] for index, _ in owned]
        answers = self.likelihoods([pair for _, pair in owned], advance, documents, live=True)
        totals = [0.0] * len(texts)
        for (index, _), (logprob, _) in zip(owned, answers, strict=True):
            totals[index] += logprob
        return totals

    def generate(self, run: Run | None, content: Sequence[Any], make: Callable[[], str]) -> str:
        """A generated text, or the one that was kept; ``content`` decides it.

        Content that comes again is another sample.  Each has a seed of its own, so that a resumed
        run and every method draw the same.
        """
        same = json.dumps(content)
        number = self._repeats[same]
        self._repeats[same] += 1
        key = self.key("generate", number, *content)
        content_seed = json.dumps([self.options.seed, number, same])
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
        """While a text is generated: its masks are chosen as the protocol says.

        ``published``: on ``context``, ids [1, T], before it is read, and fixed; else as it is read.
        """
        if run is None or self.options.protocol == "decode":
            yield
            return
        self.candidate.model(context, use_cache=True, logits_to_keep=1)
        run.hold(run.select())
        with run.decoding(prompt=True):
            yield

    def key(self, kind: str, *content: Any) -> str:
        """Names a part by everything that decides its value, the run's settings aside."""
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        return f"lm/{self.candidate.label}/{self.options.protocol}/{kind}/{digest}"
