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
from dart_llm.patching.executors import cuda_ffn
from dart_llm.patching.executors.cuda_ffn import CudaFfn
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.patching.executors.torch_ffn import CompactFfn
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import low_bit, winner_places
from dart_llm.session.run import prune
from steps import Same, apart, generate
from tiny import tiny, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (extra gpu)"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
FORMS = ("llama", "llama-bias", "phi3", "gpt2", "gpt_neox")
"""Gate, up and down; with biases; gate and up fused; plain with biases, by inputs and by rows."""


@pytest.fixture
def kernels(monkeypatch):
    """The kernels; in the interpreter with few programs, each of which takes 10 ms."""
    made = cuda_ffn.kernels()
    if made.INTERPRETED:
        monkeypatch.setattr(made, "ROWS", 64)
        monkeypatch.setattr(made, "CHUNK", 64)
    return made


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def model_of(name, dtype=torch.float32, **sizes):
    return tiny(name, dtype=dtype, **sizes).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "width", "keep"), [(300, 40, 3), (33, 130, 11)])
def test_rows_and_their_sum(inputs, width, keep, dtype):
    """Sizes that no block divides, one neuron of a program's eight, ids of each vector's own."""
    made = cuda_ffn.kernels()
    gate, up = drawn(width, inputs, dtype=dtype), drawn(width, inputs, dtype=dtype, seed=1)
    x, ids = drawn(2, inputs, dtype=dtype), torch.arange(width - keep, width, device=DEVICE)
    result = made.rows(x, (gate, up), ids)
    for one, matrix in zip(result, (gate, up), strict=True):
        assert apart(one, x.float() @ matrix[ids].float().T) < 1e-6
    own = torch.stack([ids, ids - keep])
    assert torch.equal(made.rows(x, (up,), own)[0, 0], result[1, 0])
    u = drawn(2, keep, dtype=dtype)
    wanted = torch.stack([u[m].float() @ up[own[m]].float() for m in range(2)])
    assert apart(made.weighted_sum(u, up, own), wanted) < 1e-6


def test_a_sum_in_parts(kernels, monkeypatch):
    """The neurons of one output are cut into parts, the last of them short."""
    monkeypatch.setattr(kernels, "CHUNK", 32)
    down, u, ids = drawn(150, 20), drawn(1, 130), torch.arange(130, device=DEVICE)
    assert apart(kernels.weighted_sum(u, down, ids), u @ down[:130]) < 1e-6


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 12), (4, 7)])
def test_products_with_low_bit_copies(kernels, bits, group):
    copy, x = low_bit(drawn(20, 45), bits, group), drawn(2, 45, seed=1)
    ids = torch.tensor([0, 3, 19], device=DEVICE)
    assert apart(kernels.low_bit_product(x, copy, ids), copy.product(x, ids)) < 1e-6


