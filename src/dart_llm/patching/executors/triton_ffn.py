"""One FFN by Triton kernels: the kept neurons are read by an index, of a mask or of each token.

It has compiled for GPUs and run in Triton's interpreter; on a card it has not run.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import MissingExtra
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.packed import PackedTensor
from dart_llm.patching.executors.native_ffn import NO_MODULE
from dart_llm.patching.executors.token_ffn import STEP_ROWS, TokenFfn, most_rows
from dart_llm.patching.executors.torch_ffn import buffer
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask, contribution_estimate

FEW = STEP_ROWS
"""Vectors up to which the kernels are used; more are a matrix product on rows that are gathered."""


def triton_unsupported_reason(block: FfnBlock) -> str:
    """Why the kernels cannot run ``block``: "", or a clause.  Raises ``MissingExtra``."""
    if block.inline:
        return NO_MODULE
    if block.offloaded:
        return "is offloaded"
    down = block.down.weight
    assert isinstance(down, Tensor)
    if any(isinstance(part.weight, PackedTensor) for part in block.projections):
        return "holds its weights in blocks"
    if down.device.type != "cuda" and not kernels().INTERPRETED:
        return "is not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, to test them)"
    if block.down_width > kernels().MOST:
        return f"has more than {kernels().MOST} neurons"
    return ""


@functools.cache
def kernels() -> ModuleType:
    """The kernels, which import triton; raises ``MissingExtra``."""
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "gpu")
    from dart_llm.patching.executors import triton_kernels

    return triton_kernels


class TritonFfn:
    """The kept neurons of one block; a new mask is a new index in the same buffer.

    ``matrices``: of gate, if there is one, up and down, [I, D] each, a neuron a row.  Those that
    store neurons as columns (down, as a rule) are copied: with the first mask, and with a later one
    where they were changed in place or replaced since.
    """

    def __init__(self, block: FfnBlock) -> None:
        self.block = block
        self.token: TokenFfn | None = None
        self.unload()

    def unload(self) -> None:
        """Hold neither masks nor copies."""
        self.mask: LayerMask | None = None
        self.matrices: tuple[Tensor, ...] = ()
        self._versions: list[tuple[int, int]] = []
        self.ids = self.bias = self.mean = self.worth = None  # type: Tensor | None
        self.winners = 0
        self.linear: LowRank | None = None

    @property
    def token_rows(self) -> int:
        """Rows of the largest batch whose tokens choose here; 0 where somebody looks on."""
        token = self.token
        if token is None or not token.rule.native or token.watched:
            return 0
        return 0 if torch.compiler.is_compiling() else most_rows("triton", by_weights=False)

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Take over a mask; a no-op when it is in force already."""
        if mask is self.mask:
            return
        self.mask = None
        with torch.inference_mode(False):
            self._read_weights()
            self.ids = _held(self.ids, mask.ids)
            down_bias = self.block.biases()[2]
            parts = [t.float() for t in (down_bias, mask.bias) if t is not None]
            self.bias = _held(self.bias, sum(parts[1:], parts[0]) if parts else None)
            new = mask.low_rank
            old = None if self.linear is None else self.linear.out
            out = _held(old, None if new is None else new.out)
            self.linear = None if new is None or out is None else LowRank(new.basis, out)
            self._load_choice(mask)
        self.mask = mask

    def _load_choice(self, mask: LayerMask) -> None:
        """What each token chooses by: how many, what they are worth, what the others stand at."""
        if not isinstance(mask, TokenMask):
            self.winners, self.mean, self.worth = 0, None, None
            return
        assert self.token is not None
        worth = self.token.saliency(mask)
        self.worth = _held(self.worth, worth.float()[mask.ids])
        self.winners, self.mean = mask.winners, _held(self.mean, mask.mean)

    def _read_weights(self) -> None:
        versions = [(one.data_ptr(), _version(one)) for one in _weights(self.block)]
        if versions == self._versions:
            return
        gate, up, down = self.block.matrices()
        wanted = [part.detach() for part in (gate, up, down.t()) if part is not None]
        old = self.matrices or (None,) * len(wanted)
        self.matrices = tuple(
            part if part.is_contiguous() else buffer(known, tuple(part.shape), part).copy_(part)
            for known, part in zip(old, wanted, strict=True)
        )
        self._versions = versions

    def run(self, x: Tensor) -> Tensor:
        """z from the kept neurons alone.  x: [..., D]; of ``token_rows`` where tokens choose."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        assert self.ids is not None
        ids = self._chosen(flat) if self.winners else self.ids
        many = len(flat) > FEW or torch.compiler.is_compiling()
        z = self._product(flat, ids) if many else self._kernel(flat, ids)
        return z.reshape(x.shape)

    def _chosen(self, x: Tensor) -> Tensor:
        """Ids of the neurons that each token keeps, ascending, [M, k]."""
        assert self.token is not None and self.ids is not None and self.worth is not None
        make = kernels()
        biases = self.block.biases()[:2]
        made = [make.low_bit_product(x, copy, self.ids) for copy in self.token.proxies]
        for at, bias in enumerate(biases[2 - len(made) :]):
            if bias is not None:
                made[at] += bias[self.ids]
        act = self.block.act
        estimate = act(made[0]) if len(made) == 1 else act(made[0]) * made[1]
        strengths = contribution_estimate(estimate, self.worth)
        chosen: Tensor = make.largest(strengths, self.ids, self.winners)
        return chosen

    def _kernel(self, x: Tensor, ids: Tensor) -> Tensor:
        *inputs, down = self.matrices
        u = self._hidden(kernels().rows(x, tuple(inputs), ids).unbind(0), x, ids)
        return self._finish(kernels().weighted_sum(u.contiguous(), down, ids), x)

    def _product(self, x: Tensor, ids: Tensor) -> Tensor:
        """As ``_kernel``, for many vectors: their products are worth a copy of the rows."""
        *inputs, down = self.matrices
        made = tuple(F.linear(x, matrix[ids]) for matrix in inputs)
        return self._finish((self._hidden(made, x, ids) @ down[ids]).float(), x)

    def _hidden(self, made: tuple[Tensor, ...], x: Tensor, ids: Tensor) -> Tensor:
        """What the down projection is given of the kept neurons, [M, k]."""
        biases = self.block.biases()[2 - len(made) : 2]
        both = [
            (one if bias is None else one + bias[ids]).to(x.dtype)
            for one, bias in zip(made, biases, strict=True)
        ]
        act = self.block.act
        u = act(both[0]) if len(both) == 1 else act(both[0]) * both[1]
        return u if self.mean is None else u - self.mean[ids].to(u.dtype)

    def _finish(self, z: Tensor, x: Tensor) -> Tensor:
        z = (z if self.bias is None else z + self.bias).to(x.dtype)
        return z if self.linear is None else z + self.linear(x)

    def places(self) -> tuple[int, ...]:
        """What a recorded step would read: shapes and addresses."""
        out = None if self.linear is None else self.linear.out
        held = (*self.matrices, self.ids, self.bias, self.mean, self.worth, out)
        found = (part for t in held if t is not None for part in (t.data_ptr(), len(t)))
        return (self.winners, *found)

    def nbytes(self) -> int:
        """Bytes of the copies and of what a mask needs here, beside the mask itself."""
        own = set(map(_memory, _weights(self.block)))
        out = None if self.linear is None else self.linear.out
        held = (*self.matrices, self.ids, self.bias, self.mean, self.worth, out)
        copies = (t for t in held if t is not None and _memory(t) not in own)
        return sum(t.numel() * t.element_size() for t in copies)


def _weights(block: FfnBlock) -> list[Tensor]:
    held = (part.weight for part in block.projections)
    return [weight for weight in held if isinstance(weight, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(weight: Tensor) -> int:
    """Counts changes in place; tensors of inference mode count none."""
    return 0 if weight.is_inference() else weight._version


def _held(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """``new`` in the place of ``old``, where that fits: recorded steps go on reading it."""
    return None if new is None else buffer(old, tuple(new.shape), new).copy_(new)
