"""Losses of windows under each protocol; perplexity as a Measurement.

Losses of one slice or window under each protocol (docs/method.md, "Evaluation").

``decode``: the first P - 1 tokens of a slice are the prompt (dense, observed); token P and the
C - 1 that follow run as decode tokens through the live tracer, so all C predictions are pruned.
``full``, ``published`` and ``standard``: masks from a dense pass over the P prompt tokens, over the
whole slice, or over the text before the window, applied to every position of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.data import documents
from dart_llm.errors import ConfigError, DartError
from dart_llm.evaluation.likelihood import CHUNK, SHORT
from dart_llm.evaluation.masks_seen import MaskCounts, Taken, unpack
from dart_llm.evaluation.measurement import LEAK, Measurement, MeasureOptions
from dart_llm.evaluation.windows import STANDARD, Window, cut, slice_windows
from dart_llm.models.describe import context_length
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import RunReport, add_dense, merge_reports, slim
from dart_llm.pruning.sequence import Phase
from dart_llm.session.prepare import PreparedMethod, UnitStore
from dart_llm.session.run import Run

DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class WindowLosses:
    """Per scored token of one window: its loss (nats), and whether it ran pruned."""

    losses: tuple[float, ...]
    pruned: tuple[bool, ...]


@dataclass(frozen=True)
class Scored:
    """Losses of one method: per slice, nats of each scored token; and how they came about."""

    losses: tuple[tuple[float, ...], ...]
    report: RunReport | None

    @property
    def mean_loss(self) -> float:
        """Over all scored tokens, nats."""
        flat = [loss for losses in self.losses for loss in losses]
        return sum(flat) / len(flat)

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


def _score(model: Any, run: Run | None, window: Window, protocol: str, prompt: Any) -> WindowLosses:
    ids = window.ids[None].to(model.device)
    if protocol == "decode":
        begin, cache = window.first - 1, prompt
        if cache is None:
            cache = model(ids[:, :begin], use_cache=True, logits_to_keep=1).cache
    else:
        begin, cache = 0, None
        if run is not None:
            _choose_masks(model, run, window, protocol)
    losses, pruned = _feed(model, run, ids, window.first, begin, cache)
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DartError(
            f"the loss of its token {window.first + bad[0]} is the first that is not finite "
            f"({float(losses[bad[0]])}): the model overflows; try dtype float32"
        )
    return WindowLosses(tuple(losses.tolist()), tuple(pruned))


def _choose_masks(model: Any, run: Run, window: Window, protocol: str) -> None:
    """Hold the masks that a dense pass over the protocol's tokens gives."""
    run.hold(None)
    asked = run.asks_for_pruning
    seen = window.ids if protocol == "published" else window.ids[: window.first]
    if protocol == STANDARD:
        assert window.before is not None
        seen = window.before
    model(seen[None].to(model.device), use_cache=True, logits_to_keep=1)
    masks = run.select()
    if asked and all(mask is None for mask in masks):
        raise ConfigError(
            f"{window.name}: the masks that were chosen remove no neuron: ask for a higher sparsity"
        )
    run.hold(masks)


def _feed(
    model: Any, run: Run | None, ids: Tensor, first: int, begin: int, cache: Any
) -> tuple[Tensor, list[bool]]:
    """Feed ``ids`` ([1, n]) from ``begin`` on, whose past lies in ``cache``, as decode tokens.

    Returns the losses of the tokens from ``first`` on, [n - first] float32, and whether each ran
    pruned.  A chunk ends where the masks can change, and its logits are gone before the next one.
    """
    losses: list[Tensor] = []
    pruned: list[bool] = []
    end = ids.shape[1] - 1
    while begin < end:
        size = min(CHUNK, end - begin)
        if run is not None:
            bound = run.tokens_until_change() if begin else run.config.release_step
            size = min(size, bound or size)
        stop = begin + size
        targets = ids[0, max(begin + 1, first) : stop + 1]
        found, cache = _chunk(model, run, ids[:, begin:stop], cache, targets)
        losses.append(found)
        pruned += [run is not None and run.phase == Phase.PRUNED] * len(targets)
        begin = stop
    return torch.cat(losses), pruned


