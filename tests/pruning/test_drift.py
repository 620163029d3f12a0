"""The drift detector: windows, votes, error rates; and when a sequence notices drift."""

import math
from statistics import NormalDist, stdev

import pytest
import torch

from dart_llm.pruning.drift import MAX_WINDOWS, Detector, Rule, make_rule
from synthetic import HIDDEN, Driver, Stream, config, make_layers

PAIRS = Rule(2, lambda mu, sigma: mu - 0.5 * sigma, 2)
"""Windows of two tokens, small enough for numbers by hand."""

REFERENCE = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
# each against the sum of the others: (2, 2), (3, 1), (2, 1), (2, 2)
LEFT_OUT = (math.sqrt(0.5), math.sqrt(0.1), 3 / math.sqrt(10), math.sqrt(0.5))
MU, SIGMA = sum(LEFT_OUT) / 4, stdev(LEFT_OUT)


def tokens(*pairs):
    """[1, T, 2]"""
    return torch.tensor([pairs], dtype=torch.float32)


def windows(*means, size=2):
    """[1, T, 2] tokens whose window means are ``means``, no token equal to its mean."""
    shifts = [(index - (size - 1) / 2) * 0.1 for index in range(size)]
    return tokens(*[(a + shift, b - shift) for a, b in means for shift in shifts])


def at(angle):
    """The unit vector whose cosine with (1, 0) is cos(angle)."""
    return math.cos(angle), math.sin(angle)


def armed(rule, reference):
    detector = Detector(rule)
    detector.observe(reference, None)
    detector.start()
    assert detector.armed
    return detector


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_rules():
    mu, sigma = torch.tensor([0.9, 0.9]), torch.tensor([0.5, 2.0])
    for name, numbers, thresholds in (
        ("published", (5, 1, 0), [0.8, 0.7]),
        ("paper", (10, 3, 0), [0.65, -0.1]),
        ("dart", (10, 3, 0), [0.15, -2.1]),
        ("windows 6 2 0.25", (6, 2, 0), [0.775, 0.4]),
    ):
        rule = make_rule(name)
        assert (rule.window, rule.count, rule.interval) == numbers and rule.threshold is not None
        assert rule.threshold(mu, sigma).tolist() == pytest.approx(thresholds)
    assert make_rule("interval 48") == Rule(0, None, 0, interval=48)
    assert make_rule("never") == Rule(0, None, 0)


def test_windows_by_hand():
    """c is along (3, 2): the mean over all observed tokens, each window against the others."""
    detector = armed(PAIRS, windows(*REFERENCE))
    assert float(detector.mu) == pytest.approx(MU, abs=1e-6)
    assert float(detector.sigma) == pytest.approx(SIGMA, abs=1e-6)
    (check,) = detector.watch(windows((2.0, 2.0)), None)
    assert check.similarity == pytest.approx([5 / math.sqrt(26)], abs=1e-6)
    assert check.threshold == pytest.approx([MU - 0.5 * SIGMA], abs=1e-6)
    assert (check.window, check.counter, check.fired, check.live) == (1, 0, False, [True])
    # a window is the mean of its own tokens, whenever they come
    assert detector.watch(tokens((4.0, 0.0)), None) == []
    assert detector.watch(tokens((0.0, 4.0)), None)[0].similarity == check.similarity
    # tokens beside the windows belong to the centroid; the window in progress is dropped
    detector = Detector(PAIRS)
    detector.observe(torch.cat([windows(*REFERENCE), tokens((-3.0, 5.0))], 1), None)
    assert detector.filled == 1
    detector.start()
    assert (detector.filled, detector.counter) == (0, 0)
    (check,) = detector.watch(windows((1.0, 0.0)), None)
    assert check.similarity == pytest.approx([3 / math.sqrt(9 + 81)], abs=1e-6)


def test_the_counter_goes_up_and_down():
    reference = windows(at(0.1), at(-0.1), at(0.1), at(-0.1))
    detector = armed(Rule(2, lambda mu, sigma: mu - 0.5 * sigma - 0.05, 3), reference)
    low, high = at(1.0), at(0.0)
    series = windows(high, low, low, high, low, high, high, high, low, low, low)
    checks = detector.watch(series, None)
    counters = [0, 1, 2, 1, 2, 1, 0, 0, 1, 2, 3]
    assert [(c.window, c.counter) for c in checks] == [*enumerate(counters, 1)]
    assert [check.fired for check in checks] == [False] * 10 + [True]


def test_too_few_windows_arm_on_the_first_four_of_pruned():
    """The scripts took one token: deviation NaN, threshold NaN, detector dead."""
    dense = windows((-5.0, 1.0), (-5.0, 2.0), (-5.0, 0.0), (1.0, 0.0))
    for observed in (0, 1, 2, 6, 7):
        detector = Detector(PAIRS)
        detector.observe(dense[:, :observed], None)
        detector.start()
        assert not detector.armed
        checks = detector.watch(windows(*REFERENCE, (2.0, 2.0), at(2.0), at(2.0)), None)
        assert [check.threshold is None for check in checks] == [True] * 4 + [False] * 3
        assert [check.counter for check in checks[:5]] == [0] * 5
        assert [check.fired for check in checks] == [False] * 6 + [True]
        # what came before is forgotten: c is along (3, 2) again
        assert float(detector.mu) == pytest.approx(MU, abs=1e-6)
        assert checks[4].similarity == pytest.approx([5 / math.sqrt(26)], abs=1e-6)
        assert checks[4].threshold == pytest.approx([MU - 0.5 * SIGMA], abs=1e-6)


