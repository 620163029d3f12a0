"""FFNs and other projections by the native kernels, and the layout in which these read weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import ConfigError
from dart_llm.models.agreement import forward_of
from dart_llm.models.ffn import FfnBlock, matrix_of
from dart_llm.models.packed import PackedTensor
from dart_llm.native.build import ops
from dart_llm.native.memory import RESERVE, Span, available, private_maps
from dart_llm.patching.executors.token_ffn import TokenFfn, most_rows
from dart_llm.patching.executors.torch_ffn import run_rows
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask

# Weight matrices in which a neuron is a row, without a second copy.
#
# A down projection [D, I] stores a neuron as a column.  While a model is attached its values are
# transposed in the same memory, so that a neuron is a row that can be read alone; shape, values,
# name and address of the parameter stay the same.  ``restore`` undoes it.
#
# Only memory of the parameter alone is written: allocated by PyTorch, or mapped for this process
# alone, and not shared with other tensors of the model.


class Layout:
    """Parameters that were transposed in place, and packed matrices that were reordered.

    ``room``: memory for the compact weights of all layers.
    """

    def __init__(self) -> None:
        self._transposed: list[tuple[nn.Parameter, int]] = []
        self._reordered: list[tuple[Any, str]] = []
        self.room: Any = None

    def make_room(self, size: int) -> None:
        """Reserve ``size`` bytes for compact weights, before any token waits for them; 0: none.

        None either where less than ``RESERVE`` would be left to others.
        """
        self.room = None  # first: the old room may be what is missing
        if size and available() - size > RESERVE:
            self.room = torch.classes.dart_llm.HugeRoom(size)

    def has_room(self, size: int) -> bool:
        """Whether ``room`` has ``size`` bytes left, or may grow by as many."""
        if self.room is not None and self.room.left() >= size:
            return True
        if available() - size <= RESERVE:
            return False
        if self.room is None:
            self.room = torch.classes.dart_llm.HugeRoom(0)
        return True

    def neuron_rows(self, matrix: Tensor, parameter: nn.Parameter) -> Tensor:
        """``matrix`` [I, D], a view of ``parameter`` or of its transpose, as contiguous rows.

        Check ``not_in_place_reason`` first.  Raises ``ConfigError`` if it is not contiguous.
        """
        if matrix.is_contiguous():
            return matrix
        if not parameter.is_contiguous():
            raise ConfigError(
                "native kernels transpose weights in place, and these are not contiguous: use "
                "executor compact"
            )
        # recorded first: an interrupt may come between any two lines, and none divides lay_out
        self._transposed.append((parameter, parameter.data_ptr()))
        ops().lay_out(parameter, True)
        return parameter.data.t()

    def reorder(self, matrix: Any, order: str) -> Any:
        """A packed matrix by rows or tiles, as ``order`` names it; a part of another as a copy."""
        if matrix.order() == order:
            return matrix
        self._reordered.append((matrix, matrix.order()))  # first, as above
        return ops().packed_turned(matrix, order, False)

    def restore(self) -> None:
        """Undo all; safe to call again, wherever it was interrupted."""
        while self._reordered:
            ops().packed_turned(*self._reordered[-1], False)
            self._reordered.pop()
        while self._transposed:
            parameter, address = self._transposed[-1]
            if not parameter.is_contiguous():
                if parameter.data_ptr() == address:
                    ops().lay_out(parameter, False)
                else:  # replaced or moved meanwhile, strides and all
                    parameter.data = parameter.data.contiguous()
            self._transposed.pop()
        self.room = None


def not_in_place_reason(
    model: nn.Module, blocks: Sequence[FfnBlock], others: Sequence[nn.Module] = ()
) -> str | None:
    """Why weights that must be transposed in place cannot be; None if all can.

    ``others``: projections beside those of the FFNs.  Needs the native kernels.
    """
    wanted = [pair for block in blocks for pair in _not_in_rows(block)]
    attention = [_parameter(part) for part in others if not matrix_of(part).is_contiguous()]
    wanted += [(weight, "a projection of the attention") for weight in attention]
    spans = list(_named_spans(model)) if wanted else []
    private: list[Span] | None = None
    for weight, role in wanted:
        start, end = _span(weight)
        if bool(weight.is_shared()):  # type: ignore[no-untyped-call]
            return f"{role} shares its memory with another process"
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != end - start:
            return f"{role} is a view of something larger"
        on_it = [name for (low, high), name in spans if low < end and start < high]
        if len(on_it) > 1:
            return f"{' and '.join(on_it)} lie on the same memory"
        if not ops().allocated(weight):
            private = list(private_maps()) if private is None else private
            if not any(low <= start and end <= high for low, high in private):
                return f"{role} lies in memory that PyTorch did not allocate"
    return None


def _not_in_rows(block: FfnBlock) -> Iterator[tuple[nn.Parameter, str]]:
    """The projections whose neurons are columns, and their names in messages."""
    _, up, down = block.matrices()
    for role, module, rows in (("up", block.up, up), ("down", block.down, down.t())):
        if not rows.is_contiguous() and (role == "down" or block.by_inputs):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            yield weight, f"the {role} projection of layer {block.index}"


def _named_spans(model: nn.Module) -> Iterator[tuple[Span, str]]:
    """Addresses of the parameters and buffers, by each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in chain(parameters, model.named_buffers(remove_duplicate=False)):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
            yield _span(tensor), name


