"""Runs FFNs and other linear layers in native kernels, which need a special layout of the weights.

Packed matrices are quantized weights, in blocks as in a GGUF file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm import cache
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.agreement import forward_of
from dart_llm.models.ffn import FfnBlock, matrix_of
from dart_llm.models.float32_products import emulates
from dart_llm.models.packed import PackedTensor
from dart_llm.native.build import built_name, kernels_in_use, ops
from dart_llm.native.memory import RESERVE, available, private_maps
from dart_llm.patching.executors.token_ffn import TokenFfn, max_rows
from dart_llm.patching.executors.torch_ffn import run_rows, total_bias
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask

SKIP_BELOW = 0.9
"""Rows of unselected neurons are skipped if this takes at most this share of the time.  Down
projections are a fifth of a token, so gains below a tenth are lost in the probe's inaccuracy."""

PROBE_S = 0.1
"""Seconds that ``SelectionTimes.measure`` takes."""


class SelectionTimes(NamedTuple):
    """Milliseconds per token for all down projections after per-token selection by activations.

    ``read_all``: all weights are read, and those of unselected neurons are multiplied by 0.
    ``skip``: only selected neurons are read, from a copy with another layout; ``inf`` without
    memory for it.  Scattered neurons are slower to read, byte for byte.
    """

    read_all: float
    skip: float

    @classmethod
    def measure(cls, downs: Sequence[Any], share: float) -> SelectionTimes:
        """Measure the times on this machine, or take them from the cache.

        ``downs``: packed down projections of all layers; ``share``: of their neurons, selected.
        Needs memory for a copy of them.
        """
        shapes = [(down.type(), *down.shape()) for down in downs]
        kernels = built_name(), kernels_in_use(), torch.get_num_threads()
        key = cache.key_of(cache.processor(), kernels, shapes, share)
        folder = cache.cache_folder() / "selection"
        if (data := cache.read(folder, key, ".json")) is not None:
            return cls(*json.loads(data))
        copies = [by_neurons(down) for down in downs]
        seconds = ops().selection_times(list(downs), copies, share, PROBE_S)
        times = cls(*(round(1e3 * s, 4) for s in seconds))
        with contextlib.suppress(LoadError):  # a cache that cannot be written
            cache.write(folder, key, ".json", json.dumps(times).encode())
        return times

    @property
    def skips(self) -> bool:
        return self.skip <= SKIP_BELOW * self.read_all

    def __str__(self) -> str:
        if self.skip == math.inf:
            return "reads all down rows of unselected neurons (no memory for a copy to skip them)"
        verb = "skips" if self.skips else "reads all"
        return (
            f"{verb} down rows of unselected neurons (reading all takes {self.read_all:.2f} ms per "
            f"token on this machine, skipping {self.skip:.2f} ms)"
        )


def by_neurons(down: Any) -> Any:
    """Return a copy of a packed down projection in which every neuron is contiguous."""
    return ops().packed_turned(down, "neurons", True)


