"""examples/vllm: what needs no vLLM, and the thin part on stand-ins for vLLM's classes."""

import importlib
import sys
import tomllib
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dart_llm.models.describe import describe
from dart_llm.patching.executors.torch_ffn import CompactFfn
from dart_llm.pruning.masks import LayerMask, top_ids
from dart_llm.pruning.scores import squared_share
from dart_llm.session.run import prune
from shells import ROOT
from steps import new_cache, selections, step
from tiny import tiny, tokens

FOLDER = ROOT / "examples/vllm"
HALF = {"dart_sparsity": 0.5}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dart_vllm", "vllm")]:
        del sys.modules[name]


def masks_of(least=1):
    return importlib.import_module("dart_vllm.masks").RequestMasks(least)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Linear:
    """As vLLM's parallel linear layers: what they return is a pair."""

    def __init__(self, weight):
        self.weight, self.bias = weight, None

    def __call__(self, x):
        return F.linear(x, self.weight), None


def silu_and_mul(both):
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def mlp_of(block):
    """A layer's FFN in vLLM's form."""
    gate, up, down = block.matrices()
    parts = {"gate_up_proj": Linear(torch.cat([gate, up]).detach())}
    return SimpleNamespace(**parts, act_fn=silu_and_mul, down_proj=Linear(down.detach()))


def test_a_request_leaves_the_evidence_of_its_own_slices():
    masks, u = masks_of(), drawn(9, 6)
    masks.add("a", HALF)
    masks.add("b", {"dart_sparsity": "0.75"})  # a server may be given words
    masks.add("dense", None)
    masks.begin(["a", "dense", "b"], [0, 3, 5, 7], [True, True, True])
    masks.observe(0, u)  # 7 tokens, and 2 of padding
    masks.begin(["dense", "a"], [0, 1, 3], [False, True])
    masks.observe(0, u[6:])
    assert masks.ids(0) is None
    share = squared_share(u)
    wanted = {"a": share[:3].sum(0) + share[7:9].sum(0), "b": share[5:7].sum(0)}
    for name, keep in (("a", 3), ("b", 2)):
        masks.begin([name], [0, 1], [False])
        assert torch.equal(masks.ids(0), top_ids(wanted[name], keep))
        assert masks.ids(1) is None  # a layer that saw nothing


def test_only_a_decoded_token_alone_in_its_batch_is_pruned():
    masks = masks_of(least=4)
    masks.add("a", HALF)
    masks.add("b", HALF)
    masks.begin(["a", "b"], [0, 4, 7], [True, True])
    masks.observe(0, drawn(7, 6))
    found = {}
    for names, starts, reads in (
        (["a"], [0, 1], [False]),
        (["a"], [0, 2], [False]),  # drafts
        (["a", "b"], [0, 1, 2], [False, False]),
        (["b"], [0, 1], [False]),  # too few tokens were seen
        (["other"], [0, 1], [False]),
        (["a"], [0, 1], [True]),  # the last token of a prompt
        ([], [0], []),
    ):
        masks.begin(names, starts, reads)
        found[str(names), starts[-1], any(reads)] = masks.ids(0) is not None
    assert [key for key, pruned in found.items() if pruned] == [("['a']", 1, False)]


def test_ids_stay_in_one_place_and_requests_are_forgotten():
    masks = masks_of()
    for name in ("a", "b"):
        masks.add(name, HALF)
        masks.begin([name], [0, 3], [True])
        masks.observe(0, drawn(3, 8, seed=ord(name)))
    found = []
    for name in ("a", "b", "a"):
        masks.begin([name], [0, 1], [False])
        found.append((masks.ids(0).clone(), masks.ids(0).data_ptr()))
    assert torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[1][0])
    assert len({place for _, place in found}) == 1
    masks.forget("a")
    masks.begin(["a"], [0, 1], [False])
    assert masks.ids(0) is None
    masks.add("a", HALF)  # preempted: its prompt is read again
    masks.begin(["a"], [0, 2], [True])
    masks.observe(0, drawn(2, 8, seed=ord("b")))
    masks.begin(["a"], [0, 1], [False])
    assert masks.ids(0).data_ptr() == found[0][1]


