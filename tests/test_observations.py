"""The queue of observed decode tokens: bounded in tokens and bytes; nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dart_llm import observations
from dart_llm.observations import LIMIT, Observations, Seen


def token(value: float, width: int = 4) -> dict[int, Seen]:
    u = torch.full((1, 1, width), value)
    return {layer: (u + 100 * layer, u, None, None, None) for layer in range(2)}


@pytest.fixture
def flushed() -> list[tuple[int, Tensor, Tensor | None]]:
    return []


@pytest.fixture
def queue(flushed) -> Observations:
    return Observations(lambda flags, layer, seen, w: flushed.append((layer, seen[0], w)))


def test_the_limit_of_tokens_adds_them_in_order(queue, flushed):
    for value in range(LIMIT - 1):
        queue.add([True], token(float(value)), None, 1, 1)
    assert flushed == []
    queue.add([True], token(float(LIMIT - 1)), None, 1, 1)
    assert [layer for layer, _, _ in flushed] == [0, 1]
    assert flushed[0][1][0, :, 0].tolist() == [float(v) for v in range(LIMIT)]
    assert flushed[1][1][0, :, 0].tolist() == [100.0 + v for v in range(LIMIT)]
    assert queue.nbytes() == 0


def test_the_limit_of_bytes_comes_first_for_wide_layers(queue, flushed, monkeypatch):
    monkeypatch.setattr(observations, "MAX_BYTES", 3 * 2 * 2 * 4 * 64)  # tokens, layers, u and z
    for value in range(3):
        assert flushed == []
        queue.add([True], token(float(value), width=64), None, 1, 1)
    assert flushed[0][1].shape == (1, 3, 64)


def test_weights_of_some_tokens_become_ones_for_the_others(queue, flushed):
    queue.add([True], token(1.0), None, 1, 1)
    queue.add([True], token(2.0), torch.zeros(1, 1), 1, 1)
    queue.flush()
    assert flushed[0][2].tolist() == [[1.0, 0.0]]


def test_other_flags_flush_first(queue, flushed):
    queue.add([True], token(1.0), None, 1, 1)
    queue.add([False], token(2.0), None, 1, 1)
    assert [u[0, :, 0].tolist() for layer, u, _ in flushed if layer == 0] == [[1.0]]
