"""The native kernels alone: products, FFNs and folds against torch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm import native_build as build
from dart_llm.native_ffn import ACTS, act_number
from steps import apart

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
KINDS = ("", "avx512bf16", "avx512", "avx2", "portable")


@contextlib.contextmanager
def kernels(kind: str):
    if not build.use_kernels(kind):
        pytest.skip(f"this CPU has no {kind}")
    yield
    build.use_kernels("")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 33, 576])
def test_products(size: int, dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(size)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(3, size), (21, size), (21,)]
    )
    with kernels(kind):
        found = build.ops().linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert found.dtype == dtype and apart(found, wanted) < TOLERANCE[dtype] / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_ffn(gated: bool, act: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(act)
    width, size, rank = 50, 40, 3

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, up, gate, down = drawn(2, size), drawn(width, size), drawn(width, size), drawn(width, size)
    biases, bias, basis, adds = drawn(2, width), drawn(size), drawn(rank, size), drawn(rank, size)
    ids = torch.tensor([0, 3, 4, 7, 20, 21, 22, 23, 49], dtype=torch.int32)
    with kernels(kind):
        found = build.ops().ffn(
            x,
            gate if gated else None,
            up,
            down,
            biases[0] if gated else None,
            biases[1],
            ids,
            bias,
            basis,
            adds,
            act,
        )
    rows = ids.long()
    u = F.linear(x, up[rows], biases[1][rows])
    u = ACTS[act](F.linear(x, gate[rows], biases[0][rows])) * u if gated else ACTS[act](u)
    wanted = u @ down[rows] + bias + F.linear(x, basis) @ adds
    assert apart(found, wanted) < 2e-6


def test_wrong_shapes_are_refused_and_not_read() -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 9)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        build.ops().linear(x, weight, None)
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        build.ops().linear(x.half(), weight.half(), None)


def test_activations_are_known_by_what_they_do() -> None:
    from transformers.activations import ACT2FN

    names = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4}
    assert {name: act_number(ACT2FN[name]) for name in names} == names
    assert act_number(ACT2FN["mish"]) is None and act_number(ACT2FN["quick_gelu"]) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold(dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(30, 70, generator=generator).to(dtype)
    ids, factors = torch.tensor([0, 2, 3, 11, 29]), torch.randn(5, 33, generator=generator)
    with kernels(kind):
        found = build.ops().fold(rows, ids.int(), factors)
    assert apart(found.t(), rows[ids].double().t() @ factors.double()) < 1e-6
