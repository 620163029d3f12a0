"""Which tokens of a text are scored: slices, windows of ``standard``, slices with a topic change.

The whole text is tokenised at once.  If the tokenizer adds a beginning-of-sequence token, only the
start of the text has it, not later slices or windows.

**Slices** (protocols ``decode``, ``full``, ``published``) have P prompt tokens and C scored tokens,
and are evenly spaced over the text.  All C tokens are predicted.

**Windows** (protocol ``standard``) of W tokens cover the whole text.  Without overlap, a window of
n tokens gives n - 1 predictions: its first token has no context and is not predicted, as is usual
in perplexity scripts.  With a stride S < W each window begins S tokens after the previous window
and scores only tokens not scored before: W - 1 in the first window, S in the others.  The last
window may be shorter (scripts that drop it give slightly different numbers); if it would have only
one token, that token is not scored.  A text of T tokens thus has T - ceil(T / W) scored tokens
without overlap and T - 1 with it; the mean loss is over all scored tokens.

**Topic slices** belong to the tasks ``continuation:TEXTS#SET`` and ``shift:TEXTS#SET``.  TEXTS are
names joined by ``+``; SET is one half of their documents, ``choose`` or ``report``.  A document
that fills a slice is cut into slices; shorter documents are joined by blank lines until they fill a
slice.  Of each text, ``limit`` evenly spaced slices are used.  In ``continuation`` the text goes on
after the prompt; in ``shift`` another text begins ``LEAD`` tokens after the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dart_llm.data.datasets import positions
from dart_llm.data.documents import EMBEDDED, SETS, Source, start_token
from dart_llm.data.passages import BREAK
from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import PROTOCOLS, MeasureOptions
from dart_llm.reporting.words import count as count_text

STANDARD = "standard"

PPL_PROTOCOLS: dict[str, str] = {
    **PROTOCOLS,
    STANDARD: "windows cover the whole text; the text before a window selects its masks",
}
"""The protocols of perplexity (docs/reference.md, "Protocols")."""


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens ``ids`` ([n]) that are fed as one sequence; those from index ``first`` on are scored.

    ``first`` is at least 1.  ``number`` is the index of the slice or window.  ``start`` is the
    first token's index in the text, set only by ``slice_windows``.  ``before`` ([m]) has the tokens
    right before a window of ``standard``.  ``source`` is the name of a topic slice's text.
    ``lead`` is the number of scored tokens before a topic change, which metrics exclude.
    """

    ids: Tensor
    first: int
    number: int = 0
    start: int | None = None
    before: Tensor | None = None
    source: str = ""
    lead: int = 0

    @property
    def id(self) -> int | str:
        """An ID by which the results of different methods are paired."""
        if self.source:
            return f"{self.source}/{self.number}"
        return self.number if self.start is None else self.start

    @property
    def scored(self) -> int:
        """The number of tokens that the metrics include."""
        return len(self.ids) - self.first - self.lead

    @property
    def name(self) -> str:
        """The window's name in messages."""
        if self.source:
            return f"slice {self.id}"
        start = "" if self.start is None else f" (it begins at token {self.start} of the text)"
        return f"slice {self.number}{start}"


def cut(
    ids: Tensor, options: MeasureOptions, longest: int | None
) -> tuple[list[Window], tuple[str, ...]]:
    """Cut a text into the windows of a protocol; also return notes on the numbers.

    ``ids``: [T].  ``longest``: the model's context length.  Raises ``ConfigError`` if the text is
    too short or a slice too long, ``UnknownName`` for an unknown protocol.
    """
    check_name("protocol", options.protocol, PPL_PROTOCOLS)
    if options.protocol != STANDARD:
        prompt, scored = options.prompt_tokens, options.scored_tokens
        if longest and prompt + scored > longest:
            raise ConfigError(
                f"a perplexity slice of {prompt} prompt + {scored} scored tokens is longer than "
                f"the model's context of {longest}: give fewer prompt or scored tokens"
            )
        return slice_windows(ids, options.limit, prompt, scored, options.sample_seed), ()
    window, stride = options.window, options.stride
    if stride is not None and stride > window:
        raise ConfigError(
            f"stride {stride} is larger than the window of {window}: tokens between the windows "
            "would never be scored; give a stride of at most the window"
        )
    size = min(window, longest or window)
    step = size if stride is None else min(size, stride)
    note = (
        f"windows of {size} tokens, the model's context length, instead of {window}: compare only "
        "with results for that window"
    )
    windows = standard_windows(ids, size, step, options.limit, options.sample_seed)
    return windows, (note,) if size < window else ()


