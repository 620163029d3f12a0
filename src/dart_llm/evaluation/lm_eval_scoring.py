"""From requests in tokens to log-likelihoods: grouping by context, resuming, accounting."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.likelihood import SHORT, decoded_tokens, score_context
from dart_llm.evaluation.masks_seen import Part, TakenMasks, finished_part, merge_accounting
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.pruning.records import merge_reports, without_sequences
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import BoundMethod, Run

Pair = tuple[tuple[int, ...], tuple[int, ...]]
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
        self,
        candidate: BoundMethod,
        options: MeasureOptions,
        parts: UnitStore,
        max_length: int,
    ) -> None:
        self.candidate = candidate
        self.options = options
        self.parts = parts
        self.max_length = max_length
        self.taken = TakenMasks()
        self.finished: list[Part] = []
        self.short = 0
        self.at_once = False
        self._asked = Counter[str]()

    @contextlib.contextmanager
    def attached(self, likelihood: bool) -> Iterator[Run | None]:
        """The candidate's run, attached; None for the untouched model."""
        run = self.candidate.run(likelihood)
        if run is None:
            yield None
            return
        self.taken = run.on_masks = TakenMasks()
        with run:
            yield run

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
        groups: dict[tuple[int, ...], list[int]] = {}
        cut = [self._fit(pair) for pair in pairs]
        for index, (context, _) in enumerate(cut):
            groups.setdefault(context, []).append(index)
        answers: dict[int, Answer] = {}
        kind = "rolling" if live else "likelihood"
        self.at_once = self.at_once or not live

        def score(run: Run | None, contexts: Sequence[tuple[int, ...]]) -> None:
            for context in contexts:
                indices = groups[context]
                wanted = [cut[index][1] for index in indices]
                key = self.key(kind, self.options.batch_size, context, wanted)
                make = partial(self._score, run, context, wanted, names[indices[0]])
                part = self._finish(key, make)
                for index, (logprob, greedy) in zip(indices, part["answers"], strict=True):
                    answers[index] = (logprob, greedy)
                advance(len(indices))

        any_length = self.candidate.config is None or self.options.protocol == "published"
        least = 0 if any_length else SHORT
        short = [context for context in groups if len(context) < least]
        self.short += len(short)
        score(None, short)
        if long := [context for context in groups if len(context) >= least]:
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
        self,
        run: Run | None,
        context: tuple[int, ...],
        continuations: Sequence[tuple[int, ...]],
        name: str,
    ) -> Part:
        model, protocol, size = self.candidate.model, self.options.protocol, self.options.batch_size
        try:
            scored, reports = score_context(model, run, context, continuations, protocol, size)
        except DartError as error:
            raise type(error)(f"{self.candidate.label}, document {name}: {error}") from error
        if run is not None:
            self._check_pruned(run, reports, len(context))
        return {
            "answers": [[one.logprob, one.greedy] for one in scored],
            "report": without_sequences(merge_reports(reports)) if reports else None,
            "dense_tokens": decoded_tokens(continuations) if run is None else 0,
            "masks": self.taken.take(),
        }

    def _check_pruned(self, run: Run, reports: Sequence[dict[str, Any]], context: int) -> None:
        decoded = sum(report["decoded_tokens"] for report in reports)
        dense = sum(r["decoded_tokens"] * r["dense_token_share"] for r in reports)
        if run.asks_for_pruning and decoded and dense >= decoded:
            raise ConfigError(
                f"{self.candidate.label}: all {decoded} scored tokens of an item with {context} "
                "context tokens ran dense, so this would measure the untouched model; give a "
                "smaller --min-evidence or --masking-step, or another task"
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
        found = [self.windows(tokens, prefix) for tokens in texts]
        owner = [index for index, pairs in enumerate(found) for _ in pairs]
        every = [pair for pairs in found for pair in pairs]
        answers = self.likelihoods(every, advance, [names[index] for index in owner], live=True)
        totals = [0.0] * len(texts)
        for index, (logprob, _) in zip(owner, answers, strict=True):
            totals[index] += logprob
        return totals

    def generate(self, run: Run | None, content: Sequence[Any], make: Callable[[], str]) -> str:
        """A generated text, or the one that was kept; ``content`` decides it.

        Content that comes again is another sample.  Each has a seed of its own, so that a resumed
        run and every method draw the same.
        """
        same = json.dumps(content)
        number = self._asked[same]
        self._asked[same] += 1
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
        return {"text": text, "report": report, "dense_tokens": 0, "masks": self.taken.take()}

    @contextlib.contextmanager
    def generating(self, run: Run | None, context: torch.Tensor) -> Iterator[None]:
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

    def accounting(self) -> dict[str, Any] | None:
        """Everything scored so far in one report; None for the untouched model."""
        return merge_accounting(self.candidate.run(likelihood=True), self.finished)
