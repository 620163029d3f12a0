"""Which tokens of a text perplexity is measured on: slices, or the windows of ``standard``.

A text is tokenised once, as a whole; the tokenizer adds a beginning-of-sequence token at most at
the start of the text, and none is put before later slices or windows.

**Slices** (protocols ``decode``, ``full``, ``published``): P prompt tokens and C scored ones,
evenly spaced over the text.  All C tokens are predicted.

**Windows** (protocol ``standard``) of W tokens cover the whole text.  Without overlap, a window of
n tokens gives n - 1 predictions: its first token has nothing before it and is not predicted, as in
the usual scripts.  With a stride S < W each window begins S tokens after the one before and scores
only the tokens that no window scored yet: W - 1 of the first one, S of the others.  The last window
may be shorter (scripts that drop it give slightly different numbers); a single token that is left
over is not scored.  A text of T tokens thus has T - ceil(T / W) scored tokens without overlap and
T - 1 with it; the mean loss is over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dart_llm.data.datasets import positions
from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import PROTOCOLS, MeasureOptions

STANDARD = "standard"

PPL_PROTOCOLS: dict[str, str] = {
    **PROTOCOLS,
    STANDARD: "the whole text in windows, each pruned by the text before it",
}
"""The protocols of perplexity (docs/reference.md, "Protocols")."""


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens ``ids`` ([n]) that are fed as one sequence; those from index ``first`` on are scored.

    ``first`` is at least 1.  ``number``: which slice or window it is, from 0.  ``start``: where it
    begins in the text, in tokens, or None.  ``before``: [m], the text right before it.
    """

    ids: Tensor
    first: int
    number: int = 0
    start: int | None = None
    before: Tensor | None = None

    @property
    def id(self) -> int:
        """Pairs the same window over methods."""
        return self.number if self.start is None else self.start

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first

    @property
    def name(self) -> str:
        """For messages."""
        start = "" if self.start is None else f" (it begins at token {self.start} of the text)"
        return f"slice {self.number}{start}"


def cut(
    ids: Tensor, options: MeasureOptions, longest: int | None
) -> tuple[list[Window], tuple[str, ...]]:
    """The windows of ``options``, and notes for readers of the numbers.

    ids: [T].  ``longest``: tokens of the model's context.  Raises ``ConfigError`` when the text is
    too short or a slice too long, ``UnknownName`` for the protocol.
    """
    check_name("protocol", options.protocol, PPL_PROTOCOLS)
    if options.protocol != STANDARD:
        prompt, scored = options.prompt_tokens, options.scored_tokens
        if longest and prompt + scored > longest:
            raise ConfigError(
                f"a perplexity slice of {prompt} prompt + {scored} scored tokens is longer than "
                f"the model's context of {longest}: give fewer prompt or scored tokens"
            )
        found = slice_windows(ids, options.limit, prompt, scored, options.sample_seed)
        return found, ()
    size, stride = shape(options, longest)
    note = (
        f"windows of {size} tokens, the model's whole context, instead of "
        f"{options.window}: compare only with numbers of that window"
    )
    found = standard_windows(ids, size, stride, options.limit, options.sample_seed)
    return found, (note,) if size < options.window else ()


def shape(options: MeasureOptions, longest: int | None) -> tuple[int, int]:
    """Window and stride of ``standard`` on a model with a context of ``longest`` tokens."""
    if options.stride is not None and options.stride > options.window:
        raise ConfigError(
            f"stride {options.stride} is larger than the window of {options.window}: tokens "
            "between the windows would never be scored; give a stride of at most the window"
        )
    size = min(options.window, longest or options.window)
    return size, size if options.stride is None else min(size, options.stride)


def slice_windows(
    ids: Tensor, limit: int | None, prompt: int, scored: int, seed: int | None = None
) -> list[Window]:
    """``limit`` slices of ``prompt + scored`` tokens, evenly spaced; None: as many as fit.

    ids: [T].  With ``seed``: a random choice of the slices that lie side by side.  Raises
    ``ConfigError`` when the text is too short for one.
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
    chosen = choose(fit, limit, seed)
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
    """Windows of ``size`` tokens over the whole text; see the module's docstring.

    ids: [T].  ``limit``: the first ones, or with ``seed`` a random choice.  Raises ``ConfigError``
    when the text is shorter than one window.
    """
    step = size if stride is None else stride
    if size < 2 or not 1 <= step <= size:
        raise ConfigError(
            f"a window of {size} tokens with stride {step} scores nothing or leaves tokens out: "
            "give a window of at least 2 tokens and a stride from 1 to the window"
        )
    if len(ids) < size:
        raise ConfigError(
            f"the text has {len(ids)} tokens, fewer than one window of {size}: give a longer text "
            "or a smaller --window"
        )
    windows: list[Window] = []
    begin, done = 0, 1
    while done < len(ids):
        end = min(begin + size, len(ids))
        first = max(done - begin, 1)
        if begin + first < end:
            before = ids[max(0, begin - size) : begin]
            windows.append(Window(ids[begin:end], first, len(windows), begin, before))
        begin, done = begin + step, end
    return [windows[index] for index in choose(len(windows), limit, seed)]


def choose(total: int, limit: int | None, seed: int | None) -> list[int]:
    """The first ``limit`` of ``total`` positions, or a random choice that grows with ``limit``."""
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} leaves nothing to measure: give at least 1")
    return positions(total, limit, seed)