def slice_windows(
    ids: Tensor, limit: int | None, prompt: int, scored: int, seed: int | None = None
) -> list[Window]:
    """Cut ``limit`` evenly spaced slices of ``prompt + scored`` tokens; None means all that fit.

    ``ids``: [T].  With ``seed``, the text is divided into slices, of which a random sample is
    returned.  Raises ``ConfigError`` if the text is shorter than one slice.
    """
    if prompt < 2 or scored < 1:
        raise ConfigError("a perplexity slice needs at least 2 prompt tokens and 1 scored token")
    size = prompt + scored
    fit = len(ids) // size
    if not fit:
        raise ConfigError(
            f"the text has {len(ids)} tokens; a slice needs {prompt} prompt + {scored} scored "
            "tokens: give a longer text or fewer tokens"
        )
    chosen = positions(fit, limit, seed)
    starts = [number * size for number in chosen]
    if seed is None:
        gaps = max(1, len(chosen) - 1)
        starts = [round(number * (len(ids) - size) / gaps) for number in range(len(chosen))]
    return [
        Window(ids[start : start + size], prompt, number, start)
        for number, start in enumerate(starts)
    ]


def standard_windows(
    ids: Tensor,
    size: int,
    stride: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> list[Window]:
    """Cut the whole text into windows of ``size`` tokens; see the module's docstring.

    ``ids``: [T].  ``limit``: number of windows to return, the first ones or, with ``seed``, a
    random sample; None means all.  Raises ``ConfigError`` if the text is shorter than one window.
    """
    step = size if stride is None else stride
    if size < 2 or not 1 <= step <= size:
        raise ConfigError(
            f"a window of {size} tokens with stride {step} scores nothing or skips tokens: "
            "give a window of at least 2 tokens and a stride from 1 to the window"
        )
    if len(ids) < size:
        raise ConfigError(
            f"the text has {len(ids)} tokens, fewer than one window of {size}: give a longer text "
            "or a smaller --window"
        )
    windows: list[Window] = []
    begin, covered = 0, 1
    while covered < len(ids):
        end = min(begin + size, len(ids))
        first = max(covered - begin, 1)
        if begin + first < end:
            before = ids[max(0, begin - size) : begin]
            windows.append(Window(ids[begin:end], first, len(windows), begin, before))
        begin, covered = begin + step, end
    return [windows[index] for index in positions(len(windows), limit, seed)]


# Topic slices.

LEAD = 64
"""The number of first-topic tokens that are decoded before the second topic begins."""

MOMENT = LEAD + 1
"""The decode step that feeds the first token of the second topic; step 0 feeds the last prompt
token."""

DEFAULT_SLICES = 16
"""The default number of slices per source."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Tokens ``body`` [n] of a source, without the tokenizer's start token.

    ``documents``: indices of the documents from which the tokens come.
    """

    source: str
    number: int
    body: Tensor
    documents: tuple[int, ...]


@lru_cache(maxsize=4)  # all methods share the tokenised texts
def topic_windows(
    sources: tuple[Source, ...],
    which: str,
    tokenizer: Any,
    options: MeasureOptions,
    shift: bool,
    longest: int | None = None,
) -> list[Window]:
    """Cut ``limit`` slices from the set ``which`` of each source; if ``shift``, the topic changes.

    The default limit is ``DEFAULT_SLICES``, or less if the embedded texts are the only source.  The
    text after a topic change is the next source's slice with the same number; with a single source,
    it is a slice that shares no document with the first.  Raises ``ConfigError`` for too little
    text, for a single source without a second topic, and for slices longer than ``longest``, the
    model's context length.
    """
    prompt, scored, lead = options.prompt_tokens, options.scored_tokens, LEAD if shift else 0
    if longest is not None and prompt + LEAD + scored > longest:
        raise ConfigError(
            f"slices of up to {prompt + LEAD + scored} tokens are longer than the model's context, "
            f"{longest}: give fewer prompt or scored tokens"
        )
    start = torch.tensor(start_token(tokenizer), dtype=torch.int64)
    size = prompt + max(LEAD, scored) - len(start)  # the same slices in either task
    cut_slices = [list(cut_source(source, which, tokenizer, size)) for source in sources]
    wanted = DEFAULT_SLICES if options.limit is None else options.limit
    if options.limit is None and [source.label for source in sources] == [EMBEDDED]:
        wanted = max(1, min(DEFAULT_SLICES, len(cut_slices[0])))
    groups = [
        _spread(source, which, slices, wanted, size)
        for source, slices in zip(sources, cut_slices, strict=True)
    ]
    windows = []
    for number, group in enumerate(groups):
        for index, first in enumerate(group):
            ids = torch.cat([start, first.body])
            if shift:
                following = groups[(number + 1) % len(groups)]
                second = following[index] if groups[1:] else _second_topic(group, index)
                ids = torch.cat([ids[: prompt + LEAD], second.body])
            ids = ids[: prompt + lead + scored]
            windows.append(Window(ids, prompt, index, source=first.source, lead=lead))
    return windows


def cut_source(source: Source, which: str, tokenizer: Any, size: int) -> Iterator[Slice]:
    """All slices of ``size`` tokens of a source's set ``which``, in order and numbered from 0."""
    number, short = 0, list[tuple[int, str, int]]()
    for document, text in source.half(which):
        ids = _encode(tokenizer, text)
        for begin in range(0, len(ids) - size + 1, size):
            yield Slice(source.label, number, ids[begin : begin + size], (document,))
            number += 1
        if len(ids) >= size:
            continue
        short.append((document, text, len(ids)))
        if sum(tokens for _, _, tokens in short) < size:
            continue
        joined = _encode(tokenizer, BREAK.join(text for _, text, _ in short))
        if len(joined) >= size:
            documents = tuple(document for document, _, _ in short)
            yield Slice(source.label, number, joined[:size], documents)
            number, short = number + 1, []


def _encode(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _spread(
    source: Source, which: str, slices: Sequence[Slice], wanted: int, size: int
) -> list[Slice]:
    """Choose ``wanted`` evenly spaced slices, including the first and the last; renumber them."""
    if len(slices) < wanted:
        documents = count_text(len(source.documents), "document")
        raise ConfigError(
            f'the text "{source.label}" has {count_text(len(slices), "slice")} of {size} tokens in '
            f"its set {which} (the {SETS[which]} half of {documents}), but {wanted} are needed: "
            "give a longer text, or fewer slices, scored or prompt tokens"
        )
    gaps = max(1, wanted - 1)
    chosen = [slices[index * (len(slices) - 1) // gaps] for index in range(wanted)]
    return [replace(piece, number=number) for number, piece in enumerate(chosen)]


def _second_topic(group: Sequence[Slice], number: int) -> Slice:
    """A slice that shares no document with the slice ``number``, about half the group away."""
    documents = set(group[number].documents)
    for step in range(len(group)):
        other = group[(number + len(group) // 2 + step) % len(group)]
        if not documents & set(other.documents):
            return other
    raise ConfigError(
        f'the only text, "{group[number].source}", has no slice of another document, so the topic '
        "cannot change: give a second --text, more --slices, or only the task continuation"
    )
