"""Speed-ups beside the bandwidth limit."""

from __future__ import annotations

import pytest

from dart_llm.reporting.speed_up import DISTURBED, SpeedUp, contradicting, judge


def test_a_ratio_below_the_limit_is_the_median_of_the_repetitions() -> None:
    found = judge([2.0, 2.2, 2.0], [1.6, 2.0, 1.0], limit=2.5)
    assert found.ratio == pytest.approx(1.25)
    assert not found.disturbed


@pytest.mark.parametrize(
    ("base", "other", "limit"),
    [
        ([1.494], [0.260], 1.24),  # 5.74 x, the number that a run once printed
        ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.1], 1.5),
        ([1.0, 4.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0], None),  # says nothing, whatever the bytes
    ],
)
def test_what_cannot_be_is_disturbed(
    base: list[float], other: list[float], limit: float | None
) -> None:
    found = judge(base, other, limit)
    assert found.disturbed
    assert found.ratio is None
    assert found.to_dict()["speed_up"] is None
    assert found.to_dict()["disturbed"] == DISTURBED


def test_a_ratio_whose_scatter_reaches_the_limit_is_the_limit() -> None:
    found = judge([1.2, 1.3, 1.4], [1.0, 1.0, 1.0], limit=1.26)
    assert found.ratio == 1.26
    assert found.scatter == pytest.approx(0.05 / 1.3)
    assert judge([1.35] * 3, [1.0] * 3, limit=1.26).ratio == 1.26  # what computing may add
    assert judge([1.40] * 3, [1.0] * 3, limit=1.26).disturbed


def test_slower_than_dense_is_no_contradiction() -> None:
    assert judge([1.0, 1.0], [1.5, 1.5], limit=1.2) == SpeedUp(pytest.approx(2 / 3), 1.2, 0.0)


def test_repetitions_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="at least one repetition"):
        judge([], [])


def test_two_timings_that_contradict_the_bytes_are_both_named() -> None:
    sizes = {"dense": 100.0, "griffin 30 %": 80.0, "griffin 50 %": 70.0}
    times = {"dense": [1.0, 1.0], "griffin 30 %": [0.95, 0.95], "griffin 50 %": [0.7, 0.7]}
    assert contradicting(times, sizes) == {"griffin 30 %", "griffin 50 %"}
    times["griffin 50 %"] = [0.9, 0.9]
    assert contradicting(times, sizes) == set()
