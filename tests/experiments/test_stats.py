"""Bootstrap intervals: known values, pairing, degenerate data, determinism."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.experiments.stats import Interval, Sample, interval, paired_interval


def gaussian(n: int, mean: float = 0.0, sigma: float = 1.0, seed: int = 0) -> dict[str, float]:
    noise = random.Random(seed)
    return {str(i): noise.gauss(mean, sigma) for i in range(n)}


def plus(sample: Sample, amount: float, noise: float = 0.0, seed: int = 1) -> dict[str, float]:
    own = random.Random(seed)
    return {k: float(v) + amount + own.gauss(0, noise) for k, v in sample.items()}  # type: ignore[arg-type]


def test_a_mean_agrees_with_the_normal_interval() -> None:
    values = gaussian(400, 5.0, 2.0)
    found = interval(values)
    assert found is not None
    array = np.array(list(values.values()))
    half = 1.96 * array.std(ddof=1) / math.sqrt(400)
    assert found.estimate == pytest.approx(array.mean())
    assert found.n == 400 and found.null is None
    assert found.low == pytest.approx(array.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(array.mean() + half, abs=0.05 * half)
    assert not found.significant and found.sign == 0


def test_a_list_is_taken_too() -> None:
    found = interval([0.0, 1.0, 1.0, 0.0, 1.0])
    assert found is not None and found.estimate == pytest.approx(0.6)
    assert 0.0 <= found.low < 0.6 < found.high <= 1.0


def test_pairing_takes_out_what_items_share() -> None:
    a = gaussian(100)
    b = plus(a, -0.1, noise=0.05)
    found = paired_interval(a, b)
    assert found is not None
    assert found.estimate == pytest.approx(0.1, abs=0.02)
    assert found.high - found.low < 0.03  # the items alone spread over about 0.4
    assert found.significant and found.sign == 1 and found.differing == 100
    other = paired_interval(b, a)
    assert other is not None and other.sign == -1
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=0.003)


def test_items_are_matched_by_id_in_any_order() -> None:
    a, b = gaussian(40), gaussian(40, seed=7)
    shuffled = dict(random.Random(3).sample(list(b.items()), 40))
    found = paired_interval(a, b, seed=5)
    assert found == paired_interval(a, shuffled, seed=5)
    assert found == paired_interval({**a, "only in a": 100.0}, {**b, "only in b": -100.0}, seed=5)
    assert found is not None and found.n == 40
    assert found != paired_interval(a, b, seed=6)


def test_a_ratio_of_perplexities() -> None:
    losses = gaussian(16, 3.0, 0.3)
    a: Sample = {k: (v + 0.7, 256) for k, v in plus(losses, 0.0, noise=0.05).items()}
    b: Sample = {k: (v, 256) for k, v in losses.items()}
    found = paired_interval(a, b, "ratio_of_exp_mean")
    assert found is not None and found.null == 1.0
    direct = math.exp(
        sum(v for v, _ in a.values()) / 16 - sum(v for v, _ in b.values()) / 16  # type: ignore[misc]
    )
    assert found.estimate == pytest.approx(direct)
    assert found.low < math.exp(0.7) < found.high and found.high - found.low < 0.2
    assert found.sign == 1


def test_tokens_are_the_weights() -> None:
    a: Sample = {"long": (2.0, 300), "short": (5.0, 100)}
    b: Sample = {"long": (1.0, 300), "short": (2.0, 100)}
    found = paired_interval(a, b, "ratio_of_exp_mean")
    assert found is not None
    assert found.estimate == pytest.approx(math.exp((600 + 500) / 400 - (300 + 200) / 400))
    single = interval(a, "exp_mean")
    assert single is not None and single.estimate == pytest.approx(math.exp(1100 / 400))
    assert math.exp(2.0) <= single.low <= single.high <= math.exp(5.0)
    uneven = paired_interval({"x": (1.0, 1), "y": (3.0, 3)}, {"x": (1.0, 3), "y": (3.0, 1)})
    assert uneven is not None and uneven.estimate == pytest.approx(10 / 4 - 6 / 4)


def test_what_is_all_equal_has_no_width() -> None:
    a = gaussian(10)
    assert paired_interval(a, a) == Interval(0.0, 0.0, 0.0, 10, 0.0, 0)
    found = paired_interval(plus(a, 0.25), a)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    assert found.significant
    ratio = paired_interval({"a": (2.0, 9), "b": (3.0, 9)}, {"a": (1.0, 9), "b": (2.0, 9)}, RATIO)
    assert ratio is not None
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((math.e,) * 3)
    assert interval([1.0, 1.0, 1.0]) == Interval(1.0, 1.0, 1.0, 3)


RATIO: stats.Kind = "ratio_of_exp_mean"


def test_fewer_than_two_items_say_nothing() -> None:
    assert interval({}) is None and interval([3.0]) is None
    assert paired_interval({"a": 1.0, "b": 2.0}, {"b": 1.0, "c": 2.0}) is None
    assert stats.mean({}) is None and stats.mean({"a": (2.0, 5)}) == 2.0


def test_what_is_not_finite_has_no_interval() -> None:
    assert interval([1.0, math.nan, 2.0]) is None
    assert interval([1.0, math.inf]) is None
    assert interval({"a": (1.0, 0), "b": (2.0, 1)}) is None


def test_huge_losses_do_not_overflow() -> None:
    found = interval([(900.0, 1), (1000.0, 1)], "exp_mean")
    assert found is not None and math.isfinite(found.high)


def test_five_unequal_items_are_never_significant() -> None:
    base = {str(i): 0.0 for i in range(100)}
    for differing in (5, 6):
        other = {name: float(int(name) < differing) for name in base}
        found = paired_interval(other, base)
        assert found is not None and found.low > 0 and found.differing == differing
        assert found.significant == (differing == 6)
        assert found.few == (differing == 5)


def test_coverage_is_near_its_level() -> None:
    """Of 120 samples of 60 flags with the same chance, about 95 % of the intervals hold zero."""
    held = 0
    for seed in range(120):
        noise = random.Random(seed)
        a = {str(i): float(noise.random() < 0.5) for i in range(60)}
        b = {str(i): float(noise.random() < 0.5) for i in range(60)}
        found = paired_interval(a, b, seed=seed)
        assert found is not None
        held += found.low <= 0 <= found.high
    assert 107 <= held <= 119  # 114 +- 2.5 standard deviations


@pytest.mark.parametrize("n", [6, 16])
def test_few_items_have_wide_enough_intervals(n: int) -> None:
    """Slices of a text: without widening, 14 % (n = 6) and 11 % (n = 16) exclude equality."""
    wrong = 0
    for seed in range(200):
        noise = random.Random(seed)
        a = {str(i): noise.gauss(3.0, 0.4) for i in range(n)}
        b = {name: value + noise.gauss(0.0, 0.15) for name, value in a.items()}
        found = paired_interval(a, b, "ratio_of_exp_mean")
        assert found is not None
        wrong += not found.low <= 1 <= found.high
    assert 3 <= wrong <= 19  # at 5 %: 10 +- 3 standard deviations; BCa leaves a little at n = 6


def test_many_items_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MANY_ITEMS", 50)
    values = gaussian(51, 1.0)
    found = interval(values)
    assert found is not None and found.low < found.estimate < found.high
    assert found == interval(values)


def test_to_dict() -> None:
    assert Interval(1.0, 2.0, 1.5, 9).to_dict() == {
        "low": 1.0,
        "high": 2.0,
        "estimate": 1.5,
        "n": 9,
    }
    data = Interval(1.0, 2.0, 1.5, 9, 0.0, 8).to_dict()
    assert data["significant"] is True and data["differing"] == 8


def test_mixing_is_item_by_item() -> None:
    mixed = stats.mix({"a": (1.0, 4), "b": 2.0}, {"a": (3.0, 9), "c": 5.0}, 0.25)
    assert mixed == {"a": (1.5, 4)}


def test_the_warning_about_many_comparisons_is_written_down() -> None:
    assert stats.__doc__ is not None and "Of twenty" in stats.__doc__


def test_intervals_over_texts_are_those_of_their_means() -> None:
    """The same draws, counted: the mean of a number per text, and what is undefined in some."""
    values = np.array(list(gaussian(12, 1.0).values()))

    def statistics(counts: np.ndarray) -> dict[str, np.ndarray]:
        means = counts @ values / counts.sum(1)
        some = np.where(counts[:, 0] > 0, means, np.nan)
        return {"mean": means, "some": some, "none": means * np.nan}

    found = stats.text_intervals(statistics, 12, seed=3)
    whole = interval(list(values), seed=3)
    assert whole is not None and found["mean"] == pytest.approx((whole.low, whole.high))
    assert found["some"] is not None and found["some"][0] < found["some"][1]
    assert found["none"] is None
    assert stats.text_intervals(statistics, 1) == {}


def test_intervals_of_a_mean_of_texts_cover_it() -> None:
    """60 samples of 12 normal numbers: 95 % intervals hold the mean as often as they say."""
    drawn, covered = random.Random(3), 0
    for number in range(60):
        values = np.array([drawn.gauss(0, 1) for _ in range(12)])
        (ends,) = stats.text_intervals(
            lambda counts, v=values: {"m": counts @ v / counts.sum(1)}, 12, number
        ).values()
        assert ends is not None
        covered += ends[0] <= 0 <= ends[1]
    assert 53 <= covered <= 60  # 57 expected, standard error 1.7


def test_a_ratio_of_perplexities_counts_slices_by_their_tokens() -> None:
    one = [[1.0], [2.0, 2.0, 2.0]]
    assert stats.ratio_interval(one, one) == (1.0, 1.0)
    assert stats.ratio_interval(one, [[0.0], [2.0, 2.0, 2.0]]) == pytest.approx((1.0, math.e))
    assert stats.ratio_interval([[1.0]], [[2.0]]) is None


def test_importing_is_lean() -> None:
    code = "import sys, dart_llm.experiments.comparison_report; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