def _chunk(
    model: Any, run: Run | None, ids: Tensor, cache: Any, targets: Tensor
) -> tuple[Tensor, Any]:
    """One decode forward.  Losses of ``targets`` ([m]), which its last m positions predict."""
    given: dict[str, Any] = {} if cache is None else {"cache": cache}
    given.update(use_cache=True, logits_to_keep=max(1, len(targets)))
    if run is None:
        output = model(ids, **given)
    else:
        with run.decoding(prompt=cache is None):
            output = model(ids, **given)
    logits = output.logits[0, : len(targets)].float()
    return F.cross_entropy(logits, targets, reduction="none"), output.cache


def ratio_interval(pruned: Scored, dense: Scored) -> tuple[float, float] | None:
    """95 % bootstrap interval over slices of ``perplexity(pruned) / perplexity(dense)``.

    Slices count by their tokens.  None with fewer than two, which say nothing of the spread.
    """
    import numpy as np

    pairs = list(zip(pruned.losses, dense.losses, strict=True))
    if len(pairs) < 2:
        return None
    gaps = np.array([sum(a) - sum(b) for a, b in pairs])
    sizes = np.array([len(a) for a, _ in pairs])
    draws = np.random.default_rng(0).integers(0, len(gaps), (DRAWS, len(gaps)))
    ratios = gaps[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(math.exp(min(700.0, low))), float(math.exp(min(700.0, high)))


# One scored window as a JSON-able part: losses, which tokens ran pruned, accounting and masks.


DIGITS = 6
"""Decimals of a kept loss (nats); every number of a measurement is computed from kept losses."""

Part = Mapping[str, Any]


def score_part(candidate: PreparedMethod, run: Run | None, window: Window, protocol: str) -> Part:
    """Score one window as a part; ``run``: not attached, or None for the untouched model."""
    if run is None:
        return _part(candidate, None, window, protocol)
    run.reset()
    asked = run.asks_for_pruning
    if protocol == STANDARD and is_first(window):
        return {**_part(candidate, None, window, protocol), "dense_tokens": len(window.ids) - 1}
    run.on_masks = taken = Taken()
    with run:
        part = _part(candidate, run, window, protocol)
        report = slim(run.report().to_dict())
    if asked and not any(ran_pruned(part)):
        raise ConfigError(
            f"perplexity of {candidate.label}: all {window.scored} scored tokens of a slice ran "
            "dense, so this would measure the untouched model; give more prompt or scored "
            "tokens, or a smaller --min-evidence or --masking-step"
        )
    found = {**part, "report": report, "masks": taken.packed}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # as a resumed run reads it


def is_first(window: Window) -> bool:
    """Whether too little text lies before a window of ``standard`` to choose masks from."""
    return window.before is None or len(window.before) < SHORT


def _part(
    candidate: PreparedMethod, run: Run | None, window: Window, protocol: str
) -> dict[str, Any]:
    found = score_window(candidate.model, run, window, protocol)
    runs = [[flag, len(list(same))] for flag, same in itertools.groupby(found.pruned)]
    return {
        "losses": [round(loss, DIGITS) for loss in found.losses],
        "pruned": runs,
        "report": None,
        "dense_tokens": 0,
        "masks": [],
    }


def ran_pruned(sample: Mapping[str, Any]) -> list[bool]:
    """Per loss of a sample (or part): whether its token ran pruned."""
    return [bool(flag) for flag, length in sample["pruned"] for _ in range(length)]


def part_key(candidate: PreparedMethod, name: str, protocol: str, window: Window) -> str:
    """Names a part by everything that decides its value, the model aside."""
    digest = hashlib.sha256()
    if candidate.config is not None:
        digest.update(json.dumps(candidate.config.to_dict(), sort_keys=True).encode())
    for layer, ids in sorted((candidate.masks or {}).items()):
        digest.update(f"{layer}:{torch.as_tensor(ids).tolist()}".encode())
    for mask in candidate.held or ():
        digest.update(b"dense" if mask is None else mask.ids.cpu().numpy().tobytes())
    for tokens in (window.ids, window.before):
        digest.update(b"|" if tokens is None else tokens.cpu().numpy().tobytes())
    shape = f"{window.id}-{len(window.ids)}-{window.first}"
    return f"ppl/{name}/{candidate.label}/{protocol}/{shape}/{digest.hexdigest()[:24]}"


# Perplexity as a measurement: one method on one text, resumable window by window.


Score = Callable[[PreparedMethod, Run | None, Window, str], Part]


def measure(
    candidate: PreparedMethod,
    name: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity on the text called ``name`` (``ppl_texts.read``); see ``measure_text``."""
    return measure_text(candidate, name, documents.read(name), options, parts, advance)


def measure_text(
    candidate: PreparedMethod,
    name: str,
    text: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity on ``text`` under ``options.protocol``; ``advance(1)`` after each window.

    Raises ``ConfigError`` when the text is too short, a slice too long, or all tokens of a slice
    ran dense though sparsity was asked for; ``DartError`` when a loss is not finite.
    """
    windows, notes = cut(_ids(candidate.tokenizer, text), options, context_length(candidate.model))
    return measure_windows(candidate, name, windows, options.protocol, parts, advance, notes)


def count(name: str, options: MeasureOptions, tokenizer: Any, longest: int | None = None) -> int:
    """How many windows ``measure`` scores; ``longest``: tokens of the model's context."""
    return len(cut(_ids(tokenizer, documents.read(name)), options, longest)[0])


def _ids(tokenizer: Any, text: str) -> Tensor:
    """[T]; special tokens as the tokenizer adds them."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def measure_windows(
    candidate: PreparedMethod,
    name: str,
    windows: Sequence[Window],
    protocol: str,
    parts: UnitStore,
    advance: Callable[[int], None],
    notes: Sequence[str] = (),
    score: Score = score_part,
) -> Measurement:
    """Score all windows, keeping each as a part; ``name``: what the text is called."""
    run = candidate.run(likelihood=protocol != "decode")
    if protocol == STANDARD and run is not None and run.asks_for_pruning:
        _check_any_pruned(candidate, windows)
    found: list[Part] = []
    for window in windows:
        key = part_key(candidate, name, protocol, window)
        part = parts.part(key)
        if part is None:
            part = score(candidate, run, window, protocol)
            parts.save_part(key, part)
        found.append(part)
        advance(1)
    items = tuple(_item(window, part) for window, part in zip(windows, found, strict=True))
    counts = MaskCounts()
    for part in found:
        for packed in part["masks"]:
            counts(unpack(packed))
    return Measurement(
        task=f"perplexity:{name}",
        protocol=protocol,
        metric="perplexity",
        higher_is_better=False,
        metrics=_metrics(found),
        items=items,
        accounting=None if run is None else _accounting(run, found),
        samples=tuple(_sample(window, part) for window, part in zip(windows, found, strict=True)),
        notes=(*candidate.notes, *notes, *_notes(run, protocol, found)),
        counts=counts.counts,
        masks=counts.masks,
    )


def _check_any_pruned(candidate: PreparedMethod, windows: Sequence[Window]) -> None:
    if all(is_first(window) for window in windows):
        raise ConfigError(
            f"perplexity of {candidate.label}: protocol standard takes the masks of a window from "
            "the text before it, and the first window, which has none, is all there is; give a "
            "longer text, a larger --limit or a smaller --window"
        )


def _item(window: Window, part: Part) -> dict[str, Any]:
    losses = part["losses"]
    return {
        "id": window.id,
        "mean_loss": math.fsum(losses) / len(losses),
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
    pruned = [loss for loss, flag in zip(losses, flags, strict=True) if flag]
    found = {"perplexity": perplexity(_mean(losses)), "mean_loss": _mean(losses)}
    if pruned:
        found["perplexity_pruned_tokens"] = perplexity(_mean(pruned))
        found["mean_loss_pruned_tokens"] = _mean(pruned)
    return {**found, "tokens": len(losses), "pruned_tokens": len(pruned)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _accounting(run: Run, parts: Iterable[Part]) -> dict[str, Any]:
    reports = [part["report"] for part in parts if part["report"]]
    run.reset()
    merged = merge_reports(reports) if reports else run.report().to_dict()
    merged = dict(add_dense(merged, sum(part["dense_tokens"] for part in parts)))
    merged.pop("sequences")
    return merged


def _notes(run: Run | None, protocol: str, parts: Sequence[Part]) -> list[str]:
    if run is None:
        return []
    notes = [LEAK] if protocol == "published" else []
    dense = sum(part["dense_tokens"] for part in parts)
    if dense:
        notes.append(
            f"{dense} tokens ran dense: fewer than {SHORT} tokens lie before their window, too few "
            "to choose masks from"
        )
    return notes


# Perplexity of several methods on the same slices: the document in perplexity.json.


PROTOCOL = "decode"

_score_one = score_part


@dataclass(frozen=True)
class Row:
    """One method's perplexity; ``config`` None: dense."""

    label: str
    config: PruneConfig | None
    measurement: Measurement


def score_row(
    candidate: PreparedMethod,
    windows: Sequence[Tensor],
    prompt: int,
    folder: UnitStore,
    text: str,
    advance: Callable[[int], None],
) -> Row:
    """Score all slices ([P + C] each), keeping each as a finished part of the folder."""
    cut = [Window(ids, prompt, number) for number, ids in enumerate(windows)]
    found = measure_windows(candidate, text, cut, PROTOCOL, folder, advance, score=_score_one)
    return Row(candidate.label, candidate.config, found)


def rows_to_dict(rows: Sequence[Row], text: str, prompt: int, scored: int) -> dict[str, Any]:
    """The document of one text in perplexity.json; the first row is dense."""
    found = [(row.label, row.measurement) for row in rows]
    return document(found, text, {"prompt_tokens": prompt, "scored_tokens": scored})


def document(
    rows: Sequence[tuple[str, Measurement]], text: str, shape: Mapping[str, int]
) -> dict[str, Any]:
    """Labelled measurements of the same windows as one document; the first is dense.

    ``shape``: ``prompt_tokens`` and ``scored_tokens``, or ``window`` and ``stride``.
    """
    dense = rows[0][1]
    return {
        "protocol": dense.protocol,
        "text": text,
        "slices": len(dense.items),
        **shape,
        "rows": [_row(label, measurement, dense) for label, measurement in rows],
        "losses": {label: [s["losses"] for s in found.samples] for label, found in rows},
    }


def _row(label: str, found: Measurement, dense: Measurement) -> dict[str, Any]:
    """One row; ``..._pruned_tokens`` speaks of the tokens that ran pruned, dense over the same."""
    report, own, base = found.accounting, _scored(found), _scored(dense)
    return {
        "method": report["method"] if report else label,
        "label": label,
        "sparsity": report["requested_sparsity"] if report else 0.0,
        "perplexity": own.perplexity,
        "mean_loss": own.mean_loss,
        "ratio_to_dense": own.perplexity / base.perplexity,
        "interval": None if found is dense else ratio_interval(own, base),
        "tokens": found.metrics["tokens"],
        "pruned_tokens": found.metrics["pruned_tokens"],
        "perplexity_pruned_tokens": found.metrics.get("perplexity_pruned_tokens"),
        "dense_perplexity_pruned_tokens": dense_where_pruned(found, dense),
        "accounting": report,
        "notes": list(found.notes),
    }


def _scored(found: Measurement) -> Scored:
    return Scored(tuple(tuple(sample["losses"]) for sample in found.samples), None)


def dense_where_pruned(found: Measurement, dense: Measurement) -> float | None:
    """Perplexity of ``dense`` over the tokens that ran pruned in ``found``; None of nothing."""
    losses = [
        loss
        for own, base in zip(found.samples, dense.samples, strict=True)
        for loss, pruned in zip(base["losses"], ran_pruned(own), strict=True)
        if pruned
    ]
    return perplexity(sum(losses) / len(losses)) if losses else None
