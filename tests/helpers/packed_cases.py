"""Packed matrices for tests: kinds of kernels, blocks of every type, and what kernels must give."""

import contextlib
import platform
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import nn

from dart_llm.models.gguf_file import BLOCKS
from dart_llm.models.packed import PackedTensor
from dart_llm.models.packed_loading import round_weights
from dart_llm.native import build
from tiny import tiny

ARM = platform.machine() in ("aarch64", "arm64")
OF_THIS_MACHINE = ("neon",) if ARM else ("avx512bf16", "avx512", "avxvnni", "avx2")
KINDS = (*OF_THIS_MACHINE, "portable")
SMALL = tuple(name for name in BLOCKS if not name.endswith("_k"))
"""Types whose blocks have 32 weights; those of the others have 256."""


@contextlib.contextmanager
def kernels(kind):
    if not build.ops().use(kind):
        pytest.skip(f"this CPU has no {kind}")
    yield
    build.ops().use("")


def drawn_blocks(name, rows, columns, seed=0, size=1.0):
    """Blocks [rows, bytes] of random levels and scales, up to 0.011 ``size``; and dense."""
    draw, kind = np.random.default_rng(seed), Kind[name.upper()]
    weights, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (rows, columns // weights, length), dtype=np.uint8)
    halves = {"q6_k": [208], "q8_0": [0], "q4_0": [0], "q5_0": [0]}.get(name, [0, 2])
    for at in halves:
        factors = (size * (0.001 + 0.01 * draw.random(blocks.shape[:2]))).astype(np.float16)
        factors *= draw.choice(np.array([-1, 1], np.float16), factors.shape)
        blocks[:, :, at : at + 2] = factors[..., None].view(np.uint8)
    blocks = blocks.reshape(rows, -1)
    dense = quants.dequantize(blocks, kind).astype(np.float32)
    return torch.from_numpy(blocks), torch.from_numpy(dense)


def packed(name, rows, columns, order="rows", *, seed=0):
    """A matrix of the native kernels, and its weights."""
    blocks, dense = drawn_blocks(name, rows, columns, seed)
    return build.ops().packed_from_blocks(blocks, name, rows, columns, order), dense


def rounded(x, group=32):
    """``x`` [..., n] as the kernels round it: to 8 bits, ``group`` values to a scale; float64."""
    room = -x.shape[-1] % group
    groups = torch.nn.functional.pad(x.float(), (0, room)).reshape(*x.shape[:-1], -1, group)
    most = groups.abs().amax(-1, keepdim=True)
    levels = torch.round(groups * torch.where(most > 0, 127 / most, 0.0))
    values = levels.double() * (most / 127).double()
    return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def differ(product, x, weights, least=1e-30):
    """Largest difference of ``product`` from x [n, M] times weights [M, N], by size of terms.

    ``least``: what counts as the size at least, as a share of the largest one.
    """
    x, weights = x.double(), weights.double()
    size = x.abs() @ weights.abs()
    size = size.clamp(min=least * float(size.max()) + 1e-30)
    return float(((product.double() - x @ weights).abs() / size).max())


def mixed_model(name):
    """FFNs as Q4_K_M mixes them: the down projection of another type; the rest in Q8_0."""
    model = tiny(name, hidden_size=256, intermediate_size=256)
    assert round_weights(model, "q8_0") == []
    for seed, layer in enumerate(model.model.layers):
        for part, kind in (("gate", "q4_k"), ("up", "q4_k"), ("down", "q6_k")):
            matrix, _ = packed(kind, 256, 256, "tiles", seed=seed)
            weight = PackedTensor(matrix, model.dtype)
            getattr(layer.mlp, f"{part}_proj").weight = nn.Parameter(weight, requires_grad=False)
    return model


SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HUGE = SWITCH.is_file() and "[never]" not in SWITCH.read_text()
"""Whether the system gives huge pages."""


def mapped(address):
    """Sizes, in kilobytes, of the map on which ``address`` lies; {} of none."""
    sizes, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            low, high = (int(address, 16) for address in name.split("-"))
            inside = low <= address < high
        elif inside and rest[-1] == "kB":
            sizes[name[:-1]] = int(rest[0])
    return sizes