def test_the_largest_are_those_of_a_stable_sort(kernels):
    strengths = drawn(3, 70).abs()
    strengths[0, ::3], strengths[1] = 0.5, 0.0
    strengths[2, 5], strengths[2, 9] = torch.inf, torch.nan
    ids = torch.arange(10, 80, device=DEVICE)
    for keep in (1, 30, 70):
        wanted = ids[winner_places(strengths.nan_to_num(nan=torch.inf), keep)]
        if keep == 1:  # of infinite and no number the first
            wanted[2] = kernels.largest(strengths, ids, 1)[2]
            assert wanted[2] in (15, 19)
        assert torch.equal(kernels.largest(strengths, ids, keep), wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_one_ffn(kernels, name, dtype):
    """Under one mask after the other, with compensation and without; few vectors and many."""
    block = describe(model_of(name, dtype)).blocks[1]
    ours, theirs = CudaFfn(block), CompactFfn(block)
    hidden = block.matrices()[2].shape[0]
    maps = LowRank(drawn(4, hidden, dtype=dtype), drawn(hidden, 4, dtype=dtype, seed=1))
    masks = [
        LayerMask(torch.tensor([2, 3, 7], device=DEVICE), block.down_width),
        LayerMask(torch.arange(5, 40, device=DEVICE), block.down_width, drawn(hidden), maps),
    ]
    with torch.no_grad():
        for mask in masks:
            ours.load(mask)
            theirs.load(mask)
            for shape in ((1, 2), (1, STEP_ROWS + 1)):
                x = drawn(*shape, hidden, dtype=dtype)
                assert ours.run(x).shape == x.shape and ours.run(x).dtype == dtype
                assert apart(ours.run(x), theirs.run(x)) < TOLERANCE[dtype]
    size = block.down_width * hidden * torch.finfo(dtype).bits // 8
    assert ours.nbytes() == size + ours.bias.nbytes  # down is copied, or an up by inputs
    ours.unload()
    assert ours.nbytes() == 0


@pytest.mark.contract("exact restore")
def test_generate_and_leave_nothing_behind(kernels):
    model = model_of("qwen2", num_hidden_layers=1)
    ids = tokens(1, 20, seed=5)
    if DEVICE == "cuda":
        pytest.skip("weights are compared bit for bit on the CPU")
    with Same(model):
        with prune(model, "griffin", sparsity=0.5, executor="compact"):
            wanted = generate(model, ids, 4)
        with prune(model, "griffin", sparsity=0.5, executor="cuda") as run:
            result = generate(model, ids, 4)
            kept = run.patch.layers[0].kept
        assert torch.equal(result.sequences, wanted.sequences)
        assert apart(result.logits, wanted.logits) < 1e-5 and kept.nbytes() == 0


def test_weights_that_change_in_place_count_from_the_next_mask(kernels):
    block = describe(model_of("llama")).blocks[0]
    ffn, x = CudaFfn(block), drawn(1, 32)
    masks = [LayerMask(torch.arange(20, device=DEVICE), 48) for _ in range(2)]
    with torch.no_grad():
        ffn.load(masks[0])
        first, place = ffn.run(x), ffn.matrices[-1].data_ptr()
        block.down.weight.mul_(2)
        ffn.load(masks[1])
        assert apart(ffn.run(x), 2 * first) < 1e-6 and ffn.matrices[-1].data_ptr() == place


def test_what_it_cannot_run_is_refused(kernels, monkeypatch):
    def refused(model, sentence, **settings):
        with pytest.raises(ConfigError, match=sentence):
            prune(model, "griffin", sparsity=0.5, executor="cuda", **settings)

    refused(model_of("opt"), r'executor "cuda" cannot run OPT.* layer 0 has no FFN module')
    assert prune(model_of("llama"), "griffin", sparsity=0.5).executor != "cuda"
    refused(model_of("llama"), 'use executor "masked"', batch="per_row")
    monkeypatch.setattr(kernels, "MOST", 47)
    refused(model_of("llama"), 'layer 0 has more than 47 neurons; use executor "compact"')
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    refused(tiny("llama"), r"layer 0 is not on a GPU \(TRITON_INTERPRET=1 runs")


@pytest.mark.usefixtures("native")
def test_weights_in_blocks_are_refused():
    model = tiny("llama", intermediate_size=64)
    round_weights(model, "q8_0")
    with pytest.raises(ConfigError, match="layer 0 stores its weights in blocks"):
        prune(model, "griffin", sparsity=0.5, executor="cuda")


def test_without_triton_one_sentence_says_what_to_install(monkeypatch):
    cuda_ffn.kernels.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(MissingExtra, match=r"needs triton, .* pip install 'dart-llm\[gpu\]'"):
            prune(tiny("llama"), "griffin", sparsity=0.5, executor="cuda")
    finally:
        cuda_ffn.kernels.cache_clear()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dart_llm.patching.executors import cuda_kernels as kernels

HALF, SINGLE, LONG = "*bf16", "*fp32", "*i64"
CASES = (
    (kernels._rows, {"x": HALF, "first": HALF, "second": HALF}, {"BLOCK": 512, "N": 8}),
    (kernels._sum, {"u": HALF, "down": HALF}, {"COLUMNS": 128, "CHUNK": 32}),
    (kernels._low_bit, {"x": HALF, "levels": "*u8", "scales": HALF},
     {"GROUP": 32, "HALVES": 2, "BLOCK": 256, "N": 8}),
    (kernels._largest, {"strengths": SINGLE, "out": LONG}, {"WIDTH": 2048}),
)
for kernel, given, constants in CASES:
    types = {"ids": LONG, "out": SINGLE} | given | dict.fromkeys(constants, "constexpr")
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
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, **environment, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "compiled\n", done.stderr
