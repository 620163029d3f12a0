"""What ids show of a model: gradients against leaves of the test's own, sums, bases; progress."""

import pytest
import torch

from dart_llm.calibration import collect as module
from dart_llm.calibration import progress
from dart_llm.calibration.collect import Needs, collect, evaluating, find_bases, run_forward
from dart_llm.models.describe import describe
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.statistics import UP, SelfStats, Statistics
from dart_llm.pruning.weights import with_parts
from prior_cases import STATISTICS, layers_of, observed
from products import SHAPES
from steps import Same, shared_model
from tiny import LAYERS, VOCAB, tiny, tokens

ROWS, LENGTH = 3, 14
INNER = slice(4, LENGTH - 1)
KEPT = LENGTH - 5
"""Without the four sinks and the last token, which predicts nothing."""


def by_leaves(model, ids):
    """u and dL/du per layer, [B, T, I], by a zero added to the down projection's input."""
    leaves, seen, handles = {}, {}, []
    for block in describe(model).blocks:

        def add(module, args, layer=block.index):
            seen[layer] = args[0].detach()
            leaves[layer] = torch.zeros_like(args[0], requires_grad=True)
            return (args[0].detach() * 1 + leaves[layer] + (args[0] - args[0].detach()),)

        handles.append(block.down.register_forward_pre_hook(add))
    try:
        logits = model(ids).logits
        loss = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
        result = torch.autograd.grad(loss, list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
    shape = (*ids.shape, -1)
    return {
        layer: (seen[layer].reshape(shape), gradient.reshape(shape))
        for layer, gradient in zip(leaves, result, strict=True)
    }


def found_by(model, ids):
    """What ``run_forward`` hands on: per layer u and dL/du."""
    result = {}
    with evaluating(model):
        run_forward(model, ids, lambda n, seen, g: result.setdefault(n, (seen.u, g)), kept=INNER)
    return result


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", [*SHAPES, "gemma2", "bloom", "opt-postnorm"])
def test_gradients(name):
    model, ids = shared_model(name), tokens(ROWS, LENGTH, seed=5)
    wanted = by_leaves(model, ids)
    frozen = tiny(name).requires_grad_(False)
    with Same(frozen):
        by_frozen = found_by(frozen, ids)
    assert not any(p.requires_grad for p in frozen.parameters())
    result = found_by(model, ids)
    assert list(result) == list(range(LAYERS))
    for layer, (seen, gradient) in result.items():
        u, g = (t[:, INNER] for t in wanted[layer])
        assert gradient.shape == u.shape == (ROWS, KEPT, u.shape[-1])
        torch.testing.assert_close(seen, u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, g, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(by_frozen[layer][1], gradient)
        assert float(g.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_sums_and_squared_gradients(name, monkeypatch):
    """In parts of two rows, after each of which the progress grows."""
    model, ids, news = shared_model(name), tokens(ROWS, LENGTH, seed=5), []
    bases = find_bases(model, ids, 3, layers_of(model))
    monkeypatch.setattr(module, "LOGITS", 2 * LENGTH * VOCAB)
    result = collect(model, ids, Needs(STATISTICS, bases, True, inner=True), news.append)
    assert news == [0.5, 1]
    for layer, (u, g) in by_leaves(model, ids).items():
        u, g = (t[:, INNER].flatten(0, 1) for t in (u, g))
        sums = result[layer].sums
        mean = g.square().mean(0)
        torch.testing.assert_close(sums["fisher"].total, mean, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(sums["score"].total, u.square().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums["signed"].total, u.sum(0), rtol=1e-4, atol=1e-4)
        assert (sums["score"].weight, sums["fisher"].weight) == (ROWS * KEPT, 1)
        # OPT's blocks never see the FFN's input while they are pruned
        features = set() if name == "opt" else {"features", "moments", "cross"}
        assert set(sums) == {"score", "signed", "fisher", *features}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_squares_of_the_up_projection(name):
    """Only where there is a gate; the root of their mean is a factor of what ranks neurons."""
    model, ids = shared_model(name), tokens(ROWS, LENGTH, seed=5)
    result = collect(model, ids, Needs(Statistics(None, frozenset({UP})), inner=True))
    outputs = []
    block, layer = describe(model).blocks[1], layers_of(model)[1]
    hook = block.up.register_forward_hook(lambda _, args, y: outputs.append(y[:, INNER]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    (layer,) = with_parts([layer], self_stats=[SelfStats(result[1])])
    sizes = outputs[0][..., -layer.width :].square().mean((0, 1)).sqrt()
    wanted = layer.down_norm * (1 if block.plain else sizes)
    torch.testing.assert_close(layer.saliency, wanted)


def test_batches_are_added_up(monkeypatch):
    model, ids = shared_model(), tokens(10, 12)
    config = PruneConfig.build("flap", budget="blend depth energy")
    together = observed(model, config, ids)
    monkeypatch.setattr(module, "BATCH", 3)
    for first, second in zip(together, observed(model, config, ids), strict=True):
        assert set(first.sums) == set(second.sums) == {"score", "signed", "cosine", "change"}
        for key, one in first.sums.items():
            assert one.weight == second.sums[key].weight == 120
            assert torch.allclose(one.total, second.sums[key].total, rtol=1e-5, atol=1e-5)


def test_lines_by_the_clock(monkeypatch):
    """The first line after five seconds, then every ten; the time left by the measured speed."""
    news, clock = [], [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress(news.append, {"first": 100.0, "second": 300.0}, "learning")
    for stage, start in (("first", 0), ("second", 30)):
        advance = bar.stage(stage)
        for second in range(1, 31):
            clock[0] = float(start + second)
            advance(second / 30)
    assert news == [
        "learning",
        "learning (first): 4 %, about 2 min left",
        "learning (first): 12 %, about 2 min left",
        "learning (first): 21 %, about 2 min left",
        "learning (second): 38 %, about 60 s left",
        "learning (second): 62 %, about 30 s left",
        "learning (second): 88 %, about 8 s left",
    ]
