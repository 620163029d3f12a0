"""What priors and low-rank compensation cost, by hand."""

import pytest

from dart_llm.pruning.accounting import Costs, tracing_flops
from dart_llm.session.run import prune
from prior_cases import CONFIG
from steps import decode, shared_model
from tiny import HIDDEN, LAYERS, WIDTH, tokens

PROMPT, STEPS = 30, 6


def pruned(name="llama", method=CONFIG, **settings):
    with prune(shared_model(name), method, **settings) as run:
        decode(run.model, tokens(1, PROMPT + STEPS, seed=3), PROMPT)
    return run


@pytest.mark.parametrize(
    ("name", "executor"),
    [("llama", "auto"), ("llama", "masked"), ("phi3", "auto"), ("gpt2", "auto"), ("opt", "auto")],
)
def test_work_by_hand(name, executor):
    run = pruned(name, executor=executor)
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
    report = pruned(masking_step=2, compensation_rank=8).report()
    assert report.dense_token_share == pytest.approx(2 / STEPS)
    seen = 2 * LAYERS * (16 * WIDTH + 8 * (WIDTH + 8) * 8) / 4
    half = dense // 2 + LAYERS * 2 * 8 * HIDDEN
    once = 2 * (dense // 2 + LAYERS * 8 * HIDDEN) + LAYERS * WIDTH // 2 * HIDDEN
    moved = seen + 2 * dense + (STEPS - 2) * half + once
    assert report.ffn_bytes_share == pytest.approx(moved / (STEPS * dense))


def test_tracing_flops_by_hand():
    """8 per neuron, hidden unit and token, the products with features; a mask's sort and fit."""
    run = pruned(compensation_rank=8)
    costs, kept = Costs(run.layers, 1, low_rank=True), [WIDTH // 2] * LAYERS
    tokens = 8 * (WIDTH + HIDDEN) + 2 * (WIDTH + HIDDEN + 8) * 8
    assert tracing_flops(costs, 5) == 5 * LAYERS * tokens
    build = WIDTH * 6 + 2 * (WIDTH // 2) * HIDDEN * 9 + 2 * (WIDTH + 8) * 64
    assert tracing_flops(costs, 1, kept, True) == LAYERS * (tokens + build)
    assert tracing_flops(costs, 0, kept) == LAYERS * WIDTH * 6
