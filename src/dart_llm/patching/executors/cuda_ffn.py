"""Executor cuda: one FFN by Triton kernels that read the kept neurons by an index.

It runs in Triton's interpreter, where it is tested, and compiles for GPUs; on a card it has not
run, so that ``auto`` never chooses it.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from dart_llm.errors import MissingExtra
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.packed import PackedTensor
from dart_llm.patching.executors.native_ffn import NO_MODULE
from dart_llm.patching.executors.token_ffn import STEP_ROWS, TokenFfn, most_rows
from dart_llm.patching.executors.torch_ffn import buffer, run_rows
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask, contribution_estimate


def cuda_unsupported_reason(block: FfnBlock) -> str | None:
    """Why the kernels cannot run ``block``; None if they can.  Raises ``MissingExtra``."""
    if block.inline:
        return NO_MODULE
    if block.offloaded:
        return "is offloaded"
    down = block.down.weight
    assert isinstance(down, Tensor)
    if any(isinstance(part.weight, PackedTensor) for part in block.projections):
        return "stores its weights in blocks"
    if down.device.type != "cuda" and not kernels().INTERPRETED:
        return "is not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, to test them)"
    if block.down_width > kernels().MOST:
        return f"has more than {kernels().MOST} neurons"
    return None


@functools.cache
def kernels() -> ModuleType:
    """The kernels, which import triton; raises ``MissingExtra``."""
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "gpu")
    from dart_llm.patching.executors import cuda_kernels

    return cuda_kernels


class CudaFfn:
    """The kept neurons of one block; a new mask is a new index.

    ``matrices``: of gate (or None), up and down, [I, D] each, a neuron a row.  Those that store
    neurons as columns (down, as a rule) are copied: with the first mask, and with a later one where
    they were changed or replaced since.
    """

    def __init__(self, block: FfnBlock) -> None:
        self.block = block
        self.token: TokenFfn | None = None
        self.unload()

    def unload(self) -> None:
        """Keep neither masks nor copies."""
        self.mask: LayerMask | None = None
        self.matrices: list[Tensor | None] = []
        self._versions: list[tuple[int, int]] = []
        self.bias = self.mean = self.saliency = None  # type: Tensor | None
        self.winners = 0
        self.linear: LowRank | None = None

    @property
    def token_rows(self) -> int:
        """Rows of the largest batch with per-token selection; 0 while choices are watched."""
        token = self.token
        if token is None or not token.rule.native or token.watched:
            return 0
        return 0 if torch.compiler.is_compiling() else most_rows("cuda", by_weights=False)

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Switch to a mask; a no-op when it is in force already."""
        if mask is self.mask:
            return
        self.mask = None
        with torch.inference_mode(False):
            self._read_weights()
            down_bias = self.block.biases()[2]
            parts = [t.float() for t in (down_bias, mask.bias) if t is not None]
            self.bias = sum(parts[1:], parts[0]) if parts else None
            self.linear = mask.low_rank
            self.winners, self.mean, self.saliency = 0, None, None
            if isinstance(mask, TokenMask):
                assert self.token is not None
                saliency = self.token.saliency(mask)
                self.winners, self.mean = mask.winners, mask.mean
                self.saliency = saliency.float()[mask.ids]
        self.mask = mask

    def _read_weights(self) -> None:
        versions = [(weight.data_ptr(), _version(weight)) for weight in _weights(self.block)]
        if versions == self._versions:
            return
        gate, up, down = self.block.matrices()
        old = self.matrices or (None,) * 3
        rows = [None if part is None else part.detach() for part in (gate, up, down.t())]
        self.matrices = [
            part
            if part is None or part.is_contiguous()
            else buffer(copied, tuple(part.shape), part).copy_(part)
            for copied, part in zip(old, rows, strict=True)
        ]
        self._versions = versions

    def run(self, x: Tensor) -> Tensor:
        """z from the kept neurons alone.  x: [..., D]; of ``token_rows`` with ``TokenMask``."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        assert self.mask is not None
        if len(flat) > STEP_ROWS or torch.compiler.is_compiling():
            # matrix products are worth a copy of the rows
            biases = self.block.biases()[:2]
            z = run_rows(flat, self.matrices, biases, self.mask.ids, self.block.act).float()
        else:
            z = self._kernel(flat, self._selected(flat) if self.winners else self.mask.ids)
        z = (z if self.bias is None else z + self.bias).to(x.dtype)
        z = z if self.linear is None else z + self.linear(flat)
        return z.reshape(x.shape)

    def _selected(self, x: Tensor) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [M, k]."""
        assert self.token is not None and self.mask is not None and self.saliency is not None
        ids, biases = self.mask.ids, self.block.biases()[:2]
        parts = [kernels().low_bit_product(x, proxy, ids) for proxy in self.token.proxies]
        for at, bias in enumerate(biases[2 - len(parts) :]):
            if bias is not None:
                parts[at] += bias[ids]
        strengths = contribution_estimate(self._activated(parts), self.saliency)
        selected: Tensor = kernels().largest(strengths, ids, self.winners)
        return selected

    def _kernel(self, x: Tensor, ids: Tensor) -> Tensor:
        """z [M, D] float32 without bias.  ids: [k], or [M, k] of each vector."""
        *inputs, down = self.matrices
        rows = kernels().rows(x, tuple(m for m in inputs if m is not None), ids).unbind(0)
        biases = self.block.biases()[2 - len(rows) : 2]
        parts = [
            (part if bias is None else part + bias[ids]).to(x.dtype)
            for part, bias in zip(rows, biases, strict=True)
        ]
        u = self._activated(parts)
        u = u if self.mean is None else u - self.mean[ids].to(u.dtype)
        z: Tensor = kernels().weighted_sum(u.contiguous(), down, ids)
        return z

    def _activated(self, parts: list[Tensor]) -> Tensor:
        """u of the products with gate and up, or with up alone."""
        act = self.block.act
        return act(parts[0]) if len(parts) == 1 else act(parts[0]) * parts[1]

    def nbytes(self) -> int:
        """Bytes of the copies and of what a mask needs here, beside the mask itself."""
        weights = {_memory(weight) for weight in _weights(self.block)}
        parts = [t for t in (*self.matrices, self.bias, self.saliency) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts if _memory(t) not in weights)


def _weights(block: FfnBlock) -> list[Tensor]:
    weights = (part.weight for part in block.projections)
    return [weight for weight in weights if isinstance(weight, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(weight: Tensor) -> int:
    """Counts changes in place; tensors of inference mode count none."""
    return 0 if weight.is_inference() else weight._version
