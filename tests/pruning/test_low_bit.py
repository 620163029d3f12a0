"""Low-bit copies: the grid by hand, packing, products and errors."""

from __future__ import annotations

import math

import pytest
import torch

from dart_llm.pruning import token_level as low_bit
from dart_llm.pruning.token_level import gaussian_error, squared_error
from low_bit_cases import by_hand

MAKE = low_bit.low_bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group", "inputs"),
    [(4, 4, 12), (4, 5, 13), (4, 5, 15), (4, 32, 7), (8, 4, 12), (8, 3, 10)],
)
def test_the_grid(bits: int, group: int, inputs: int, dtype: torch.dtype) -> None:
    w = torch.randn(6, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[2] = 0  # a group without any weight
    w[3, :3] = torch.tensor([0.7, -0.7, 0.05], dtype=dtype)
    copy = MAKE(w, bits, group)
    assert copy.shape == (6, inputs)
    assert copy.dense().tolist() == by_hand(w, bits, group)
    groups = math.ceil(inputs / group)
    assert copy.nbytes() == 6 * (math.ceil(inputs * bits / 8) + 2 * groups)
    transposed = MAKE(w.t().contiguous().t(), bits, group)
    assert torch.equal(transposed.dense(), copy.dense())


def test_a_matrix_on_the_grid_is_copied_exactly() -> None:
    levels = torch.randint(-7, 8, (5, 64), generator=torch.Generator().manual_seed(2)).float()
    levels[:, ::32] = 7
    w = levels * 0.125
    copy = MAKE(w, 4, 32)
    assert torch.equal(copy.dense(), w)
    assert squared_error(w, copy) == (0.0, pytest.approx(float(w.square().sum())))


def test_products_of_all_rows_and_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    w, x = (torch.randn(9, 20, generator=generator) for _ in range(2))
    x, rows = x[:6].view(2, 3, 20), torch.tensor([1, 4, 8])
    whole = MAKE(w, 4, 8)
    wanted = x @ torch.tensor(by_hand(w, 4, 8)).t()
    assert torch.allclose(whole.product(x), wanted, atol=1e-5)
    assert torch.allclose(whole.product(x, rows), wanted[..., rows], atol=1e-5)
    assert whole.product(x.bfloat16()).dtype == torch.float32
    monkeypatch.setattr(low_bit, "CHUNK", 40)  # two rows at a time
    parts = MAKE(w, 4, 8)
    assert torch.equal(parts.levels, whole.levels) and torch.equal(parts.scales, whole.scales)
    assert torch.allclose(parts.product(x), wanted, atol=1e-5)
    assert torch.allclose(parts.product(x, rows), wanted[..., rows], atol=1e-5)
    assert squared_error(w, parts) == pytest.approx(squared_error(w, whole))


def test_errors_of_gaussian_weights() -> None:
    """A step is max / 7, and its rounding error uniform: step / sqrt(12), with a bfloat16 scale."""
    drawn = torch.randn(4000, 64, generator=torch.Generator().manual_seed(4))
    steps = drawn.view(4000, 2, 32).abs().amax(-1) / 7
    expected = float((steps.square().mean() / 12).sqrt())
    assert gaussian_error(4000, 64, 4, 32) == pytest.approx(expected, rel=0.02)
    assert gaussian_error(4000, 64, 4, 48) > gaussian_error(4000, 64, 4, 32)
    assert gaussian_error(4000, 64, 8, 32) < 0.01
    assert gaussian_error(10**9, 64, 4, 32) == gaussian_error(10**8, 64, 4, 32)  # rows are alike


def test_a_four_bit_file_does_not_flatter_the_copies() -> None:
    """16 values per group of 32: an asymmetric grid would copy them; this one errs as ever."""
    drawn = torch.randn(2000, 32, generator=torch.Generator().manual_seed(5))
    low, high = drawn.amin(1, keepdim=True), drawn.amax(1, keepdim=True)
    step = (high - low) / 15
    filed = ((drawn - low) / step).round() * step + low
    off, whole = squared_error(filed, MAKE(filed, 4, 32))
    assert math.sqrt(off / whole) == pytest.approx(gaussian_error(2000, 32, 4, 32), rel=0.1)
