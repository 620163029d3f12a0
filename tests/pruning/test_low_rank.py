"""Low-rank compensation against plain eigendecompositions and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dart_llm.pruning import compensation as low_rank_module
from dart_llm.pruning.compensation import (
    FLOOR,
    RIDGE,
    LowRank,
    compensation,
    find_basis,
    inverses,
    low_rank,
)
from dart_llm.pruning.compensation import CompensationInputs as Gone
from dart_llm.pruning.statistics import LayerStatistics as LayerEvidence
from prior_cases import STATISTICS, seen

T, D, I, R = 80, 12, 20, 5  # noqa: E741 - the method's own names
SPREAD = torch.tensor([9.0, 6, 4, 3, 2, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_map(
    down: Tensor, evidence: LayerEvidence, basis: Tensor, removed: Tensor
) -> tuple[Tensor, LowRank]:
    (found,) = low_rank([Gone(down, evidence, basis, removed)])
    return found


def inputs(seed: int = 0, tokens: int = T) -> Tensor:
    """h [T, D]: a mean, and another spread along each of twelve turned directions."""
    turn = torch.linalg.qr(noise(D, D, seed=50)).Q
    return noise(tokens, D, seed=seed) * SPREAD @ turn + 3 * noise(D, seed=51)


def principal(h: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variances, largest first, and directions [D, D] in rows, of the D x D covariance."""
    h64 = h.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(h64, rowvar=False, bias=True))
    return values[::-1], vectors.T[::-1]


# the basis


@pytest.mark.parametrize("rank", [1, 5, 12, 40])
def test_the_basis_spans_the_principal_directions(rank: int) -> None:
    h = inputs()
    basis = find_basis(h, rank)
    rank = min(rank, D)
    assert basis.shape == (rank, D) and basis.dtype == torch.float32
    values, vectors = principal(h)
    unit = (basis / basis.norm(dim=1, keepdim=True)).double().numpy()
    wanted = vectors[:rank]
    np.testing.assert_allclose(unit.T @ unit, wanted.T @ wanted, atol=2e-4)
    # each scaled to variance 1, but for the share of the mean variance that is added
    variance = (h @ basis.T).var(0, correction=0).flip(0)
    floor = FLOOR * values.sum() / D
    np.testing.assert_allclose(variance, values[:rank] / (values[:rank] + floor), rtol=1e-3)
    assert float(variance[0]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_fewer_tokens_than_directions(tokens: int) -> None:
    """T tokens vary in T - 1 directions."""
    h = inputs(tokens=tokens)
    basis = find_basis(h, R)
    assert basis.shape == (tokens - 1, D) and bool(basis.isfinite().all())
    if tokens > 1:
        centred = h - h.mean(0)
        unit = basis / basis.norm(dim=1, keepdim=True)
        torch.testing.assert_close(centred @ unit.T @ unit, centred, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 123.456])
def test_constant_inputs_have_nothing_to_read(value: float) -> None:
    """Their rounding is no feature: what is left is mean compensation."""
    h = torch.full((T, D), value) * noise(D, seed=3)
    basis = find_basis(h, R)
    assert basis.tolist() == torch.zeros(R, D).tolist()
    u, down, removed = noise(T, I), noise(D, I, seed=1), torch.tensor([0, 7, 9])
    bias, linear = one_map(down, seen(u, h, basis), basis, removed)
    assert linear.out.tolist() == torch.zeros(D, R).tolist()
    torch.testing.assert_close(bias, compensation(down, u.mean(0), removed))


def test_a_direction_without_variance_does_not_blow_up() -> None:
    """Two inputs that never differ: their direction gets the floor, not one over nothing."""
    h = inputs()
    h[:, 3] = h[:, 8]
    basis = find_basis(h, D)
    values, _ = principal(h)
    assert values[-1] < 1e-9
    floor = FLOOR * float(values.sum()) / D
    assert float(basis[0].norm()) <= floor**-0.5 * 1.01


# the regression


def least_squares(u: Tensor, f: Tensor, ridge: float) -> np.ndarray:
    """[I, r]: the ridge as rows of its own below the centred features."""
    u64, f64 = (t.double().numpy() for t in (u - u.mean(0), f - f.mean(0)))
    below = np.sqrt(ridge * len(f64)) * np.eye(f64.shape[1])
    zeros = np.zeros((f64.shape[1], u64.shape[1]))
    found, *_ = np.linalg.lstsq(np.vstack([f64, below]), np.vstack([u64, zeros]), rcond=None)
    return found.T


def slopes(evidence):
    one = Gone(noise(D, I), evidence, noise(R, D), torch.arange(I))
    (inverse,) = inverses([one], evidence.sums["features"].mean[None])
    return one.covariances()[:, :-1] @ inverse


@pytest.mark.parametrize("cuts", [(T,), (50, 30), (1,) * T])
def test_slopes_are_ridge_regression(cuts: tuple[int, ...]) -> None:
    h = inputs()
    u = (h @ noise(D, I, seed=4)).relu() + noise(T, I, seed=5)
    basis = find_basis(h, R)
    found = slopes(seen(u, h, basis, cuts=cuts))
    assert found.shape == (I, R) and found.dtype == torch.float32
    np.testing.assert_allclose(found, least_squares(u, h @ basis.T, RIDGE), rtol=1e-3, atol=2e-3)


