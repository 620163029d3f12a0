"""Bootstrap intervals: known values, pairing, degenerate data, coverage; judged speed-ups."""

import math
import random

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval, SpeedUp, interval, judge, paired_interval
from dart_llm.reporting import words

RATIO = "ratio_of_exp_mean"


def gaussian(n, mean=0.0, sigma=1.0, seed=0):
    noise = random.Random(seed)
    return {str(i): noise.gauss(mean, sigma) for i in range(n)}


def plus(sample, amount, noise=0.0):
    draw = random.Random(1)
    return {k: v + amount + draw.gauss(0, noise) for k, v in sample.items()}


def test_a_mean_agrees_with_the_normal_interval():
    values = gaussian(400, 5.0, 2.0)
    result = interval(values)
    array = np.array(list(values.values()))
    half = 1.96 * array.std(ddof=1) / math.sqrt(400)
    assert result.estimate == pytest.approx(array.mean())
    ends = [array.mean() - half, array.mean() + half]
    assert list(result.ends) == pytest.approx(ends, abs=0.05 * half)
    assert (result.n, result.null, result.significant, result.sign) == (400, None, False, 0)


def test_pairing_by_id_takes_out_what_items_share():
    a = gaussian(100)
    b = plus(a, -0.1, noise=0.05)
    result = paired_interval(a, b)
    assert result.estimate == pytest.approx(0.1, abs=0.02)
    assert result.ends[1] - result.ends[0] < 0.03  # the items alone spread over about 0.4
    assert (result.significant, result.sign, result.differing) == (True, 1, 100)
    assert paired_interval(b, a).sign == -1
    shuffled = dict(random.Random(3).sample(list(b.items()), 100))
    assert result == paired_interval(a, shuffled)
    assert result == paired_interval({**a, "only in a": 100.0}, {**b, "only in b": -100.0})
    assert result.n == 100 and result != paired_interval(a, b, seed=6)


def test_ratios_of_perplexities_weigh_items_by_their_tokens():
    losses = gaussian(16, 3.0, 0.3)
    a = {k: (v + 0.7, 256) for k, v in plus(losses, 0.0, noise=0.05).items()}
    b = {k: (v, 256) for k, v in losses.items()}
    result = paired_interval(a, b, RATIO)
    direct = math.exp(sum(v for v, _ in a.values()) / 16 - sum(v for v, _ in b.values()) / 16)
    assert (result.null, result.sign) == (1.0, 1) and result.estimate == pytest.approx(direct)
    assert result.ends[0] < math.exp(0.7) < result.ends[1] and result.ends[1] - result.ends[0] < 0.2
    a = {"long": (2.0, 300), "short": (5.0, 100)}
    b = {"long": (1.0, 300), "short": (2.0, 100)}
    assert paired_interval(a, b, RATIO).estimate == pytest.approx(math.exp((1100 - 500) / 400))
    assert interval(a, "exp_mean").estimate == pytest.approx(math.exp(1100 / 400))


def test_what_is_all_equal_has_no_width():
    a = gaussian(10)
    assert paired_interval(a, a) == Interval((0.0, 0.0), 0.0, 10, 0.0, 0)
    result = paired_interval(plus(a, 0.25), a)
    assert result.ends == pytest.approx((0.25, 0.25)) and result.significant
    more, less = ({str(n): (n + add, 9) for n in range(6)} for add in (1.0, 0.0))
    ratio = paired_interval(more, less, RATIO)
    assert (*ratio.ends, ratio.estimate) == pytest.approx((math.e,) * 3)
    assert paired_interval(a, a).alike and not ratio.alike and not interval([1.0] * 6).alike


def test_what_says_nothing_has_no_interval():
    assert stats.mean({}) is None and paired_interval({"a": 1.0}, {"b": 1.0}) is None
    for values in ([], [1.0, math.nan], [1.0, math.inf], {"a": (1.0, 0), "b": (2.0, 1)}):
        assert interval(values) is None
    huge = interval([(900.0, 1), (1000.0, 1)] * 3, "exp_mean")  # does not overflow
    assert math.isfinite(huge.ends[1])


