"""Losses of windows under each protocol, and perplexity as a ``Measurement``.

A protocol says which tokens select the masks and which tokens run pruned.  A slice has P prompt
tokens and C scored tokens.  Under ``decode`` its first P - 1 tokens run dense and are observed;
token P and the C - 1 tokens after it run as decode tokens, so all C predictions are pruned.  The
other protocols apply masks to every position; the masks come from a dense pass over the P prompt
tokens (``full``), the whole slice (``published``) or the text before the window (``standard``).
See docs/reference.md, "Protocols".
"""

from __future__ import annotations

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
from dart_llm.evaluation.forced_decoding import CHUNK, ScheduledRun, feed
from dart_llm.evaluation.likelihood import SHORT
from dart_llm.evaluation.measurement import LEAK, Measurement, MeasureOptions, mean
from dart_llm.evaluation.parts import (
    Part,
    UnitStore,
    check_pruned,
    finished_part,
    merge_accounting,
    method_digest,
)
from dart_llm.evaluation.tasks import SHIFT, slice_sources, split
from dart_llm.evaluation.windows import MOMENT, STANDARD, Window, cut, slice_windows, topic_windows
from dart_llm.models.calls import cache_of
from dart_llm.models.describe import context_length
from dart_llm.models.screen import divergence
from dart_llm.pruning.records import RunReport, without_sequences
from dart_llm.pruning.sequence import Phase
from dart_llm.session.run import BoundMethod, Run


class WindowLosses(NamedTuple):
    """For each scored token of a window: its loss (nats), and True if it ran pruned."""

    losses: tuple[float, ...]
    pruned: tuple[bool, ...]


@dataclass(frozen=True)
class Scored:
    """For each slice, the loss (nats) of each scored token.  ``report``: the run's accounting."""

    losses: tuple[tuple[float, ...], ...]
    report: RunReport | None

    @property
    def mean_loss(self) -> float:
        """The mean over all scored tokens, in nats."""
        return mean([*itertools.chain(*self.losses)])

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(self.mean_loss)


def perplexity(mean_loss: float) -> float:
    """exp of a mean loss in nats, capped to stay a finite float."""
    return math.exp(min(700.0, mean_loss))


def slices(ids: Tensor, count: int | None, prompt: int, scored: int) -> list[Tensor]:
    """Cut ``count`` evenly spaced windows of ``prompt + scored`` tokens; None means all that fit.

    ``ids``: [T] int64.  Raises ``ConfigError`` if the text is shorter than one window.
    """
    return [window.ids for window in slice_windows(ids, count, prompt, scored)]


