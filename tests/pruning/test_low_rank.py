"""Low-rank compensation against plain eigendecompositions and least squares."""

import numpy as np
import pytest
import torch

from dart_llm.pruning import compensation as module
from dart_llm.pruning.compensation import (
    FLOOR,
    RIDGE,
    CompensationInputs,
    LowRank,
    compensation,
    find_basis,
    inverses,
    low_rank,
)
from dart_llm.pruning.statistics import LayerStatistics
from prior_cases import STATISTICS, seen

T, D, I, R = 80, 12, 20, 5  # noqa: E741 - the method's own names
SPREAD = torch.tensor([9.0, 6, 4, 3, 2, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DOWN, MIX = noise(D, I, seed=8), noise(D, I, seed=4)


def one_map(down, evidence, basis, removed):
    (found,) = low_rank([CompensationInputs(down, evidence, basis, removed)])
    return found


def inputs(seed=0, tokens=T):
    """h [T, D]: a mean, and another spread along each of twelve turned directions."""
    turn = torch.linalg.qr(noise(D, D, seed=50)).Q
    return noise(tokens, D, seed=seed) * SPREAD @ turn + 3 * noise(D, seed=51)


def principal(h):
    """Variances, largest first, and directions [D, D] in rows, of the D x D covariance."""
    values, vectors = np.linalg.eigh(np.cov(h.double().numpy(), rowvar=False, bias=True))
    return values[::-1], vectors.T[::-1]


@pytest.mark.parametrize("rank", [1, 5, 12, 40])
def test_the_basis_spans_the_principal_directions(rank):
    h = inputs()
    basis = find_basis(h, rank)
    rank = min(rank, D)
    assert basis.shape == (rank, D) and basis.dtype == torch.float32
    values, vectors = principal(h)
    unit = (basis / basis.norm(dim=1, keepdim=True)).double().numpy()
    np.testing.assert_allclose(unit.T @ unit, vectors[:rank].T @ vectors[:rank], atol=2e-4)
    # each scaled to variance 1, but for the share of the mean variance that is added
    variance = (h @ basis.T).var(0, correction=0).flip(0)
    floor = FLOOR * values.sum() / D
    np.testing.assert_allclose(variance, values[:rank] / (values[:rank] + floor), rtol=1e-3)


def test_inputs_that_hardly_vary():
    """T tokens vary in T - 1 directions; the rounding of a constant is no feature."""
    for tokens in (1, 2, 4):
        h = inputs(tokens=tokens)
        basis = find_basis(h, R)
        assert basis.shape == (tokens - 1, D) and bool(basis.isfinite().all())
        centred, unit = h - h.mean(0), basis / basis.norm(dim=1, keepdim=True)
        torch.testing.assert_close(centred @ unit.T @ unit, centred, rtol=1e-3, atol=1e-3)
    u, removed = noise(T, I), torch.tensor([0, 7, 9])
    for value in (0.0, 1.0, 123.456):
        h = torch.full((T, D), value) * noise(D, seed=3)
        basis = find_basis(h, R)
        assert basis.tolist() == torch.zeros(R, D).tolist()
        bias, linear = one_map(DOWN, seen(u, h, basis), basis, removed)
        assert linear.out.tolist() == torch.zeros(D, R).tolist()
        torch.testing.assert_close(bias, compensation(DOWN, u.mean(0), removed))
    h = inputs()
    h[:, 3] = h[:, 8]  # that direction gets the floor, not one over nothing
    values, _ = principal(h)
    assert values[-1] < 1e-9
    longest = (FLOOR * float(values.sum()) / D) ** -0.5
    assert float(find_basis(h, D)[0].norm()) <= longest * 1.01


def least_squares(u, f, ridge):
    """[I, r]: the ridge as rows of its own below the centred features."""
    u64, f64 = (t.double().numpy() for t in (u - u.mean(0), f - f.mean(0)))
    below = np.sqrt(ridge * len(f64)) * np.eye(f64.shape[1])
    zeros = np.zeros((f64.shape[1], u64.shape[1]))
    found, *_ = np.linalg.lstsq(np.vstack([f64, below]), np.vstack([u64, zeros]), rcond=None)
    return found.T


def slopes(evidence):
    one = CompensationInputs(DOWN, evidence, noise(R, D), torch.arange(I))
    (inverse,) = inverses([one], evidence.sums["features"].mean[None])
    return one.covariances()[:, :-1] @ inverse


@pytest.mark.parametrize("cuts", [(T,), (50, 30), (1,) * T])
def test_slopes_are_ridge_regression(cuts):
    """Also where few tokens were observed: one has no variance at all, and every slope is 0."""
    h = inputs()
    u = (h @ MIX).relu() + noise(T, I, seed=5)
    basis = find_basis(h, R)
    found = slopes(seen(u, h, basis, cuts=cuts))
    assert found.shape == (I, R) and found.dtype == torch.float32
    np.testing.assert_allclose(found, least_squares(u, h @ basis.T, RIDGE), rtol=1e-3, atol=2e-3)
    assert float(slopes(seen(u[:1], h[:1], basis)).abs().max()) < 1e-3
    assert bool(slopes(seen(u[:2], h[:2], basis)).isfinite().all())


def test_tokens_of_no_weight_enter_no_slope():
    h, junk = inputs(), torch.arange(T) % 3 == 0
    u = h @ MIX + noise(T, I, seed=5)
    basis = find_basis(h[~junk], R)
    wanted = slopes(seen(u[~junk], h[~junk], basis))
    h[junk] = u[junk] = 1e3
    found = slopes(seen(u, h, basis, weights=(~junk).float()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_linear_in_the_input_is_reproduced(monkeypatch):
    h, new, shift = inputs(), inputs(seed=9), noise(I, seed=7)
    u, removed, basis = h @ MIX + shift, torch.tensor([1, 2, 5, 11, 19]), find_basis(h, D)
    wanted = (new @ MIX + shift)[:, removed] @ DOWN[:, removed].T

    def missing():
        bias, linear = one_map(DOWN, seen(u, h, basis), basis, removed)
        assert bias.shape == (D,) and linear.out.shape == (D, D) and linear.basis is basis
        found = bias + linear(new)
        return float((found - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert 0.05 < missing() < 0.15, "the ridge shrinks, by 0.1 / 1.1 where the variance is 1"
    monkeypatch.setattr(module, "RIDGE", 1e-6)
    assert missing() < 2e-3


def test_at_the_mean_input_only_the_mean_is_added():
    """Whatever the slopes: bias + map at the mean of h is mean compensation, which is rank 0."""
    h = inputs()
    u, removed = (h @ MIX).relu(), torch.arange(4, 12)
    wanted = compensation(DOWN, u.mean(0), removed)
    for rank in (0, R):
        basis = find_basis(h, rank)
        bias, linear = one_map(DOWN, seen(u, h, basis), basis, removed)
        assert linear.out.shape == (D, rank) and linear.nbytes() == 4 * D * rank
        torch.testing.assert_close(bias + linear(h.mean(0)), wanted, rtol=1e-3, atol=1e-3)
    lost = u[:, removed] @ DOWN[:, removed].T
    left, plain = ((lost - told).square().sum() for told in (bias + linear(h), wanted))
    assert float(left) < 0.5 * float(plain)


def test_dtypes_and_rows():
    """A map has the dtype of the weights; rows of a batch may have a map each."""
    h, removed = inputs(), torch.arange(8)
    basis = find_basis(h, R)
    evidence = seen(h @ MIX, h, basis)
    _, exact = one_map(DOWN, evidence, basis, removed)
    for dtype in (torch.bfloat16, torch.float16):
        bias, linear = one_map(DOWN.to(dtype), evidence, basis.to(dtype), removed)
        assert (bias.dtype, linear.out.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(linear.out.float(), exact.out, rtol=2e-2, atol=0.1)
    each = LowRank(noise(R, D), noise(2, D, R, seed=1))
    some = noise(2, 3, D, seed=2)
    for row in range(2):
        single = LowRank(each.basis, each.out[row])
        torch.testing.assert_close(each(some)[row], single(some[row]), rtol=1e-5, atol=1e-5)
    assert each.nbytes() == 2 * 4 * D * R


def test_layers_at_once_are_each_layer_alone():
    """Also where one has fewer features."""
    h, layers = inputs(), []
    for number, rank in enumerate((R, 3, R, R)):
        basis, removed = find_basis(h, rank), torch.arange(number, I, 3)
        known = seen((h @ noise(D, I, seed=4 + number)).relu(), h, basis)
        layers.append(CompensationInputs(noise(D, I, seed=number), known, basis, removed))
    for one, (bias, linear) in zip(layers, low_rank(layers), strict=True):
        ((alone_bias, alone),) = low_rank([one])
        torch.testing.assert_close(bias, alone_bias)
        torch.testing.assert_close(linear.out, alone.out)
        assert linear.basis is one.basis
    assert low_rank([]) == []


def test_an_autocast_rounds_no_sum_and_no_solution():
    h = inputs()

    def everything():
        basis, evidence, z = find_basis(h, R), LayerStatistics(), torch.zeros(1, T, 1)
        f, w = (h.double() @ basis.double().T).float(), torch.ones(1, T)
        u = (h.double() @ MIX.double()).float()
        STATISTICS.update(evidence, u[None], z, None, None, w, f[None])
        bias, linear = one_map(DOWN, evidence, basis, torch.arange(8))
        return [basis, *(known.total for known in evidence.sums.values()), bias, linear.out]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    assert {one.dtype for one in cast} == {torch.float32}
    assert all(map(torch.equal, plain, cast))