@pytest.mark.parametrize("n", [2, 5, 6])
def test_below_six_items_there_is_an_estimate_and_no_interval(n):
    values = {str(number): float(number) for number in range(n)}
    alone, pairs = interval(values), paired_interval(plus(values, 1.0, noise=0.1), values)
    assert alone.estimate == pytest.approx((n - 1) / 2) and alone.n == pairs.n == n
    assert (alone.ends is None) == (pairs.ends is None) == (n < 6)
    assert not pairs.few and pairs.significant == (n == 6)
    why = f"too few (n = {n})" if n < 6 else None
    assert alone.to_dict().get("no_interval") == why == words.too_few(n)
    gaps = np.arange(1.0, n + 1), np.arange(2.0, n + 2)
    assert stats.gap_closed(*gaps) is not None
    assert (stats.gap_closed_interval(*gaps) is None) == (n < 6)


@pytest.mark.parametrize("differing", [5, 6])
def test_five_unequal_items_are_never_significant(differing):
    base = {str(i): 0.0 for i in range(100)}
    result = paired_interval({name: float(int(name) < differing) for name in base}, base)
    assert result.ends[0] > 0 and result.differing == differing
    assert (result.significant, result.few) == (differing == 6, differing == 5)
    assert result.to_dict()["significant"] == (differing == 6)


@pytest.mark.parametrize("n", [6, 16])
def test_few_items_have_wide_enough_intervals(n):
    """Slices of a text: without widening, 14 % (n = 6) and 11 % (n = 16) exclude equality."""
    wrong = 0
    for seed in range(200):
        noise = random.Random(seed)
        a = {str(i): noise.gauss(3.0, 0.4) for i in range(n)}
        b = {name: value + noise.gauss(0.0, 0.15) for name, value in a.items()}
        result = paired_interval(a, b, RATIO)
        wrong += not result.ends[0] <= 1 <= result.ends[1]
    assert 3 <= wrong <= 19  # at 5 %: 10 +- 3 standard deviations; BCa leaves a little at n = 6


def test_intervals_over_texts_are_those_of_their_means():
    """The same draws, counted: the mean of a number per text, and what is undefined in some."""
    values = np.array(list(gaussian(12, 1.0).values()))

    def statistics(counts):
        means = counts @ values / counts.sum(1)
        some = np.where(counts[:, 0] > 0, means, np.nan)
        return {"mean": means, "some": some, "none": means * np.nan}

    intervals = stats.text_intervals(statistics, 12, seed=3)
    whole = interval(list(values), seed=3)
    assert intervals["mean"] == pytest.approx(whole.ends)
    assert intervals["some"][0] < intervals["some"][1] and intervals["none"] is None
    assert stats.text_intervals(statistics, 5) == {}


@pytest.mark.parametrize(
    ("base", "other", "limit", "ratio"),
    [
        ([2.0, 2.2, 2.0], [1.6, 2.0, 1.0], 2.5, 1.25),  # the median of the repetitions
        ([1.2, 1.3, 1.4], [1.0, 1.0, 1.0], 1.26, 1.26),  # its scatter reaches the limit
        ([1.35] * 3, [1.0] * 3, 1.26, 1.26),  # what computing may add
        ([1.40] * 3, [1.0] * 3, 1.26, None),
        ([1.0, 1.0], [1.5, 1.5], 1.2, 2 / 3),  # slower than dense contradicts nothing
        ([1.494], [0.260], 1.24, None),  # 5.74 x, the number that a run once printed
        ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.1], 1.5, None),
        ([1.0, 4.0, 1.0, 4.0], [1.0] * 4, None, None),  # says nothing, whatever the bytes
    ],
)
def test_a_speed_up_above_the_bandwidth_limit_is_disturbed(base, other, limit, ratio):
    judged = judge(base, other, limit)
    assert judged.ratio == (None if ratio is None else pytest.approx(ratio))
    data = judged.to_dict()
    assert (data["speed_up"], data["bytes_limit"]) == (judged.ratio, limit)
    assert data["disturbed"] == (stats.DISTURBED if ratio is None else None)


def test_repetitions_come_in_pairs():
    assert judge([1.2, 1.3, 1.4], [1.0] * 3).scatter == pytest.approx(0.05 / 1.3)
    assert judge([2.0], [1.0], 2.5) == SpeedUp(2.0, 2.5, None)
    with pytest.raises(ValueError, match="shorter"):
        judge([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="at least one repetition"):
        judge([], [])
