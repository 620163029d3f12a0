"""Weights that are laid out anew: only memory of their own, known to autograd, and put back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dart_llm.errors import ConfigError
from dart_llm.native.build import ops
from dart_llm.session.run import prune
from steps import Same, apart, decode
from tiny import HIDDEN, LAYERS, WIDTH, tiny, tokens

pytestmark = pytest.mark.usefixtures("native")

PROMPT = 24
HALF = {layer: list(range(WIDTH // 2)) for layer in range(LAYERS)}


def _ids() -> Tensor:
    return tokens(1, PROMPT + 4, seed=3)


def _down(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.down_proj


def _pruned(model: Any, executor: str) -> Tensor:
    with prune(model, masks=HALF, executor=executor):
        return decode(model, _ids(), PROMPT)


# one call lays them out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_laying_out_changes_nothing_but_strides(inference: bool, dtype: torch.dtype) -> None:
    with torch.inference_mode(inference):
        parameter = nn.Parameter(torch.randn(5, 7).to(dtype))
        values, address = parameter.detach().clone(), parameter.data_ptr()
    for columns, strides in ((True, (1, 5)), (False, (7, 1))):
        version = None if inference else parameter._version
        ops().lay_out(parameter, columns)
        assert torch.equal(parameter, values) and parameter.stride() == strides
        assert parameter.data_ptr() == address and parameter.requires_grad and parameter.is_leaf
        assert inference or parameter._version == version + 1


# memory of their own


def _shared_by_two(model: Any, folder: Path) -> None:
    _down(model, 1).weight = nn.Parameter(_down(model).weight.data)


def _a_buffer_on_it(model: Any, folder: Path) -> None:
    model.register_buffer("seen", _down(model).weight.data[3], persistent=False)


def _part_of_a_larger_tensor(model: Any, folder: Path) -> None:
    flat = torch.randn(2 * WIDTH * HIDDEN)
    _down(model).weight.data = flat[WIDTH * HIDDEN :].view(HIDDEN, WIDTH)


def _of_numpy(model: Any, folder: Path) -> None:
    array = np.random.default_rng(0).standard_normal((HIDDEN, WIDTH), dtype="float32")
    _down(model).weight.data = torch.from_numpy(array)


def _mapped(model: Any, folder: Path) -> None:
    _down(model).weight.detach().numpy().tofile(folder / "weight")
    array = np.memmap(folder / "weight", "float32", "r", shape=(HIDDEN, WIDTH))
    _down(model).weight.data = torch.from_numpy(array)


def _in_shared_memory(model: Any, folder: Path) -> None:
    _down(model).weight.share_memory_()


NOT_OURS = {
    "two": (
        _shared_by_two,
        "layers.0.mlp.down_proj.weight and model.layers.1.mlp.down_proj.weight",
    ),
    "buffer": (_a_buffer_on_it, r"down_proj.weight and seen lie on the same memory"),
    "larger": (_part_of_a_larger_tensor, "the down projection of layer 0 is a view of something"),
    "numpy": (_of_numpy, "layer 0 lies in memory that PyTorch did not allocate"),
    "read": (_mapped, "layer 0 lies in memory that PyTorch did not allocate"),
    "processes": (_in_shared_memory, "layer 0 shares its memory with another process"),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("case", NOT_OURS)
def test_memory_that_is_not_its_own_is_left_as_it_is(case: str, tmp_path: Path) -> None:
    change, reason = NOT_OURS[case]
    model = tiny()
    change(model, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert prune(model, masks=HALF).executor == "compact"
    for executor in ("native", "slim"):
        with pytest.raises(ConfigError, match=f"{executor}.*{reason}.*compact"):
            prune(model, masks=HALF, executor=executor)
    with prune(model, masks=HALF):
        assert all(_down(model, layer).weight.is_contiguous() for layer in range(LAYERS))
        assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
        found = decode(model, _ids(), PROMPT)
    assert apart(found, _pruned(model, "masked")) < 1e-5


def _saved(folder: Path) -> Any:
    tiny().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not _down(model).weight.untyped_storage().resizable()  # a private map of the file
    return model


def _loaded(folder: Path) -> Any:
    model = tiny(seed=1)
    torch.save(tiny().state_dict(), folder / "weights.pt")
    model.load_state_dict(torch.load(folder / "weights.pt"), assign=True)
    assert not _down(model).weight.untyped_storage().resizable()
    return model


@pytest.mark.contract("exact restore")
@pytest.mark.parametrize("make", [_saved, _loaded])
def test_checkpoints_are_memory_of_their_own(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    model.tie_weights()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert prune(model, masks=HALF).executor == "slim"
    with Same(model):
        found = _pruned(model, "slim")
    assert apart(found, _pruned(model, "masked")) < 1e-5
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


# autograd


def _loss(model: Any) -> Tensor:
    return model(_ids(), labels=_ids()).loss


@pytest.mark.parametrize("executor", ["native", "slim"])
def test_gradients_never_cross_a_change_of_layout(executor: str) -> None:
    model = tiny()
    with prune(model, masks=HALF, executor=executor):
        inside = _loss(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()
    before = _loss(model)
    with (
        prune(model, masks=HALF, executor=executor),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        before.backward()


def test_a_whole_training_step_inside_is_that_outside() -> None:
    def trained(attach: bool) -> list[Tensor]:
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = prune(model, masks=HALF, executor="slim")
        if attach:
            run.attach()
        for _ in range(2):
            _loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.detach()
        assert all(p.is_contiguous() for p in model.parameters())
        return [p.detach().clone() for p in model.parameters()]

    inside, outside = trained(True), trained(False)
    assert max(apart(a, b) for a, b in zip(inside, outside, strict=True)) < 1e-5
    assert not torch.equal(outside[0], tiny().model.embed_tokens.weight)


# what is kept of a block


@pytest.mark.parametrize("executor", ["native", "slim", "compact"])
def test_what_is_kept_of_a_block_is_the_original_after_it(executor: str) -> None:
    model, ids = tiny(), _ids()
    dense = decode(model, ids, PROMPT)
    layer = model.model.layers[1]
    x = torch.randn(1, 3, HIDDEN)
    parts = [layer.mlp(x), layer.self_attn.q_proj(x)]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    with prune(model, masks=HALF, executor=executor):
        decode(model, ids, PROMPT)
        kept = model.forward, layer.mlp.forward, layer.self_attn.q_proj.forward, model.generate
        shallow = copy.copy(model)
        pruned = decode(model, ids, PROMPT)
    assert apart(pruned, dense) > 1e-3
    with torch.no_grad():
        assert torch.equal(kept[1](x), parts[0]) and torch.equal(kept[2](x), parts[1])
        assert torch.equal(decode(shallow, ids, PROMPT), dense)
        assert torch.equal(kept[3](ids, max_new_tokens=5, do_sample=False), written)
        model.forward = kept[0]  # as tools do that put back what they found
        assert torch.equal(decode(model, ids, PROMPT), dense)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(decode(copied, ids, PROMPT), dense)
    with Same(model), prune(model, masks=HALF, executor=executor):
        assert torch.equal(decode(model, ids, PROMPT), pruned)
