"""The native kernels alone: products, FFNs and folds against torch."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from dart_llm.models.screen import Screen
from dart_llm.native import build
from dart_llm.patching.executors.native_ffn import ACTS, act_number
from dart_llm.pruning.token_level import contribution_estimate, low_bit, winner_places
from packed_cases import KINDS, kernels
from steps import apart

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


def drawing(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 33, 576])
def test_products(size, dtype, kind):
    draw = drawing(size, dtype)
    x, weight, bias = draw(3, size), draw(21, size), draw(21)
    with kernels(kind):
        product = build.ops().linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert product.dtype == dtype and apart(product, wanted) < TOLERANCE[dtype] / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_ffn(gated, act, kind):
    width, size, rank, drawn = 50, 40, 3, drawing(act)
    x, up, gate, down = drawn(2, size), drawn(width, size), drawn(width, size), drawn(width, size)
    biases, bias, basis, adds = drawn(2, width), drawn(size), drawn(rank, size), drawn(rank, size)
    ids = torch.tensor([0, 3, 4, 7, 20, 21, 22, 23, 49], dtype=torch.int32)
    with kernels(kind):
        gates = (gate, biases[0]) if gated else (None, None)
        parts = x, gates[0], up, down, gates[1], biases[1], ids
        z = build.ops().ffn(*parts, bias, basis, adds, None, act)
    rows = ids.long()
    u = F.linear(x, up[rows], biases[1][rows])
    u = ACTS[act](F.linear(x, gate[rows], biases[0][rows])) * u if gated else ACTS[act](u)
    wanted = u @ down[rows] + bias + F.linear(x, basis) @ adds
    assert apart(z, wanted) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("size", "bits", "group"), [(128, 4, 32), (85, 4, 32), (85, 8, 20)])
def test_a_token_chooses(size, bits, group, gated, dtype, kind):
    """The strongest by the copies, out of the candidates: each neuron writes to its own place."""
    width, keep, drawn = 60, 20, drawing(size + bits, dtype)
    x, up, gate, biases = drawn(1, size), drawn(width, size), drawn(width, size), drawn(2, width)
    worth, mean = drawn(width).float().abs(), drawn(width).float()
    down = torch.eye(width, size, dtype=dtype)
    copies = [low_bit(part, bits, group) for part in (gate, up)]
    candidates = torch.tensor([i for i in range(width) if i % 4])
    parts = [t for copy in copies[0 if gated else 1 :] for t in (copy.levels, copy.scales)]
    parts = [*([] if gated else [None, None]), *parts]
    choice = torch.classes.dart_llm.Choice(*parts, worth, mean, [size, bits, group, keep, 1])
    with kernels(kind):
        gates = (gate, biases[0]) if gated else (None, None)
        given = x, gates[0], up, down, gates[1], biases[1], candidates.int()
        z = build.ops().ffn(*given, None, None, None, choice, 0)

    def activation(gate, up):
        gate, up = gate + biases[0].float(), up + biases[1].float()
        return (F.silu(gate) * up if gated else F.silu(up))[0]

    estimate = activation(*(copy.product(x) for copy in copies))
    places = winner_places(contribution_estimate(estimate, worth)[candidates], keep)
    winners = candidates[places]
    assert torch.equal(z[0].nonzero().flatten(), winners)
    u = activation(x.float() @ gate.float().t(), x.float() @ up.float().t())
    assert apart(z[0, winners], (u - mean)[winners]) < TOLERANCE[dtype]


def test_what_does_not_fit_is_refused_and_not_read():
    up, worth, run = torch.randn(6, 8), torch.ones(6), build.ops()
    copy = low_bit(up, 4, 32)

    def choose(numbers=(8, 4, 32, 3, 1), levels=copy.levels, rows=1, up=up):
        given = None, None, levels, copy.scales, worth, None, list(numbers)
        choice = torch.classes.dart_llm.Choice(*given)
        run.ffn(torch.randn(rows, 8), None, up, up, *[None] * 6, choice, 0)

    choose()
    screen = Screen.of(torch.eye(64).repeat(2, 1), torch.eye(64), 4.0)
    other = screen.basis, screen.levels[:, :32], screen.by, 64, 1.0, torch.ones(100, 64), None
    odd = (9, 4, 32, 3, 1), (8, 4, 7, 3, 1), (8, 4, 32, 7, 1), (8, 4, 32, 0, 1)
    for problem, *calls in (
        ("shapes do not fit", lambda: run.linear(torch.ones(1, 8), torch.ones(4, 9), None)),
        ("float32 and bfloat16", lambda: run.linear(up.half(), up.half(), None)),
        ("another shape", *(lambda numbers=numbers: choose(numbers) for numbers in odd)),
        ("another shape", lambda: choose(levels=copy.levels[:5])),
        ("of another FFN", lambda: choose(up=torch.randn(7, 8))),
        ("one at a time", lambda: choose(rows=2)),
        ("another shape", lambda: run.screened_head(torch.ones(1, 64), *other)),
    ):
        for call in calls:
            with pytest.raises(RuntimeError, match=problem):
                call()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind):
    """By every activation, which is known by what it does."""
    names = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3, "mish": None}
    assert {name: act_number(ACT2FN[name]) for name in names} == names
    x, one = torch.tensor([[1.0], [-2.0], [float("nan")], [3.0]]), torch.ones(1, 1)
    with kernels(kind):
        for number, act in ACTS.items():
            result = build.ops().ffn(x, None, one, one, *[None] * 7, number)
            torch.testing.assert_close(result, act(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("words", "size", "keep"), [(5000, 72, 40), (4096, 64, 64), (9, 40, 33)])
def test_a_screened_head(words, size, keep, dtype, kind):
    """Rough scores by the largest directions, exact ones near the best."""
    drawn = drawing(words, dtype)
    weight, x, states = drawn(words, size), drawn(3, size), drawn(50, size)
    screen = replace(Screen.of(weight, states, 1.0, 1e7), keep=keep, threshold=9.0)
    rough = screen.rough(x)
    near, full = screen.near(rough), F.linear(x, weight)
    parts = *screen.tensors(), keep, 9.0
    with kernels(kind):
        scores, exact = build.ops().screened_head(x, *parts, weight, None)
    # sums in another order may put a word on the other side of the threshold
    assert all(abs(a - b) <= 2 for a, b in zip(exact, near.sum(1).tolist(), strict=True))
    assert scores.dtype == dtype
    off = (scores - torch.where(near, full, rough.to(dtype))).abs().float()
    assert int((off > 2 * TOLERANCE[dtype] * float(full.abs().max())).sum()) <= 6
