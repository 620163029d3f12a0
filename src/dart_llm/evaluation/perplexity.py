"""Losses of windows under each protocol; perplexity as a measurement.

``decode``: the first P - 1 tokens of a slice are the prompt (dense, observed); token P and the
C - 1 that follow run as decode tokens, so all C predictions are pruned.  ``full``, ``published``
and ``standard``: masks from a dense pass over the P prompt tokens, over the whole slice, or over
the text before the window, applied to every position of it (docs/reference.md, "Protocols").
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.data import documents
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.forced_decoding import CHUNK, feed
from dart_llm.evaluation.likelihood import SHORT
from dart_llm.evaluation.masks_seen import (
    Part,
    TakenMasks,
    count_masks,
    finished_part,
    merge_accounting,
)
from dart_llm.evaluation.measurement import LEAK, Measurement, MeasureOptions, mean
from dart_llm.evaluation.windows import STANDARD, Window, cut, slice_windows
from dart_llm.models.describe import context_length
from dart_llm.pruning.records import RunReport, without_sequences
from dart_llm.pruning.sequence import Phase
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import BoundMethod, Run


class WindowLosses(NamedTuple):
    """Per scored token of one window: its loss (nats), and whether it ran pruned."""

    losses: tuple[float, ...]
    pruned: tuple[bool, ...]


@dataclass(frozen=True)
class Scored:
    """Losses of one method: per slice, nats of each scored token; and the accounting."""

    losses: tuple[tuple[float, ...], ...]
    report: RunReport | None

    @property
    def mean_loss(self) -> float:
        """Over all scored tokens, nats."""
        return mean([*itertools.chain(*self.losses)])

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(self.mean_loss)


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats, cut where a float ends."""
    return math.exp(min(700.0, mean_loss))


def slices(ids: Tensor, count: int | None, prompt: int, scored: int) -> list[Tensor]:
    """``count`` evenly spaced windows of ``prompt + scored`` tokens; None: as many as fit.

    ids: [T] int64.  Raises ``ConfigError`` when the text is too short for one.
    """
    return [window.ids for window in slice_windows(ids, count, prompt, scored)]


