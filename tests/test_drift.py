"""The drift detector: golden similarities, exact windows, and error rates that the rules imply."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dart_llm.drift import MAX_WINDOWS, MIN_WINDOWS, Check, Detector, Rule, make_rule

NORMAL = NormalDist()
PAIRS = Rule(2, lambda mu, sigma: mu - 0.5 * sigma, 2)
"""Windows of two tokens, small enough for numbers by hand."""


def tokens(*pairs: tuple[float, float]) -> Tensor:
    """[1, T, 2]"""
    return torch.tensor([pairs], dtype=torch.float32)


def windows(*means: tuple[float, float], size: int = 2) -> Tensor:
    """[1, T, 2] tokens whose window means are ``means``, no token equal to its mean."""
    found = []
    for a, b in means:
        for index in range(size):
            shift = (index - (size - 1) / 2) * 0.1
            found.append((a + shift, b - shift))
    return tokens(*found)


def at(angle: float) -> tuple[float, float]:
    """The unit vector whose cosine with (1, 0) is cos(angle)."""
    return math.cos(angle), math.sin(angle)


def armed(rule: Rule, reference: Tensor) -> Detector:
    detector = Detector(rule)
    detector.observe(reference, None)
    detector.start()
    assert detector.armed
    return detector


REFERENCE = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
# each against the sum of the others: (2, 2), (3, 1), (2, 1), (2, 2)
LEFT_OUT = (math.sqrt(0.5), math.sqrt(0.1), 3 / math.sqrt(10), math.sqrt(0.5))
MU = sum(LEFT_OUT) / 4
SIGMA = math.sqrt(sum((s - MU) ** 2 for s in LEFT_OUT) / 3)


def test_the_rules() -> None:
    mu, sigma = torch.tensor([0.9, 0.9]), torch.tensor([0.5, 2.0])
    rule = make_rule("published")
    assert (rule.window, rule.count, rule.interval) == (5, 1, 0)
    assert rule.threshold is not None
    assert rule.threshold(mu, sigma).tolist() == pytest.approx([0.8, 0.7])
    rule = make_rule("paper")
    assert (rule.window, rule.count, rule.interval) == (10, 3, 0)
    assert rule.threshold is not None
    assert rule.threshold(mu, sigma).tolist() == pytest.approx([0.65, -0.1])
    assert make_rule("interval 48") == Rule(0, None, 0, interval=48)
    assert make_rule("never") == Rule(0, None, 0)


def test_leave_one_out_by_hand() -> None:
    detector = armed(PAIRS, windows(*REFERENCE))
    assert float(detector.mu) == pytest.approx(MU, abs=1e-6)
    assert float(detector.sigma) == pytest.approx(SIGMA, abs=1e-6)
    # c is along (3, 2)
    (check,) = detector.watch(windows((2.0, 2.0)), None)
    assert check.similarity == pytest.approx([5 / math.sqrt(26)], abs=1e-6)
    assert check.threshold == pytest.approx([MU - 0.5 * SIGMA], abs=1e-6)
    assert (check.window, check.counter, check.fired, check.live) == (1, 0, False, [True])


def test_tokens_beside_the_windows_belong_to_the_centroid() -> None:
    """c is the mean over all observed tokens, those of an unfinished window too."""
    detector = armed(PAIRS, torch.cat([windows(*REFERENCE), tokens((-3.0, 5.0))], 1))
    (check,) = detector.watch(windows((1.0, 0.0)), None)
    assert check.similarity == pytest.approx([3 / math.sqrt(9 + 81)], abs=1e-6)


def test_the_counter_goes_up_and_down() -> None:
    reference = windows(at(0.1), at(-0.1), at(0.1), at(-0.1))
    detector = armed(Rule(2, lambda mu, sigma: mu - 0.5 * sigma - 0.05, 3), reference)
    low, high = at(1.0), at(0.0)
    checks = detector.watch(
        windows(high, low, low, high, low, high, high, high, low, low, low), None
    )
    assert [check.counter for check in checks] == [0, 1, 2, 1, 2, 1, 0, 0, 1, 2, 3]
    assert [check.fired for check in checks] == [False] * 10 + [True]
    assert [check.window for check in checks] == list(range(1, 12))


def test_one_low_window_is_enough_for_the_published_rule() -> None:
    rule = make_rule("published")
    detector = armed(rule, windows(*[at(0.0)] * 6, size=5))
    assert float(detector.mu) == pytest.approx(1, abs=1e-3)
    checks = detector.watch(windows(at(0.4), at(0.5), at(0.0), size=5), None)
    # cos 0.4 = 0.921 is above mu - 0.1 = 0.9, cos 0.5 = 0.878 is not
    assert [check.fired for check in checks] == [False, True, False]
    assert checks[0].threshold == pytest.approx([0.9], abs=2e-3)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 13), min_size=1, max_size=12),
    st.lists(st.integers(1, 13), min_size=1, max_size=12),
)
def test_windows_do_not_depend_on_the_forwards(
    seed: int, reference: list[int], watched: list[int]
) -> None:
    """Windows follow one another without overlap, however the tokens arrive."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2, sum(reference), 3, generator=generator) + 2
    second = torch.randn(2, sum(watched), 3, generator=generator) + 2
    rule = Rule(3, lambda mu, sigma: mu - 0.5 * sigma, 2)
    whole, parts = Detector(rule), Detector(rule)
    whole.observe(first, None)
    for part in first.split(reference, 1):
        parts.observe(part, None)
    whole.start()
    parts.start()
    assert whole.armed == parts.armed == (sum(reference) // 3 >= MIN_WINDOWS)
    together = whole.watch(second, None)
    apart = [check for part in second.split(watched, 1) for check in parts.watch(part, None)]
    assert len(together) == len(apart) == sum(watched) // 3
    assert whole.filled == parts.filled == sum(watched) % 3
    for a, b in zip(together, apart, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)
        assert (a.counter, a.window) == (b.counter, b.window)
        if a.threshold is not None:
            assert a.threshold == pytest.approx(b.threshold, abs=1e-5)


def test_a_window_is_the_mean_of_its_own_tokens() -> None:
    detector = armed(PAIRS, windows(*REFERENCE))
    assert detector.watch(tokens((4.0, 0.0)), None) == []
    (first,) = detector.watch(tokens((0.0, 4.0)), None)
    (second,) = detector.watch(tokens((6.0, 0.0), (0.0, 0.0)), None)
    assert first.similarity == pytest.approx([5 / math.sqrt(26)], abs=1e-6)
    assert second.similarity == pytest.approx([3 / math.sqrt(13)], abs=1e-6)


# arming late


def test_too_few_windows_arm_on_the_first_four_of_pruned() -> None:
    detector = Detector(PAIRS)
    detector.observe(windows((-5.0, 1.0), (-5.0, 2.0), (-5.0, 0.0)), None)
    detector.start()
    assert not detector.armed
    checks = detector.watch(windows(*REFERENCE, (2.0, 2.0)), None)
    assert [check.threshold is None for check in checks] == [True] * 4 + [False]
    assert [check.counter for check in checks[:4]] == [0] * 4
    assert not any(check.fired for check in checks[:4])
    assert float(detector.mu) == pytest.approx(MU, abs=1e-6)
    assert float(detector.sigma) == pytest.approx(SIGMA, abs=1e-6)
    # the three windows before are forgotten: c is along (3, 2) again
    assert checks[4].similarity == pytest.approx([5 / math.sqrt(26)], abs=1e-6)
    assert checks[4].threshold == pytest.approx([MU - 0.5 * SIGMA], abs=1e-6)


@pytest.mark.parametrize("observed", [0, 1, 2, 7])
def test_a_reference_of_few_tokens_is_never_nan(observed: int) -> None:
    """The scripts took one token: deviation NaN, threshold NaN, detector dead."""
    detector = Detector(PAIRS)
    detector.observe(windows(*REFERENCE)[:, :observed], None)
    detector.start()
    low = [at(2.0)] * 4
    for check in detector.watch(windows(*REFERENCE, *low), None):
        assert all(math.isfinite(value) for value in check.similarity)
        assert check.threshold is None or all(math.isfinite(value) for value in check.threshold)
    assert check.fired


def test_zeros_are_never_nan() -> None:
    detector = armed(PAIRS, torch.zeros(1, 8, 2))
    checks = detector.watch(torch.zeros(1, 8, 2), None)
    assert [check.similarity for check in checks] == [[0.0]] * 4
    assert not any(check.fired for check in checks)


def test_what_is_not_a_number_never_fires() -> None:
    detector = armed(PAIRS, windows(*REFERENCE))
    checks = detector.watch(torch.full((1, 8, 2), math.nan), None)
    assert [check.fired for check in checks] == [False] * 4
    assert [check.counter for check in checks] == [0] * 4


def test_rules_without_windows_see_nothing() -> None:
    for text in ("never", "interval 5"):
        detector = Detector(make_rule(text))
        detector.observe(windows(*REFERENCE), None)
        detector.start()
        assert detector.watch(windows(*REFERENCE), None) == []
        assert detector.nbytes() == 0


def test_half_precision_is_averaged_in_float32() -> None:
    reference = windows(*REFERENCE) * 1000
    detector = armed(PAIRS, reference.half())
    assert float(detector.mu) == pytest.approx(MU, abs=1e-3)
    assert detector.mu is not None
    assert detector.mu.dtype == torch.float32


def test_entering_pruned_drops_the_window_in_progress() -> None:
    detector = Detector(PAIRS)
    detector.observe(torch.cat([windows(*REFERENCE), tokens((9.0, 9.0))], 1), None)
    assert detector.filled == 1
    detector.start()
    assert detector.filled == 0
    assert detector.counter == 0


def test_memory_is_bounded() -> None:
    detector = Detector(PAIRS)
    for _ in range(5):
        detector.observe(torch.randn(1, 2 * 40, 2), None)
    assert len(detector.windows) == MAX_WINDOWS < 200
    assert float(detector.tokens) == 400
    assert detector.nbytes() == 4 * (2 + 1 + 2 * MAX_WINDOWS)
    detector.start()
    assert detector.nbytes() == 4 * (2 + 1 + 1 + 1)


# rolled back tokens


def test_rolled_back_tokens_leave_the_window_in_progress() -> None:
    rule = Rule(5, lambda mu, sigma: mu - 0.5 * sigma, 2)
    generator = torch.Generator().manual_seed(5)
    reference = torch.randn(1, 30, 2, generator=generator) + 1
    stay, gone, more = torch.randn(3, 1, 3, 2, generator=generator) + 1
    clean, cut = armed(rule, reference), armed(rule, reference)
    clean.watch(stay[:, :2], None)
    cut.watch(torch.cat([stay[:, :2], gone[:, :2]], 1), None)
    cut.cut(2)
    assert cut.filled == clean.filled == 2
    assert cut.watch(more, None) == clean.watch(more, None)
    cut.watch(more[:, :1], None)
    cut.cut(4)  # more than the window holds
    assert cut.filled == 0
    cut.cut(1)
    assert cut.filled == 0


# batches


def rows_of(*angles: float, size: int = 2) -> Tensor:
    """[B, size, 2]: one window, row b at its angle."""
    return torch.cat([windows(at(angle), size=size) for angle in angles])


def batch(rows: int = 4) -> Detector:
    reference = torch.cat([rows_of(*[0.1 * (-1) ** i] * rows) for i in range(4)], 1)
    return armed(Rule(2, lambda mu, sigma: mu - 0.05, 1), reference)


@pytest.mark.parametrize(
    ("angles", "live", "low"),
    [
        ((0, 0, 0, 0), None, False),
        ((1, 1, 0, 0), None, False),  # half is not more than half
        ((1, 1, 1, 0), None, True),
        ((1, 1, 0, 0), (True, True, True, False), True),
        ((1, 1, 1, 0), (False, False, True, True), False),
        ((1, 1, 1, 1), (False, False, False, False), False),
        ((0, 0, 0, 1), (False, False, False, True), True),
    ],
)
def test_more_than_half_of_the_live_rows(
    angles: tuple[int, ...], live: tuple[bool, ...] | None, low: bool
) -> None:
    detector = batch()
    alive = None if live is None else torch.tensor(live)
    (check,) = detector.watch(rows_of(*angles), alive)
    assert check.fired == low
    assert check.similarity == pytest.approx([math.cos(a) for a in angles], abs=2e-3)
    assert check.live == list(live or [True] * 4)


def test_every_row_has_its_own_reference() -> None:
    """Row 1 looks the other way and varies more: its own centroid and threshold say so."""
    parts = [rows_of(0.1 * (-1) ** i, math.pi + 0.6 * (-1) ** i) for i in range(4)]
    detector = armed(PAIRS, torch.cat(parts, 1))
    assert detector.mu is not None
    assert float(detector.mu[0]) > float(detector.mu[1])
    alone = armed(PAIRS, torch.cat(parts, 1)[1:])
    assert float(detector.mu[1]) == pytest.approx(float(alone.mu))
    (check,) = detector.watch(rows_of(0.0, math.pi), None)
    assert check.similarity == pytest.approx([1, 1], abs=5e-3)


def test_padding_enters_neither_the_centroid_nor_a_window() -> None:
    generator = torch.Generator().manual_seed(2)
    real = torch.randn(2, 9, 2, generator=generator) + 1
    junk = torch.full((1, 3, 2), 1e6)
    left, right = torch.cat([junk, real[:1]], 1), torch.cat([real[1:], junk], 1)
    weights = torch.ones(2, 12)
    weights[0, :3] = weights[1, 9:] = 0
    padded, plain = Detector(PAIRS), Detector(PAIRS)
    padded.observe(torch.cat([left, right]), weights)
    plain.observe(real, None)
    padded.start()
    plain.start()
    more = torch.randn(2, 4, 2, generator=generator)
    for a, b in zip(padded.watch(more, None), plain.watch(more, None), strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)
        assert a.threshold == pytest.approx(b.threshold, abs=1e-5)


def test_rows_of_unequal_length_share_the_windows_of_the_shortest() -> None:
    """All real tokens enter the centroid; windows stop where the shortest row does."""
    real = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(3)) + 1
    weights = torch.ones(2, 12)
    weights[1, 9:] = 0
    detector = Detector(PAIRS)
    detector.observe(real, weights)
    assert len(detector.windows) == 4
    assert detector.tokens is not None
    assert detector.tokens.tolist() == [12, 9]
    assert detector.total is not None
    assert detector.total[1].tolist() == pytest.approx(real[1, :9].sum(0).tolist())


def test_a_finished_row_does_not_hold_up_the_windows_of_the_others() -> None:
    real = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(4)) + 1
    alone, both = armed(PAIRS, real[:1]), Detector(PAIRS)
    for token in real.split(1, 1):
        both.observe(token, torch.tensor([[1.0], [0.0]]), torch.tensor([True, False]))
    both.start()
    assert both.armed
    assert both.mu is not None
    assert float(both.mu[0]) == pytest.approx(float(alone.mu), abs=1e-6)
    assert bool(both.mu.isfinite().all())


# error rates, at the level of similarities

SERIES, HORIZON, CENTRE, SPREAD = 200, 120, 0.8, 0.05


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
    """200 noisy stationary series; the interval is 3 standard errors over the series."""
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
    """Within n0 + 1 windows, in each of 200 series."""
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
