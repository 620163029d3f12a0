"""The tasks ``continuation`` and ``shift``: perplexity of slices, with and without a new topic.

``continuation:TEXTS#SET``: the text continues after the prompt.  ``shift:TEXTS#SET``: after the
prompt and ``LEAD`` more tokens, another text begins.  TEXTS are joined by ``+``; SET is one half
of their documents, ``choose`` or ``report``.

A document of at least one slice of tokens gives whole slices; shorter ones are joined by a blank
line until they fill one.  Of all slices ``limit`` are taken, evenly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dart_llm.data import documents
from dart_llm.data.documents import EMBEDDED, SETS, Source, start_token
from dart_llm.data.passages import BREAK
from dart_llm.errors import ConfigError
from dart_llm.evaluation.forced_decoding import ScheduledRun
from dart_llm.evaluation.masks_seen import count_masks, finished_part, merge_accounting
from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.perplexity import part_key, perplexity, score_part
from dart_llm.evaluation.tasks import SLICED, slice_sources, split
from dart_llm.evaluation.windows import Window
from dart_llm.models.describe import context_length
from dart_llm.reporting.words import count as count_text
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import BoundMethod, Run

CONTINUATION, SHIFT = SLICED

LEAD = 64
"""Tokens of the first topic that are decoded before the second one begins."""

DEFAULT_SLICES = 16
"""Slices of a source where no number is given."""


@dataclass(frozen=True)
class Shape:
    """Tokens of a slice: ``prompt`` of the prompt, ``scored`` of what is scored."""

    prompt: int
    scored: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model reads."""
        return self.prompt + LEAD + self.scored

    @property
    def size(self) -> int:
        """Tokens of a slice: enough for either task."""
        return self.prompt + max(LEAD, self.scored)


@dataclass(frozen=True, eq=False)
class Slice:
    """Tokens ``body`` [n] of a source, without the tokenizer's start token.

    ``documents``: the numbers of the documents that they come from.
    """

    source: str
    number: int
    body: Tensor
    documents: tuple[int, ...]

    @property
    def id(self) -> str:
        """Unique among the slices of a run."""
        return f"{self.source}/{self.number}"


@dataclass(frozen=True, eq=False)
class Pair:
    """A slice, and the one whose beginning is the second topic."""

    first: Slice
    second: Slice
    start: tuple[int, ...]
    """What the tokenizer puts before a text: one token, or none."""
    shape: Shape

    def window(self, kind: str) -> Window:
        """The tokens that are read; the first ``shape.prompt`` are the prompt in either task."""
        shape, body = self.shape, self.first.body
        begin = torch.tensor(self.start, dtype=body.dtype)
        if kind == CONTINUATION:
            ids = torch.cat([begin, body])[: shape.prompt + shape.scored]
        else:
            first = torch.cat([begin, body])[: shape.prompt + LEAD]
            ids = torch.cat([first, self.second.body[: shape.scored]])
        return Window(ids, shape.prompt)


def pairs(
    sources: Sequence[Source],
    which: str,
    tokenizer: Any,
    shape: Shape,
    wanted: int | None,
    shift: bool = True,
) -> list[Pair]:
    """``wanted`` slices of the set ``which`` of every source, each with its second topic.

    ``wanted`` None: ``DEFAULT_SLICES``, or as many as there are of the embedded texts alone.  The
    second topic of a slice is the slice of the same number of the next source; of a single source,
    a slice that shares no document.  Raises ``ConfigError`` for too little text, and, with
    ``shift``, for a single source that has no second topic.
    """
    start = tuple(start_token(tokenizer))
    size = shape.size - len(start)
    found = [list(cut(source, which, tokenizer, size)) for source in sources]
    number = DEFAULT_SLICES if wanted is None else wanted
    if wanted is None and [source.label for source in sources] == [EMBEDDED]:
        number = max(1, min(DEFAULT_SLICES, len(found[0])))
    groups = [
        _take(source, which, own, number, size) for source, own in zip(sources, found, strict=True)
    ]
    if len(groups) == 1:
        (group,) = groups
        seconds = [[_other(group, at, shift) for at in range(len(group))]]
    else:
        seconds = [*groups[1:], groups[0]]
    both = zip(groups, seconds, strict=True)
    return [Pair(*two, start, shape) for group in both for two in zip(*group, strict=True)]


def cut(source: Source, which: str, tokenizer: Any, size: int) -> Iterator[Slice]:
    """Every slice of ``size`` tokens of one set, in order; numbers are those of this order."""
    number, waiting = 0, list[tuple[int, str, int]]()
    for place, text in source.half(which):
        ids = _encode(tokenizer, text)
        for begin in range(0, len(ids) - size + 1, size):
            yield Slice(source.label, number, ids[begin : begin + size], (place,))
            number += 1
        if len(ids) >= size:
            continue
        waiting.append((place, text, len(ids)))
        if sum(tokens for _, _, tokens in waiting) < size:
            continue
        joined = _encode(tokenizer, BREAK.join(text for _, text, _ in waiting))
        if len(joined) >= size:
            places = tuple(place for place, _, _ in waiting)
            yield Slice(source.label, number, joined[:size], places)
            number, waiting = number + 1, []


