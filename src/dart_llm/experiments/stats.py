"""Bootstrap intervals over items, pairs and texts; speed-ups and their bandwidth limit.

Items of two methods are paired by id.  Both methods answered the same questions, so the variation
between items cancels and small differences become visible.

An interval describes the sampled items, not other tasks or models.  **Of twenty comparisons whose
true difference is zero, about one has an interval that excludes zero**: a table with many
comparisons will contain such rows, so a single row is not evidence of a difference.

Decoding a token reads each needed weight once.  Reading fewer bytes can therefore speed up
decoding at most by the ratio of the bytes, the bandwidth limit.  If a measured ratio is clearly
larger, another process used the machine during one of the timings; such a ratio is not reported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dart_llm.reporting.words import FEWEST_ITEMS, too_few

LEVEL = 0.95

RESAMPLES = 5000

MANY_ITEMS, MANY_RESAMPLES = 4000, 2000
"""With more than ``MANY_ITEMS`` items, ``MANY_RESAMPLES`` resamples suffice, and percentile
intervals replace BCa (bias-corrected and accelerated) intervals."""

BATCH = 2_000_000
"""Maximum number of drawn values in a batch of resamples."""

Value = float | tuple[float, float]
"""An item's value, or a pair of value and weight (a slice's mean loss and number of tokens)."""

Sample = Mapping[str, Value]
"""Maps an item's id to its value."""

Kind = Literal["difference", "ratio_of_exp_mean"]

