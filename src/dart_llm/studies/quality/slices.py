"""Slices, topic-shift pairs, and one slice scored.

Slices of a source's documents as tokens, and what each cell reads of them.

A document of at least one slice of tokens gives whole slices; shorter ones are joined by a blank
line until they fill one.  Of all slices N are taken, evenly spaced.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.data.documents import EMBEDDED, SETS, Source, start_token
from dart_llm.data.passages import BREAK
from dart_llm.errors import ConfigError
from dart_llm.evaluation.forced_decoding import ScheduledRun
from dart_llm.evaluation.perplexity import WindowLosses, score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.comparison import read_traffic
from dart_llm.models.quantised import Quantised
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.selection import check_fits
from dart_llm.reporting.words import count
from dart_llm.session.run import BoundMethod, Run
from dart_llm.studies.quality.settings import CONTINUATION, LEAD, Shape

USUAL = 16
"""Slices of a source where no number is asked for."""


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

    def window(self, cell: str) -> Window:
        """What is read: the first ``shape.prompt`` tokens are the prompt, in either cell alike."""
        shape, body = self.shape, self.first.body
        begin = torch.tensor(self.start, dtype=body.dtype)
        if cell == CONTINUATION:
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

    ``wanted`` None: ``USUAL``, or as many as there are of the embedded texts alone.  The second
    topic of a slice is the slice of the same number of the next source; where there is one source
    alone, a slice of it that shares no document.  Raises ``ConfigError`` for too little text, and,
    with ``shift``, for a single source that has no second topic.
    """
    start = tuple(start_token(tokenizer))
    size = shape.size - len(start)
    found = [list(cut(source, which, tokenizer, size)) for source in sources]
    number = USUAL if wanted is None else wanted
    if wanted is None and [source.label for source in sources] == [EMBEDDED]:
        number = max(1, min(USUAL, len(found[0])))
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
        raise ConfigError(
            f'the text "{source.label}" has {count(len(found), "slice")} of {size} tokens in its '
            f"set {which} (the {SETS[which]} half of {count(len(source.documents), 'document')}), "
            f"fewer than the {wanted} wanted: give a longer text, or a smaller --slices, --tokens "
            "or --prompt-tokens"
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
        "--cells continuation"
    )


# One slice of ``dart-llm bench quality`` measured in one way, as a JSON-able part.
#
# GRIFFIN's masks follow from the prompt alone, and the dense prompt is the same at every sparsity:
# one pass over a slice's prompt serves the untouched model and all of GRIFFIN's sparsities, in
# both cells.


MOMENT = LEAD + 1
"""Decode step that feeds the first token of the second topic: step 0 feeds the prompt's last."""

DIGITS = 9
"""Decimals of a kept mean loss (nats)."""

FACTS = (
    "decoded_tokens",
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_bytes_share_if_compact",
    "extra_memory_bytes",
    "token_bytes_share",
    "mean_context",
)
"""What is kept of a run's report, over all decoded tokens of the slice."""

FIRST = ("first", "given")
"""Causes of a sequence's first masks."""

Part = dict[str, Any]
"""``loss``: mean over the scored tokens, nats; ``tokens``: how many those are; ``accounting``:
``FACTS`` and the decode steps of re-masks, None where nothing was pruned; ``seconds``."""


class PromptRun(Run):
    """A run that observes a prompt for configurations that differ in their sparsity alone."""

    def masks_at(self, config: PruneConfig) -> Masks:
        """The masks that ``config`` gives by what this run has observed."""
        self.controller.flush()
        with torch.inference_mode(False):
            evidence = self.controller.sequences[-1].evidence
            return check_fits(config, self.layers).preview(evidence)


@torch.inference_mode()
def score_shared_prompt(
    model: Any, griffin: PruneConfig, pair: Pair, wanted: Sequence[tuple[str, float]]
) -> Iterator[tuple[str, float, Part]]:
    """Parts of the untouched model (sparsity 0) and of GRIFFIN, one per (cell, sparsity)."""
    began = time.perf_counter()
    first = pair.window(wanted[0][0])
    ids = first.ids[None, : first.first - 1].to(model.device)
    observer = PromptRun(model, griffin)
    with observer:
        prompt = model(ids, use_cache=True, logits_to_keep=1).cache
    for cell, sparsity in wanted:
        window, cache = pair.window(cell), copy.deepcopy(prompt)
        if not sparsity:
            found = score_window(model, None, window, prompt=cache)
            yield cell, sparsity, _part(found, None, pair, began)
        else:
            config = griffin.replace({"sparsity": sparsity})
            with Run(model, config, fixed_masks=observer.masks_at(config)) as run:
                found = score_window(model, run, window, prompt=cache)
            yield cell, sparsity, _part(found, run, pair, began)
        began = time.perf_counter()


def score_single(candidate: BoundMethod, run: Run | None, cell: str, pair: Pair) -> Part:
    """The part of any method; ``run``: one of the candidate's, not attached, or None for a new one
    that is told the moment of the change.

    Raises ``ConfigError`` when all decoded tokens ran dense though a sparsity was asked for.
    """
    began = time.perf_counter()
    if run is None:
        made = candidate.run(make=functools.partial(ScheduledRun, triggers=[MOMENT]))
        assert made is not None
        run = made
    run.reset()
    with run:
        found = score_window(candidate.model, run, pair.window(cell))
    part = _part(found, run, pair, began)
    if part["accounting"]["dense_token_share"] == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"{candidate.label}: all {part['accounting']['decoded_tokens']} decoded tokens of "
            f"slice {pair.first.id} ran dense, so this would measure the untouched model; give "
            "more --prompt-tokens or --tokens"
        )
    return part


@torch.inference_mode()
def score_rounded(rounded: Quantised, cell: str, pair: Pair) -> Part:
    """The part of a dense model with fewer bits; its prompt is read with them too."""
    began = time.perf_counter()
    window = pair.window(cell)
    found = score_window(rounded.model, None, window)
    traffic = read_traffic(rounded.facts)
    assert traffic is not None
    decoded = len(found.losses)
    context = window.first - 1 + (decoded + 1) / 2
    share = rounded.facts["ffn_share_of_bfloat16"]
    accounting = dict.fromkeys(FACTS, 0.0) | {
        "decoded_tokens": decoded,
        "dense_token_share": 1.0,
        "ffn_bytes_share_if_compact": share,
        "token_bytes_share": traffic.share(context),
        "mean_context": context,
        "remask_steps": [],
    }
    return {**_part(found, None, pair, began), "accounting": accounting}


def _part(found: WindowLosses, run: Run | None, pair: Pair, began: float) -> Part:
    """The last ``pair.shape.scored`` tokens are scored, in either cell."""
    losses = found.losses[-pair.shape.scored :]
    accounting = None
    if run is not None:
        report = run.report().to_dict()
        steps = [remask.step for remask in run.remasks if remask.cause not in FIRST]
        accounting = {**{name: report[name] for name in FACTS}, "remask_steps": steps}
    return {
        "loss": round(math.fsum(losses) / len(losses), DIGITS),
        "tokens": len(losses),
        "accounting": accounting,
        "seconds": time.perf_counter() - began,
    }