def score(
    model: Any,
    run: Run | None,
    windows: Sequence[Tensor],
    prompt: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """Score all ``windows`` ([P + C] each) under ``decode``; call ``advance(1)`` after each.

    ``prompt`` is the number P of prompt tokens.  ``run`` is an attached run, or None for the
    untouched model.  Raises ``DartError`` if a loss is not finite.
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

    ``run`` is an attached run, or None for the untouched model.  ``decode`` adds a sequence to the
    run; the other protocols reset the run first.  ``prompt`` (only for ``decode``) is None or the
    KV cache of a dense pass over the window's prompt; this call extends that cache, and the run
    does not observe the prompt.  Raises ``DartError``, which names slice and token, if a loss is
    not finite.
    """
    losses: list[Tensor] = []
    pruned: list[bool] = []

    def add_losses(logits: Tensor, expected: Tensor) -> None:
        losses.append(F.cross_entropy(logits.float(), expected, reduction="none"))
        pruned.extend([run is not None and run.phase == Phase.PRUNED] * len(expected))

    predict(model, run, window, add_losses, protocol, prompt)
    return WindowLosses(tuple(finite_losses(torch.cat(losses), window)), tuple(pruned))


def predict(
    model: Any,
    run: Run | None,
    window: Window,
    on_logits: Callable[[Tensor, Tensor], None],
    protocol: str = "decode",
    prompt: Any = None,
    chunk: int = CHUNK,
) -> None:
    """Feed a window under ``protocol``, and pass its scored tokens' logits to ``on_logits``.

    ``on_logits(logits, targets)`` gets logits [m, V] and their target tokens [m], in order, for
    chunks of at most ``chunk`` tokens.  The other arguments are those of ``score_window``.
    """
    ids = window.ids[None].to(model.device)
    begin, cache = 0, None
    if protocol == "decode":
        begin, cache = window.first - 1, prompt
        if cache is None:
            cache = cache_of(model(ids[:, :begin], use_cache=True, logits_to_keep=1))
    elif run is not None:
        _fix_masks(model, run, window, protocol)
    targets = ids[0, begin + 1 :]
    first = window.first - 1 - begin

    def add_targets(start: int, logits: Tensor) -> None:
        on_logits(logits[0], targets[start : start + logits.shape[1]])

    feed(model, run, ids[:, begin:-1], cache, add_targets, first=first, cached=begin, chunk=chunk)


def finite_losses(losses: Tensor, window: Window) -> list[float]:
    """The losses as a list; raises ``DartError``, which names the token, if one is not finite."""
    not_finite = (~losses.isfinite()).nonzero().flatten().tolist()
    if not_finite:
        raise DartError(
            f"{window.name}: the loss of its token {window.first + not_finite[0]} is the first "
            f"that is not finite ({float(losses[not_finite[0]])}): the model overflows; try dtype "
            "float32"
        )
    return losses.tolist()


def _fix_masks(model: Any, run: Run, window: Window, protocol: str) -> None:
    """Select masks in a dense pass over the protocol's tokens, and keep them fixed."""
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
            f"{window.name}: the selected masks remove no neurons: give a higher sparsity"
        )
    run.hold(masks)


# A scored window as a part (JSON-serialisable): losses, which tokens ran pruned, and accounting.

DIGITS = 6
"""Decimals of a stored loss (nats); every number of a measurement is computed from these losses."""


def score_part(candidate: BoundMethod, run: Run | None, window: Window, protocol: str) -> Part:
    """Score one window as a part; ``run`` is not attached yet, or None for the untouched model."""
    if run is None:
        return _part(candidate, None, window, protocol)
    run.reset()
    if protocol == STANDARD and is_first(window):
        return _part(candidate, None, window, protocol, dense_tokens=len(window.ids) - 1)
    prunes = run.asks_for_pruning
    with run:
        part = _part(candidate, run, window, protocol)
        part["report"] = without_sequences(run.report().to_dict())
    check_pruned(
        not prunes or any(ran_pruned(part)),
        f"perplexity of {candidate.label}",
        f"{window.scored} scored tokens of a slice",
        "give more prompt or scored tokens, or a smaller --min-evidence or --masking-step",
    )
    # converted to JSON and back, so that the values equal those of a resumed run
    return json.loads(json.dumps(part))  # type: ignore[no-any-return]


def is_first(window: Window) -> bool:
    """Whether a window of ``standard`` has too little text before it to select masks from."""
    return window.before is None or len(window.before) < SHORT


def _part(
    candidate: BoundMethod, run: Run | None, window: Window, protocol: str, dense_tokens: int = 0
) -> dict[str, Any]:
    scored = score_window(candidate.model, run, window, protocol)
    runs = [[flag, len(list(same))] for flag, same in itertools.groupby(scored.pruned)]
    losses = [round(loss, DIGITS) for loss in scored.losses]
    return {"losses": losses, "pruned": runs, "report": None, "dense_tokens": dense_tokens}


def ran_pruned(sample: Mapping[str, Any]) -> list[bool]:
    """For each loss of a sample (or part), whether that token ran pruned."""
    return [bool(flag) for flag, length in sample["pruned"] for _ in range(length)]