def _span(tensor: Tensor) -> Span:
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + (reach * tensor.element_size() if tensor.numel() else 0)


TILE = 16
"""Rows of a packed matrix that are interleaved."""

PADDING = 192
"""Most bytes that a part of compact weights takes beside its rows."""

FEW = 32
"""Vectors up to which the kernel is used; more are matrix products on copied rows."""

ACTS: Mapping[int, Callable[[Tensor], Tensor]] = {
    0: F.silu,
    1: F.gelu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: F.relu,
    4: lambda x: F.relu(x).square(),
}
"""Activations of the kernels, by number; kernels.h has the same."""

NO_MODULE = "has no FFN module of its own"


class KernelMask(NamedTuple):
    """What the kernels run for one mask, in the order of their arguments.

    ``ids``: [k] int32, None for all; ``bias``: [D] float32; ``basis``, ``features``: [r, D];
    ``choice``: how each token selects out of ``ids``, None where it runs them all; ``matrices``: of
    packed weights, gate, up and down (all of them, or compact weights of ``ids``).
    """

    ids: Tensor | None = None
    bias: Tensor | None = None
    basis: Tensor | None = None
    features: Tensor | None = None
    choice: Any = None
    matrices: tuple[Any, ...] = ()

    def nbytes(self) -> int:
        parts = (self.ids, self.bias, self.features)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def act_number(act: Callable[[Tensor], Tensor]) -> int | None:
    """Which of ``ACTS`` an activation is, by its values on a grid; None where it is another."""
    grid = torch.linspace(-6, 6, 193)
    try:
        values = act(grid)
    except (RuntimeError, TypeError):
        return None
    same = (n for n, other in ACTS.items() if torch.allclose(values, other(grid), atol=1e-5))
    return next(same, None)


def native_unsupported_reason(block: FfnBlock) -> str | None:
    """Why the kernels cannot run ``block``; None if they can."""
    if block.inline:
        return NO_MODULE
    if block.offloaded:
        return "is offloaded"
    down = block.down.weight
    if not isinstance(down, Tensor) or down.device.type != "cpu":
        return "is not on the CPU"
    if down.dtype not in (torch.float32, torch.bfloat16):
        return f"is {str(down.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if not all(isinstance(part.weight, nn.Parameter) for part in block.projections):
        return "has weights that are computed from others"
    if len({isinstance(part.weight, PackedTensor) for part in block.projections}) > 1:
        return "stores some of its matrices in blocks and others not"
    gate, up, _ = block.matrices()
    if not up.is_contiguous() and not block.by_inputs:
        return "stores its up projection by inputs"
    if gate is not None and not gate.is_contiguous():
        return "stores its gate by inputs"
    if act_number(block.act) is None:
        return "has an activation that they do not know"
    return None


