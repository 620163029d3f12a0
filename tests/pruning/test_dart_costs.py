"""What priors and low-rank compensation cost, by hand: work, memory, and no export."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dart_llm.session.run import prune
from prior_cases import CONFIG
from steps import decode, shared_model
from tiny import HIDDEN, LAYERS, WIDTH, tokens

PROMPT, LENGTH = 30, 36


def ids() -> torch.Tensor:
    return tokens(1, LENGTH, seed=3)


def pruned(name: str, **settings: Any) -> Any:
    """A run that decoded six tokens."""
    run = prune(shared_model(name), CONFIG, **settings)
    with run:
        decode(run.model, ids(), PROMPT)
    return run


def _costs(name: str) -> tuple[int, int]:
    """Matrices per neuron, and bytes of one layer's prior."""
    gated = name in ("llama", "phi3")
    rank = 0 if name == "opt" else 8
    sums = 3 * WIDTH + (rank + rank * rank + WIDTH * rank if rank else 0)
    return (3 if gated else 2), 4 * (sums + rank * HIDDEN)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("executor", ["auto", "masked"])
def test_work_by_hand(name: str, executor: str) -> None:
    run = pruned(name, executor=executor)
    report, steps = run.report(), LENGTH - PROMPT
    per, _ = _costs(name)
    rank = 0 if name == "opt" else 8
    dense = LAYERS * WIDTH * per * HIDDEN
    kept = [layer.kept for layer in report.layers]
    maps = LAYERS * 2 * rank * HIDDEN
    half = sum(kept) * per * HIDDEN
    assert 2 * half == dense and all(count < WIDTH for count in kept)
    removed = (LAYERS * WIDTH - sum(kept)) * HIDDEN
    copies = 2 * (half + LAYERS * rank * HIDDEN)
    # the width in bits is 6; the regression solves r x r for I right-hand sides
    build = LAYERS * WIDTH * 6 + 2 * removed * (1 + rank) + LAYERS * 2 * (WIDTH + rank) * rank**2
    if_compact = steps * (half + maps) + copies + removed
    assert report.ffn_bytes_share_if_compact == pytest.approx(if_compact / (steps * dense))
    flops = steps * 2 * (half + maps) + build
    assert report.ffn_flops_share_if_compact == pytest.approx(flops / (steps * 2 * dense))
    if run.executor == "compact":
        assert report.ffn_bytes_share == report.ffn_bytes_share_if_compact
        assert report.ffn_flops_share == report.ffn_flops_share_if_compact
        return
    assert report.ffn_bytes_share == pytest.approx(
        (steps * (dense + maps) + removed) / (steps * dense)
    )
    flops = steps * 2 * (dense + maps) + build
    assert report.ffn_flops_share == pytest.approx(flops / (steps * 2 * dense))


def test_layers_that_keep_everything_cost_no_map() -> None:
    """A table: layer 1 alone is pruned, to 12 neurons."""
    model, steps = shared_model(), LENGTH - PROMPT
    config = CONFIG.replace({"sparsity": None, "budget": {"table": "1:#12", "name": "uniform"}})
    with prune(model, config) as run:
        decode(model, ids(), PROMPT)
    report, whole = run.report(), WIDTH * 3 * HIDDEN
    used = 3 * whole + 12 * 3 * HIDDEN + 2 * 8 * HIDDEN
    once = 2 * (12 * 3 * HIDDEN + 8 * HIDDEN) + 36 * HIDDEN
    assert report.ffn_bytes_share == pytest.approx((steps * used + once) / (steps * 4 * whole))


@pytest.mark.parametrize("method", ["static", "random"])
def test_dense_tokens_that_nobody_observes_cost_what_dense_tokens_cost(method: str) -> None:
    """``masking_step`` of a score that needs no activations."""
    with prune(shared_model(), method, sparsity=0.5, masking_step=4, executor="masked") as run:
        decode(run.model, tokens(1, 20), 12)
    report = run.report()
    assert (report.dense_token_share, report.ffn_bytes_share) == (0.5, 1.0)


def test_observed_tokens_are_charged_for_the_features() -> None:
    """Two dense tokens are observed: 8 FLOPs per neuron and hidden unit, and the products."""
    model, steps, dense = shared_model(), LENGTH - PROMPT, LAYERS * WIDTH * 3 * HIDDEN

    def flops(**changes: Any) -> float:
        with prune(model, CONFIG, masking_step=2, **changes) as run:
            decode(model, ids(), PROMPT)
        assert run.report().dense_token_share == pytest.approx(2 / steps)
        return run.report().ffn_flops_share * steps * 2 * dense

    features = 2 * 2 * LAYERS * (HIDDEN + 8 + WIDTH) * 8
    maps = (steps - 2) * 2 * LAYERS * 2 * 8 * HIDDEN
    removed = LAYERS * WIDTH // 2 * HIDDEN
    build = 2 * removed * 8 + LAYERS * 2 * (WIDTH + 8) * 64
    more = flops() - flops(compensation_rank=0)
    assert more == pytest.approx(features + maps + build, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_memory_by_hand(name: str) -> None:
    """The prior, the sums, scores and masks of the sequence, and what the executor holds."""
    run = prune(shared_model(name), CONFIG)
    with run:
        decode(run.model, ids(), PROMPT)
        report = run.report()
    per, prior = _costs(name)
    rank = 0 if name == "opt" else 8
    kept = sum(layer.kept for layer in report.layers)
    sums = 2 * WIDTH + (rank + rank * rank + WIDTH * rank if rank else 0)
    state = LAYERS * 4 * (sums + WIDTH) + 8 * kept + LAYERS * 4 * (HIDDEN + rank * HIDDEN)
    if name == "opt":
        held = LAYERS * 4 * WIDTH  # multipliers; the bias is the mask's own
    else:
        biases = LAYERS * HIDDEN + (kept if name == "gpt2" else 0)
        held = 4 * (kept * per * HIDDEN + LAYERS * rank * HIDDEN + biases)
    assert report.extra_memory_bytes == LAYERS * prior + state + held


def test_memory_of_the_prior_is_counted_from_the_start() -> None:
    run = prune(shared_model(), CONFIG)
    assert run.report().extra_memory_bytes == 0, "nothing is learnt yet"
    with run:
        assert run.report().extra_memory_bytes == LAYERS * _costs("llama")[1]


# export