def _encode(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _take(
    source: Source, which: str, found: Sequence[Slice], wanted: int, size: int
) -> list[Slice]:
    """``wanted`` of the slices, evenly spaced, the first and the last among them."""
    if len(found) < wanted:
        documents_text = count_text(len(source.documents), "document")
        raise ConfigError(
            f'the text "{source.label}" has {count_text(len(found), "slice")} of {size} tokens in '
            f"its set {which} (the {SETS[which]} half of {documents_text}), fewer than the "
            f"{wanted} wanted: give a longer text, or fewer slices, scored or prompt tokens"
        )
    gaps = max(1, wanted - 1)
    chosen = [found[place * (len(found) - 1) // gaps] for place in range(wanted)]
    return [Slice(one.source, n, one.body, one.documents) for n, one in enumerate(chosen)]


def _other(group: Sequence[Slice], number: int, shift: bool) -> Slice:
    """A slice that shares no document with the one at ``number``, half the group away."""
    own = set(group[number].documents)
    for step in range(len(group)):
        found = group[(number + len(group) // 2 + step) % len(group)]
        if not own & set(found.documents):
            return found
    if not shift:
        return group[number]
    raise ConfigError(
        f'the text "{group[number].source}" is all there is, and no other slice of it is of '
        "another document, so no topic can change: give a second --text, more --slices, or "
        "the continuation alone"
    )


# The tasks ``continuation`` and ``shift`` as measurements.


MOMENT = LEAD + 1
"""Decode step that feeds the first token of the second topic: step 0 feeds the prompt's last."""


def measure(
    candidate: BoundMethod,
    task: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity of the last tokens of every slice, keeping each slice as a part.

    Raises ``ConfigError`` for too little text, for slices longer than the model's context, and
    where all tokens of a slice ran dense though sparsity was requested.
    """
    pairs_of_task = read_pairs(task, options, candidate.tokenizer)
    shape = Shape(options.prompt_tokens, options.scored_tokens)
    longest = context_length(candidate.model)
    if longest is not None and shape.longest > longest:
        raise ConfigError(
            f"slices of up to {shape.longest} tokens are longer than the model's context, "
            f"{longest}: give fewer prompt or scored tokens"
        )
    kind, name = split(task)
    make_run = partial(ScheduledRun, triggers=[MOMENT]) if options.oracle else Run
    run, scored = candidate.run(make=make_run), []
    for pair in pairs_of_task:
        window = pair.window(kind)
        if options.oracle:  # it has used up its moment
            run = candidate.run(make=make_run)
        key = part_key(candidate, f"{kind}:{name}", f"oracle {options.oracle}", window)
        make = partial(score_part, candidate, run, window, "decode")
        scored.append(finished_part(parts, key, make))
        advance(1)
    losses = [part["losses"][-shape.scored :] for part in scored]
    every = [loss for one in losses for loss in one]
    mean_loss = math.fsum(every) / len(every)
    counts, masks = count_masks(scored)
    return Measurement(
        task=task,
        protocol="decode",
        metric="perplexity",
        higher_is_better=False,
        metrics={"perplexity": perplexity(mean_loss), "mean_loss": mean_loss, "tokens": len(every)},
        items=tuple(
            {
                "id": pair.first.id,
                "source": pair.first.source,
                "mean_loss": math.fsum(one) / len(one),
                "tokens": len(one),
            }
            for pair, one in zip(pairs_of_task, losses, strict=True)
        ),
        accounting=merge_accounting(run, scored),
        samples=tuple(
            {"id": pair.first.id, "losses": list(one)}
            for pair, one in zip(pairs_of_task, losses, strict=True)
        ),
        notes=candidate.notes,
        counts=counts,
        masks=masks,
    )


def count(task: str, options: MeasureOptions, tokenizer: Any) -> int:
    """How many slices ``measure`` scores."""
    return len(read_pairs(task, options, tokenizer))


@lru_cache(maxsize=4)
def read_pairs(task: str, options: MeasureOptions, tokenizer: Any) -> list[Pair]:
    """The slices of a task; remembered, so that all methods are measured on one reading."""
    kind, name = split(task)
    names, which = slice_sources(name)
    shape = Shape(options.prompt_tokens, options.scored_tokens)
    sources = documents.sources(names)
    return pairs(sources, which, tokenizer, shape, options.limit, kind == SHIFT)
