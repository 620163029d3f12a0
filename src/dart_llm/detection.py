"""Replay a drift detector over a recorded text, as the tracer would run it (tracer.py, life.py).

Nothing is pruned here: the signals are those of the dense model, so every rule sees the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dart_llm.drift import Check, Detector, Rule, make_rule
from dart_llm.drift_guards import guards_allow
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.registry import DRIFT_RULES, METHODS
from dart_llm.signals import Recorded


@dataclass(frozen=True)
class Watcher:
    """A rule, what is observed after a trigger, and the guards that may hold one back.

    ``observe``: tokens; the guards are those of ``DriftConfig``.
    """

    name: str
    rule: Rule
    observe: int
    min_distance: int = 0
    max_dense_share: float | None = None
    allowance: int = 0


def make_watcher(name: str, observe: int) -> Watcher:
    """A drift rule without guards (``paper``, ``interval 64``), or a method's with its own.

    A method (``dart-prompt``) brings its guards and the tokens that it observes; a name that is
    both (``dart``) is the rule.  Raises ``UnknownName``, and ``ConfigError`` for a method that
    never re-masks.
    """
    from dart_llm.config import DriftConfig

    name = name.replace(":", " ")  # as a drift study writes an interval
    base = name.partition(" ")[0]
    if base in DRIFT_RULES:
        return Watcher(name, make_rule(DriftConfig(rule=name).rule), observe)
    if name not in METHODS:
        raise UnknownName("drift rule", name, {*DRIFT_RULES.names(), *METHODS.names()})
    config = METHODS.get(name)
    if config.drift.rule == "never":
        raise ConfigError(f"the method {name} never re-masks, so it has no drift rule to study")
    return Watcher(
        name,
        make_rule(config.drift.rule),
        config.remask.observe_tokens or max(1, config.masking_step),
        config.drift.min_distance,
        config.drift.max_dense_share,
        config.drift.allowance,
    )


def sweep_rule(window: int, k: float, count: int) -> Rule:
    """theta = mu - k sigma, a trigger at ``count``."""
    return Rule(window, lambda mu, sigma: mu - k * sigma, count)


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
    found, rule, v = Replay(), watcher.rule, signal.values[None]
    detector = _armed(signal, rule, v[:, signal.first : prompt])
    at, end, run, spent, last = prompt, v.shape[1], 0, 0, None
    while at < end and (rule.window or rule.interval):
        step = min(end - at, _tokens_until_change(rule, detector, run))
        part = v[:, at : at + step]
        at, run = at + step, run + step
        fired = bool(rule.interval) and run >= rule.interval
        if not fired and rule.window:
            checks = detector.watch(part, None)
            found.checks += [(at, check) for check in checks]
            fired = any(check.fired for check in checks)
        if fired and _allowed(watcher, at - prompt, last, spent):
            found.triggers.append(at)
            last, run = at - prompt, 0
            detector = _armed(signal, rule, v[:, at : at + watcher.observe])
            spent, at = spent + watcher.observe, at + watcher.observe
    return found


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


def _allowed(watcher: Watcher, decoded: int, last: int | None, spent: int) -> bool:
    return guards_allow(
        decoded,
        last,
        spent,
        watcher.observe,
        watcher.min_distance,
        watcher.max_dense_share,
        watcher.allowance,
    )


def similarities(signal: Recorded, prompt: int, window: int) -> list[tuple[int, float]]:
    """Similarity of every window to the prompt, with the tokens seen by its end; no trigger."""
    quiet = Rule(window, lambda mu, sigma: torch.full_like(mu, -torch.inf), 1)
    found = replay(signal, prompt, Watcher("quiet", quiet, 0))
    return [(at, check.similarity[0]) for at, check in found.checks]
