"""Gradients, inference mode and no_grad in one run: nothing leaks from one to the other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from steps import CACHE, Same, generate, new_cache, shared_model, state_of
from tiny import tiny, tokens


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_inference_mode_and_others_in_one_block(executor: str) -> None:
    model, extra = shared_model(), tokens(1, 8, seed=5)
    settings = {
        "sparsity": 0.5,
        "executor": executor,
        "prior": SMALL,
        "min_evidence": 0,
        "drift": {"rule": "interval 3", "min_distance": 0, "max_dense_share": 1.0},
        "remask": {"observe_tokens": 2},
    }

    def talk(mode: Callable[[], Any]) -> list[torch.Tensor]:
        found = []
        with prune(model, "dart", **settings) as run:
            for _ in range(2):
                with mode():
                    first = generate(model, tokens(), 12)
                    cache = first.past_key_values
                    turn = torch.cat([first.sequences, extra], 1)
                    found += [*first.logits, *generate(model, turn, 8, **{CACHE: cache}).logits]
                found += [*generate(model, tokens(), 8).logits]
        assert run.report().remask_causes == {"first": 4, "interval": 8, "prompt": 2}
        return found

    with Same(model):
        plain = talk(torch.no_grad)
        inference = talk(torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(plain, inference, strict=True))


def _gradients(model: Any, **settings: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of a loss over a prefill and two decode steps, all with the graph on."""
    model.zero_grad(set_to_none=True)
    ids, cache = tokens(1, 12), new_cache(model)
    with prune(model, **settings) as run:
        out = [model(ids[:, :10], **{CACHE: cache}).logits]
        for position in (10, 11):
            out.append(model(ids[:, position : position + 1], **{CACHE: cache}).logits)
        logits = torch.cat(out, 1)
        logits.log_softmax(-1)[..., 5].sum().backward()
        for layer in state_of(run).evidence:
            assert all(not known.total.requires_grad for known in layer.sums.values())
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, logits


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, "dart") for name in ("llama", "gemma2", "phi3", "gpt2", "falcon", "opt")],
        *[(name, "dart-token") for name in ("llama", "gpt2")],
    ],
)
def test_gradients(name: str, method: str) -> None:
    model = tiny(name)
    dense, _ = _gradients(model, method="dense")
    cache, ids = new_cache(model), tokens(1, 12)
    parts = [model(ids[:, :10], **{CACHE: cache}).logits]
    parts += [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in (10, 11)]
    torch.cat(parts, 1).log_softmax(-1)[..., 5].sum().backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[n], plain[n]) for n in plain)
    settings = {"method": method, "sparsity": 0.5, "min_evidence": 0, "prior": SMALL}
    pruned, logits = _gradients(model, **settings)
    assert pruned.keys() == plain.keys()
    assert all(bool(g.isfinite().all()) for g in pruned.values())
    down = [n for n in plain if any(k in n for k in ("down_proj.w", "mlp.c_proj.w", "4h_to_h.w"))]
    down += [n for n in plain if n.endswith("fc2.weight")]
    assert len(down) == 4
    assert all(float(pruned[n].norm()) > 0 and not torch.equal(pruned[n], plain[n]) for n in down)
    masked, same = _gradients(model, **settings, executor="masked")
    assert torch.equal(logits, same)
    assert all(torch.equal(pruned[n], masked[n]) for n in pruned)


def test_no_graph_is_kept() -> None:
    model, ids = tiny("gemma2"), tokens(1, 12)
    with prune(model, CONFIG, min_evidence=0, masking_step=3) as run:
        cache = new_cache(model)
        alive: list[Any] = []
        watch = model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, z: alive.append((z.requires_grad, weakref.ref(z)))
        )
        model(ids[:, :8], **{CACHE: cache})
        for position in range(8, 12):
            model(ids[:, position : position + 1], **{CACHE: cache})
        watch.remove()
        del cache
        gc.collect()
        assert [grad for grad, _ in alive] == [True] * 5
        assert [z() for _, z in alive] == [None] * 5
    assert run.report().decoded_tokens == 4
