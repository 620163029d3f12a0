"""The drift detector over batches: votes, padding, finished rows; and rolled back tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dart_llm.pruning.drift import Detector, Rule
from windows import PAIRS, armed, at, windows

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
