"""After a run the model is exactly what it was, however it ended; hooks of accelerate stay."""

import contextlib
import copy
import functools
import pickle
from itertools import product

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import dart_llm
from dart_llm.errors import AttachError, ConfigError
from dart_llm.models.checkpoint import fingerprint
from dart_llm.models.packed_loading import round_weights
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from products import SHAPES, cases, in_turn
from steps import CACHE, HALF, Same, apart, generate, new_cache, shared_model, state_of, written
from tiny import NAMES, tiny, tokens

METHODS = ("griffin", "dart", "dart-token", "published", "teal-attention", "cats")
METHODS += ("static", "dense")
CASES = [(name, method) for method, name in in_turn(METHODS, SHAPES)]


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("name", "method"), cases([*product(NAMES, METHODS[:1]), *CASES], NAMES, METHODS)
)
def test_normal_exit(name, method):
    model = shared_model(name)
    settings = {"self_stats": SMALL} if method.startswith("dart") else {}
    settings |= {"method": method, "sparsity": 0 if method == "dense" else 0.5}
    hook = model.register_forward_hook(lambda *_: None)  # hooks of the user stay
    with Same(model):
        run, _ = written(model, tokens(2, 70), 8, settings)
    hook.remove()
    assert run.report().decoded_tokens == 14


@pytest.mark.contract("exact restore")
def test_nested_and_repeated_blocks():
    model, sequences = shared_model(), []
    with Same(model), prune(model, **HALF) as run:
        for enter, words in (
            (prune(model, "dart").attach, r"dart_llm\.restore\(model\)"),
            (run.attach, "attached already"),
            (prune(model.model, "griffin").attach, "restore"),
        ):
            with pytest.raises(AttachError, match=words):
                enter()
        generate(model, tokens(), 4)
    assert run.report().decoded_tokens == 3
    for _ in range(2):
        with Same(model):
            run.attach()
            run.reset()
            sequences.append(generate(model, tokens(), 8).sequences)
            run.detach()
            run.detach()
    assert torch.equal(*sequences) and run.report().decoded_tokens == 7


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


@pytest.mark.parametrize("part", ["", "model", "model.layers.0.mlp"])
def test_an_attached_model_cannot_be_copied_or_pickled(part):
    model = tiny()
    with prune(model, **HALF):
        for copies in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="cannot be copied or pickled"):
                copies(model.get_submodule(part))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens()).logits, model(tokens()).logits)


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("executor", ["masked", "compact"])
def test_inference_mode_and_others_in_one_block(executor):
    model, extra = shared_model(), tokens(1, 8, seed=5)
    settings = {"sparsity": 0.5, "executor": executor, "self_stats": SMALL, "min_evidence": 0}
    settings |= {"drift": {"rule": "interval 3", "min_distance": 0, "max_dense_share": 1.0}}
    settings |= {"remask": {"observe_tokens": 2}}

    def talk(mode):
        logits = []
        with prune(model, "dart", **settings) as run:
            for _ in range(2):
                with mode():
                    first = generate(model, tokens(), 12)
                    cache = first.past_key_values
                    turn = torch.cat([first.sequences, extra], 1)
                    logits += [*first.logits, *generate(model, turn, 8, **{CACHE: cache}).logits]
                logits += [*generate(model, tokens(), 8).logits]
        assert run.report().remask_causes == {"first": 4, "interval": 8, "prompt": 2}
        return logits

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
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _gradients(model, **settings):
    with prune(model, **settings) as run:
        logits = _loss(model)
        for layer in state_of(run).evidence:
            assert all(not known.total.requires_grad for known in layer.sums.values())
    return _taken(model), logits


@pytest.mark.parametrize(
    ("name", "method"),
    [*product(("llama", "phi3", "gpt2", "opt"), ["dart"]), ("llama", "dart-token")],
)
def test_gradients(name, method):
    model = tiny(name)
    _loss(model)
    plain, (dense, _) = _taken(model), _gradients(model, method="dense")
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[n], plain[n]) for n in plain)
    settings = {"method": method, "sparsity": 0.5, "min_evidence": 0, "self_stats": SMALL}
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


