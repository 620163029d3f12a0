"""A detector replayed over a signal, and how well its triggers meet known changes.

A decoded token is *stationary* while the reference is of its topic: before the first change, and
from the first trigger after a change up to the next change.  A trigger there is a false alarm.  The
first trigger after a change detects it when it comes within the horizon, and is late afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.stats import text_intervals
from dart_llm.pruning.config import DriftConfig
from dart_llm.pruning.drift import Check, Detector, Rule, guards_allow, make_rule
from dart_llm.pruning.registry import DRIFT_RULES, METHODS
from dart_llm.reporting.words import too_few
from dart_llm.studies.drift.signals import Recorded

# As the controller of a run would run the detector.  Nothing is pruned here: the signals are those
# of the dense model, so every rule sees the same text.


@dataclass(frozen=True)
class Watcher:
    """A rule, the tokens observed after a trigger, and the guards that may suppress one.

    ``guards``: ``min_distance``, ``max_dense_share`` and ``allowance`` of ``DriftConfig``.
    """

    name: str
    rule: Rule
    observe: int
    guards: tuple[int, float | None, int] = (0, None, 0)


def make_watcher(name: str, observe: int) -> Watcher:
    """A drift rule without guards (``paper``, ``interval 64``), or a method's with its own.

    A method (``dart-prompt``) brings its guards and the tokens that it observes; a name that is
    both (``dart``) is the rule.  Raises ``UnknownName``, and ``ConfigError`` for a method that
    never re-masks.
    """
    name = name.replace(":", " ")  # as a drift study writes an interval
    base = name.partition(" ")[0]
    if base in DRIFT_RULES:
        return Watcher(name, make_rule(DriftConfig(rule=name).rule), observe)
    if name not in METHODS:
        raise UnknownName("drift rule", name, {*DRIFT_RULES.names(), *METHODS.names()})
    config = METHODS.get(name)
    if config.drift.rule == "never":
        raise ConfigError(f"the method {name} never re-masks, so it has no drift rule to study")
    drift, tokens = config.drift, config.remask.observe_tokens or max(1, config.masking_step)
    guards = drift.min_distance, drift.max_dense_share, drift.allowance
    return Watcher(name, make_rule(drift.rule), tokens, guards)


@dataclass
class Replay:
    """What a watcher did on one text.

    ``triggers``: for each, the tokens of the text seen by then, prompt included.  ``checks``: the
    completed windows, each with the tokens seen.
    """

    triggers: list[int] = field(default_factory=list)
    checks: list[tuple[int, Check]] = field(default_factory=list)


@torch.no_grad()
def replay(signal: Recorded, prompt: int, watcher: Watcher) -> Replay:
    """Watch the tokens after ``prompt`` one after the other; the prompt is the reference.

    After a trigger the next ``watcher.observe`` tokens are observed and become the new reference,
    and the detector, its window and its counter start anew.
    """
    replayed, rule, v = Replay(), watcher.rule, signal.values[None]
    detector = _armed(signal, rule, v[:, signal.first : prompt])
    at, end, run, spent, last = prompt, v.shape[1], 0, 0, None
    while at < end and (rule.window or rule.interval):
        step = min(end - at, _tokens_until_change(rule, detector, run))
        part = v[:, at : at + step]
        at, run = at + step, run + step
        fired = bool(rule.interval) and run >= rule.interval
        if not fired and rule.window:
            checks = detector.watch(part, None)
            replayed.checks += [(at, check) for check in checks]
            fired = any(check.fired for check in checks)
        if fired and guards_allow(at - prompt, last, spent, watcher.observe, *watcher.guards):
            replayed.triggers.append(at)
            last, run = at - prompt, 0
            detector = _armed(signal, rule, v[:, at : at + watcher.observe])
            spent, at = spent + watcher.observe, at + watcher.observe
    return replayed


def _armed(signal: Recorded, rule: Rule, observed: Tensor) -> Detector:
    detector = Detector(rule, signal.compare)
    detector.observe(observed, None)
    detector.start()
    return detector


def _tokens_until_change(rule: Rule, detector: Detector, run: int) -> int:
    """At most one window is completed, or the interval, at the last of these tokens."""
    bounds = [rule.window - detector.filled] if rule.window else []
    if rule.interval:
        bounds.append(rule.interval - run)
    return max(1, min(bounds))


def similarities(signal: Recorded, prompt: int, window: int) -> list[tuple[int, float]]:
    """Similarity of every window to the prompt, with the tokens seen by its end; no trigger."""
    quiet = Rule(window, lambda mu, sigma: torch.full_like(mu, -torch.inf), 1)
    replayed = replay(signal, prompt, Watcher("quiet", quiet, 0))
    return [(at, check.similarity[0]) for at, check in replayed.checks]


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What one rule did on one text.

    ``reach``: for every change, the tokens within which it could be detected.  ``delays``: for
    every change, tokens of the new topic that were read at its detection, or None.
    ``stationary``: tokens, see the module's docstring.
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
    """Sort the triggers of one text.

    triggers: tokens seen at each; changes: index of the first token of each new topic; both rise.
    ``end``: tokens of the text, of which ``prompt`` are the prompt.
    """
    fired, begins = set(triggers), {change: number for number, change in enumerate(changes)}
    delays: list[int | None] = [None] * len(changes)
    pending: int | None = None
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
    reach = tuple(
        min(horizon, after - change)
        for change, after in zip(changes, [*changes[1:], end], strict=True)
    )
    counts = (false_alarms, late, len(fired), stationary, end - prompt)
    return Outcome(reach, tuple(delays), *counts)


INTERVALS = {
    "rate": "rate_interval",
    "delay_with_misses": "delay_with_misses_interval",
    "false_alarms_per_1000": "fa_interval",
    "gain": "gain_interval",
}
"""The numbers that have one, and the keys of their intervals."""


def rates(outcomes: Sequence[Outcome], seed: int = 0, intervals: bool = True) -> dict[str, Any]:
    """One rule over all texts, as JSON-able data: the entries of a row of detection.json.

    ``delay_median``: over detected changes.  ``delay_with_misses``: mean over all changes, a miss
    counting as its whole reach.  ``alarms_per_1000``: of all decoded tokens.  ``blind_rate``: what
    a rule that fires at equal distances, as often, detects: where a change lies between two alarms
    is left to chance, so an alarm falls within its reach with min(1, reach x alarms per token).
    Intervals: 95 %, by resampling whole texts; None of too few, as ``no_interval`` says.
    """
    once = _statistics(outcomes, np.ones((1, len(outcomes))))
    values = {name: float(value[0]) for name, value in once.items()}
    delays = [delay for outcome in outcomes for delay in outcome.delays if delay is not None]
    ends: Mapping[str, tuple[float, float] | None] = {}
    if intervals:
        ends = text_intervals(lambda weights: _statistics(outcomes, weights), len(outcomes), seed)
    bounds = {name: ends.get(name) for name in INTERVALS}
    counts = ("false_alarms", "late", "alarms", "decoded")
    return {
        "changes": sum(len(o.delays) for o in outcomes),
        "detected": len(delays),
        "delay_median": float(median(delays)) if delays else None,
        **values,
        **{key: list(bounds[name] or ()) or None for name, key in INTERVALS.items()},
        **{name: sum(getattr(o, name) for o in outcomes) for name in counts},
        "tokens": sum(o.stationary for o in outcomes),
        "no_interval": too_few(len(outcomes)),
    }


def _statistics(outcomes: Sequence[Outcome], weights: Array) -> dict[str, Array]:
    """weights: [B, n], how often each text counts.  Each statistic is [B]."""

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
    """Delays, a miss counting as its reach."""
    return sum(r if d is None else d for d, r in zip(outcome.delays, outcome.reach, strict=True))


def auc(same: Sequence[float], other: Sequence[float]) -> float | None:
    """Chance that a value of ``same`` is above one of ``other``, ties counting half; None: empty.

    The area under the curve of the test that calls low values a change (Mann and Whitney, 1947).
    """
    if not same or not other:
        return None
    a, b = np.asarray(same)[:, None], np.asarray(other)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())
