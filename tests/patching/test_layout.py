"""Weights that are laid out anew: only memory of their own, known to autograd, and put back."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from dart_llm.session.run import prune
from steps import Same, apart, decode
from tiny import HIDDEN, LAYERS, WIDTH, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT = 24
IDS = tokens(1, PROMPT + 4, seed=3)
HALF = {layer: list(range(WIDTH // 2)) for layer in range(LAYERS)}


def _pruned(model, executor):
    with prune(model, masks=HALF, executor=executor):
        return decode(model, IDS, PROMPT)


def _saved(folder):
    tiny().save_pretrained(folder)
    # a private map of the file
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _loaded(folder):
    model = tiny(seed=1)
    torch.save(tiny().state_dict(), folder / "weights.pt")
    model.load_state_dict(torch.load(folder / "weights.pt"), assign=True)
    return model


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("make", [_saved, _loaded])
def test_checkpoints_are_memory_of_their_own(make, tmp_path):
    model = make(tmp_path)
    assert not model.model.layers[0].mlp.down_proj.weight.untyped_storage().resizable()
    model.tie_weights()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert prune(model, masks=HALF).executor == "native"
    with Same(model):
        result = _pruned(model, "native")
    assert apart(result, _pruned(model, "masked")) < 1e-5
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


INPLACE = "modified by an inplace operation"


def _loss(model):
    return model(IDS, labels=IDS).loss


def test_gradients_never_cross_a_change_of_layout():
    model = tiny()
    with prune(model, masks=HALF, executor="native"):
        inside = _loss(model)
    with pytest.raises(RuntimeError, match=INPLACE):
        inside.backward()
    before = _loss(model)
    with prune(model, masks=HALF, executor="native"), pytest.raises(RuntimeError, match=INPLACE):
        before.backward()


@pytest.mark.parametrize("executor", ["native", "compact"])
def test_what_is_kept_of_a_block_is_the_original_after_it(executor):
    model = tiny()
    dense = decode(model, IDS, PROMPT)
    layer = model.model.layers[1]
    x = torch.randn(1, 3, HIDDEN)
    parts = [layer.mlp(x), layer.self_attn.q_proj(x)]
    written = model.generate(IDS, max_new_tokens=5, do_sample=False)
    with prune(model, masks=HALF, executor=executor):
        decode(model, IDS, PROMPT)
        kept = model.forward, layer.mlp.forward, layer.self_attn.q_proj.forward, model.generate
        shallow = copy.copy(model)
        pruned = decode(model, IDS, PROMPT)
    assert apart(pruned, dense) > 1e-3
    with torch.no_grad():
        assert torch.equal(kept[1](x), parts[0]) and torch.equal(kept[2](x), parts[1])
        assert torch.equal(decode(shallow, IDS, PROMPT), dense)
        assert torch.equal(kept[3](IDS, max_new_tokens=5, do_sample=False), written)
        model.forward = kept[0]  # as tools do that put back what they found
        assert torch.equal(decode(model, IDS, PROMPT), dense)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(decode(copied, IDS, PROMPT), dense)
    with Same(model), prune(model, masks=HALF, executor=executor):
        assert torch.equal(decode(model, IDS, PROMPT), pruned)
