"""The queue of observed decode tokens: bounded in tokens and bytes; nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dart_llm.pruning import observations
from dart_llm.pruning.observations import LIMIT, Observations, ObservedForward
from dart_llm.pruning.observations import LayerObservation as Seen
from dart_llm.pruning.observations import detached_copy as outlasting
from dart_llm.pruning.observations import sampled_per_sequence as own_reads
from dart_llm.pruning.observations import sampled_tokens as read_tokens


def token(value: float, width: int = 4, stream: bool = False) -> dict[int, Seen]:
    u = torch.full((1, 1, width), value)
    others = (u, u, u) if stream else ()
    return {layer: Seen(u + 100 * layer, u, *others) for layer in range(2)}


Flushed = list[tuple[tuple[int, ...], Seen, Tensor | None]]


@pytest.fixture
def flushed() -> Flushed:
    return []


@pytest.fixture
def queue(flushed) -> Observations:
    return Observations(lambda flags, layers, seen, w: flushed.append((layers, seen, w)))


def add(
    queue: Observations,
    observing: list[bool],
    layers: dict[int, Seen],
    weights: torch.Tensor | None,
    rows: int,
    tokens: int,
    sampled: list[int],
    by: torch.Tensor | None = None,
) -> None:
    queue.add(observing, ObservedForward.accepted(layers, rows, tokens, weights, sampled, by))


def test_the_limit_of_tokens_adds_them_in_order_all_layers_at_once(queue, flushed):
    for value in range(LIMIT - 1):
        add(queue, [True], token(float(value)), None, 1, 1, [0])
    assert flushed == []
    add(queue, [True], token(float(LIMIT - 1)), None, 1, 1, [0])
    ((layers, seen, weights),) = flushed
    assert (layers, weights) == ((0, 1), None)
    assert seen.u.shape == (2, 1, LIMIT, 4) and seen.h.shape == (2, 1, LIMIT, 4)
    assert seen.u[:, 0, :, 0].tolist() == [[k + float(v) for v in range(LIMIT)] for k in (0, 100)]
    assert (seen.z, seen.x, seen.r) == (None, None, None)
    assert queue.forwards == []


def test_the_limit_of_bytes_comes_first_for_wide_layers(queue, flushed, monkeypatch):
    monkeypatch.setattr(observations, "MAX_BYTES", 3 * 2 * 2 * 4 * 64)  # tokens, layers, u and h
    for value in range(3):
        assert flushed == []
        add(queue, [True], token(float(value), width=64), None, 1, 1, [0])
    assert flushed[0][1].u.shape == (2, 1, 3, 64)


def test_weights_of_some_tokens_become_ones_for_the_others(queue, flushed):
    add(queue, [True], token(1.0), None, 1, 1, [0])
    add(queue, [True], token(2.0), torch.zeros(1, 1), 1, 1, [0])
    queue.flush()
    assert flushed[0][2].tolist() == [[1.0, 0.0]]


def test_layers_of_several_widths_are_added_apart(queue, flushed):
    layers = {0: 4, 1: 6, 2: 4}
    seen = {i: Seen(torch.full((1, 1, w), 1.0 + i)) for i, w in layers.items()}
    add(queue, [True], seen, None, 1, 1, [0])
    queue.flush()
    assert [(layers, seen.u[:, 0, 0, -1].tolist()) for layers, seen, _ in flushed] == [
        ((0, 2), [1.0, 3.0]),
        ((1,), [2.0]),
    ]


def test_tokens_that_were_rolled_back_are_left_out(queue, flushed):
    seen = Seen(torch.arange(3.0)[None, :, None], torch.ones(1, 3, 2))
    add(queue, [True], {0: seen}, None, 1, 2, [0, 1])
    queue.flush()
    assert flushed[0][1].u.flatten().tolist() == [0.0, 1.0]
    assert flushed[0][1].h.shape == (1, 1, 2, 2)


def test_what_outlasts_is_safe_from_changes_in_place():
    z = torch.ones(1, 1, 2, requires_grad=True) * 1
    seen = Seen(z * 2, None, z, z * 3, z)
    kept = outlasting(seen, stream=True)
    with torch.no_grad():
        z.add_(5)
    assert kept.z.tolist() == [[[1.0, 1.0]]] and kept.r is kept.z
    assert not any(t.requires_grad for t in kept if t is not None)
    assert outlasting(seen, stream=False)[2:] == (None, None, None)


def test_sensitivities_are_read_on_the_first_tokens_and_every_eighth():
    assert [n for n in range(30) if read_tokens([n], 1)] == [*range(9), 16, 24]
    assert read_tokens([9, 16], 1) == [0]
    assert read_tokens([9], 2) == [] and read_tokens([6], 4) == [0, 1, 2]
    assert read_tokens([], 1) == []


def test_a_life_reads_what_it_would_read_alone(queue, flushed):
    """Three rows: at their ninth token, their tenth, and their second to last forward's."""
    assert own_reads([3], [0]) is None and own_reads([0, 8, 16], [0]) is None
    assert own_reads([8, 9, 20], [0, 1, 4]).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    u = torch.arange(6.0).reshape(3, 2, 1)
    seen = {0: Seen(u, None, u, u, u)}
    add(queue, [True] * 3, seen, None, 3, 2, [0, 1], torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    add(queue, [True] * 3, seen, torch.full((3, 2), 0.5), 3, 2, [0, 1], None)
    half = {0: seen[0].cut(slice(1))}
    add(queue, [True] * 3, half, None, 3, 1, [0], torch.tensor([[0.0, 1], [1, 1], [1, 1]]))
    queue.flush()
    (_, _, every), (_, stream, some) = flushed
    assert every.tolist() == [[1, 1, 0.5, 0.5, 1]] * 3
    assert stream.x.shape == (1, 3, 5, 1)
    assert some.tolist() == [[1, 0, 0.5, 0.5, 0], [0, 1, 0.5, 0.5, 1], [1, 1, 0.5, 0.5, 1]]
