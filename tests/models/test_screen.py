"""The screened head by hand: directions, thresholds, which words are exact, and its bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.models.packed import pack
from dart_llm.models.screen import (
    WIDEST,
    Gaps,
    Screen,
    directions_of,
    divergence,
    rank_of,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states_along(directions, count=400, seed=1):
    """States [n, D] that vary along ``directions`` [k, D], each half as much as the one before."""
    scales = 8 * 0.5 ** torch.arange(len(directions)).float()
    return (drawn(count, len(directions), seed=seed) * scales) @ directions


def test_directions_are_those_of_the_states_in_order():
    axes = torch.linalg.qr(drawn(8, 8))[0]
    found = directions_of(states_along(axes[:3]))
    assert torch.allclose(found @ found.t(), torch.eye(8), atol=1e-5)
    shares = (states_along(axes[:3]) @ found.t()).square().sum(0)
    assert bool((shares[:-1] >= shares[1:] - 1e-3).all()) and float(shares[3:].sum()) < 1e-3


def test_the_mean_is_not_taken_off():
    states = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    assert directions_of(states)[0].abs().tolist() == [1, 0]


def test_ranks_by_hand():
    # 0.6 of a quarter of 1,152 bytes are 172.8; 32 directions take 18 and 4 x 32 x 576 / 49,152
    assert rank_of(0.25, 49_152, 576, 1152) == 32 * int(172.8 / 19.5)
    assert rank_of(1.0, 49_152, 64, 128) == 64  # no more than there are
    with pytest.raises(ConfigError, match="no room for rough scores in 1% of its bytes"):
        rank_of(0.01, 49_152, 576, 1152)


def test_thresholds_by_hand():
    gaps = Gaps()
    gaps.add(torch.tensor([[0.0, -1.01, -2.01, -70.0], [5.0, 4.49, 1.99, 1.0]]))
    # words within 0.5: one of the first token, one of the second; 1.02: two and two
    assert gaps.threshold(1) == pytest.approx(0.51, abs=WIDEST / 4096)
    assert gaps.threshold(2) == pytest.approx(2.01, abs=WIDEST / 4096)
    assert gaps.threshold(0.5) == 0
    assert gaps.threshold(4) == WIDEST


def test_divergence_by_hand():
    full, found = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    q = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    want = 0.5 * (0.5 / q).log().sum()
    assert float(divergence(full, found)) == pytest.approx(float(want), rel=1e-6)
    assert float(divergence(found, found + 3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("stored", "share"), [("plain", 0.5), ("bfloat16", 0.6), ("q8_0", 0.95)])
def test_the_share_is_met_on_the_states_it_was_made_of(stored, share, request):
    if stored == "q8_0":
        request.getfixturevalue("native")
    weight = drawn(512, 64) / 4
    weight = weight.bfloat16() if stored == "bfloat16" else weight
    weight = pack(weight, "q8_0") if stored == "q8_0" else weight
    states = drawn(256, 64, seed=2)
    screen = Screen.of(weight, states, share)
    rows = screen.near(screen.rough(states)).sum(1).float().mean() / 512
    read = screen.nbytes() / weight.nbytes
    assert read < 0.6 * share + 1e-6
    assert 0.95 * share < read + rows <= share + 1e-6


@examples(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.3, 0.9))
def test_words_near_the_best_are_chosen_and_no_others(seed, share):
    weight, states = drawn(512, 64, seed=seed), drawn(20, 64, seed=seed + 1)
    screen = Screen.of(weight, states, share)
    rough = screen.rough(states)
    near = screen.near(rough)
    assert bool(near.any(1).all())  # the best one always
    gaps = rough.amax(1, keepdim=True) - rough
    assert bool((gaps[near] <= screen.threshold + 1e-4).all())
    assert bool((gaps[~near] > screen.threshold - 1e-4).all())


def test_rough_scores_are_those_of_the_states_own_directions():
    weight = drawn(512, 64) / 8
    axes = torch.linalg.qr(drawn(64, 64, seed=3))[0]
    states = states_along(axes[:4])
    rough, full = Screen.of(weight, states, 0.5).rough(states), states @ weight.t()
    off = float((rough - full).norm() / full.norm())
    assert 0.02 < off < 0.2  # of 4 bits
