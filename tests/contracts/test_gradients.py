"""Gradients, inference mode and no_grad in one run: nothing leaks from one to the other."""

import gc
import weakref

import pytest
import torch

from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from steps import CACHE, Same, generate, new_cache, shared_model, state_of
from tiny import tiny, tokens


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_inference_mode_and_others_in_one_block(executor):
    model, extra = shared_model(), tokens(1, 8, seed=5)
    settings = {"sparsity": 0.5, "executor": executor, "prior": SMALL, "min_evidence": 0}
    settings |= {"drift": {"rule": "interval 3", "min_distance": 0, "max_dense_share": 1.0}}
    settings |= {"remask": {"observe_tokens": 2}}

    def talk(mode):
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
        plain, inference = talk(torch.no_grad), talk(torch.inference_mode)
    assert all(torch.equal(a, b) for a, b in zip(plain, inference, strict=True))


def _loss(model):
    """A prefill and two decode steps, all with the graph on, and a loss over them; the logits."""
    ids, cache = tokens(1, 12), new_cache(model)
    parts = [model(part, **{CACHE: cache}).logits for part in ids.split([10, 1, 1], 1)]
    logits = torch.cat(parts, 1)
    logits.log_softmax(-1)[..., 5].sum().backward()
    return logits


def _taken(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _gradients(model, **settings):
    with prune(model, **settings) as run:
        logits = _loss(model)
        for layer in state_of(run).evidence:
            assert all(not known.total.requires_grad for known in layer.sums.values())
    return _taken(model), logits


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[(name, "dart") for name in ("llama", "gemma2", "phi3", "gpt2", "falcon", "opt")],
        ("llama", "dart-token"),
    ],
)
def test_gradients(name, method):
    model = tiny(name)
    _loss(model)
    plain, (dense, _) = _taken(model), _gradients(model, method="dense")
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[n], plain[n]) for n in plain)
    settings = {"method": method, "sparsity": 0.5, "min_evidence": 0, "prior": SMALL}
    fewer, logits = _gradients(model, **settings)
    assert fewer.keys() == plain.keys()
    assert all(bool(g.isfinite().all()) for g in fewer.values())
    kinds = ("down_proj.w", "mlp.c_proj.w", "4h_to_h.w", "fc2.weight")
    down = [n for n in plain if any(kind in n for kind in kinds)]
    assert len(down) == 4
    assert all(float(fewer[n].norm()) > 0 and not torch.equal(fewer[n], plain[n]) for n in down)
    masked, same = _gradients(model, **settings, executor="masked")
    assert torch.equal(logits, same)
    assert all(torch.equal(fewer[n], masked[n]) for n in fewer)


def test_no_graph_is_kept():
    model, ids = tiny("gemma2"), tokens(1, 12)
    with prune(model, CONFIG, min_evidence=0, masking_step=3) as run:
        cache = new_cache(model)
        alive = []
        watch = model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, z: alive.append((z.requires_grad, weakref.ref(z)))
        )
        for part in ids.split([8, 1, 1, 1, 1], 1):
            model(part, **{CACHE: cache})
        watch.remove()
        del cache
        gc.collect()
        assert [(grad, z()) for grad, z in alive] == [(True, None)] * 5
    assert run.report().decoded_tokens == 4