class NativeFfn:
    """The kept neurons of one block; a new mask is a new index."""

    def __init__(self, block: FfnBlock, layout: Layout) -> None:
        reason = native_unsupported_reason(block)
        number = act_number(block.act)
        if reason or number is None:
            raise ConfigError(
                f"executor native cannot run layer {block.index}, which {reason}: use "
                "executor compact or masked"
            )
        self.block, self.act, self._layout = block, number, layout
        gate, up, down = block.matrices()
        with torch.no_grad():
            self.down = layout.neuron_rows(down.t().detach(), _parameter(block.down)).detach()
            self.up = up.detach()
            if block.by_inputs:
                self.up = layout.neuron_rows(self.up, _parameter(block.up)).detach()
        self.gate = None if gate is None else gate.detach()
        matrices = (self.gate, self.up, self.down)
        self._run: Any = ops().ffn.default
        self._packs: tuple[Any, ...] = ()
        if isinstance(self.up, PackedTensor):
            self._run = ops().packed_ffn.default
            self._packs = tuple(part.matrix for part in matrices if isinstance(part, PackedTensor))
        self._copies: tuple[Any, ...] = ()
        self.gate_bias, self.up_bias, self.down_bias = block.biases()
        self.token: TokenFfn | None = None
        self.unload()

    def unload(self) -> None:
        """Keep no mask."""
        self.mask: LayerMask | None = None
        self._copies = ()
        self.kept = KernelMask(matrices=self._packs)

    @property
    def selects(self) -> bool:
        """Whether the kernels select a token's neurons as its method does."""
        return self.token is not None and self.token.rule.native

    @property
    def token_rows(self) -> int:
        """Rows of the largest batch with per-token selection, beside whole steps; 0: none.

        Several tokens together would read most neurons.
        """
        return most_rows("native", self.by_weights) if self.selects else 0

    @property
    def by_weights(self) -> bool:
        """Whether tokens select by the exact activations of all neurons."""
        return self.token is not None and self.token.rule.by_weights

    def everything(self) -> KernelMask:
        """All neurons."""
        bias = self.down_bias
        return KernelMask(bias=None if bias is None else bias.float(), matrices=self._packs)

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Switch to a mask; a no-op when it is in force already."""
        if mask is self.mask:
            return
        self.mask = None  # compact weights are overwritten, and that may be interrupted
        with torch.inference_mode(False):
            linear = mask.low_rank
            parts = [t.float() for t in (self.down_bias, mask.bias) if t is not None]
            bias = sum(parts[1:], parts[0]).contiguous() if parts else None
            ids = None if len(mask.ids) == mask.width else mask.ids.to(torch.int32)
            basis = features = None
            if linear is not None:
                basis, features = linear.basis.contiguous(), linear.out.t().contiguous()
            choice = self._choice(mask) if isinstance(mask, TokenMask) else None
            matrices = self._matrices(ids, choice is not None)
            self.kept = KernelMask(ids, bias, basis, features, choice, matrices)
        self.mask = mask

    def _matrices(self, ids: Tensor | None, per_token: bool) -> tuple[Any, ...]:
        """The packed matrices that a mask reads.

        Scattered rows cost more time than their bytes, so that what a mask keeps for many tokens is
        copied, where memory is left for it.  What each token selects is read in place, row by row:
        of the down projection alone where exact activations select.
        """
        if not self._packs or (ids is None and (not per_token or self.by_weights)):
            self._copies = ()
            return self._packs
        copied = not per_token and ids is not None and (bool(self._copies) or self._fits(ids))
        order, (*outer, down) = "tiles" if copied else "rows", self._packs
        self._packs = (*(self._layout.reorder(matrix, order) for matrix in outer), down)
        if not copied:
            self._copies = ()
            return self._packs
        old, room = self._copies, self._layout.room
        self._copies = tuple(ops().packed_kept(self._packs, ids, old, room))
        return self._copies

    def _fits(self, ids: Tensor) -> bool:
        return self._layout.has_room(self.copied_bytes(len(ids)))

    def copied_bytes(self, count: int) -> int:
        """Most bytes of compact weights for a mask of ``count`` neurons; 0: it has none."""
        if not self._packs or not 0 < count < self.block.down_width:
            return 0
        *outer, down = self._packs
        parts = [part for matrix in outer for part in matrix.parts()] + [down.parts()[0]]
        rows = count + TILE - 1  # in whole tiles
        return sum(matrix.nbytes * rows // self.block.down_width + PADDING for matrix in parts)

    def _choice(self, mask: TokenMask) -> Any:
        """What the kernels read to select ``mask.winners`` neurons."""
        assert self.token is not None
        mean, config = mask.mean, self.token.rule.config
        parts = [part for proxy in self.token.proxies for part in (proxy.levels, proxy.scales)]
        return torch.classes.dart_llm.Choice(
            *([None] * (4 - len(parts))),
            *parts,
            self.token.saliency(mask).float().contiguous(),
            None if mean is None else mean.float().contiguous(),
            [self.up.shape[1], config.bits, config.group, mask.winners],
        )

    def run(self, x: Tensor) -> Tensor:
        """z from the kept neurons alone.  x: [..., D]; of one token with per-token selection."""
        flat = x.reshape(-1, x.shape[-1])
        many = len(flat) > FEW or torch.compiler.is_compiling()  # which traces no native call
        z = self._product(flat) if many else self._kernel(flat)
        return z.reshape(x.shape)

    def _kernel(self, x: Tensor) -> Tensor:
        kept = self.kept
        matrices = kept.matrices or (self.gate, self.up, self.down)
        z: Tensor = self._run(
            x.detach().contiguous(),
            *((None,) * (3 - len(matrices))),
            *matrices,
            self.gate_bias,
            self.up_bias,
            *kept[:-1],
            self.act,
        )
        return z

    def _product(self, x: Tensor) -> Tensor:
        """As ``_kernel``, for many vectors."""
        kept, biases = self.kept, (self.gate_bias, self.up_bias)
        z = run_rows(x, (self.gate, self.up, self.down), biases, kept.ids, ACTS[self.act])
        if kept.bias is not None:
            z = z + kept.bias.to(z.dtype)
        if kept.basis is not None and kept.features is not None:
            z = z + F.linear(x, kept.basis) @ kept.features
        return z

    def nbytes(self) -> int:
        """Bytes for the mask in force, beside the mask itself."""
        weights = (self.gate, self.up, self.down)
        stored = {_address(part.matrix) for part in weights if isinstance(part, PackedTensor)}
        packs = (*self._copies, *self._packs)
        copies = (pack for pack in packs if _address(pack) not in stored)
        return self.kept.nbytes() + sum(int(pack.nbytes()) for pack in copies)


def _address(matrix: Any) -> int:
    """Of a packed matrix."""
    return int(matrix.parts()[0].data_ptr())


def _parameter(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


PLAIN = "torch.nn.modules.linear"
"""Module of the forward that the kernel replaces."""


class NativeLinear:
    """One linear layer outside the FFNs, for the few vectors of a decode step.

    torch multiplies a vector with a small matrix at a fraction of the memory bandwidth.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._run: Any = ops().linear.default

    def run(self, original: Callable[..., Any], x: Tensor) -> Tensor:
        """Its forward; the original one where the kernel cannot run."""
        weight, size = self.module.weight, x.shape[-1]
        few = 0 < x.numel() <= FEW * size and x.dtype == weight.dtype and size == weight.shape[1]
        few = few and not isinstance(weight, PackedTensor)  # which runs on its blocks by itself
        traced = torch.compiler.is_compiling() or torch.is_grad_enabled()  # neither sees the kernel
        if not few or traced or torch.is_autocast_enabled("cpu"):
            return original(x)  # type: ignore[no-any-return]
        bias = self.module.bias
        y: Tensor = self._run(x.reshape(-1, size).contiguous(), weight, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def native_linears(model: nn.Module, blocks: tuple[FfnBlock, ...]) -> Iterator[NativeLinear]:
    """The linear layers of ``model`` that the kernel can run, those of its FFNs left out."""
    in_ffns = {id(part) for block in blocks for part in block.projections}
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in in_ffns:
            continue
        plain = "forward" not in module.__dict__ and forward_of(module)[0].__module__ == PLAIN
        if plain and not hasattr(module, "_hf_hook") and _readable(module.weight):
            yield NativeLinear(module)


def _readable(weight: Any) -> bool:
    floats = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return floats and type(weight) is nn.Parameter and weight.is_contiguous()