@pytest.mark.parametrize("wrong", [1, -0.1, "much", [0.5], float("nan")])
def test_what_makes_no_sense_is_said_and_dense(wrong, caplog):
    masks = masks_of()
    masks.add("a", {"dart_sparsity": wrong})
    masks.begin(["a"], [0, 2], [True])
    masks.observe(0, drawn(2, 8))
    masks.begin(["a"], [0, 1], [False])
    assert masks.ids(0) is None and "is no number from 0 to below 1" in caplog.text


@torch.no_grad()
def test_masks_and_numbers_are_those_of_griffin():
    """A prompt in two chunks beside another request, then a decoded token, in one layer."""
    ffn = importlib.import_module("dart_vllm.ffn")
    model, ids = tiny("llama"), tokens(1, 40)
    block = describe(model).blocks[1]
    inputs = []
    handle = block.ffn.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with prune(model, "griffin", sparsity=0.5) as run:
        chosen = selections(run)
        cache = new_cache(model)
        step(model, ids[:, :39], cache)
        handle.remove()
        step(model, ids[:, 39:], cache)
    (x,) = inputs
    masks, other = masks_of(), drawn(5, 32)
    forward = ffn.PrunedFfn(mlp_of(block), 1, masks)
    masks.add("a", HALF)
    for chunk in (x[:20], x[20:]):
        masks.begin(["b", "a"], [0, 5, 5 + len(chunk)], [False, True])
        z = forward(torch.cat([other, chunk]))
        assert torch.allclose(z[5:], block.ffn(chunk), atol=1e-6)
    masks.begin(["a"], [0, 1], [False])
    wanted = chosen[0][2][1]
    assert torch.equal(masks.ids(1), wanted)
    compact = CompactFfn(block)
    compact.load(LayerMask(wanted, block.down_width))
    assert torch.allclose(forward(x[:1]), compact.run(x[:1]), atol=1e-6)
    padded = forward(x[:2])  # a step with padding runs dense
    assert torch.allclose(padded, block.ffn(x[:2]), atol=1e-6)


def test_weights_that_it_cannot_read_are_refused():
    ffn = importlib.import_module("dart_vllm.ffn")
    mlp = mlp_of(describe(tiny("llama")).blocks[0])
    mlp.down_proj.bias = torch.zeros(32)
    with pytest.raises(ValueError, match="layer 0 has a bias"):
        ffn.PrunedFfn(mlp, 0, masks_of())
    mlp.down_proj.weight = torch.zeros(32, 48, dtype=torch.int8)
    with pytest.raises(ValueError, match="layer 0 holds quantised weights"):
        ffn.PrunedFfn(mlp, 0, masks_of())


# vLLM by stand-ins: which calls the thin part makes, not whether vLLM takes them.


