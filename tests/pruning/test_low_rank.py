"""Low-rank compensation against eigendecompositions and least squares; what it costs, by hand."""

import numpy as np
import pytest
import torch

from dart_llm.pruning import compensation as module
from dart_llm.pruning.accounting import Costs, tracing_flops
from prior_cases import CONFIG, seen
from steps import pruned, shared_model
from tiny import HIDDEN, LAYERS, WIDTH, tokens
from tiny import drawn as noise

T, D, I, R = 80, 12, 20, 5  # noqa: E741 - the method's own names
SPREAD = torch.tensor([9.0, 6, 4, 3, 2, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])


DOWN, MIX = noise(D, I, seed=8), noise(D, I, seed=4)


def one_map(down, evidence, basis, removed):
    (result,) = module.low_rank([module.CompensationInputs(down, evidence, basis, removed)])
    return result


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
    basis = module.find_basis(h, rank)
    rank = min(rank, D)
    assert basis.shape == (rank, D) and basis.dtype == torch.float32
    values, vectors = principal(h)
    unit = (basis / basis.norm(dim=1, keepdim=True)).double().numpy()
    np.testing.assert_allclose(unit.T @ unit, vectors[:rank].T @ vectors[:rank], atol=2e-4)
    # each scaled to variance 1, but for the share of the mean variance that is added
    variance = (h @ basis.T).var(0, correction=0).flip(0)
    floor = module.FLOOR * values.sum() / D
    np.testing.assert_allclose(variance, values[:rank] / (values[:rank] + floor), rtol=1e-3)


def least_squares(u, f, ridge):
    """[I, r]: the ridge as rows of its own below the centred features."""
    u64, f64 = (t.double().numpy() for t in (u - u.mean(0), f - f.mean(0)))
    below = np.sqrt(ridge * len(f64)) * np.eye(f64.shape[1])
    zeros = np.zeros((f64.shape[1], u64.shape[1]))
    result, *_ = np.linalg.lstsq(np.vstack([f64, below]), np.vstack([u64, zeros]), rcond=None)
    return result.T


def slopes(evidence):
    one = module.CompensationInputs(DOWN, evidence, noise(R, D), torch.arange(I))
    (inverse,) = module.inverses([one], evidence.sums["features"].mean[None])
    return one.covariances()[:, :-1] @ inverse


@pytest.mark.parametrize("cuts", [(T,), (50, 30), (1,) * T])
def test_slopes_are_ridge_regression(cuts):
    """Also where few tokens were observed: one has no variance at all, and every slope is 0."""
    h = inputs()
    u = (h @ MIX).relu() + noise(T, I, seed=5)
    basis = module.find_basis(h, R)
    result = slopes(seen(u, h, basis, cuts=cuts))
    assert result.shape == (I, R) and result.dtype == torch.float32
    wanted = least_squares(u, h @ basis.T, module.RIDGE)
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=2e-3)
    assert float(slopes(seen(u[:1], h[:1], basis)).abs().max()) < 1e-3
    assert bool(slopes(seen(u[:2], h[:2], basis)).isfinite().all())


def test_what_is_linear_in_the_input_is_reproduced(monkeypatch):
    h, new, shift = inputs(), inputs(seed=9), noise(I, seed=7)
    u, removed, basis = h @ MIX + shift, torch.tensor([1, 2, 5, 11, 19]), module.find_basis(h, D)
    wanted = (new @ MIX + shift)[:, removed] @ DOWN[:, removed].T

    def missing():
        bias, linear = one_map(DOWN, seen(u, h, basis), basis, removed)
        assert bias.shape == (D,) and linear.out.shape == (D, D) and linear.basis is basis
        result = bias + linear(new)
        return float((result - wanted).norm() / (wanted - wanted.mean(0)).norm())

    assert 0.05 < missing() < 0.15, "the ridge shrinks, by 0.1 / 1.1 where the variance is 1"
    monkeypatch.setattr(module, "RIDGE", 1e-6)
    assert missing() < 2e-3