class Layout:
    """Transposes parameters in place and reorders packed matrices; ``restore`` undoes all of it.

    A down projection [D, I] stores a neuron as a column.  While a model is attached, the values of
    the projection are transposed within their memory.  A neuron is then a row, which can be read
    without a second copy of the weights.  Shape, values, name and address of the parameter stay the
    same; its strides change.  A parameter must not share its memory: see ``not_in_place_reason``.

    ``room``: memory for the compact weights of all layers; None until it is needed.  ``downs``: the
    packed down projections of all layers.  ``selection``: how they are read after per-token
    selection; None until a mask needs to know.
    """

    def __init__(self) -> None:
        self._transposed: list[tuple[nn.Parameter, int]] = []
        self._reordered: list[tuple[Any, str]] = []
        self.room: Any = None
        self.downs: list[Any] = []
        self.selection: SelectionTimes | None = None
        self._selections: dict[float, SelectionTimes] = {}

    def has_room(self, size: int) -> bool:
        """Return True if ``room`` has ``size`` bytes, or can grow by them with ``RESERVE`` left."""
        if self.room is None:
            self.room = torch.classes.dart_llm.HugeRoom(0)
        return self.room.left() >= size or available() - size > RESERVE

    def skips(self, share: float) -> bool:
        """Return whether down rows are skipped if tokens select ``share`` of the neurons."""
        tenth = max(0.1, round(share, 1))  # uneven budgets have a share for every layer
        if tenth not in self._selections:
            self._selections[tenth] = SelectionTimes(0.0, math.inf)
            if self.has_room(sum(down.nbytes() for down in self.downs)):
                self._selections[tenth] = SelectionTimes.measure(self.downs, tenth)
        self.selection = self._selections[tenth]
        return self.selection.skips

    def neuron_rows(self, matrix: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return ``matrix`` [I, D] with contiguous rows; transposes ``parameter`` if needed.

        Packed matrices stay as they are.

        ``matrix``: a view of ``parameter``, or of its transpose.  Check ``not_in_place_reason``
        first.  Raises ``ConfigError`` if ``parameter`` is not contiguous.
        """
        if matrix.is_contiguous() or isinstance(matrix, PackedTensor):
            return matrix
        if not parameter.is_contiguous():
            raise ConfigError(
                "native kernels transpose weights in place, but these weights are not contiguous: "
                "use executor compact"
            )
        # recorded first, because an interrupt may come between these lines, but not in lay_out
        self._transposed.append((parameter, parameter.data_ptr()))
        ops().lay_out(parameter, True)
        return parameter.data.t()

    def reorder(self, matrix: Any, order: str) -> Any:
        """Return packed ``matrix`` in ``order`` (rows, tiles), or a copy if part of another."""
        if matrix.order() == order:
            return matrix
        self._reordered.append((matrix, matrix.order()))  # recorded first, as above
        return ops().packed_turned(matrix, order, False)

    def restore(self) -> None:
        """Undo all changes; safe to call again after an interrupt at any point."""
        while self._reordered:
            ops().packed_turned(*self._reordered[-1], False)
            self._reordered.pop()
        while self._transposed:
            parameter, address = self._transposed[-1]
            if not parameter.is_contiguous():
                if parameter.data_ptr() == address:
                    ops().lay_out(parameter, False)
                else:  # the parameter was replaced or moved meanwhile, and kept its strides
                    parameter.data = parameter.data.contiguous()
            self._transposed.pop()
        self.room = None


def not_in_place_reason(
    model: nn.Module, blocks: Sequence[FfnBlock], others: Sequence[nn.Module] = ()
) -> str | None:
    """Return why some weights cannot be transposed in place as needed; None if all can.

    ``others``: projections outside the FFNs.  The native kernels must be available.
    """
    to_transpose = [pair for block in blocks for pair in _not_in_rows(block)]
    to_transpose += [
        (_parameter(part), "a projection of the attention")
        for part in others
        if not matrix_of(part).is_contiguous()
    ]
    names: dict[int, list[str]] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in chain(parameters, model.named_buffers(remove_duplicate=False)):
        if to_transpose and type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
            names.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    private = list(private_maps()) if to_transpose else []
    for weight, role in to_transpose:
        start = weight.data_ptr()
        end = start + weight.numel() * weight.element_size()
        if bool(weight.is_shared()):  # type: ignore[no-untyped-call]
            return f"{role} shares its memory with another process"
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != end - start:
            return f"{role} is a view of a larger tensor"
        if len(same := names.get(start, [])) > 1:
            return f"{' and '.join(same)} share the same memory"
        mapped = any(low <= start and end <= high for low, high in private)
        if not mapped and not ops().allocated(weight):
            return f"{role} is in memory that PyTorch did not allocate"
    return None


def _not_in_rows(block: FfnBlock) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield each weight to transpose (its columns are neurons now), and its name in messages."""
    _, up, down = block.matrices()
    for role, module, rows in (("up", block.up, up), ("down", block.down, down.t())):
        weight = module.weight
        if rows.is_contiguous() or isinstance(weight, PackedTensor):
            continue
        if role == "down" or block.by_inputs:
            assert isinstance(weight, nn.Parameter)
            yield weight, f"the {role} projection of layer {block.index}"


TILE = 16
"""Number of rows of a packed matrix that order ``tiles`` interleaves."""

PADDING = 192
"""Maximum number of bytes that one tensor of compact weights needs in addition to its rows."""

FEW = 32
"""Maximum number of vectors for a kernel.  For more vectors, kept rows are copied for torch."""

ACTS: Mapping[int, Callable[[Tensor], Tensor]] = {
    0: F.silu,
    1: F.gelu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: F.relu,
    4: lambda x: F.relu(x).square(),
}
"""The kernels' activation functions, by number; must match kernels.h."""


class KernelMask(NamedTuple):
    """Arguments of the kernels for one mask, in the kernels' order.

    ``ids``: kept neurons [k] int32, or None for all.  ``bias``: [D] float32.  ``basis`` and
    ``features``: [r, D], of low-rank compensation.  ``choice``: how each token selects neurons of
    ``ids``; None if every token uses all of ``ids``.  ``matrices``: packed gate, up and down, with
    all neurons or (compact weights) only with ``ids``; empty if the weights are not packed.
    """

    ids: Tensor | None = None
    bias: Tensor | None = None
    basis: Tensor | None = None
    features: Tensor | None = None
    choice: Any = None
    matrices: tuple[Any, ...] = ()

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.ids, self.bias, self.features) if t is not None)


