"""Record signals of a text, replay drift rules over them, match triggers with topic changes.

A signal has one vector per token, [T, D] float32, recorded in one dense forward.  As in a run, the
detector computes the cosine between the mean of each window of tokens and the mean of the
reference: the tokens of the prompt or, after a trigger, the tokens that follow the trigger.
Nothing is pruned, so all rules see the same signal.

A token after the prompt (called decoded, as in a run) is *stationary* while the reference is from
the token's topic: before the first change, and from the first trigger after a change up to the next
change.  A trigger at a stationary token is a false alarm.  The first trigger after a change detects
the change if it is within the horizon; otherwise the trigger is late.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dart_llm.errors import ConfigError, DartError, UnknownName
from dart_llm.experiments.stats import text_intervals
from dart_llm.models import capture
from dart_llm.pruning.config import DriftConfig
from dart_llm.pruning.drift import SINKS, Check, Detector, Rule, guards_allow, make_rule
from dart_llm.pruning.registry import DRIFT_RULES, METHODS
from dart_llm.reporting.words import too_few


def layers_of(name: str, count: int) -> tuple[int, ...]:
    """The indices, below ``count``, of the layers that the signal ``name`` uses.

    Empty for the hidden state.  The depth of layer l is l / (count - 1), as in docs/reference.md.
    """
    last = count - 1
    if name == "attention-80":
        return (round(0.8 * last),)
    if name == "attention-several":
        return tuple(range(math.ceil(last / 2), count))
    return () if name == "hidden" else (last,)


@torch.no_grad()
def record_signals(model: Any, ids: Tensor, signals: Sequence[str]) -> dict[str, Tensor]:
    """All ``signals`` of the text ``ids`` [T], by name, from one forward of the untouched model.

    Each signal is [T, D] float32 on the CPU.  Raises ``DartError`` if a signal is not finite.
    """
    layers = {name: layers_of(name, capture.layer_count(model)) for name in signals}
    vectors: dict[int | str, Tensor] = {}

    def record(name: int | str, v: Tensor) -> None:
        vectors[name] = v.detach().to("cpu", torch.float32, copy=True)

    with contextlib.ExitStack() as stack:
        outputs = sorted({layer for of_signal in layers.values() for layer in of_signal})
        stack.enter_context(capture.attention_outputs(model, outputs, record))
        if "hidden" in signals:
            stack.enter_context(capture.last_hidden(model, partial(record, "hidden")))
        model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    recorded = {}
    for name in signals:
        parts = [vectors[layer] for layer in layers[name] or (name,)]
        if len(parts) > 1:  # normalise each token's vectors, then concatenate them
            parts = [normalize(part, dim=-1) for part in parts]
        recorded[name] = torch.cat(parts, -1)
        if not bool(recorded[name].isfinite().all()):
            raise DartError(
                f"the signal {name} is not finite: the model overflows; try dtype float32"
            )
    return recorded


# Replaying a detector over a signal.


@dataclass(frozen=True)
class Watcher:
    """A drift rule with guards that may suppress its triggers.

    ``observe``: number of tokens observed after a trigger.  ``guards``: ``min_distance``,
    ``max_dense_share`` and ``allowance``, as in ``DriftConfig``.
    """

    name: str
    rule: Rule
    observe: int
    guards: tuple[int, float | None, int] = (0, None, 0)


def make_watcher(name: str, observe: int) -> Watcher:
    """The watcher for a drift rule (``paper``, ``interval 64``) or a method (``dart-prompt``).

    A rule has no guards and observes ``observe`` tokens after a trigger.  A method has its own
    rule, guards and number of observed tokens.  ``dart`` names a rule and a method; it means the
    rule.  Raises ``UnknownName``, and ``ConfigError`` for a method that never re-masks.
    """
    name = name.replace(":", " ")  # drift studies write interval:64
    if name.partition(" ")[0] in DRIFT_RULES:
        return Watcher(name, make_rule(DriftConfig(rule=name).rule), observe)
    if name not in METHODS:
        raise UnknownName("drift rule", name, {*DRIFT_RULES.names(), *METHODS.names()})
    config = METHODS.get(name)
    drift, tokens = config.drift, config.remask.observe_tokens or max(1, config.masking_step)
    if drift.rule == "never":
        raise ConfigError(f"the method {name} never re-masks, so it has no drift rule to study")
    guards = drift.min_distance, drift.max_dense_share, drift.allowance
    return Watcher(name, make_rule(drift.rule), tokens, guards)


@torch.no_grad()
def replay(
    signal: Tensor, prompt: int, watcher: Watcher
) -> tuple[list[int], list[tuple[int, Check]]]:
    """Replay a rule over ``signal`` [T, D], with the first ``prompt`` tokens as the reference.

    After a trigger the next ``watcher.observe`` tokens are observed and become the new reference;
    the detector, its window and its counter start again.  Returns two lists.  The first has, for
    every trigger, the number of tokens read by then, prompt included.  The second has, for every
    completed window, the number of tokens read by then and the window's check.
    """
    triggers, windows = list[int](), list[tuple[int, Check]]()
    rule, v = watcher.rule, signal[None]
    detector = _armed(rule, v[:, SINKS:prompt])
    # at: tokens read; end: tokens in total; since: tokens watched since the last trigger;
    # spent: tokens observed after triggers; last: tokens between the prompt and the last trigger
    at, end, since, spent, last = prompt, v.shape[1], 0, 0, None
    while at < end and (rule.window or rule.interval):
        # read on to the next token at which a window or the interval can complete
        steps = [end - at, rule.window - detector.filled if rule.window else end]
        steps += [rule.interval - since] if rule.interval else []
        step = max(1, min(steps))
        part = v[:, at : at + step]
        at, since = at + step, since + step
        fired = bool(rule.interval) and since >= rule.interval
        if not fired and rule.window:
            checks = detector.watch(part, None)
            windows += [(at, check) for check in checks]
            fired = any(check.fired for check in checks)
        if fired and guards_allow(at - prompt, last, spent, watcher.observe, *watcher.guards):
            triggers.append(at)
            last, since = at - prompt, 0
            detector = _armed(rule, v[:, at : at + watcher.observe])
            spent, at = spent + watcher.observe, at + watcher.observe
    return triggers, windows


def _armed(rule: Rule, observed: Tensor) -> Detector:
    """A detector whose reference is ``observed``, [1, T, D]."""
    detector = Detector(rule)
    detector.observe(observed, None)
    detector.start()
    return detector


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """How a rule performed on a text; the module's docstring defines the terms.

    ``reach``: for each change, the largest delay that counts as a detection: the horizon or, if
    smaller, the number of tokens to the next change or the end.  ``delays``: for each change, the
    number of new-topic tokens read when it was detected; None if missed.  ``late``: number of late
    triggers.  ``alarms``: number of all triggers.  ``stationary``: number of stationary tokens.
    """

    reach: tuple[int, ...]
    delays: tuple[int | None, ...]
    false_alarms: int
    late: int
    alarms: int
    stationary: int
    decoded: int


def outcome(
    triggers: Sequence[int], changes: Sequence[int], prompt: int, end: int, horizon: int
) -> Outcome:
    """Classify the triggers on a text.

    ``triggers``: number of tokens read at each trigger, ascending; ``changes``: index of the first
    token of each new topic, ascending; ``end``: number of tokens in the text, prompt included.
    """
    fired, begins = set(triggers), {change: number for number, change in enumerate(changes)}
    delays: list[int | None] = [None] * len(changes)
    pending: int | None = None  # the last change, if no trigger has followed it
    false_alarms = late = stationary = 0
    for token in range(prompt, end):
        pending = begins.get(token, pending)
        stationary += pending is None
        if token + 1 not in fired:
            continue
        delay = 0 if pending is None else token + 1 - changes[pending]
        if pending is None:
            false_alarms += 1
        elif delay <= horizon:
            delays[pending] = delay
        else:
            late += 1
        pending = None
    ends = zip(changes, [*changes[1:], end], strict=True)
    reach = tuple(min(horizon, after - change) for change, after in ends)
    counts = (false_alarms, late, len(fired), stationary, end - prompt)
    return Outcome(reach, tuple(delays), *counts)


INTERVALS = {
    "rate": "rate_interval",
    "delay_with_misses": "delay_with_misses_interval",
    "false_alarms_per_1000": "fa_interval",
    "gain": "gain_interval",
}
"""Maps each statistic that has an interval to the key of the interval."""


def rates(outcomes: Sequence[Outcome], seed: int = 0, intervals: bool = True) -> dict[str, Any]:
    """A rule's statistics over all texts, as a row of detection.json.

    ``delay_median``: median delay of the detected changes.  ``delay_with_misses``: mean delay of
    all changes, where a miss counts as the change's full reach.  ``alarms_per_1000``: triggers per
    1,000 decoded tokens.  ``blind_rate``: the detection rate of a rule that fires as often, at
    equal distances.  A change is at a random position between two alarms, so the probability that
    an alarm falls within the change's reach is min(1, reach x alarms per token).  Intervals are 95
    % intervals by resampling texts; with too few texts they are None and ``no_interval`` says why.
    """
    statistics = _statistics(outcomes, np.ones((1, len(outcomes))))
    delays = [delay for outcome in outcomes for delay in outcome.delays if delay is not None]
    ends: Mapping[str, tuple[float, float] | None] = {}
    if intervals:
        ends = text_intervals(lambda weights: _statistics(outcomes, weights), len(outcomes), seed)
    counts = ("false_alarms", "late", "alarms", "decoded")
    return {
        "changes": sum(len(o.delays) for o in outcomes),
        "detected": len(delays),
        "delay_median": float(median(delays)) if delays else None,
        **{name: float(value[0]) for name, value in statistics.items()},
        **{key: list(ends.get(name) or ()) or None for name, key in INTERVALS.items()},
        **{name: sum(getattr(o, name) for o in outcomes) for name in counts},
        "tokens": sum(o.stationary for o in outcomes),
        "no_interval": too_few(len(outcomes)),
    }


def _statistics(outcomes: Sequence[Outcome], weights: Array) -> dict[str, Array]:
    """Statistics by name, each [B]; ``weights`` [B, texts]: how often each resample has a text."""

    def total(value: Callable[[Outcome], int]) -> Array:
        summed: Array = weights @ np.array([float(value(o)) for o in outcomes])
        return summed

    changes = np.maximum(total(lambda o: len(o.delays)), 1)
    rate = total(lambda o: sum(delay is not None for delay in o.delays)) / changes
    per_token = total(lambda o: o.alarms) / np.maximum(total(lambda o: o.decoded), 1)
    blind = np.zeros_like(rate)
    for tokens in {tokens for o in outcomes for tokens in o.reach}:
        share = total(lambda o, tokens=tokens: o.reach.count(tokens)) / changes  # type: ignore[misc]
        blind += share * np.minimum(1.0, tokens * per_token)
    stationary = np.maximum(total(lambda o: o.stationary), 1)
    return {
        "rate": rate,
        "delay_with_misses": total(_waited) / changes,
        "false_alarms_per_1000": 1000 * total(lambda o: o.false_alarms) / stationary,
        "alarms_per_1000": 1000 * per_token,
        "blind_rate": blind,
        "gain": rate - blind,
    }


def _waited(outcome: Outcome) -> int:
    """The sum of the delays of a text's changes, where a miss counts as the change's reach."""
    return sum(r if d is None else d for d, r in zip(outcome.delays, outcome.reach, strict=True))