def test_at_the_mean_input_only_the_mean_is_added():
    """Whatever the slopes: bias + map at the mean of h is mean compensation, which is rank 0."""
    h = inputs()
    u, removed = (h @ MIX).relu(), torch.arange(4, 12)
    wanted = module.compensation(DOWN, u.mean(0), removed)
    for rank in (0, R):
        basis = module.find_basis(h, rank)
        bias, linear = one_map(DOWN, seen(u, h, basis), basis, removed)
        assert linear.out.shape == (D, rank) and linear.nbytes == 4 * D * rank
        torch.testing.assert_close(bias + linear(h.mean(0)), wanted, rtol=1e-3, atol=1e-3)
    lost = u[:, removed] @ DOWN[:, removed].T
    left, plain = ((lost - added).square().sum() for added in (bias + linear(h), wanted))
    assert float(left) < 0.5 * float(plain)


def test_layers_at_once_are_each_layer_alone():
    h, layers = inputs(), []
    for number, rank in enumerate((R, 3, R, R)):
        basis, removed = module.find_basis(h, rank), torch.arange(number, I, 3)
        known = seen((h @ noise(D, I, seed=4 + number)).relu(), h, basis)
        layers.append(module.CompensationInputs(noise(D, I, seed=number), known, basis, removed))
    for one, (bias, linear) in zip(layers, module.low_rank(layers), strict=True):
        ((alone_bias, alone),) = module.low_rank([one])
        torch.testing.assert_close(bias, alone_bias)
        torch.testing.assert_close(linear.out, alone.out)
        assert linear.basis is one.basis
    assert module.low_rank([]) == []


PROMPT, STEPS = 30, 6


def decoded(name="llama", **settings):
    """The run of a model that decodes ``STEPS`` tokens."""
    ids = tokens(1, PROMPT + STEPS, seed=3)
    return pruned(shared_model(name), ids, PROMPT, method=CONFIG, **settings)[0]


@pytest.mark.parametrize(
    ("name", "executor"),
    [("llama", "auto"), ("llama", "masked"), ("phi3", "auto"), ("gpt2", "auto"), ("opt", "auto")],
)
def test_work_by_hand(name, executor):
    run = decoded(name, executor=executor)
    report = run.report()
    per, rank = 3 if name in ("llama", "phi3") else 2, 0 if name == "opt" else 8
    dense, maps = LAYERS * WIDTH * per * HIDDEN, LAYERS * 2 * rank * HIDDEN
    kept = [layer.kept for layer in report.layers]
    half = sum(kept) * per * HIDDEN
    assert 2 * half == dense and all(count < WIDTH for count in kept)
    removed = (LAYERS * WIDTH - sum(kept)) * HIDDEN
    copies = 2 * (half + LAYERS * rank * HIDDEN)
    moved = STEPS * (half + maps) + copies + removed
    assert report.ffn_bytes_share_if_compact == pytest.approx(moved / (STEPS * dense))
    if run.executor == "masked":
        moved = STEPS * (dense + maps) + removed
    assert report.ffn_bytes_share == pytest.approx(moved / (STEPS * dense))


def test_observed_tokens_are_charged_for_what_is_summed():
    """Sums are read and written in float32, u f^T and f f^T too; maps, copies, removed columns."""
    dense = LAYERS * WIDTH * 3 * HIDDEN
    report = decoded(masking_step=2, compensation_rank=8).report()
    assert report.dense_token_share == pytest.approx(2 / STEPS)
    seen = 2 * LAYERS * (16 * WIDTH + 8 * (WIDTH + 8) * 8) / 4
    half = dense // 2 + LAYERS * 2 * 8 * HIDDEN
    once = 2 * (dense // 2 + LAYERS * 8 * HIDDEN) + LAYERS * WIDTH // 2 * HIDDEN
    moved = seen + 2 * dense + (STEPS - 2) * half + once
    assert report.ffn_bytes_share == pytest.approx(moved / (STEPS * dense))


def test_tracing_flops_by_hand():
    """8 per neuron, hidden unit and token, the products with features; a mask's sort and fit."""
    run = decoded(compensation_rank=8)
    costs, kept = Costs(run.layers, 1, low_rank=True), [WIDTH // 2] * LAYERS
    tokens = 8 * (WIDTH + HIDDEN) + 2 * (WIDTH + HIDDEN + 8) * 8
    assert tracing_flops(costs, 5) == 5 * LAYERS * tokens
    build = WIDTH * 6 + 2 * (WIDTH // 2) * HIDDEN * 9 + 2 * (WIDTH + 8) * 64
    assert tracing_flops(costs, 1, kept, True) == LAYERS * (tokens + build)
    assert tracing_flops(costs, 0, kept) == LAYERS * WIDTH * 6