# blocks that end with an error; last, for the native kernels stay on from here

OFTEN = {"drift": {"rule": "interval 4", "min_distance": 0}, "remask": {"observe_tokens": 2}}
"""Re-masks while eight tokens are generated."""

SCENARIOS = {
    "maps of the FFN's input": {"method": CONFIG, **OFTEN},
    "clamp": {**HALF, "clamp": {0: {3: 2.5}, 2: {5: 0.0}}, **OFTEN},
    "masks": {"masks": {0: [1, 2], 3: range(40)}},
    "per row": {**HALF, "batch": "per_row"},
    "tokens": {"method": "dart-token", "sparsity": 0.5, "self_stats": SMALL},
    "prior": {"method": "dart", "sparsity": 0.5, "self_stats": SMALL, **OFTEN},
}
"""Settings under which a block ends with an error."""


@functools.cache
def packed_model():
    """Weights in blocks."""
    model = tiny("llama", hidden_size=64, intermediate_size=160)
    assert round_weights(model, "q4_0") == []
    return model


@pytest.mark.contract("exact restore")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("name", "executor", "scenario"),
    [
        *product(["llama", "gpt2", "opt"], ["auto"], ["maps of the FFN's input"]),
        *product(["llama"], ["masked"], SCENARIOS),
        *product(["llama"], ["compact", "native"], [one for one in SCENARIOS if one != "per row"]),
        *product(["gemma3", "gpt2", "bloom"], ["native"], ["prior"]),
        *product(["packed"], ["masked", "compact", "native"], ["prior", "tokens"]),
    ],
)
def test_an_error_in_the_block(name, executor, scenario):
    """Weights in blocks are read and not touched."""
    model = packed_model() if name == "packed" else shared_model(name)
    before = fingerprint(model)
    with (
        Same(model),
        contextlib.suppress(ZeroDivisionError),
        prune(model, executor=executor, **SCENARIOS[scenario]),
    ):
        generate(model, tokens(2, 30), 8)
        assert name != "packed" or fingerprint(model) == before
        raise ZeroDivisionError


CPU = torch.device("cpu")
PLACES = {
    "dispatched": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "host": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
}


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize(
    ("place", "name"),
    [*product(["dispatched"], ["llama", "gpt2", "opt"]), ("host", "phi3"), ("disk", "gemma2")],
)
def test_accelerate_hooks_stay(place, name, tmp_path):
    ids = tokens(1, 40)
    _, wanted = written(shared_model(name), ids, 6, {"executor": "masked"})
    model = PLACES[place](tiny(name), tmp_path)

    def state():
        return [
            (n, list(m.__dict__), id(m.__dict__.get("forward")), hasattr(m, "_hf_hook"))
            for n, m in model.named_modules()
        ]

    before, dense = state(), generate(model, ids, 6)
    run, got = written(model, ids, 6)
    copies = place == "dispatched" and name != "opt"
    assert run.executor in (("compact", "native") if copies else ("masked",))
    assert apart(got.logits, wanted.logits) < 1e-5
    assert apart(got.logits, dense.logits) > 1e-2
    assert state() == before and any(hooked for *_, hooked in before)
    after = generate(model, ids, 6)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, dense.logits, strict=True))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_offloaded_weights_are_not_read(place, tmp_path):
    model = PLACES[place](tiny(), tmp_path)
    for settings in (
        *({"method": method} for method in ("dart", "static")),
        *({"score": score} for score in ("contribution", "max", "random")),
        {"executor": "compact"},
    ):
        with pytest.raises(ConfigError, match="offloaded"):
            prune(model, **{"method": "griffin", **settings})
    ids, logits = {layer: list(range(10)) for layer in range(4)}, []
    for one in (model, shared_model()):
        with prune(one, masks=ids, executor="masked"):
            logits.append(generate(one, tokens(), 5).logits)
    assert apart(*logits) < 1e-5
