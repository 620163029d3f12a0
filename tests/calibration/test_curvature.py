"""Gradients by the neurons, against leaves of our own and finite differences."""

from itertools import pairwise

import pytest
import torch

from curvature_cases import KEPT, LENGTH, ROWS, by_leaves
from dart_llm.calibration import collect
from dart_llm.calibration.collect import evaluating, gradients
from products import SHAPES
from steps import Same, shared_model
from tiny import LAYERS, VOCAB, tiny, tokens


def found_by(model, ids):
    """What ``gradients`` hands on, its parts joined: per layer u and dL/du."""
    parts = {}

    def take(layer, seen, gradient):
        parts.setdefault(layer, []).append((seen.u, gradient))

    gradients(model, ids, take)
    return {layer: list(map(torch.cat, zip(*some, strict=True))) for layer, some in parts.items()}


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", [*SHAPES, "gemma2", "bloom", "opt-postnorm"])
def test_gradients(name):
    model, ids = shared_model(name), tokens(ROWS, LENGTH, seed=5)
    wanted = by_leaves(model, ids)
    frozen = tiny(name).requires_grad_(False)
    with Same(frozen):
        by_frozen = found_by(frozen, ids)
    assert not any(p.requires_grad for p in frozen.parameters())
    found = found_by(model, ids)
    assert list(found) == list(range(LAYERS))
    for layer, (seen, gradient) in found.items():
        u, g = (t[:, 4:-1] for t in wanted[layer])
        assert gradient.shape == u.shape == (ROWS, KEPT, u.shape[-1])
        torch.testing.assert_close(seen, u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, g, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(by_frozen[layer][1], gradient)
        assert float(g.abs().max()) > 1e-3


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_flags_and_gradients_of_the_model_stay(name):
    model = tiny(name).train()
    modules = list(model.modules())
    for module in modules[::3]:
        module.training = False
    model.get_input_embeddings().requires_grad_(False)
    modes = [module.training for module in modules]
    flags = [p.requires_grad for p in model.parameters()]
    *others, last = model.parameters()
    kept = last.grad = torch.full_like(last, 7.0)
    with evaluating(model):
        assert not any(module.training for module in modules)
        with Same(model):
            found_by(model, tokens(2, LENGTH))
    found_by(model, tokens(2, LENGTH))
    assert [module.training for module in modules] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert last.grad is kept and bool((kept == 7).all()) and all(p.grad is None for p in others)


def test_rows_go_through_in_parts(monkeypatch):
    model, ids, news, sizes = shared_model(), tokens(9, LENGTH), [], []
    wanted = found_by(model, ids)
    monkeypatch.setattr(collect, "LOGITS", 2 * LENGTH * VOCAB)
    for layer, (_, gradient) in found_by(model, ids).items():
        torch.testing.assert_close(gradient, wanted[layer][1], rtol=1e-4, atol=1e-5)
    gradients(model, ids, lambda layer, s, g: sizes.append(len(g)), news.append)
    assert sizes == [2] * 4 * LAYERS + [1] * LAYERS
    assert news == sorted(news) and news[-1] == pytest.approx(1), "forward, backward, by layers"
    assert len(news) == 5 * 2 * LAYERS and max(b - a for a, b in pairwise([0, *news])) < 0.06
