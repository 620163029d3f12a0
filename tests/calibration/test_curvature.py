"""Gradients by the neurons, against leaves of our own and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_cases import KEPT, LENGTH, ROWS, by_leaves
from dart_llm.calibration import collect as curvature
from dart_llm.calibration.collect import evaluating, gradients
from dart_llm.models.capture import LayerActivations as Seen
from dart_llm.models.describe import describe
from products import SHAPES
from steps import Same, shared_model
from tiny import LAYERS, VOCAB, tiny, tokens


def found_by(model: Any, ids: Tensor) -> dict[int, tuple[Seen, Tensor]]:
    """What ``gradients`` hands on, its parts joined."""
    parts: dict[int, list[tuple[Seen, Tensor]]] = {}

    def take(layer: int, seen: Seen, gradient: Tensor) -> None:
        parts.setdefault(layer, []).append((seen, gradient))

    gradients(model, ids, take, lambda text: None)
    return {
        layer: (
            Seen(
                *(torch.cat([getattr(s, k) for s, _ in several]) for k in ("u", "x", "z", "r", "h"))
            ),
            torch.cat([gradient for _, gradient in several]),
        )
        for layer, several in parts.items()
    }


@pytest.mark.parametrize("name", [*SHAPES, "llama", "gemma2", "bloom", "gpt_neox", "opt-postnorm"])
def test_gradients(name: str) -> None:
    """Every shape of FFN; OPT flattens its tokens, Conv1D its weights' sense."""
    model, ids = shared_model(name), tokens(ROWS, LENGTH, seed=5)
    wanted = by_leaves(model, ids)
    found = found_by(model, ids)
    assert list(found) == list(range(LAYERS))
    for layer, (seen, gradient) in found.items():
        u, g = (t[:, 4:-1] for t in wanted[layer])
        assert gradient.shape == u.shape == (ROWS, KEPT, u.shape[-1])
        assert seen.z.shape == seen.x.shape == seen.h.shape
        torch.testing.assert_close(seen.u, u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, g, rtol=1e-3, atol=1e-5)
        assert float(g.abs().max()) > 1e-3
        assert not gradient.requires_grad and not seen.u.requires_grad


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_finite_differences(name: str) -> None:
    """The summed loss of the tokens that follow, as one activation moves."""
    model, ids = tiny(name, dtype=torch.float64), tokens(1, LENGTH, seed=5)
    found = found_by(model, ids)
    for layer, neuron, position in ((0, 3, 4), (1, 17, 6), (2, 40, 12), (3, 11, 8)):
        block, losses = describe(model).blocks[layer], []
        for change in (-1e-2, 1e-2):

            def move(
                module: nn.Module,
                args: Any,
                by: float = change,
                n: int = neuron,
                at: int = position,
            ) -> Any:
                u = args[0].clone()
                u.view(LENGTH, -1)[at, n] += by
                return (u,)

            handle = block.down.register_forward_pre_hook(move)
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            handle.remove()
            losses.append(float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        slope = (losses[1] - losses[0]) / 2e-2
        assert float(found[layer][1][0, position - 4, neuron]) == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_frozen_weights_give_the_same(name: str) -> None:
    model, frozen = shared_model(name), tiny(name).requires_grad_(False)
    ids = tokens(2, LENGTH, seed=5)
    with Same(frozen):
        found = found_by(frozen, ids)
    assert not any(p.requires_grad for p in frozen.parameters())
    for layer, (_, gradient) in found_by(model, ids).items():
        torch.testing.assert_close(found[layer][1], gradient)


def test_one_frozen_part_stays_frozen() -> None:
    model, ids = tiny(), tokens(2, LENGTH, seed=5)
    model.get_input_embeddings().requires_grad_(False)
    for parameter in model.model.layers[2].parameters():
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    found = found_by(model, ids)
    assert [p.requires_grad for p in model.parameters()] == flags
    for layer, (_, gradient) in found_by(shared_model(), ids).items():
        torch.testing.assert_close(found[layer][1], gradient)


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", SHAPES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = tiny(name)
    model.train()
    modules = list(model.modules())
    for module in modules[::3]:
        module.training = False
    flags = [module.training for module in modules]
    kept = torch.full_like(next(model.parameters()), 7.0)
    next(model.parameters()).grad = kept
    with evaluating(model):
        assert not any(module.training for module in modules)
        with Same(model):
            found_by(model, tokens(2, LENGTH))
    assert [module.training for module in modules] == flags
    found_by(model, tokens(2, LENGTH))
    assert [module.training for module in modules] == flags
    first, *others = model.parameters()
    assert first.grad is kept and bool((kept == 7).all())
    assert all(p.grad is None for p in others)
    assert all(p.requires_grad for p in model.parameters())


def test_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, news = shared_model(), tokens(9, LENGTH), list[str]()
    wanted, sizes = found_by(model, ids), list[int]()
    monkeypatch.setattr(curvature, "LOGITS", 2 * LENGTH * VOCAB)
    found = found_by(model, ids)
    for layer, (_, gradient) in wanted.items():
        torch.testing.assert_close(found[layer][1], gradient, rtol=1e-4, atol=1e-5)
    gradients(model, ids, lambda layer, s, g: sizes.append(len(g)), news.append)
    assert sizes == [2] * 4 * LAYERS + [1] * LAYERS
    told = [f"learning from the model's own text: {done} of 5 parts" for done in (2, 4)]
    assert news == told
    monkeypatch.setattr(curvature, "LOGITS", 1)
    assert found_by(model, ids[:2])[0][1].shape[0] == 2
