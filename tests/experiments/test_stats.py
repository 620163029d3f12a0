"""Bootstrap intervals: known values, pairing, degenerate data, determinism, coverage."""

import math
import random

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval, interval, paired_interval
from dart_llm.reporting import words

RATIO = "ratio_of_exp_mean"


def gaussian(n, mean=0.0, sigma=1.0, seed=0):
    noise = random.Random(seed)
    return {str(i): noise.gauss(mean, sigma) for i in range(n)}


def plus(sample, amount, noise=0.0):
    own = random.Random(1)
    return {k: v + amount + own.gauss(0, noise) for k, v in sample.items()}


def test_a_mean_agrees_with_the_normal_interval():
    values = gaussian(400, 5.0, 2.0)
    found = interval(values)
    array = np.array(list(values.values()))
    half = 1.96 * array.std(ddof=1) / math.sqrt(400)
    assert found.estimate == pytest.approx(array.mean())
    ends = [array.mean() - half, array.mean() + half]
    assert list(found.ends) == pytest.approx(ends, abs=0.05 * half)
    assert (found.n, found.null, found.significant, found.sign) == (400, None, False, 0)
    flags = interval([0.0, 1.0, 1.0, 0.0, 1.0] * 2)  # a list is taken too
    assert flags.estimate == pytest.approx(0.6) and 0 <= flags.ends[0] < 0.6 < flags.ends[1] <= 1


def test_pairing_by_id_takes_out_what_items_share():
    a = gaussian(100)
    b = plus(a, -0.1, noise=0.05)
    found = paired_interval(a, b)
    assert found.estimate == pytest.approx(0.1, abs=0.02)
    assert found.ends[1] - found.ends[0] < 0.03  # the items alone spread over about 0.4
    assert (found.significant, found.sign, found.differing) == (True, 1, 100)
    other = paired_interval(b, a)
    ends = (-found.ends[1], -found.ends[0])
    assert other.sign == -1 and other.ends == pytest.approx(ends, abs=0.003)
    shuffled = dict(random.Random(3).sample(list(b.items()), 100))
    assert found == paired_interval(a, shuffled)
    assert found == paired_interval({**a, "only in a": 100.0}, {**b, "only in b": -100.0})
    assert found.n == 100 and found != paired_interval(a, b, seed=6)


def test_ratios_of_perplexities_weigh_items_by_their_tokens():
    losses = gaussian(16, 3.0, 0.3)
    a = {k: (v + 0.7, 256) for k, v in plus(losses, 0.0, noise=0.05).items()}
    b = {k: (v, 256) for k, v in losses.items()}
    found = paired_interval(a, b, RATIO)
    direct = math.exp(sum(v for v, _ in a.values()) / 16 - sum(v for v, _ in b.values()) / 16)
    assert (found.null, found.sign) == (1.0, 1) and found.estimate == pytest.approx(direct)
    assert found.ends[0] < math.exp(0.7) < found.ends[1] and found.ends[1] - found.ends[0] < 0.2
    a = {"long": (2.0, 300), "short": (5.0, 100)}
    b = {"long": (1.0, 300), "short": (2.0, 100)}
    found = paired_interval(a, b, RATIO)
    assert found.estimate == pytest.approx(math.exp((600 + 500) / 400 - (300 + 200) / 400))
    single = interval(a, "exp_mean")
    assert single.estimate == pytest.approx(math.exp(1100 / 400))
    assert (single.ends, found.ends, found.n) == (None, None, 2)
    uneven = paired_interval({"x": (1.0, 1), "y": (3.0, 3)}, {"x": (1.0, 3), "y": (3.0, 1)})
    assert uneven.estimate == pytest.approx(10 / 4 - 6 / 4)


