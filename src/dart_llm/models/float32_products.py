"""Matrix products of many tokens in float32, on CPUs that emulate them in 16 bits.

torch multiplies bfloat16 and float16 matrices on an x86 CPU without AVX-512 by a loop that takes 5
to 20 times as long as float32's product.  One token is faster in 16 bits all the same: it reads
half the bytes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dart_llm.models.agreement import Replacement
from dart_llm.models.packed import PackedTensor
from dart_llm.native.memory import available

FEW = 4
"""Rows up to which a product stays in 16 bits: widening the weights would take longer."""

CHUNK = 1 << 20
"""Weights that are widened at a time: they stay in the CPU's cache until they are multiplied."""

LEAST_ROWS = 256
"""Rows of a weight that are widened at a time, at least."""

_CHECKS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
"""torch's own answers to which 16-bit matrices this CPU multiplies."""

FREE_COPIES = 2
"""How often the memory of a float32 copy must be free for it to be made."""


def emulates(dtype: torch.dtype) -> bool:
    """Whether torch emulates products of matrices of ``dtype`` on this CPU."""
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None) if dtype in _CHECKS else None
    return check is not None and not check()


class Float32Products(TorchFunctionMode):
    """Inside, products of more than ``FEW`` rows of 16-bit CPU matrices run in float32.

    Results and gradients have the dtype that they would have had.  Only a chunk of a weight is
    widened at a time.  Low-bit blocks are left to themselves.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run = _PRODUCTS.get(func)
        result = None if run is None else run(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _is_slow(x: Any) -> bool:
    """Whether products of the rows of x [..., n, K] are faster in float32."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.device.type == "cpu"
        and x.shape[-2] > FEW
        and emulates(x.dtype)
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear``, whose rows are those of all sequences together."""
    rows = input.reshape(-1, input.shape[-1]) if input.dim() > 2 else input
    if type(weight) not in (Tensor, nn.Parameter) or not _is_slow(rows) or weight.dim() != 2:
        return None
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        return None  # which torch refuses
    times: Any = _Product.apply if torch.is_grad_enabled() else _Product.forward
    product: Tensor = times(rows, weight)
    result = product if bias is None else product + bias.float()
    return result.to(input.dtype).reshape(*input.shape[:-1], len(weight))


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of ``weight`` [N, K] that are widened at a time."""
    return torch.split(weight, max(LEAST_ROWS, CHUNK // weight.shape[1]))


class _Product(torch.autograd.Function):
    """rows [n, K] times the transpose of weight [N, K]: [n, N] float32.

    The graph keeps the weight in its 16 bits.
    """

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        wide = rows.float()
        return torch.cat([F.linear(wide, part.float()) for part in _chunks(weight)], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        for_rows = for_weight = None
        if ctx.needs_input_grad[0]:
            parts = _chunks(weight)
            wide = gradient.new_zeros(rows.shape)
            for columns, part in zip(torch.split(gradient, len(parts[0]), 1), parts, strict=True):
                wide.addmm_(columns, part.float())
            for_rows = wide.to(rows.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = (gradient.t() @ rows.float()).to(weight.dtype)
        return for_rows, for_weight


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    """``torch.addmm``, by which a Conv1D multiplies."""
    return _linear(mat1, mat2.t(), input) if beta == alpha == 1 and input.dim() == 1 else None


def _in_float32(func: Any) -> Callable[..., Tensor | None]:
    """``func`` of activations: all of them are widened."""

    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        if first is None or not _is_slow(first) or kwargs.get("out") is not None:
            return None
        wide = torch.utils._pytree.tree_map_only(Tensor, _widened, (args, kwargs))
        result: Tensor = func(*wide[0], **wide[1])
        return result.to(first.dtype)

    return run


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _CHECKS else tensor


_PRODUCTS: Mapping[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **{
        func: _in_float32(func)
        for func in (
            F.scaled_dot_product_attention,
            torch.matmul,
            torch.bmm,
            torch.baddbmm,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.bmm,
        )
    },
}
"""Replacements by torch function; one that returns None leaves the call to torch."""


class WidePrompts(Replacement):
    """The forward of a model that multiplies many tokens in float32; its copies keep it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        super().__init__(original, _wide_prompt)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return WidePrompts(copy.deepcopy(self.original, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return WidePrompts, (self.original,)


def _wide_prompt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward of the model; one of few tokens is not even looked at."""
    if torch.compiler.is_compiling() or _tokens(args, kwargs) <= FEW:
        return original(*args, **kwargs)
    if torch.is_autocast_enabled("cpu"):  # which would narrow what is widened
        return original(*args, **kwargs)
    with Float32Products():
        return original(*args, **kwargs)


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tokens a forward is given, in all its rows."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None and (embeddings := kwargs.get("inputs_embeds")) is not None:
        ids = embeddings[..., 0]
    return ids.numel() if isinstance(ids, Tensor) else 0


def compute_prompts_in_float32(model: Any) -> bool:
    """Let ``model`` multiply many tokens in float32 from now on; False where nothing is gained.

    Its weights stay as they are, and a single token is decoded in their dtype.
    """
    if not is_emulated(model) or _is_wide(model):
        return False
    model.forward = WidePrompts(model.forward)
    return True


def float32_note(model: Any) -> str:
    """How prompts of ``model`` are computed, where not in its dtype; else ""."""
    if not _is_wide(model) or not is_emulated(model):
        return ""
    name = str(model.dtype).removeprefix("torch.")
    return (
        f"this CPU has no {name} arithmetic: prompts are computed in float32, decoding stays "
        f"{name}; --dtype overrides"
    )


def is_emulated(model: Any) -> bool:
    """Whether products of many tokens of ``model`` are emulated on this CPU."""
    return model.device.type == "cpu" and emulates(model.dtype)


def _is_wide(model: nn.Module) -> bool:
    """Whether its prompts are float32; also while it is being pruned."""
    forward = model.__dict__.get("forward")
    while isinstance(forward, Replacement) and not isinstance(forward, WidePrompts):
        forward = forward.original
    return isinstance(forward, WidePrompts)


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[Any]:
    """What to run many tokens on in place of ``model``.

    Where torch emulates products in the model's dtype: its float32 copy, or, where memory is short,
    the model itself, matrix by matrix in float32.  Both compute the same but for rounding, and
    inside neither computes gradients of weights.
    """
    if not is_emulated(model):
        yield model
    elif can_copy(model):
        yield float32_copy(model).requires_grad_(False)
    else:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with Float32Products():
                yield model
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def can_copy(model: Any) -> bool:
    """Whether a float32 copy of ``model`` leaves enough memory, and would be one."""
    if any(weight.is_meta for weight in model.parameters()):
        return False
    return available() >= FREE_COPIES * copy_bytes(model)


def copy_bytes(model: Any) -> int:
    """Bytes of a float32 copy of ``model``."""
    return sum(4 * weight.numel() for weight in model.parameters())


def float32_copy(model: Any) -> Any:
    """A copy of ``model`` in float32, weights in blocks dequantised, tied weights still tied."""
    memo: dict[int, Any] = {}  # weights are not copied twice, in blocks and out of them
    for weight in model.parameters():
        plain = weight.dequantise() if isinstance(weight, PackedTensor) else weight.detach()
        wide = plain.to(torch.float32, copy=True)
        memo[id(weight)] = nn.Parameter(wide, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, memo).float()