Mean = Literal["mean", "exp_mean"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval around an estimate over ``n`` items.

    ``ends``: the lower and upper end; None with fewer than ``FEWEST_ITEMS`` items.  ``null``: the
    estimate that means "no difference" (0, or 1 for ratios); None for a single mean.
    ``differing``: the number of pairs whose values differ.
    """

    ends: tuple[float, float] | None
    estimate: float
    n: int
    null: float | None = None
    differing: int = 0

    @property
    def _excludes_null(self) -> bool:
        if self.null is None or self.ends is None:
            return False
        return not self.ends[0] <= self.null <= self.ends[1]

    @property
    def significant(self) -> bool:
        """Whether the interval excludes "no difference" and at least ``FEWEST_ITEMS`` pairs differ.

        Before counting significant differences, read the module's warning on many comparisons.
        """
        return self._excludes_null and self.differing >= FEWEST_ITEMS

    @property
    def few(self) -> bool:
        """Whether the difference lacks significance only because too few pairs differ."""
        return self._excludes_null and self.differing < FEWEST_ITEMS

    @property
    def alike(self) -> bool:
        """Whether the values of every pair are equal."""
        return self.null is not None and not self.differing

    @property
    def sign(self) -> int:
        """1 if the estimate is significantly above "no difference", -1 if below, otherwise 0."""
        if not self.significant:
            return 0
        return 1 if self.estimate > (self.null or 0.0) else -1

    def words(self, write: Callable[[float], str]) -> str:
        """The ends as text: "0.3 to 0.5", or "too few: n = 3"."""
        return " to ".join(map(write, self.ends)) if self.ends else f"too few: n = {self.n}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable data; only differences and ratios have ``significant``.

        With too few items, ``low`` and ``high`` are null and ``no_interval`` gives the reason.
        """
        low, high = self.ends or (None, None)
        data: dict[str, Any] = {"low": low, "high": high, "estimate": self.estimate, "n": self.n}
        if self.ends is None:
            data["no_interval"] = too_few(self.n)
        if self.null is not None:
            data |= {"differing": self.differing, "significant": self.significant}
        return data


def interval(
    values: Sample | Sequence[Value], kind: Mean = "mean", seed: int = 0
) -> Interval | None:
    """95 % interval of the weighted mean of ``values``, or of its exponential (perplexity).

    If all values are equal, both ends are the estimate, although items outside the sample might
    differ.  Fewer than ``FEWEST_ITEMS`` items give an interval without ends; no items give None.
    """
    if not isinstance(values, Mapping):
        values = {f"{number:09d}": value for number, value in enumerate(values)}
    data = _columns(values, sorted(values))
    return _mean_interval(data, kind == "exp_mean", seed, None)


def paired_interval(
    a: Sample, b: Sample, kind: Kind = "difference", seed: int = 0
) -> Interval | None:
    """95 % interval of mean(a) - mean(b), or of exp(mean(a) - mean(b)), over shared ids.

    The two values of a pair are resampled together; the order of the items does not matter.  If all
    differences are equal, both ends are the estimate.  With fewer than ``FEWEST_ITEMS`` pairs the
    interval has no ends; without pairs it is None.
    """
    shared = sorted(a.keys() & b.keys())
    data = np.concatenate([_columns(a, shared), _columns(b, shared)])
    ratio = kind == "ratio_of_exp_mean"
    return _mean_interval(data, ratio, seed, 1.0 if ratio else 0.0)


def gap_closed(gaps: Array, others: Array) -> float | None:
    """The fraction of a gap that is closed: ``1 - mean(gaps) / mean(others)``.

    ``gaps``: each item's remaining gap, [n].  ``others``: each item's full gap, [n].  None if the
    mean of ``others`` is not positive, so that there is no gap to close.
    """
    other = float(others.mean())
    return 1 - float(gaps.mean()) / other if other > 0 else None


def gap_closed_interval(gaps: Array, others: Array, seed: int = 0) -> Interval | None:
    """95 % interval of ``gap_closed``; both values of an item are drawn together.

    A resample without a gap to close counts as -inf.  The interval is None if ``gap_closed`` is
    None, with fewer than ``FEWEST_ITEMS`` items, if a value is not finite, or if so many resamples
    lack a gap that an end is infinite.
    """
    estimate, n = gap_closed(gaps, others), len(gaps)
    if estimate is None or n < FEWEST_ITEMS or not np.isfinite([gaps, others]).all():
        return None

    def statistic(drawn: Array, axis: int) -> Array:
        ids = drawn.astype(int)
        with np.errstate(divide="ignore", invalid="ignore"):
            full = others[ids].mean(axis)
            shares: Array = np.where(full > 0, 1 - gaps[ids].mean(axis) / full, -np.inf)
        return shares

    differing = int(np.count_nonzero(np.abs(gaps - others) > 1e-12))
    ends = _bootstrap((np.arange(n),), statistic, seed, n)[0]
    return None if ends is None else Interval(ends, estimate, n, 0.0, differing)


def text_intervals(
    statistics: Callable[[Array], Mapping[str, Array]], n: int, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of named statistics of ``n`` texts, all from the same resamples.

    ``statistics(counts)`` returns an array [B] for each name; ``counts`` [B, n] has the number of
    times that each of B resamples contains each text.  An interval ignores resamples in which the
    statistic is NaN.  The result is empty with fewer than ``FEWEST_ITEMS`` texts.
    """
    if n < FEWEST_ITEMS:
        return {}

    def statistic(ids: Array, axis: int) -> Array:
        rows = ids.reshape(-1, ids.shape[-1]).astype(int)
        cells = rows + n * np.arange(len(rows))[:, None]
        counts = np.bincount(cells.ravel(), minlength=n * len(rows)).reshape(-1, n)
        values = np.stack(list(statistics(counts.astype(np.float64)).values()))
        return values.reshape(len(values), *ids.shape[:-1])

    names = list(statistics(np.ones((1, n))))
    return dict(zip(names, _bootstrap((np.arange(n),), statistic, seed, n), strict=True))


def mean(values: Sample, kind: Mean = "mean") -> float | None:
    """The weighted mean of ``values``, or its exponential; None without items."""
    if not values:
        return None
    return float(_statistic(*_columns(values, sorted(values)), exponential=kind == "exp_mean"))


def _columns(values: Sample, ids: list[str]) -> Array:
    """An array [2, n] for the items ``ids``: the values times the weights, and the weights."""
    items = (values[name] for name in ids)
    pairs = [value if isinstance(value, tuple) else (float(value), 1.0) for value in items]
    columns = np.array([(value * weight, weight) for value, weight in pairs], dtype=np.float64)
    return columns.reshape(-1, 2).T


def _statistic(*columns: Array, axis: int = -1, exponential: bool = False) -> Array:
    """The weighted mean from two columns; from four, the difference of two means; or its exp."""
    means: Array = columns[0].sum(axis) / columns[1].sum(axis)
    if len(columns) == 4:
        means = means - columns[2].sum(axis) / columns[3].sum(axis)
    return np.exp(np.minimum(means, 700.0)) if exponential else means  # no overflow


def _mean_interval(
    data: Array, exponential: bool, seed: int, null: float | None
) -> Interval | None:
    """The interval of data [2 or 4, n]; None if data are empty or not finite, or a weight <= 0."""
    n = data.shape[1]
    if not n or not np.isfinite(data).all() or not (data[1::2] > 0).all():
        return None
    values = data[0] / data[1] - (data[2] / data[3] if len(data) == 4 else 0.0)
    differing = int(np.count_nonzero(np.abs(values) > 1e-12)) if null is not None else 0
    estimate = float(_statistic(*data, exponential=exponential))
    if n < FEWEST_ITEMS:
        return Interval(None, estimate, n, null, differing)
    same_weights = bool((data[1::2] == data[1]).all())
    if same_weights and np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return Interval((estimate, estimate), estimate, n, null, differing)
    if same_weights:
        data = np.stack([values * data[1], data[1]])  # faster: one mean, that of the differences

    def statistic(*columns: Array, axis: int) -> Array:
        return _statistic(*columns, axis=axis, exponential=exponential)

    ends = _bootstrap(tuple(data), statistic, seed, n)[0]
    return None if ends is None else Interval(ends, estimate, n, null, differing)


def _bootstrap(
    data: tuple[NDArray[Any], ...], statistic: Callable[..., Array], seed: int, n: int
) -> list[tuple[float, float] | None]:
    """The interval of each number that ``statistic`` returns: BCa or, if undefined, percentiles."""
    from scipy import stats

    level = _widened(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate BCa warns; percentiles replace it
        result = stats.bootstrap(
            data,
            statistic,
            n_resamples=RESAMPLES if n <= MANY_ITEMS else MANY_RESAMPLES,
            batch=max(1, BATCH // n),
            vectorized=True,
            paired=True,
            confidence_level=level,
            method="BCa" if n <= MANY_ITEMS else "percentile",
            rng=np.random.default_rng(seed),
        )
    lows, highs = np.atleast_1d(result.confidence_interval.low, result.confidence_interval.high)
    draws = np.atleast_2d(result.bootstrap_distribution)
    return [
        (float(low), float(high)) if np.isfinite([low, high]).all() else _percentiles(values, level)
        for low, high, values in zip(lows, highs, draws, strict=True)
    ]


def _percentiles(draws: Array, level: float) -> tuple[float, float] | None:
    """Percentile interval over the draws that are not NaN; None if an end is not finite."""
    numbers = draws[~np.isnan(draws)]
    if not len(numbers):
        return None
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


def _widened(n: int) -> float:
    """The confidence level to use, so that intervals over few items are wide enough.

    A mean's bootstrap interval is too narrow by sqrt((n - 1) / n), and has the tails of the normal
    distribution instead of Student's t; the level corrects both (Hesterberg, "What Teachers Should
    Know About the Bootstrap", The American Statistician 69, 2015, section 5.2).
    """
    from scipy import stats

    tail = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * math.sqrt(n / (n - 1))
    return float(stats.norm.cdf(tail) - stats.norm.cdf(-tail))


# Speed-ups.

ADVICE = "measure with dart-llm bench speed"

DISTURBED = f"disturbed: {ADVICE}"
"""The text that replaces an unreliable ratio."""

SPEED_TOLERANCE = 0.1
"""A ratio above the limit by at most this fraction is not disturbed; the limit is shown instead.

A kernel limited by computation speeds up with the fraction of weights that it skips, which can be a
few per cent more than the fraction of bytes.  The bytes of caches and small tensors are estimates.
"""

LARGEST_SCATTER = 0.25
"""A ratio is not reported if its ``SpeedUp.scatter`` is larger than this."""


@dataclass(frozen=True)
class SpeedUp:
    """The time of a baseline divided by the time of an alternative.

    ``ratio``: the speed-up, at most ``limit``; None if the timings were disturbed.  ``limit``: the
    baseline's bytes divided by the alternative's; None if bytes are not comparable.  ``scatter``:
    half the interquartile range of the repetitions' ratios, divided by the median ratio; None for a
    single repetition.
    """

    ratio: float | None
    limit: float | None = None
    scatter: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether the timings contradict the bytes or each other."""
        return self.ratio is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable data; if ``speed_up`` is None, ``disturbed`` gives the reason."""
        return {
            "speed_up": self.ratio,
            "bytes_limit": self.limit,
            "scatter": self.scatter,
            "disturbed": DISTURBED if self.ratio is None else None,
        }


def judge(base: Sequence[float], other: Sequence[float], limit: float | None = None) -> SpeedUp:
    """The speed-up of ``other`` over ``base``, from seconds per token of interleaved repetitions.

    ``base[k]`` and ``other[k]`` were measured one after the other.  The speed-up is the median of
    the ratios base[k] / other[k].  It counts as disturbed if it exceeds ``limit`` by more than
    ``SPEED_TOLERANCE`` and the ratios' lower quartile also exceeds ``limit``, or if the ratios
    scatter by more than ``LARGEST_SCATTER``.  Any other speed-up above ``limit`` is replaced by
    ``limit``.  Raises ``ValueError`` if the sequences are empty or differ in length.
    """
    ratios = [slow / fast for slow, fast in zip(base, other, strict=True)]
    if not ratios:
        raise ValueError("a speed-up needs at least one repetition")
    low, ratio, high = map(float, np.quantile(ratios, (0.25, 0.5, 0.75)))
    scatter = (high - low) / 2 / ratio if len(ratios) > 1 else None
    too_fast = limit is not None and ratio > limit * (1 + SPEED_TOLERANCE) and low > limit
    if too_fast or (scatter is not None and scatter > LARGEST_SCATTER):
        return SpeedUp(None, limit, scatter)
    return SpeedUp(ratio if limit is None else min(ratio, limit), limit, scatter)


def contradicting(times: Mapping[str, Sequence[float]], sizes: Mapping[str, float]) -> set[str]:
    """The names of timings that contradict the bytes.

    If the speed-up of a pair of timings is disturbed, the result contains both names, because
    either timing may be the cause.  ``times``: seconds per token of interleaved repetitions.
    ``sizes``: bytes that a token reads.  All timings used the same kernels.
    """
    disturbed = set[str]()
    for pair in combinations(sizes, 2):
        slow, fast = sorted(pair, key=lambda name: -sizes[name])
        if judge(times[slow], times[fast], sizes[slow] / sizes[fast]).ratio is None:
            disturbed |= {slow, fast}
    return disturbed


def pace(judged: Mapping[str, Any]) -> str:
    """``SpeedUp.to_dict()`` as text: ": 1.21 x as fast (bandwidth limit 1.30 x)"."""
    speed_up, limit = judged.get("speed_up"), judged.get("bytes_limit")
    at_most = f" (bandwidth limit {limit:.2f} x)" if limit else ""
    if speed_up is not None:
        how = f"{speed_up:.2f} x as fast" if speed_up >= 1 else f"{1 / speed_up:.2f} x slower"
        return f": {how}{at_most}"
    return f": {judged['disturbed']}{at_most}" if judged.get("disturbed") else ""