def test_what_is_all_equal_has_no_width():
    a = gaussian(10)
    assert paired_interval(a, a) == Interval((0.0, 0.0), 0.0, 10, 0.0, 0)
    found = paired_interval(plus(a, 0.25), a)
    assert found.ends == pytest.approx((0.25, 0.25)) and found.significant
    more, less = ({str(n): (n + add, 9) for n in range(6)} for add in (1.0, 0.0))
    ratio = paired_interval(more, less, RATIO)
    assert (*ratio.ends, ratio.estimate) == pytest.approx((math.e,) * 3)
    assert interval([1.0] * 6) == Interval((1.0, 1.0), 1.0, 6)
    assert paired_interval(a, a).alike and not ratio.alike and not interval([1.0] * 6).alike


def test_what_says_nothing_has_no_interval():
    assert interval({}) is None and paired_interval({"a": 1.0}, {"b": 1.0}) is None
    assert stats.mean({}) is None and stats.mean({"a": (2.0, 5)}) == 2.0
    assert interval([1.0, math.nan, 2.0]) is None and interval([1.0, math.inf]) is None
    assert interval({"a": (1.0, 0), "b": (2.0, 1)}) is None
    huge = interval([(900.0, 1), (1000.0, 1)] * 3, "exp_mean")  # does not overflow
    assert math.isfinite(huge.ends[1])


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_below_six_items_there_is_an_estimate_and_no_interval(n):
    values = {str(place): float(place) for place in range(n)}
    own, pairs = interval(values), paired_interval(plus(values, 1.0, noise=0.1), values)
    assert own.estimate == pytest.approx((n - 1) / 2) and own.n == pairs.n == n
    assert (own.ends is None) == (pairs.ends is None) == (n < 6)
    assert not pairs.few and pairs.significant == (n == 6)
    told, why = own.to_dict(), f"too few (n = {n})"
    assert told.get("no_interval") == (why if n < 6 else None) == words.too_few(n)
    assert ((told["low"], told["high"]) == (None, None)) == (n < 6)
    ends = own.words("{:.1f}".format)
    assert ends == f"too few: n = {n}" if n < 6 else ends.count(" to ") == 1
    groups = [(np.arange(1.0, n + 1), np.arange(2.0, n + 2))]
    assert stats.gap_closed(groups) is not None
    assert (stats.gap_closed_interval(groups) is None) == (n < 6)


def test_five_unequal_items_are_never_significant():
    base = {str(i): 0.0 for i in range(100)}
    for differing in (5, 6):
        other = {name: float(int(name) < differing) for name in base}
        found = paired_interval(other, base)
        assert found.ends[0] > 0 and found.differing == differing
        assert (found.significant, found.few) == (differing == 6, differing == 5)
        assert found.to_dict()["significant"] == (differing == 6)
    assert Interval((1.0, 2.0), 1.5, 9).to_dict() == {"low": 1, "high": 2, "estimate": 1.5, "n": 9}
    assert stats.__doc__ is not None and "Of twenty" in stats.__doc__  # many comparisons


@pytest.mark.parametrize("n", [6, 16])
def test_few_items_have_wide_enough_intervals(n):
    """Slices of a text: without widening, 14 % (n = 6) and 11 % (n = 16) exclude equality."""
    wrong = 0
    for seed in range(200):
        noise = random.Random(seed)
        a = {str(i): noise.gauss(3.0, 0.4) for i in range(n)}
        b = {name: value + noise.gauss(0.0, 0.15) for name, value in a.items()}
        found = paired_interval(a, b, RATIO)
        wrong += not found.ends[0] <= 1 <= found.ends[1]
    assert 3 <= wrong <= 19  # at 5 %: 10 +- 3 standard deviations; BCa leaves a little at n = 6


def test_intervals_over_texts_are_those_of_their_means():
    """The same draws, counted: the mean of a number per text, and what is undefined in some."""
    values = np.array(list(gaussian(12, 1.0).values()))

    def statistics(counts):
        means = counts @ values / counts.sum(1)
        some = np.where(counts[:, 0] > 0, means, np.nan)
        return {"mean": means, "some": some, "none": means * np.nan}

    found = stats.text_intervals(statistics, 12, seed=3)
    whole = interval(list(values), seed=3)
    assert found["mean"] == pytest.approx(whole.ends)
    assert found["some"][0] < found["some"][1] and found["none"] is None
    assert stats.text_intervals(statistics, 5) == {}
