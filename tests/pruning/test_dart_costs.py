"""What priors and low-rank compensation cost, by hand."""

import pytest

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
    # the width in bits is 6; the regression solves r x r for I right-hand sides
    build = LAYERS * WIDTH * 6 + 2 * removed * (1 + rank) + LAYERS * 2 * (WIDTH + rank) * rank**2
    moved, flops = STEPS * (half + maps) + copies + removed, STEPS * 2 * (half + maps) + build
    assert report.ffn_bytes_share_if_compact == pytest.approx(moved / (STEPS * dense))
    assert report.ffn_flops_share_if_compact == pytest.approx(flops / (STEPS * 2 * dense))
    if run.executor == "masked":
        moved, flops = STEPS * (dense + maps) + removed, STEPS * 2 * (dense + maps) + build
    assert report.ffn_bytes_share == pytest.approx(moved / (STEPS * dense))
    assert report.ffn_flops_share == pytest.approx(flops / (STEPS * 2 * dense))


def test_observed_tokens_are_charged_for_what_is_summed():
    """Two dense tokens are observed: 8 FLOPs per neuron and hidden unit, and the products."""
    dense = LAYERS * WIDTH * 3 * HIDDEN
    reports = [pruned(masking_step=2, compensation_rank=rank).report() for rank in (8, 0)]
    assert reports[0].dense_token_share == pytest.approx(2 / STEPS)
    features = 2 * 2 * LAYERS * (HIDDEN + 8 + WIDTH) * 8
    maps = (STEPS - 2) * 2 * LAYERS * 2 * 8 * HIDDEN
    build = 2 * (LAYERS * WIDTH // 2 * HIDDEN) * 8 + LAYERS * 2 * (WIDTH + 8) * 64
    more = (reports[0].ffn_flops_share - reports[1].ffn_flops_share) * STEPS * 2 * dense
    assert more == pytest.approx(features + maps + build, rel=1e-6)
    # sums read and written in float32, u f^T and f f^T too; maps, copies and the removed columns
    seen = 2 * LAYERS * (16 * WIDTH + 8 * (WIDTH + 8) * 8) / 4
    half = dense // 2 + LAYERS * 2 * 8 * HIDDEN
    once = 2 * (dense // 2 + LAYERS * 8 * HIDDEN) + LAYERS * WIDTH // 2 * HIDDEN
    moved = seen + 2 * dense + (STEPS - 2) * half + once
    assert reports[0].ffn_bytes_share == pytest.approx(moved / (STEPS * dense))
