"""The drift detector: golden similarities and exact windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.pruning.drift import MAX_WINDOWS, MIN_WINDOWS, Detector, Rule, make_rule
from windows import MU, PAIRS, REFERENCE, SIGMA, armed, at, tokens, windows


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
    rule = make_rule("dart")
    assert (rule.window, rule.count, rule.interval) == (10, 3, 0)
    assert rule.threshold is not None
    assert rule.threshold(mu, sigma).tolist() == pytest.approx([0.15, -2.1])
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


def test_the_rule_dart_fires_on_the_third_window_that_is_far_away() -> None:
    """At mu - 1.5 sigma; the paper's rule counts windows at mu - sigma too."""
    reference = windows(*(at(angle) for angle in (0.1, -0.3, 0.2, -0.1, 0.3, -0.2)), size=10)
    detector, paper = armed(make_rule("dart"), reference), armed(make_rule("paper"), reference)
    assert detector.mu is not None and detector.sigma is not None
    mu, sigma = float(detector.mu), float(detector.sigma)
    near, far = at(math.acos(mu - sigma)), at(math.acos(mu - 1.6 * sigma))
    checks = detector.watch(windows(near, far, near, far, far, far, size=10), None)
    assert [check.counter for check in checks] == [0, 1, 0, 1, 2, 3]
    assert [check.fired for check in checks] == [False] * 5 + [True]
    assert checks[0].threshold == pytest.approx([mu - 1.5 * sigma], abs=1e-5)
    assert [check.counter for check in paper.watch(windows(near, far, size=10), None)] == [1, 2]


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
