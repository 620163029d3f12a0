"""What is summed over a model's own text: curvature, bases, and the sums of a run."""

import pytest
import torch
from torch import Tensor

from curvature_cases import KEPT, LENGTH, ROWS, by_leaves
from dart_llm.calibration import collect as own_study
from dart_llm.calibration.collect import collect_statistics as study
from dart_llm.calibration.collect import find_bases
from dart_llm.pruning.compensation import find_basis
from prior_cases import STATISTICS, layers_of
from steps import shared_model
from tiny import HIDDEN, LAYERS, tokens

# what is summed


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_study(name):
    """Mean squared gradients, and the other sums."""
    model, ids = shared_model(name), tokens(ROWS, LENGTH, seed=5)
    layers = layers_of(model)
    found = study(model, ids, STATISTICS, find_bases(model, ids, 3, layers), layers)
    wanted = by_leaves(model, ids)
    squares = {
        layer: g[:, 4:-1].reshape(ROWS * KEPT, -1).square() for layer, (_, g) in wanted.items()
    }
    for layer, evidence in enumerate(found):
        sums = evidence.sums
        mean = squares[layer].mean(0)
        torch.testing.assert_close(sums["curvature"].mean, mean, rtol=1e-3, atol=1e-6)
        u = wanted[layer][0][:, 4:-1].flatten(0, 1)
        torch.testing.assert_close(sums["score"].total, u.square().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums["signed"].total, u.sum(0), rtol=1e-4, atol=1e-4)
        assert (sums["score"].weight, sums["curvature"].weight) == (ROWS * KEPT, 1)
        has = {"score", "signed", "curvature"}
        if name != "opt":  # its blocks never see the FFN's input while they are pruned
            has |= {"basis", "features", "moments", "cross"}
        assert set(sums) == has


def test_bases_come_from_the_inputs_of_the_ffn(monkeypatch):
    """The first sequences that hold enough tokens, without their sinks."""
    model, ids = shared_model(), tokens(7, LENGTH, seed=5)
    layers, inputs = layers_of(model), list[Tensor]()
    monkeypatch.setattr(own_study, "BASIS_TOKENS", 45)  # five sequences of ten
    found = find_bases(model, ids, 6, layers)
    handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach())
    )
    with torch.no_grad():
        model(ids[:5])
    handle.remove()
    wanted = find_basis(inputs[0][:, 4:].reshape(50, HIDDEN), 6)
    signs = (found[1] * wanted).sum(1).sign()[:, None]
    torch.testing.assert_close(found[1] * signs, wanted, rtol=1e-2, atol=1e-3)
    assert find_bases(model, ids, 0, layers) == [None] * LAYERS