def score(
    model: Any,
    run: Run | None,
    windows: Sequence[Tensor],
    prompt: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """The ``decode`` protocol over all ``windows`` ([P + C] each); ``advance(1)`` after each.

    ``prompt``: tokens P of each window that are read dense and observed.  ``run``: an attached run,
    or None for the untouched model.  Raises ``DartError`` when a loss is not finite.
    """
    results = []
    for number, ids in enumerate(windows):
        results.append(score_window(model, run, Window(ids, prompt, number)).losses)
        advance(1)
    return Scored(tuple(results), None if run is None else run.report())


@torch.inference_mode()
def score_window(
    model: Any, run: Run | None, window: Window, protocol: str = "decode", prompt: Any = None
) -> WindowLosses:
    """Losses of the scored tokens of one window.

    ``run``: an attached run, or None for the untouched model.  ``decode`` adds a sequence to it;
    the other protocols reset it first.  ``prompt``: for ``decode``, the cache of a dense pass over
    the window's prompt, which is used up; the run must need no evidence from it.  Raises
    ``DartError``, which names slice and token, when a loss is not finite.
    """
    try:
        return _score(model, run, window, protocol, prompt)
    except DartError as error:
        if type(error) is not DartError:
            raise
        raise DartError(f"{window.name}: {error}") from None


def predict(
    model: Any,
    run: Run | None,
    window: Window,
    take: Callable[[Tensor, Tensor], None],
    protocol: str = "decode",
    prompt: Any = None,
    chunk: int = CHUNK,
) -> None:
    """Feed a window under ``protocol``; ``take`` gets logits [m, V] and the tokens [m] that come.

    In order, and chunk by chunk, ``chunk`` tokens at most.  The other arguments are those of
    ``score_window``.
    """
    ids = window.ids[None].to(model.device)
    begin, cache = 0, None
    if protocol == "decode":
        begin, cache = window.first - 1, prompt
        if cache is None:
            cache = model(ids[:, :begin], use_cache=True, logits_to_keep=1).cache
    elif run is not None:
        _choose_masks(model, run, window, protocol)
    targets = ids[0, begin + 1 :]
    first = window.first - 1 - begin

    def hand_on(start: int, logits: Tensor) -> None:
        take(logits[0], targets[start : start + logits.shape[1]])

    feed(model, run, ids[:, begin:-1], cache, hand_on, first=first, cached=begin, chunk=chunk)


def _score(model: Any, run: Run | None, window: Window, protocol: str, prompt: Any) -> WindowLosses:
    losses: list[Tensor] = []
    pruned: list[bool] = []

    def take(logits: Tensor, expected: Tensor) -> None:
        losses.append(F.cross_entropy(logits.float(), expected, reduction="none"))
        pruned.extend([run is not None and run.phase == Phase.PRUNED] * len(expected))

    predict(model, run, window, take, protocol, prompt)
    return WindowLosses(tuple(finite_losses(torch.cat(losses), window)), tuple(pruned))


def finite_losses(losses: Tensor, window: Window) -> list[float]:
    """Those of the scored tokens of ``window``; raises ``DartError``, which names the token."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DartError(
            f"the loss of its token {window.first + bad[0]} is the first that is not finite "
            f"({float(losses[bad[0]])}): the model overflows; try dtype float32"
        )
    return losses.tolist()


def _choose_masks(model: Any, run: Run, window: Window, protocol: str) -> None:
    """Fix the masks that a dense pass over the protocol's tokens gives."""
    run.hold(None)
    prunes = run.asks_for_pruning
    seen = window.ids if protocol == "published" else window.ids[: window.first]
    if protocol == STANDARD:
        assert window.before is not None
        seen = window.before
    model(seen[None].to(model.device), use_cache=True, logits_to_keep=1)
    masks = run.select()
    if prunes and all(mask is None for mask in masks):
        raise ConfigError(
            f"{window.name}: the masks that were chosen remove no neuron: give a higher sparsity"
        )
    run.hold(masks)


# One scored window as a JSON-able part: losses, which tokens ran pruned, accounting and masks.

DIGITS = 6
"""Decimals of a stored loss (nats), from which every number of a measurement is computed."""


def score_part(candidate: BoundMethod, run: Run | None, window: Window, protocol: str) -> Part:
    """Score one window as a part; ``run``: not attached, or None for the untouched model."""
    if run is None:
        return _part(candidate, None, window, protocol)
    run.reset()
    prunes = run.asks_for_pruning
    if protocol == STANDARD and is_first(window):
        return _part(candidate, None, window, protocol, dense_tokens=len(window.ids) - 1)
    run.on_masks = taken = TakenMasks()
    with run:
        part = _part(candidate, run, window, protocol, masks=taken.packed)
        part["report"] = without_sequences(run.report().to_dict())
    if prunes and not any(ran_pruned(part)):
        raise ConfigError(
            f"perplexity of {candidate.label}: all {window.scored} scored tokens of a slice ran "
            "dense, so this would measure the untouched model; give more prompt or scored "
            "tokens, or a smaller --min-evidence or --masking-step"
        )
    return json.loads(json.dumps(part))  # type: ignore[no-any-return]  # as a resumed run reads it


def is_first(window: Window) -> bool:
    """Whether too little text lies before a window of ``standard`` to choose masks from."""
    return window.before is None or len(window.before) < SHORT


def _part(
    candidate: BoundMethod, run: Run | None, window: Window, protocol: str, **facts: Any
) -> dict[str, Any]:
    scored = score_window(candidate.model, run, window, protocol)
    runs = [[flag, len(list(same))] for flag, same in itertools.groupby(scored.pruned)]
    losses = [round(loss, DIGITS) for loss in scored.losses]
    empty: dict[str, Any] = {"report": None, "dense_tokens": 0, "masks": []}
    return {"losses": losses, "pruned": runs, **empty, **facts}


def ran_pruned(sample: Mapping[str, Any]) -> list[bool]:
    """Per loss of a sample (or part): whether its token ran pruned."""
    return [bool(flag) for flag, length in sample["pruned"] for _ in range(length)]


def part_key(candidate: BoundMethod, name: str, protocol: str, window: Window) -> str:
    """Names a part by everything that decides its value, the model aside."""
    digest = hashlib.sha256()
    if candidate.config is not None:
        digest.update(json.dumps(candidate.config.to_dict(), sort_keys=True).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        digest.update(f"{layer}:{torch.as_tensor(ids).tolist()}".encode())
    for mask in candidate.fixed_masks or ():
        digest.update(b"dense" if mask is None else mask.ids.cpu().numpy().tobytes())
    for tokens in (window.ids, window.before):
        digest.update(b"|" if tokens is None else tokens.cpu().numpy().tobytes())
    shape = f"{window.id}-{len(window.ids)}-{window.first}"
    return f"ppl/{name}/{candidate.label}/{protocol}/{shape}/{digest.hexdigest()[:24]}"


# Perplexity as a measurement: one method on one text, resumable window by window.


def measure(
    candidate: BoundMethod,
    name: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity on the text called ``name`` under ``options.protocol``; see ``measure_windows``.

    Raises ``ConfigError`` when the text is too short or a slice too long.
    """
    ids = _ids(candidate.tokenizer, documents.read(name))
    windows, notes = cut(ids, options, context_length(candidate.model))
    return measure_windows(candidate, name, windows, options.protocol, parts, advance, notes)


def count(name: str, options: MeasureOptions, tokenizer: Any, longest: int | None = None) -> int:
    """How many windows ``measure`` scores; ``longest``: tokens of the model's context."""
    return len(cut(_ids(tokenizer, documents.read(name)), options, longest)[0])


@lru_cache(maxsize=2)
def _ids(tokenizer: Any, text: str) -> Tensor:
    """[T]; cached, so that a text that is counted and then measured is tokenised once."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def measure_windows(
    candidate: BoundMethod,
    name: str,
    windows: Sequence[Window],
    protocol: str,
    parts: UnitStore,
    advance: Callable[[int], None],
    notes: Sequence[str] = (),
) -> Measurement:
    """Score all windows of the text called ``name``, storing each as a part.

    ``advance(1)`` is called after each window.  Raises ``ConfigError`` when all tokens of a slice
    ran dense though a sparsity was requested; ``DartError`` when a loss is not finite.
    """
    run = candidate.run(likelihood=protocol != "decode")
    needs_text = protocol == STANDARD and run is not None and run.asks_for_pruning
    if needs_text and all(map(is_first, windows)):
        raise ConfigError(
            f"perplexity of {candidate.label}: protocol standard takes the masks of a window from "
            "the text before it, and the first window, which has none, is all there is; give a "
            "longer text, a larger --limit or a smaller --window"
        )
    scored: list[Part] = []
    for window in windows:
        key = part_key(candidate, name, protocol, window)
        make = partial(score_part, candidate, run, window, protocol)
        scored.append(finished_part(parts, key, make))
        advance(1)
    counts, masks = count_masks(scored)
    return Measurement(
        task=f"perplexity:{name}",
        protocol=protocol,
        metric="perplexity",
        higher_is_better=False,
        metrics=_metrics(scored),
        items=tuple(map(_item, windows, scored)),
        accounting=merge_accounting(run, scored),
        samples=tuple(map(_sample, windows, scored)),
        notes=(*candidate.notes, *notes, *_notes(run, protocol, scored)),
        counts=counts,
        masks=masks,
    )


def _item(window: Window, part: Part) -> dict[str, Any]:
    losses = part["losses"]
    return {
        "id": window.id,
        "mean_loss": _mean(losses),
        "tokens": len(losses),
        "pruned_tokens": sum(ran_pruned(part)),
    }


def _sample(window: Window, part: Part) -> dict[str, Any]:
    """``first``: index of the first scored token in its window; ``pruned``: runs of equal flags."""
    return {
        "id": window.id,
        "start": window.start,
        "first": window.first,
        "losses": list(part["losses"]),
        "pruned": [list(run) for run in part["pruned"]],
    }


def _metrics(parts: Sequence[Part]) -> dict[str, float | None]:
    """``..._pruned_tokens`` only where some ran pruned."""
    losses = [loss for part in parts for loss in part["losses"]]
    flags = [flag for part in parts for flag in ran_pruned(part)]
    pruned = [*itertools.compress(losses, flags)]
    metrics = {"perplexity": perplexity(_mean(losses)), "mean_loss": _mean(losses)}
    if pruned:
        metrics["perplexity_pruned_tokens"] = perplexity(_mean(pruned))
        metrics["mean_loss_pruned_tokens"] = _mean(pruned)
    return {**metrics, "tokens": len(losses), "pruned_tokens": len(pruned)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes(run: Run | None, protocol: str, parts: Sequence[Part]) -> Iterator[str]:
    if run is not None and protocol == "published":
        yield LEAK
    if dense := sum(part["dense_tokens"] for part in parts):
        yield (
            f"{dense} tokens ran dense: fewer than {SHORT} tokens lie before their window, too few "
            "to choose masks from"
        )
