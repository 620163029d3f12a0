"""Error rates of the drift rules against the values that the rules imply."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from dart_llm.pruning.drift import MAX_WINDOWS, Check, Detector, Rule, make_rule
from windows import armed

NORMAL = NormalDist()


# error rates, at the level of similarities

SERIES, HORIZON, CENTRE, SPREAD = 100, 120, 0.8, 0.05


def window_of(similarity: float, axis: int, size: int, dims: int) -> Tensor:
    """[1, size, dims] equal tokens at ``similarity`` to axis 0; the rest lies on ``axis``."""
    v = torch.zeros(dims)
    v[0] = similarity
    v[axis] = math.sqrt(1 - similarity**2)
    return v.expand(1, size, dims)


def stationary(rule: Rule) -> Detector:
    """Armed on windows whose similarities are the quantiles of N(CENTRE, SPREAD)."""
    count = MAX_WINDOWS
    levels = [CENTRE + SPREAD * NORMAL.inv_cdf((k + 0.5) / count) for k in range(count)]
    parts = [window_of(s, 1 + k, rule.window, count + 2) for k, s in enumerate(levels)]
    return armed(rule, torch.cat(parts, 1))


def low_chance(rule: Rule) -> float:
    """Chance that one window of a normal series lies under the threshold."""
    assert rule.threshold is not None
    theta = float(rule.threshold(torch.tensor(CENTRE), torch.tensor(SPREAD)))
    return NORMAL.cdf((theta - CENTRE) / SPREAD)


def expected_triggers(p: float, count: int, horizon: int) -> float:
    """Mean number of triggers in ``horizon`` windows; the counter restarts after each."""
    states, total = [1.0] + [0.0] * (count - 1), 0.0
    for _ in range(horizon):
        after = [0.0] * count
        for n, chance in enumerate(states):
            after[max(0, n - 1)] += chance * (1 - p)
            up = n + 1
            total += chance * p if up == count else 0
            after[0 if up == count else up] += chance * p
        states = after
    return total


def windows_to_trigger(p: float, count: int) -> float:
    """Mean windows until the counter reaches ``count`` from 0."""
    total, step = 0.0, 0.0
    for n in range(count):
        step = 1 / p if n == 0 else (1 + (1 - p) * step) / p
        total += step
    return total


def series(seed: int, length: int, shift: float = 0.0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, generator=generator).tolist()
    return [CENTRE + SPREAD * (value + shift) for value in noise]


def watch_series(detector: Detector, rule: Rule, similarities: list[float]) -> list[Check]:
    """One check per window; the counter restarts after a trigger."""
    checks = []
    axis = MAX_WINDOWS + 1  # an axis that no window of the reference uses
    for similarity in similarities:
        part = window_of(max(-1.0, min(1.0, similarity)), axis, rule.window, MAX_WINDOWS + 2)
        checks += detector.watch(part, None)
        if checks[-1].fired:
            detector.counter = 0
    return checks


def test_paper_gives_a_false_trigger_every_forty_windows() -> None:
    p = low_chance(make_rule("paper"))
    assert p == pytest.approx(NORMAL.cdf(-0.5))
    assert windows_to_trigger(p, 3) == pytest.approx(40.5, abs=0.1)


@pytest.mark.parametrize("name", ["published", "paper"])
def test_false_alarms_come_at_the_analytic_rate(name: str) -> None:
    """100 noisy stationary series; the interval is 3 standard errors over the series."""
    rule = make_rule(name)
    counts, detector = [], stationary(rule)
    for seed in range(SERIES):
        detector.counter = 0
        checks = watch_series(detector, rule, series(seed, HORIZON))
        counts.append(sum(check.fired for check in checks))
    assert float(detector.sigma) == pytest.approx(SPREAD, rel=0.02)
    mean = sum(counts) / SERIES
    error = math.sqrt(sum((c - mean) ** 2 for c in counts) / (SERIES - 1) / SERIES)
    want = expected_triggers(low_chance(rule), rule.count, HORIZON)
    assert abs(mean - want) < 3 * error
    assert error < 0.1 * want


@pytest.mark.parametrize("name", ["published", "paper"])
def test_a_step_of_four_sigma_fires_at_once(name: str) -> None:
    """Within n0 + 1 windows, in each of 100 series."""
    rule = make_rule(name)
    detector = stationary(rule)
    for seed in range(SERIES):
        detector.counter = 0
        checks = watch_series(detector, rule, series(seed, rule.count + 1, shift=-4.0))
        assert any(check.fired for check in checks)


def test_a_reference_estimated_from_few_windows_keeps_the_rate_in_order() -> None:
    """Everything random, 24 windows of reference: leaving one out keeps mu and sigma honest."""
    rule = make_rule("paper")
    fired = 0
    for seed in range(SERIES):
        generator = torch.Generator().manual_seed(9000 + seed)
        v = torch.randn(1, 10 * 24 + 10 * 40, 16, generator=generator) + 0.5
        detector = armed(rule, v[:, :240])
        for part in v[:, 240:].split(10, 1):
            (check,) = detector.watch(part, None)
            if check.fired:
                fired += 1
                detector.counter = 0
    windows_each = SERIES * 40 / fired
    assert 30 < windows_each < 80
