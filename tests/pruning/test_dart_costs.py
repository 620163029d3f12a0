"""What priors and low-rank compensation cost, by hand: work and memory."""

import pytest

from dart_llm.session.run import prune
from prior_cases import CONFIG
from steps import decode, shared_model
from tiny import HIDDEN, LAYERS, WIDTH, tokens

PROMPT, STEPS = 30, 6


def pruned(name="llama", method=CONFIG, **settings):
    """A run that decoded six tokens."""
    with prune(shared_model(name), method, **settings) as run:
        decode(run.model, tokens(1, PROMPT + STEPS, seed=3), PROMPT)
        run.memory = run.report().extra_memory_bytes
    return run


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("executor", ["auto", "masked"])
def test_work_and_memory_by_hand(name, executor):
    """The prior, the sums, scores and masks of the sequence, and what the executor holds."""
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
    if executor == "masked" or name == "phi3":
        return
    features = rank + rank * rank + WIDTH * rank if rank else 0
    prior = LAYERS * 4 * (3 * WIDTH + features + rank * HIDDEN)
    state = LAYERS * 4 * (2 * WIDTH + features + WIDTH)
    state += 8 * sum(kept) + LAYERS * 4 * (HIDDEN + rank * HIDDEN)
    biases = LAYERS * HIDDEN + (sum(kept) if name == "gpt2" else 0)
    held = 4 * (half + LAYERS * rank * HIDDEN + biases)
    if name == "opt":
        held = LAYERS * 4 * WIDTH  # multipliers; the bias is the mask's own
    assert run.memory == prior + state + held
    run = prune(shared_model(name), CONFIG)
    assert run.report().extra_memory_bytes == 0, "nothing is learnt yet"
    with run:
        assert run.report().extra_memory_bytes == prior


def test_dense_layers_and_dense_tokens():
    """Layers that keep everything have no map; tokens that nobody observes cost what dense ones do.

    A table: layer 1 alone is pruned, to 12 neurons.
    """
    table = {"sparsity": None, "budget": {"table": "1:#12", "name": "uniform"}}
    report, whole = pruned(method=CONFIG.replace(table)).report(), WIDTH * 3 * HIDDEN
    used = 3 * whole + 12 * 3 * HIDDEN + 2 * 8 * HIDDEN
    once = 2 * (12 * 3 * HIDDEN + 8 * HIDDEN) + 36 * HIDDEN
    assert report.ffn_bytes_share == pytest.approx((STEPS * used + once) / (STEPS * 4 * whole))
    for method in ("static", "random"):
        settings = {"sparsity": 0.5, "masking_step": 3, "executor": "masked"}
        report = pruned(method=method, **settings).report()
        assert (report.dense_token_share, report.ffn_bytes_share) == (0.5, 1.0)


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