def test_zeros_and_what_is_not_a_number_never_fire():
    checks = armed(PAIRS, torch.zeros(1, 8, 2)).watch(torch.zeros(1, 8, 2), None)
    assert [check.similarity for check in checks] == [[0.0]] * 4
    strange = armed(PAIRS, windows(*REFERENCE)).watch(torch.full((1, 8, 2), math.nan), None)
    assert [(check.counter, check.fired) for check in [*checks, *strange]] == [(0, False)] * 8


def test_memory_is_bounded():
    detector = Detector(PAIRS)
    for _ in range(5):
        detector.observe(torch.randn(1, 2 * 40, 2), None)
    assert len(detector.windows) == MAX_WINDOWS < 200 and float(detector.tokens) == 400
    assert detector.nbytes() == 4 * (2 + 1 + 2 * MAX_WINDOWS)
    detector.start()
    assert detector.nbytes() == 4 * (2 + 1 + 1 + 1)


def rows_of(*angles):
    """[B, 2, 2]: one window, row b at its angle."""
    return torch.cat([windows(at(angle)) for angle in angles])


@pytest.mark.parametrize(
    ("angles", "live", "low"),
    [
        ((1, 1, 0, 0), None, False),  # half is not more than half
        ((1, 1, 1, 0), None, True),
        ((1, 1, 0, 0), (True, True, True, False), True),
        ((1, 1, 1, 0), (False, False, True, True), False),
        ((1, 1, 1, 1), (False, False, False, False), False),
    ],
)
def test_more_than_half_of_the_live_rows(angles, live, low):
    reference = torch.cat([rows_of(*[0.1 * (-1) ** i] * 4) for i in range(4)], 1)
    detector = armed(Rule(2, lambda mu, sigma: mu - 0.05, 1), reference)
    (check,) = detector.watch(rows_of(*angles), None if live is None else torch.tensor(live))
    assert check.fired == low
    assert check.similarity == pytest.approx([math.cos(a) for a in angles], abs=2e-3)
    assert check.live == list(live or [True] * 4)


NORMAL, CENTRE, SPREAD = NormalDist(), 0.8, 0.05
"""The similarities of windows without drift, and their mean and standard deviation."""


def window_of(similarity, axis, size):
    """[1, size, D] equal tokens at ``similarity`` to axis 0, the rest of them along ``axis``."""
    v = torch.zeros(MAX_WINDOWS + 2)
    v[0], v[axis] = similarity, math.sqrt(1 - similarity**2)
    return v.expand(1, size, -1)


def expected_triggers(low, count, horizon):
    """Mean number in ``horizon`` windows, each low by chance; the counter restarts at triggers."""
    states, total = [1.0] + [0.0] * (count - 1), 0.0
    for _ in range(horizon):
        after = [0.0] * count
        for counter, chance in enumerate(states):
            after[max(0, counter - 1)] += chance * (1 - low)
            after[(counter + 1) % count] += chance * low
        total += low * states[-1]
        states = after
    return total


def triggers(detector, seed, horizon, shift=0.0):
    """Number of triggers in a series of windows with normal similarities."""
    detector.counter, count = 0, 0
    drawn = CENTRE + SPREAD * (noise(horizon, seed=seed) - 1 + shift)
    for similarity in drawn.clamp(-1, 1).tolist():
        # along an axis that no window of the reference uses
        window = window_of(similarity, MAX_WINDOWS + 1, detector.rule.window)
        (check,) = detector.watch(window, None)
        if check.fired:
            detector.counter, count = 0, count + 1
    return count


@pytest.mark.parametrize("name", ["published", "paper"])
def test_false_alarms_come_at_the_analytic_rate(name):
    """In 40 series without drift, within 3 standard errors; a fall of 4 sigma fires at once."""
    rule, count, horizon = make_rule(name), 40, 120
    levels = [NORMAL.inv_cdf((k + 0.5) / MAX_WINDOWS) for k in range(MAX_WINDOWS)]
    reference = [window_of(CENTRE + SPREAD * z, 1 + k, rule.window) for k, z in enumerate(levels)]
    detector = armed(rule, torch.cat(reference, 1))
    assert float(detector.sigma) == pytest.approx(SPREAD, rel=0.02)
    counts = [triggers(detector, seed, horizon) for seed in range(count)]
    threshold = float(rule.threshold(torch.tensor(CENTRE), torch.tensor(SPREAD)))
    low = NORMAL.cdf((threshold - CENTRE) / SPREAD)
    want, error = expected_triggers(low, rule.count, horizon), stdev(counts) / math.sqrt(count)
    assert abs(sum(counts) / count - want) < 3 * error < 0.4 * want
    assert all(triggers(detector, seed, rule.count + 1, shift=-4.0) for seed in range(count))


def shifting(at):
    """v keeps one direction (with noise) up to ``at``, then another."""
    stream = Stream(make_layers(), 1, 400)
    first, second = torch.eye(HIDDEN)[0], torch.eye(HIDDEN)[1]
    drawn = 0.3 * (noise(1, 400, HIDDEN, seed=7) - 1)
    stream.v = drawn + torch.where(torch.arange(400)[:, None] < at, first, second)
    return stream


def test_triggers_that_the_guards_put_off_are_suppressed():
    drift = {"rule": "published", "max_dense_share": 0.1}
    run = Driver(config(drift=drift, remask={"observe_tokens": 5}), stream=shifting(80))
    run.prefill(80)
    assert run.steps(60).index("observe") == 45  # (0 + 5) <= 0.1 (45 + 5)
    early = [(check.state, check.trigger) for check in run.checks if check.step < 45]
    assert early == [("suppressed", False)] * 8
    assert run.checks[8].trigger and run.checks[8].state == "armed"
