"""After a run the model is exactly what it was, however the run ended."""

import contextlib
import copy
import gc
import pickle
import weakref
from itertools import product

import pytest
import torch
from torch import nn

import dart_llm
from dart_llm.errors import AttachError
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import SHAPES, cases
from steps import HALF, Same, generate, pruned, shared_model, written
from tiny import NAMES, tiny, tokens

METHODS = ("griffin", "dart", "dart-token", "published", "static", "dense")


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("name", "method"),
    cases([*product(NAMES, METHODS[:1]), *product(SHAPES, METHODS)], NAMES, METHODS),
)
def test_normal_exit(name, method):
    model = shared_model(name)
    settings = {"prior": SMALL} if method.startswith("dart") else {}
    settings |= {"method": method, "sparsity": 0 if method == "dense" else 0.5}
    with Same(model):
        run, _ = written(model, tokens(2, 70), 8, settings)
    assert run.report().decoded_tokens == 14


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_error_in_the_block(name):
    """Also between re-masks, and with maps of the FFN's input."""
    model, drift = shared_model(name), {"rule": "interval 4", "min_distance": 0}
    with (
        Same(model),
        contextlib.suppress(ZeroDivisionError),
        prune(model, CONFIG, drift=drift, remask={"observe_tokens": 2}),
    ):
        generate(model, tokens(1, 30), 8)
        raise ZeroDivisionError


@pytest.mark.contract("exact restore")
def test_nested_and_repeated_blocks():
    model, found = shared_model(), []
    with Same(model), prune(model, **HALF) as run:
        inner = prune(model, "dart")
        for enter, words in (
            (inner.attach, r"dart_llm\.restore\(model\)"),
            (run.attach, "attached already"),
            (prune(model.model, "griffin").attach, "restore"),
        ):
            with pytest.raises(AttachError, match=words):
                enter()
        generate(model, tokens(), 4)
        inner.detach()
    assert run.report().decoded_tokens == 3
    for _ in range(2):
        with Same(model):
            run.attach()
            run.reset()
            found.append(generate(model, tokens(), 8).sequences)
            run.detach()
            run.detach()
    assert torch.equal(*found) and run.report().decoded_tokens == 7


@pytest.mark.contract("exact restore")
def test_restore_is_always_safe():
    """Before any run, twice, before a run is left, between two runs, and inside a block."""
    model = shared_model()
    for whole in (model, nn.Linear(2, 2)):
        dart_llm.restore(whole)
    with Same(model):
        old = prune(model, **HALF).attach()
        generate(model, tokens(), 4)
        dart_llm.restore(model)
        dart_llm.restore(model)
    with Same(model):
        assert old.report().decoded_tokens == 3
        with pytest.raises(AttachError, match="attached run"), old.decoding():
            pass
        with old:
            generate(model, tokens(), 4)
        assert old.report().decoded_tokens == 6
    with Same(model):
        old.attach()
        dart_llm.restore(model.model)
        with prune(model, "griffin", sparsity=0.25) as new:
            old.detach()
            generate(model, tokens(), 4)
        assert new.report().achieved_sparsity == 0.25
        with old:
            dart_llm.restore(model)


@pytest.mark.contract("exact restore")
def test_forwards_and_hooks_of_the_user_stay():
    model, calls = tiny(), []
    mlp = model.model.layers[1].mlp
    plain = mlp.forward

    def own(x):
        calls.append(x.shape[1])
        return plain(x)

    mlp.forward, model.generate = own, model.generate
    model.register_forward_hook(lambda *a: None)
    mlp.register_forward_hook(lambda *a: None)
    with Same(model):
        written(model, tokens(), 4, {"sparsity": 0.0})
        assert mlp.forward is own and len(calls) >= 4
        with prune(model, **HALF):
            assert model.generate.__doc__ == type(model).generate.__doc__
            generate(model, tokens(), 4)


@pytest.mark.contract("exact restore")
def test_the_decoder_alone_runs_dense_after_a_generation_that_failed():
    model, ids, calls = tiny(), tokens(), []
    with torch.no_grad(), prune(model, **HALF):
        expected = model.model(ids).last_hidden_state

        def fails(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("stop")

        handle = model.model.layers[-1].register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="stop"):
            generate(model, ids, 9)
        handle.remove()
        assert torch.equal(model.model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("part", ["", "model", "model.layers.0.mlp"])
def test_an_attached_model_cannot_be_copied_or_pickled(part):
    model = tiny()
    with prune(model, **HALF):
        for copies in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="cannot be copied or pickled"):
                copies(model.get_submodule(part))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_model_that_moved_before_it_was_attached(name):
    """Views of fused and transposed weights follow ``model.to``."""
    settings = {"method": CONFIG, "score": "contribution"}

    def moved(model, **given):
        run = prune(model, **given)
        model.to(torch.bfloat16)
        return run

    run, _, got = pruned(tiny(name), tokens(1, 74), 70, moved, **settings)
    half = tiny(name, dtype=torch.bfloat16)
    other, _, wanted = pruned(half, tokens(1, 74), 70, **settings)
    assert torch.equal(got, wanted)
    a, b = run.report(), other.report()
    assert (a.ffn_bytes_share, a.extra_memory_bytes) == (b.ffn_bytes_share, b.extra_memory_bytes)


def test_two_models_at_once():
    models = (tiny("llama", seed=1), tiny("gpt2", seed=2))
    alone = [written(model, tokens(), 8)[1] for model in models]
    with (
        Same(models[0]),
        Same(models[1]),
        prune(models[0], **HALF) as a,
        prune(models[1], **HALF) as b,
    ):
        both = [generate(model, tokens(), 8) for model in models]
    for one, other in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.logits, other.logits, strict=True))
    assert a.report().decoded_tokens == b.report().decoded_tokens == 7


def test_a_dropped_model_is_freed():
    model = tiny()
    run = prune(model, **HALF).attach()
    generate(model, tokens(), 4)
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None