def act_number(act: Callable[[Tensor], Tensor]) -> int | None:
    """Return the number of the function in ``ACTS`` that equals ``act`` on a grid, or None."""
    grid = torch.linspace(-6, 6, 193)
    try:
        values = act(grid)
    except (RuntimeError, TypeError):
        return None
    same = (n for n, other in ACTS.items() if torch.allclose(values, other(grid), atol=1e-5))
    return next(same, None)


def native_unsupported_reason(block: FfnBlock) -> str | None:
    """Return why the kernels cannot run ``block``, which must not be inline; None if they can."""
    down = block.down.weight
    if not isinstance(down, Tensor) or down.device.type != "cpu":
        return "is not on the CPU"
    if down.dtype not in (torch.float32, torch.bfloat16):
        return f"is {str(down.dtype).removeprefix('torch.')}, not float32 or bfloat16"
    if not all(isinstance(part.weight, nn.Parameter) for part in block.projections):
        return "has weights that are computed from others"
    if len({isinstance(part.weight, PackedTensor) for part in block.projections}) > 1:
        return "has both quantized and other matrices"
    gate, up, _ = block.matrices()
    if not up.is_contiguous() and not block.by_inputs:
        return "stores its up projection by inputs, not by neurons"
    if gate is not None and not gate.is_contiguous():
        return "stores its gate by inputs, not by neurons"
    return None if act_number(block.act) is not None else "has an activation without a kernel"


