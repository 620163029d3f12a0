"""The screened head by hand: directions, thresholds, which words are exact, and its bytes."""

import pytest
import torch

from dart_llm.errors import ConfigError
from dart_llm.models import screen as module
from dart_llm.models.packed import pack
from dart_llm.models.screen import MIDDLE, RUN, WIDEST, Screen, divergence
from tiny import drawn


def states_along(directions, count=400, seed=1):
    """States [n, D] that vary along ``directions`` [k, D], each half as much as the one before."""
    scales = 8 * 0.5 ** torch.arange(len(directions)).float()
    return (drawn(count, len(directions), seed=seed) * scales) @ directions


def test_directions_are_those_of_the_states_in_order():
    axes = torch.linalg.qr(drawn(8, 8))[0]
    directions = module.directions_of(states_along(axes[:3]))
    assert torch.allclose(directions @ directions.t(), torch.eye(8), atol=1e-5)
    shares = (states_along(axes[:3]) @ directions.t()).square().sum(0)
    assert bool((shares[:-1] >= shares[1:] - 1e-3).all()) and float(shares[3:].sum()) < 1e-3
    constant = torch.tensor([[3.0, 0.0], [3.0, 0.0]])  # the mean is not subtracted
    assert module.directions_of(constant)[0].abs().tolist() == [1, 0]


def test_how_many_directions_are_read_by_hand():
    # 0.6 of a quarter of 1,152 bytes a word are 172.8; basis and scale: 4 x 576^2 / 49,152 + 4
    assert module.keep_of(0.25, 49_152, 576, 49_152 * 1152) == 280 == int((172.8 - 31) * 2) // 8 * 8
    assert module.keep_of(1.0, 49_152, 64, 49_152 * 128) == 64  # no more than there are
    with pytest.raises(ConfigError, match="no room for rough scores in 5% of its bytes"):
        module.keep_of(0.05, 49_152, 576, 49_152 * 1152)
    with pytest.raises(ConfigError, match="no room for rough scores"):
        module.keep_of(1.0, 49_152, 60, 49_152 * 128)


def test_where_words_lie_in_a_unit():
    """Two levels a byte; unpacked they are what they were."""
    levels = torch.zeros(RUN, 1, dtype=torch.uint8)
    levels[5], levels[64 + 17] = 3, 9  # 5 = 4 + 1 stands at 16 + 1; 17 of the next unit at 4 + 1
    packed = module._packed(levels)[0]
    assert packed.nonzero().flatten().tolist() == [5, 17]
    assert packed[17] == 3 and packed[5] == 9 << 4
    every = (drawn(RUN, 40) * 3 + MIDDLE).clamp(0, module.LEVELS - 1).byte()
    assert torch.equal(module._plain(module._packed(every)), every)


def test_rounding_finds_the_levels_and_the_scale():
    even = 0.01 * (torch.tensor([[0, 15, 7, 8, 2, 12, 9, 4]]).repeat(1, 8) - MIDDLE)
    for rows, least, most in ((even, 0, 0.12), (drawn(32, 256), 0.08, 0.13)):
        levels, scales = module._rounded(rows, torch.ones(rows.shape[1]))
        off = (levels.float() - MIDDLE) * scales[:, None] - rows
        assert least <= float(off.norm() / rows.norm()) < most  # of a Gaussian: 0.107


def test_thresholds_and_divergence_by_hand():
    scores = torch.tensor([[0.0, -1.01, -2.01, -70.0], [5.0, 4.49, 1.99, 1.0]])
    # words within 0.5: one of the first step, one of the second; 1.02: two and two
    for rows, gap in ((1, 0.51), (2, 2.01), (0.5, 0), (4, WIDEST)):
        threshold = module.threshold_for([scores[:1], scores[1:]], rows)
        assert threshold == pytest.approx(gap, abs=WIDEST / 4096)
    full, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    q = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    want = 0.5 * (0.5 / q).log().sum()
    assert float(divergence(full, other)) == pytest.approx(float(want), rel=1e-6)
    assert float(divergence(other, other + 3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("stored", "share"), [("plain", 0.2), ("bfloat16", 0.4), ("q8_0", 0.7)])
def test_the_share_is_met_on_the_states_it_was_made_of(stored, share, request):
    if stored == "q8_0":
        request.getfixturevalue("native")
    weight = drawn(2048, 64) / 4
    weight = weight.bfloat16() if stored == "bfloat16" else weight
    weight = pack(weight, "q8_0") if stored == "q8_0" else weight
    states = drawn(256, 64, seed=2)
    screen = Screen.of(weight, states, share)
    rough = screen.rough(states)
    near, gaps = screen.near(rough), rough.amax(1, keepdim=True) - rough
    assert bool(near.any(1).all()) and bool((gaps[near] <= screen.threshold + 1e-4).all())
    assert bool((gaps[~near] > screen.threshold - 1e-4).all())
    rows = near.sum(1).float().mean() / 2048
    read = screen.nbytes() / weight.nbytes
    assert 32 <= screen.keep < 64 and read < 0.6 * share + 1e-6
    assert 0.95 * share < read + rows <= share + 1e-6


def test_rough_scores_are_those_of_the_states_own_directions():
    weight = drawn(2048, 64) / 8
    axes = torch.linalg.qr(drawn(64, 64, seed=3))[0]
    states = states_along(axes[:4])
    screen = Screen.of(weight, states, 0.2)
    along = screen.along(drawn(5, 64, seed=2))
    assert ((along != 0).sum(1) <= screen.keep).all()
    rough, full = screen.rough(states), states @ weight.t()
    off = float((rough - full).norm() / full.norm())
    assert 0.02 < off < 0.2  # of 4 bits
