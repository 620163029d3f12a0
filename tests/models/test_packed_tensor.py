"""A tensor in blocks, where torch and the rest of the package take it for a weight."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dart_llm.errors import DartError
from dart_llm.models.checkpoint import digest_of
from dart_llm.models.packed import PackedTensor, PackedView, few
from dart_llm.native.build import ops
from packed_cases import differ, drawn_blocks, packed, rounded
from tiny import drawn

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
CASES = [("q4_1", False), ("q8_0", True), ("q6_k", False), ("q6_k", True)]
STORED = pytest.mark.parametrize(("name", "swapped"), CASES)


def made(name="q4_1", swapped=False, dtype=torch.float32, rows=24, columns=256):
    """A weight [rows, columns] in blocks, as a parameter, and dense."""
    matrix, dense = packed(name, rows, columns, "neurons" if swapped else "rows")
    weight = nn.Parameter(PackedTensor(matrix, dtype, swapped), requires_grad=False)
    assert isinstance(weight, nn.Parameter) and weight.shape == dense.shape
    return weight, dense.to(dtype)


@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layers(name, swapped, dtype):
    """Few vectors by inputs of 8 bits, many by dequantised rows; of any number of dimensions.

    If the matrix is stored as the transpose, it is always dequantised.
    """
    weight, dense = made(name, swapped, dtype)
    layer = nn.Linear(256, 24).to(dtype).requires_grad_(False)
    bias, layer.weight = layer.bias.double(), weight
    allowed = 1e-6 if dtype == torch.float32 else 4e-3
    for shape in ((), (3,), (2, 3), (few(),), (few() + 1,), (2, few()), (0,)):
        x = drawn(*shape, 256).to(dtype)
        result, flat = layer(x), x.reshape(-1, 256)
        assert result.shape == (*shape, 24) and result.dtype == dtype
        if len(flat):
            near = flat if swapped or len(flat) > few() else rounded(flat)
            y = result.reshape(-1, 24).double() - bias
            assert differ(y, near, dense.t()) < allowed, shape
    with pytest.raises(RuntimeError):
        layer(drawn(3, 255).to(dtype))


@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_else_sees_it_dequantised(name, swapped, dtype):
    weight, dense = made(name, swapped, dtype)
    ids, x = torch.tensor([[3, 0], [23, 3]]), drawn(5, 24).to(dtype)
    some, out = ids[0], torch.empty(30, 24, dtype=dtype)
    asked = {
        "index": lambda w: w[some],
        "index of columns": lambda w: w[:, some],
        "a slice": lambda w: w[2:7],
        "a slice of columns": lambda w: w[:, 2:7],
        "selected rows": lambda w: w.index_select(0, some),
        "selected columns": lambda w: w.index_select(1, some),
        "transposed selected": lambda w: w.t().index_select(1, some),
        "transposed otherwise": lambda w: w.transpose(-1, 0).mT.T * 1,
        "embedding": lambda w: F.embedding(ids, w),
        "wider": lambda w: w.double(),
        "a product from the left": lambda w: x @ w,
        "out": lambda w: torch.mm(drawn(30, 256).to(dtype), w.t(), out=out),
        "flat": lambda w: w.contiguous().flatten() + w.reshape(-1),
    }
    for what, ask in asked.items():
        result, wanted = ask(weight), ask(dense)
        assert type(result) is (PackedView if "slice" in what else torch.Tensor), what
        near = 1e-5
        if what.startswith("a product") and dtype == torch.bfloat16:  # in float32 on some CPUs
            near = 2.0**-7 * float(wanted.abs().max())
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=near, msg=what)
    rows = [-24, 3, -2]
    torch.testing.assert_close(weight[torch.tensor(rows)], dense[rows], rtol=1e-5, atol=1e-5)
    for beyond in (24, -25):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([beyond]), weight)
        with pytest.raises(IndexError):
            weight[torch.tensor([0, beyond])]


@STORED
@pytest.mark.parametrize("count", [3, 40])
def test_gradients_flow_through_it(name, swapped, count):
    """Those of dequantised weights: exact ones, also where the product rounded its inputs."""
    weight, dense = made(name, swapped)
    x_packed, wanted, head = drawn(count, 256), drawn(count, 256), drawn(count, 24, seed=1)
    for x, w in ((x_packed.requires_grad_(), weight), (wanted.requires_grad_(), dense)):
        (F.linear(x, w) * head).sum().backward()
    torch.testing.assert_close(x_packed.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    assert weight.grad is None


def test_it_is_read_and_never_written():
    weight, dense = made()
    ones = torch.ones(24, 256)
    layer = nn.Linear(256, 24, bias=False)
    layer.weight = weight
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.data.copy_(ones),
        lambda: weight.__setitem__(torch.tensor([0]), 1.0),
        lambda: weight.__setitem__(slice(2, 4), ones[:2]),
        lambda: torch.add(ones, 1, out=weight),
        lambda: layer.load_state_dict({"weight": ones}),
        lambda: torch._foreach_zero_([torch.ones(2), weight]),
        lambda: setattr(weight, "requires_grad", True),
        lambda: nn.Parameter(weight.data),
    ):
        with pytest.raises((DartError, RuntimeError), match="are read-only"):
            write()
    assert not weight.requires_grad_(False).requires_grad
    aways = [lambda: pickle.dumps(weight), weight.share_memory_, lambda: layer.to(torch.bfloat16)]
    aways += [lambda: torch.from_dlpack(weight), lambda: np.from_dlpack(weight.data)]
    for away in (*aways, weight.data_ptr, lambda: torch.save(layer, os.devnull)):
        with pytest.raises(DartError, match='load the model with weights="dense"'):
            away()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):  # C asks C
        torch.utils.dlpack.to_dlpack(weight)
    assert torch.equal(weight.dequantise(), dense)


VIEWS = {
    "row": lambda w: w[0],
    "columns": lambda w: w[:, 3],
    "data": lambda w: w.data[3:5],
    "flat": lambda w: w.view(-1)[:9],
    "split": lambda w: w.split(8)[0],
    "a view of a view": lambda w: w[2:9].detach().T[1],
}
WRITES = [
    lambda view: view.zero_(),
    lambda view: view.__setitem__(0, 1.0),
    lambda view: view.copy_(torch.ones_like(view)),
    lambda view: view.masked_fill_(torch.ones(view.shape, dtype=torch.bool), 0.0),
    nn.init.zeros_,
    lambda view: torch.add(torch.ones(view.shape), 1, out=view),
    lambda view: torch._foreach_mul_([torch.ones(1), view], 2.0),
    lambda view: F.relu(view, inplace=True),
]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_views_are_read_and_never_written(view, mode):
    """A write would go to a dequantised copy, and be lost without a word."""
    weight, dense = made()
    with mode():
        assert torch.equal(view(weight) + 0, view(dense)) and type(view(weight) * 1) is torch.Tensor
        for write in WRITES:
            with pytest.raises(DartError, match="quantised weights are read-only"):
                write(view(weight))
    assert torch.equal(weight.dequantise(), dense)


def test_copies_hold_the_same_blocks():
    """In memory of their own, as a run may lay rows out anew; what is no copy shares them."""
    layer = nn.Linear(256, 24)
    layer.weight = made()[0]
    copied = copy.deepcopy(layer).weight
    ours, theirs = copied.matrix.parts(), layer.weight.matrix.parts()
    assert all(map(torch.equal, ours, theirs)) and isinstance(copied, nn.Parameter)
    assert not {part.data_ptr() for part in ours} & {part.data_ptr() for part in theirs}
    for same in (layer.weight.detach(), layer.state_dict()["weight"], layer.weight.t().t()):
        assert isinstance(same, PackedTensor) and same.matrix is layer.weight.matrix


def test_digests_tell_every_level_and_factor():
    blocks, digests = drawn_blocks("q4_1", 3, 64)[0], set()
    for place in (0, 3, 4, 19, 119):
        other = blocks.clone()
        other.view(-1)[place] ^= 16
        for swapped, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.half)):
            order = "neurons" if swapped else "rows"
            matrix = ops().packed_from_blocks(other, "q4_1", 3, 64, order)
            digests.add(digest_of(PackedTensor(matrix, dtype, swapped)))
    assert len(digests) == 15 and digest_of(made()[0].t().t()) == digest_of(made()[0])