class NativeFfn:
    """Runs the kept neurons of one FFN block in native kernels.

    A new mask changes the ids that the kernels read, and may copy rows of packed weights.
    """

    def __init__(self, block: FfnBlock, layout: Layout) -> None:
        number, reason = act_number(block.act), native_unsupported_reason(block)
        if number is None or reason is not None:  # the block may have moved meanwhile
            raise ConfigError(f"executor native cannot run layer {block.index}, which {reason}")
        self.block, self.act, self._layout = block, number, layout
        self.token: TokenFfn | None = None
        gate, up, down = block.matrices()
        self.gate = None if gate is None else gate.detach()
        with torch.no_grad():
            self.down = layout.neuron_rows(down.t().detach(), _parameter(block.down)).detach()
            self.up = up.detach()
            if block.by_inputs:
                self.up = layout.neuron_rows(self.up, _parameter(block.up)).detach()
        self.gate_bias, self.up_bias, self.down_bias = block.biases()
        self._stored = (self.gate, self.up, self.down)
        self._packs = tuple(part.matrix for part in self._stored if isinstance(part, PackedTensor))
        layout.downs += self._packs[-1:]
        self._run: Any = (ops().packed_ffn if self._packs else ops().ffn).default
        self.unload()

    def unload(self) -> None:
        """Drop the mask."""
        self.mask: LayerMask | None = None
        self._copies: tuple[Any, ...] = ()
        self._by_neurons: Any = None
        self.kept = self.everything()

    def everything(self) -> KernelMask:
        """Return the kernels' arguments that run all neurons."""
        bias = self.down_bias
        return KernelMask(bias=None if bias is None else bias.float(), matrices=self._packs)

    @property
    def token_rows(self) -> int:
        """Largest batch in which tokens select neurons outside whole steps; 0: not supported.

        More tokens together would select most neurons, so that nothing is saved.
        """
        rule = None if self.token is None else self.token.rule
        return max_rows("native", rule.by_weights) if rule is not None and rule.native else 0

    @torch.no_grad()
    def load(self, mask: LayerMask) -> None:
        """Switch to ``mask``; do nothing if it is loaded already."""
        if mask is self.mask:
            return
        self.mask = None  # until the end: an interrupt may leave compact weights half written
        with torch.inference_mode(False):
            linear = mask.low_rank
            basis = features = None
            if linear is not None:
                basis, features = linear.basis.contiguous(), linear.out.t().contiguous()
            ids = None if len(mask.ids) == mask.width else mask.ids.to(torch.int32)
            if isinstance(mask, TokenMask):
                skips = self._skips(mask)
                choice, matrices = self._choice(mask, skips), self._selected_from(ids, skips)
            else:
                choice, matrices = None, self._compact(ids)
            bias = total_bias(mask, self.down_bias)
            self.kept = KernelMask(ids, bias, basis, features, choice, matrices)
        self.mask = mask

    def _compact(self, ids: Tensor | None) -> tuple[Any, ...]:
        """Return the packed matrices to read if a sequence mask keeps ``ids``; () if not packed.

        Scattered rows are slower to read than contiguous rows, so kept neurons are copied if memory
        allows.  Otherwise, gate and up are read row by row, and all of the down projection.
        """
        if ids is None or not self._packs:
            self._copies = ()
            return self._packs
        old, self._copies = self._copies, ()
        copied = bool(old) or self._fits(len(ids))
        *outer, down = self._reorder("tiles" if copied else "rows")
        if not copied:
            return self._packs
        self._copies = tuple(ops().packed_kept(outer, down, ids, old, self._layout.room))
        return self._copies

    def _selected_from(self, ids: Tensor | None, skips: bool) -> tuple[Any, ...]:
        """Return the packed matrices to read if each token selects among ``ids``; () if not packed.

        A rule that ranks by exact activations reads all rows of gate and up if ``ids`` is None.
        ``skips``: the down projection is read neuron by neuron.
        """
        if not self._packs:
            return ()
        assert self.token is not None
        self._copies = ()
        if ids is not None or not self.token.rule.by_weights:
            self._reorder("rows")
        return (*self._packs[:-1], self._by_neurons) if skips else self._packs

    def _reorder(self, order: str) -> tuple[Any, ...]:
        """Reorder gate and up; return all packed matrices."""
        *outer, down = self._packs
        self._packs = (*(self._layout.reorder(matrix, order) for matrix in outer), down)
        return self._packs

    def _fits(self, count: int) -> bool:
        """Return True if there is enough memory for compact weights of ``count`` neurons."""
        *outer, down = self._packs
        rows, width = count + TILE - 1, self.block.down_width  # in whole tiles
        parts = [part.nbytes * rows // width for matrix in outer for part in matrix.parts()]
        parts.append(down.parts()[0].nbytes)  # at most: columns are kept in whole fours
        return self._layout.has_room(sum(parts) + PADDING * len(parts))

    def _skips(self, mask: TokenMask) -> bool:
        """Return True if the down projection is read neuron by neuron, packed in a copy."""
        if not self._packs:
            return True
        assert self.token is not None
        share, down = mask.winners / mask.width, self._packs[-1]
        pays = not self.token.rule.by_weights or self._layout.skips(share)
        if pays and self._by_neurons is None and self._layout.has_room(down.nbytes()):
            self._by_neurons = by_neurons(down)
        return pays and self._by_neurons is not None

    def _choice(self, mask: TokenMask, skips: bool) -> Any:
        """Return the data from which the kernels select ``mask.winners`` neurons for each token."""
        assert self.token is not None
        rule: Any = self.token.rule
        mean, config = mask.mean, rule.config
        parts = [part for proxy in rule.proxies for part in (proxy.levels, proxy.scales)]
        return torch.classes.dart_llm.Choice(
            *([None] * (4 - len(parts))),
            *parts,
            rule.saliency(mask).float().contiguous(),
            None if mean is None else mean.float().contiguous(),
            [self.up.shape[1], config.bits, config.group, mask.winners, int(skips)],
        )

    def run(self, x: Tensor) -> Tensor:
        """Return z [..., D] from only the kept neurons; x: [..., D]."""
        flat, biases, kept = x.reshape(-1, x.shape[-1]), (self.gate_bias, self.up_bias), self.kept
        # torch.compile cannot trace native calls
        if len(flat) <= FEW and not torch.compiler.is_compiling():
            matrices = kept.matrices or self._stored
            nones = (None,) * (3 - len(matrices))
            vectors = flat.detach().contiguous()
            z = self._run(vectors, *nones, *matrices, *biases, *kept[:-1], self.act)
        else:
            z = run_rows(flat, self._stored, biases, kept.ids, ACTS[self.act])
            z = z if kept.bias is None else z + kept.bias.to(z.dtype)
            if kept.basis is not None and kept.features is not None:
                z = z + F.linear(flat, kept.basis) @ kept.features
        return z.reshape(x.shape)  # type: ignore[no-any-return]

    def nbytes(self) -> int:
        """Return the extra bytes for the loaded mask, without the mask itself."""
        weights = (t for t in self._stored if isinstance(t, PackedTensor))
        stored = {weight.matrix.parts()[0].data_ptr() for weight in weights}
        packs = (*self._copies, *self._packs, self._by_neurons)
        copies = (p for p in packs if p is not None and p.parts()[0].data_ptr() not in stored)
        return self.kept.nbytes() + sum(int(pack.nbytes()) for pack in copies)


def _parameter(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def native_linears(
    model: nn.Module, blocks: tuple[FfnBlock, ...]
) -> Iterator[tuple[nn.Linear, Callable[..., Tensor]]]:
    """Yield each linear layer that gets a new forward, and that forward.

    Outside the FFNs, these are layers that the kernel can run: for the few vectors of a decode
    step, torch reads a small matrix at only a fraction of the memory bandwidth.  In the FFNs, these
    are transposed down projections in a dtype that torch emulates.
    """
    in_ffns = {id(part) for block in blocks for part in block.projections}
    transposed = {id(block.down) for block in blocks if emulates(matrix_of(block.down).dtype)}
    for module in model.modules():
        if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):
            continue
        weight: Any = module.weight
        floats = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
        is_torchs = forward_of(module)[0].__module__ == "torch.nn.modules.linear"
        plain = is_torchs and "forward" not in module.__dict__
        if not plain or not floats or type(weight) is not nn.Parameter:
            continue
        if id(module) in transposed:
            yield module, functools.partial(_run_transposed, module)
        elif id(module) not in in_ffns and weight.is_contiguous():
            yield module, functools.partial(_run_linear, module, ops().linear.default)


def _run_linear(
    module: nn.Linear, kernel: Any, original: Callable[..., Tensor], x: Tensor
) -> Tensor:
    """The new forward of ``module``; calls the original if the kernel cannot run."""
    weight, size = module.weight, x.shape[-1]
    few = 0 < x.numel() <= FEW * size and x.dtype == weight.dtype and size == weight.shape[1]
    few = few and not isinstance(weight, PackedTensor)  # packed weights have their own kernel
    traced = torch.compiler.is_compiling() or torch.is_grad_enabled()  # neither supports the kernel
    if not few or traced or torch.is_autocast_enabled("cpu"):
        return original(x)
    y: Tensor = kernel(x.reshape(-1, size).contiguous(), weight, module.bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _run_transposed(module: nn.Linear, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The new forward of a down projection while it is transposed in place.

    For many tokens, torch's emulated product takes several times as long with transposed weights;
    with a copy of them, results are the same to the bit.
    """
    if isinstance(module.weight, PackedTensor) or x.numel() <= FEW * x.shape[-1]:
        return original(x)
    return F.linear(x, module.weight.contiguous(), module.bias)