def part_key(candidate: BoundMethod, name: str, protocol: str, window: Window) -> str:
    """A part's key, from everything that determines its value except the model."""
    digest = method_digest(candidate)
    for tokens in (window.ids, window.before):
        digest.update(b"|" if tokens is None else tokens.cpu().numpy().tobytes())
    shape = f"{window.id}-{len(window.ids)}-{window.first}"
    return f"ppl/{name}/{candidate.label}/{protocol}/{shape}/{digest.hexdigest()[:24]}"


# Perplexity of one method on one text.  An interrupted run resumes at the first unfinished window.


def measure(
    candidate: BoundMethod,
    task: str,
    options: MeasureOptions,
    parts: UnitStore,
    advance: Callable[[int], None],
) -> Measurement:
    """Measure the perplexity of ``perplexity:TEXT``, ``continuation:TEXTS#SET`` or ``shift:...``.

    Raises ``ConfigError`` if the text is too short or a slice too long, and the errors of
    ``measure_windows``.
    """
    windows, notes = _windows(task, options, candidate.tokenizer, candidate.model)
    trigger = MOMENT if options.oracle else None
    return measure_windows(
        candidate, task, windows, options.protocol, parts, advance, notes, trigger
    )


def count(task: str, options: MeasureOptions, tokenizer: Any, model: Any = None) -> int:
    """The number of windows that ``measure`` scores; ``model``, if given, limits their length."""
    return len(_windows(task, options, tokenizer, model)[0])


def _windows(
    task: str, options: MeasureOptions, tokenizer: Any, model: Any
) -> tuple[Sequence[Window], tuple[str, ...]]:
    kind, name = split(task)
    longest = None if model is None else context_length(model)
    if kind == "perplexity":
        return cut(_ids(tokenizer, documents.read(name)), options, longest)
    names, which = slice_sources(name)
    sources = documents.sources(names)
    return topic_windows(sources, which, tokenizer, options, kind == SHIFT, longest), ()


@lru_cache(maxsize=2)
def _ids(tokenizer: Any, text: str) -> Tensor:
    """Token ids [T]; cached, so that counting and measuring a text tokenise it only once."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def measure_windows(
    candidate: BoundMethod,
    task: str,
    windows: Sequence[Window],
    protocol: str,
    parts: UnitStore,
    advance: Callable[[int], None],
    notes: Sequence[str] = (),
    trigger: int | None = None,
) -> Measurement:
    """Score all windows of ``task``, storing each as a part.

    ``advance(1)`` is called after each window.  ``trigger``, if given, is the decode step of each
    window before which a re-mask (new masks from new observations) starts.  Raises ``ConfigError``
    if all tokens of a slice ran dense although a sparsity was requested, and ``DartError`` if a
    loss is not finite.
    """
    make = Run if trigger is None else partial(ScheduledRun, triggers=[trigger])
    run = candidate.run(likelihood=protocol != "decode", make=make)
    needs_text = protocol == STANDARD and run is not None and run.asks_for_pruning
    if needs_text and all(map(is_first, windows)):
        raise ConfigError(
            f"perplexity of {candidate.label}: protocol standard takes a window's masks from the "
            "text before it, but the only window here is the first; give a longer text, a larger "
            "--limit or a smaller --window"
        )
    name = split(task)[1] if trigger is None else f"{task}, re-mask at {trigger}"
    scored: list[Part] = []
    for window in windows:
        if trigger is not None:  # a ScheduledRun re-masks only once, so each window needs a new run
            run = candidate.run(make=make)
        key = part_key(candidate, name, protocol, window)
        score = partial(score_part, candidate, run, window, protocol)
        scored.append(finished_part(parts, key, score))
        advance(1)
    samples = tuple(map(_sample, windows, scored))
    return Measurement(
        task=task,
        protocol=protocol,
        metric="perplexity",
        higher_is_better=False,
        metrics=_metrics(samples),
        items=tuple(map(_item, windows, samples)),
        samples=samples,
        notes=(*candidate.notes, *notes, *_notes(run, protocol, scored)),
        accounting=merge_accounting(run, scored),
    )


def _sample(window: Window, part: Part) -> dict[str, Any]:
    """The losses of a window, without the ``window.lead`` tokens before a topic change.

    ``first``: the index in the window of the first token of ``losses``.  ``pruned``: whether each
    token ran pruned, run-length encoded as pairs [flag, length].
    """
    flags = ran_pruned(part)[window.lead :]
    return {
        "id": window.id,
        "start": window.start,
        "first": window.first + window.lead,
        "losses": list(part["losses"][window.lead :]),
        "pruned": [[flag, len(list(same))] for flag, same in itertools.groupby(flags)],
    }


def _item(window: Window, sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": window.id,
        **({"source": window.source} if window.source else {}),
        "mean_loss": mean(sample["losses"]),
        "tokens": len(sample["losses"]),
        "pruned_tokens": sum(ran_pruned(sample)),
    }


def _metrics(samples: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Metrics over all windows, and over their pruned tokens if some tokens ran pruned."""
    losses = [loss for sample in samples for loss in sample["losses"]]
    flags = [flag for sample in samples for flag in ran_pruned(sample)]
    pruned = [*itertools.compress(losses, flags)]
    metrics = {"perplexity": perplexity(mean(losses)), "mean_loss": mean(losses)}
    if pruned:
        metrics["perplexity_pruned_tokens"] = perplexity(mean(pruned))
        metrics["mean_loss_pruned_tokens"] = mean(pruned)
    return {**metrics, "tokens": len(losses), "pruned_tokens": len(pruned)}