def test_tokens_of_no_weight_enter_no_slope() -> None:
    h, junk = inputs(), torch.arange(T) % 3 == 0
    u = h @ noise(D, I, seed=4) + noise(T, I, seed=5)
    basis = find_basis(h[~junk], R)
    wanted = slopes(seen(u[~junk], h[~junk], basis))
    h, u = h.clone(), u.clone()
    h[junk] = u[junk] = 1e3
    found = slopes(seen(u, h, basis, weights=(~junk).float()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_few_observed_tokens_are_no_singular_matrix() -> None:
    """One token: the features have no variance at all, and every slope is 0."""
    h, u = inputs(), noise(T, I)
    basis = find_basis(h, R)
    found = slopes(seen(u[:1], h[:1], basis))
    assert float(found.abs().max()) < 1e-3
    assert bool(slopes(seen(u[:2], h[:2], basis)).isfinite().all())


# what stands for the removed neurons


def test_what_is_linear_in_the_input_is_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weights = inputs(), noise(D, I, seed=6)
    u, down = h @ weights + noise(I, seed=7), noise(D, I, seed=8)
    removed, basis = torch.tensor([1, 2, 5, 11, 19]), find_basis(h, D)
    new = inputs(seed=9)
    wanted = (new @ weights + noise(I, seed=7))[:, removed] @ down[:, removed].T

    def missing() -> float:
        bias, linear = one_map(down, seen(u, h, basis), basis, removed)
        assert bias.shape == (D,) and linear.out.shape == (D, D) and linear.basis is basis
        found = bias + linear(new)
        return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert missing() < 0.15, "the ridge shrinks, by 0.1 / 1.1 where the variance is 1"
    assert missing() > 0.05
    monkeypatch.setattr(low_rank_module, "RIDGE", 1e-6)
    assert missing() < 2e-3


def test_rank_zero_is_mean_compensation() -> None:
    h, u, down = inputs(), noise(T, I), noise(D, I, seed=8)
    removed, basis = torch.tensor([0, 3, 4]), find_basis(h, 0)
    assert basis.shape == (0, D)
    bias, linear = one_map(down, seen(u, h, basis), basis, removed)
    torch.testing.assert_close(bias, compensation(down, u.mean(0), removed))
    assert linear.out.shape == (D, 0) and linear.nbytes() == 0
    assert float(linear(h).abs().sum()) == 0


def test_at_the_mean_input_only_the_mean_is_added() -> None:
    """Whatever the slopes: bias + map at the mean of h is mean compensation."""
    h = inputs()
    u, down = (h @ noise(D, I, seed=4)).relu(), noise(D, I, seed=8)
    removed, basis = torch.arange(4, 12), find_basis(h, R)
    bias, linear = one_map(down, seen(u, h, basis), basis, removed)
    wanted = compensation(down, u.mean(0), removed)
    torch.testing.assert_close(bias + linear(h.mean(0)), wanted, rtol=1e-3, atol=1e-3)
    better = (h @ noise(D, I, seed=4)).relu()[:, removed] @ down[:, removed].T
    plain = float((better - wanted).square().sum())
    assert float((better - bias - linear(h)).square().sum()) < 0.5 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_map_has_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    h = inputs()
    u, down = h @ noise(D, I, seed=4), noise(D, I, seed=8)
    removed, basis = torch.arange(8), find_basis(h, R).to(dtype)
    bias, linear = one_map(down.to(dtype), seen(u, h, basis.float()), basis, removed)
    assert (bias.dtype, linear.out.dtype) == (torch.float32, dtype)
    _, exact = one_map(down, seen(u, h, basis.float()), basis.float(), removed)
    torch.testing.assert_close(linear.out.float(), exact.out, rtol=2e-2, atol=0.1)
    assert linear.nbytes() == 2 * D * R


# one map, and one per row


def test_a_map_for_every_row() -> None:
    linear = LowRank(noise(R, D), noise(2, D, R, seed=1))
    h = noise(2, 3, D, seed=2)
    for row in range(2):
        single = LowRank(linear.basis, linear.out[row])
        torch.testing.assert_close(linear(h)[row], single(h[row]), rtol=1e-5, atol=1e-5)
    assert linear.nbytes() == 2 * 4 * D * R


def test_layers_at_once_are_each_layer_alone() -> None:
    """Also where one has fewer features."""
    h, layers = inputs(), []
    for number, rank in enumerate((R, 3, R, R)):
        basis, removed = find_basis(h, rank), torch.arange(number, I, 3)
        u = (h @ noise(D, I, seed=4 + number)).relu()
        layers.append(Gone(noise(D, I, seed=number), seen(u, h, basis), basis, removed))
    together = low_rank(layers)
    for one, (bias, linear) in zip(layers, together, strict=True):
        alone_bias, alone = one_map(one.down, one.evidence, one.basis, one.removed)
        torch.testing.assert_close(bias, alone_bias)
        torch.testing.assert_close(linear.out, alone.out)
        assert linear.basis is one.basis
    assert low_rank([]) == []


# an autocast of the caller's


def test_an_autocast_rounds_no_sum_and_no_solution() -> None:
    h = inputs()
    u, down = h @ noise(D, I, seed=4), noise(D, I, seed=8)
    removed, weights = torch.arange(8), torch.ones(T)

    def everything() -> list[Tensor]:
        basis = find_basis(h, R)
        evidence, z = LayerEvidence(), torch.zeros(1, T, 1)
        f = (h.double() @ basis.double().T).float()
        STATISTICS.update(evidence, u[None], z, None, None, weights[None], f[None])
        bias, linear = one_map(down, evidence, basis, removed)
        return [basis, *(known.total for known in evidence.sums.values()), bias, linear.out]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    assert all(
        torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True)
    )