class State:
    """What vLLM's own state is asked."""

    def __init__(self, config, model, encoder_cache, device):
        self.calls = []

    def add_request(self, req_index, new_req_data):
        self.calls.append(("add", req_index))

    def remove_request(self, req_id):
        self.calls.append(("remove", req_id))

    def prepare_inputs(self, input_batch, req_states):
        return {"own": req_states}

    def prepare_dummy_inputs(self, num_reqs, num_tokens):
        return {}


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins for the modules that the plug-in imports, and what was registered."""
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    llama = type("LlamaForCausalLM", (), {"forward": lambda self, ids: f"logits of {ids}"})
    held = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor.models.llama": {"LlamaForCausalLM": llama},
        "vllm.v1.worker.gpu.model_states.default": {"DefaultModelState": State},
    }
    for name in held:
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    for name, content in held.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def config(**changes):
    parts = {"enforce_eager": True, "world_size": 1, "speculative_config": None, **changes}
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=parts["enforce_eager"]),
        parallel_config=SimpleNamespace(world_size=parts["world_size"]),
        speculative_config=parts["speculative_config"],
    )


def batch(names, starts, reads):
    """Longer arrays than requests, as vLLM keeps them."""
    return SimpleNamespace(
        req_ids=list(names),
        num_reqs=len(names),
        query_start_loc_np=np.array([*starts, *starts[-1:]], dtype=np.int32),
        is_prefilling_np=np.array([*reads, False]),
    )


def test_it_registers_without_loading_anything(vllm):
    plugin = importlib.import_module("dart_vllm")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {"vllm.general_plugins": {"dart": "dart_vllm:register"}}
    plugin.register()
    assert vllm == {"LlamaForCausalLM": "dart_vllm.model:PrunedLlamaForCausalLM"}
    assert "dart_vllm.model" not in sys.modules


def _equal(one, two):
    return torch.allclose(one, two, atol=1e-6)


@torch.no_grad()
def test_the_state_tells_the_masks_what_vllm_tells_it(vllm):
    model = importlib.import_module("dart_vllm.model")
    layers = [SimpleNamespace(mlp=mlp_of(block)) for block in describe(tiny("llama")).blocks]
    whole = SimpleNamespace(model=SimpleNamespace(layers=layers))
    state = model.PrunedLlamaForCausalLM.get_model_state_cls()(config(), whole, None, "cpu")
    asked = SimpleNamespace(req_id="a", sampling_params=SimpleNamespace(extra_args=HALF))
    state.add_request(3, asked)
    x = drawn(20, 32)
    assert state.prepare_inputs(batch(["a"], [0, 20], [True]), "states") == {"own": "states"}
    dense = [layer.mlp.forward(x[:1].repeat(20, 1))[:1] for layer in layers]
    state.prepare_inputs(batch(["a"], [0, 1], [False]), None)
    pruned = [layer.mlp.forward(x[:1]) for layer in layers]
    assert all(len(state.masks.ids(number)) == 24 for number in range(4))
    assert not any(_equal(one, two) for one, two in zip(pruned, dense, strict=True))
    state.prepare_dummy_inputs(1, 1)
    again = [layer.mlp.forward(x[:1]) for layer in layers]
    assert all(_equal(one, two) for one, two in zip(again, dense, strict=True))
    state.remove_request("a")
    state.prepare_inputs(batch(["a"], [0, 1], [False]), None)
    assert state.masks.ids(0) is None
    assert state.calls == [("add", 3), ("remove", "a")]


def test_a_runner_that_makes_no_state_is_refused(vllm):
    """Model runner V1 calls the model and never asks for its state: all would be dense."""
    model = importlib.import_module("dart_vllm.model")
    whole = model.PrunedLlamaForCausalLM()
    whole.model = SimpleNamespace(layers=[])
    with pytest.raises(
        RuntimeError, match=r"no request would be pruned: .* or uninstall dart-vllm"
    ):
        whole.forward("ids")
    whole.get_model_state_cls()(config(), whole, None, "cpu")
    assert whole.forward("ids") == "logits of ids"
    with pytest.raises(RuntimeError):  # another model of the same process
        model.PrunedLlamaForCausalLM().forward("ids")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"enforce_eager": False}, "give --enforce-eager"),
        ({"world_size": 2}, "runs on one GPU"),
        ({"speculative_config": "x"}, "leave them off"),
    ],
)
def test_what_the_prototype_cannot_do_is_refused(vllm, change, said):
    model = importlib.import_module("dart_vllm.model")
    whole = SimpleNamespace(model=SimpleNamespace(layers=[]))
    with pytest.raises(ValueError, match=said):
        model.PrunedState(config(**change), whole, None, "cpu")