def _notes(run: Run | None, protocol: str, parts: Sequence[Part]) -> Iterator[str]:
    if run is not None and protocol == "published":
        yield LEAK
    if dense := sum(part["dense_tokens"] for part in parts):
        yield (
            f"{dense} tokens ran dense: fewer than {SHORT} tokens precede their window, too few to "
            "select masks from"
        )


# A window compared with the untouched model's predictions of the same tokens.


class Compared(NamedTuple):
    """Mean loss and mean KL(reference || pruned), in nats; ``tokens``: number of scored tokens."""

    loss: float
    kl: float
    tokens: int


@torch.inference_mode()
def reference_logits(model: Any, window: Window, prompt: Any = None) -> Tensor:
    """The untouched model's logits for a window's scored tokens: [C, V] float32."""
    chunks: list[Tensor] = []
    predict(model, None, window, lambda logits, _: chunks.append(logits.float()), prompt=prompt)
    return torch.cat(chunks)


@torch.inference_mode()
def read_prompt(model: Any, window: Window) -> Any:
    """The KV cache of a dense pass over the window's prompt without its last token."""
    ids = window.ids[None, : window.first - 1].to(model.device)
    return cache_of(model(ids, use_cache=True, logits_to_keep=1))


@torch.inference_mode()
def compare_window(
    model: Any, run: Run, window: Window, reference: Tensor, prompt: Any = None
) -> Compared:
    """Compare a window under ``decode`` with ``reference``, [C, V] from ``reference_logits``.

    ``run`` must be attached.  If it uses the executor ``native``, each forward has one token, as in
    generation; this is also faster with quantised weights.  ``prompt`` is a KV cache, as in
    ``score_window``.  Raises ``DartError`` if a loss is not finite.
    """
    chunk = 1 if run.executor == "native" else CHUNK
    losses: list[Tensor] = []
    divergences: list[float] = []

    def add_losses(logits: Tensor, expected: Tensor) -> None:
        scores, done = logits.float(), len(divergences)
        dense = reference[done : done + len(expected)].to(scores.device)
        losses.append(F.cross_entropy(scores, expected, reduction="none"))
        divergences.extend(divergence(dense, scores).tolist())

    predict(model, run, window, add_losses, prompt=prompt, chunk=chunk)
    nats = finite_losses(torch.cat(losses), window)
    return Compared(mean(nats), mean(divergences), len(nats))
