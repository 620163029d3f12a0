"""Executor cuda: kernels by an index, on a GPU or in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.models.describe import describe
from dart_llm.models.packed_loading import round_weights
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.patching.executors.torch_ffn import CompactFfn
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask
from dart_llm.session.run import prune
from steps import apart
from tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (extra gpu)"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture
def cuda(few_programs):
    from dart_llm.patching.executors import cuda

    return cuda


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def model_of(name, dtype=torch.float32):
    return tiny(name, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "width", "keep"), [(300, 40, 3), (33, 130, 11)])
def test_rows_and_their_sum(cuda, monkeypatch, inputs, width, keep, dtype):
    """Sizes that no block divides, and one neuron of a program's eight."""
    monkeypatch.setattr(cuda, "ROWS", 8)
    gate, up = drawn(width, inputs, dtype=dtype), drawn(width, inputs, dtype=dtype, seed=1)
    x, ids = drawn(2, inputs, dtype=dtype), torch.arange(width - keep, width, device=DEVICE)
    products = cuda.rows(x, (gate, up), ids)
    for product, matrix in zip(products, (gate, up), strict=True):
        assert apart(product, x.float() @ matrix[ids].float().T) < 1e-6
    u = drawn(2, keep, dtype=dtype)
    assert apart(cuda.weighted_sum(u, up, ids), u.float() @ up[ids].float()) < 1e-6


def test_a_sum_in_parts(cuda, monkeypatch):
    """The neurons of one output are cut into parts, the last of them short."""
    monkeypatch.setattr(cuda, "CHUNK", 32)
    down, u, ids = drawn(150, 20), drawn(1, 130), torch.arange(130, device=DEVICE)
    assert apart(cuda.weighted_sum(u, down, ids), u @ down[:130]) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2"])
def test_one_ffn(cuda, name, dtype):
    """Masks with and without compensation, few and many vectors, weights changed between masks."""
    block = describe(model_of(name, dtype)).blocks[1]
    ours, theirs = cuda.CudaFfn(block), CompactFfn(block)
    hidden, width = block.matrices()[2].shape[0], block.down_width
    maps = LowRank(drawn(4, hidden, dtype=dtype), drawn(hidden, 4, dtype=dtype, seed=1))
    masks = [
        LayerMask(torch.tensor([2, 3, 7], device=DEVICE), width),
        LayerMask(torch.arange(5, 40, device=DEVICE), width, drawn(hidden), maps),
    ]
    with torch.no_grad():
        for mask in masks:
            block.down.weight.mul_(2)
            ours.load(mask)
            theirs.load(mask)
            for shape in ((1, 2), (1, STEP_ROWS + 1)):
                x = drawn(*shape, hidden, dtype=dtype)
                assert ours.run(x).shape == x.shape and ours.run(x).dtype == dtype
                assert apart(ours.run(x), theirs.run(x)) < TOLERANCE[dtype]
    size = width * hidden * dtype.itemsize  # down is copied, or an up by inputs
    assert ours.nbytes() == size + ours.bias.nbytes
    ours.unload()
    assert ours.nbytes() == 0


@pytest.mark.usefixtures("native")
def test_what_it_cannot_run_is_refused(cuda, monkeypatch):
    packed = tiny("llama", intermediate_size=64)
    round_weights(packed, "q8_0")
    assert prune(model_of("llama"), "griffin", sparsity=0.5).executor != "cuda"
    for model, sentence, settings in (
        (model_of("opt"), r'executor "cuda" cannot run OPT.* layer 0 has no.* FFN module', {}),
        (model_of("llama"), 'use executor "masked"', {"batch": "per_row"}),
        (packed, "layer 0 has quantized weights", {}),
        (tiny("llama"), r"layer 0 is not on a GPU \(TRITON_INTERPRET=1 runs", {}),
    ):
        if "not on a GPU" in sentence:
            monkeypatch.setattr(cuda, "INTERPRETED", False)
        with pytest.raises(ConfigError, match=sentence):
            prune(model, "griffin", sparsity=0.5, executor="cuda", **settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs triton, .* pip install 'dart-llm\[gpu\]'"):
        prune(tiny("llama"), "griffin", sparsity=0.5, executor="cuda")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dart_llm.patching.executors import cuda

HALF, SINGLE, LONG = "*bf16", "*fp32", "*i64"
CASES = (
    (cuda._rows, {"x": HALF, "first": HALF, "second": HALF}, {"BLOCK": 512, "N": 8}),
    (cuda._sum, {"u": HALF, "down": HALF}, {"COLUMNS": 128, "CHUNK": 32}),
)
for kernel, pointers, constants in CASES:
    types = {"ids": LONG, "out": SINGLE} | pointers | dict.fromkeys(constants, "constexpr")
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert ".target sm_80" in made.asm["ptx"] and made.asm["cubin"]
print("compiled")
"""


@pytest.mark.full
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Triton brings its own assembler: this takes no card."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    environment = {**os.environ, **environment, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
