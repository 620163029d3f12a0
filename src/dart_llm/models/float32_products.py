"""Computes matrix products of many tokens in float32 on CPUs that emulate 16-bit products.

On an x86 CPU without AVX-512, torch multiplies bfloat16 and float16 matrices with a loop that takes
5 to 20 times as long as the float32 product.  For a single token, 16 bits are still faster, because
half as many bytes are read.  To *widen* weights here means to convert them to float32.
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
"""Up to this many rows (input vectors), products stay in 16 bits: widening would take longer."""

CHUNK = 1 << 20
"""Number of weights that are widened at a time, small enough for the CPU's cache."""

LEAST_ROWS = 256
"""Minimum number of rows of weights that are widened at a time."""

_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Names of torch's functions that check for hardware support of 16-bit products, by dtype."""

FREE_COPIES = 2
"""A float32 copy is made only if this many times its size is free in memory."""


def emulates(dtype: torch.dtype) -> bool:
    """Whether torch emulates matrix products in ``dtype`` on this CPU."""
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None) if dtype in _CHECKS else None
    return check is not None and not check()


class Float32Products(TorchFunctionMode):
    """Inside the block, compute products with more than ``FEW`` input vectors in float32.

    This applies to 16-bit tensors on the CPU.  Results and gradients keep their dtype, and weights
    are widened chunk by chunk.  Products with quantised weights do not change.
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
    """Whether products with the rows of x [..., n, K] are faster in float32."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.device.type == "cpu"
        and x.shape[-2] > FEW
        and emulates(x.dtype)
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear`` in float32 on the rows of all sequences; None to let torch compute it."""
    rows = input.reshape(-1, input.shape[-1]) if input.dim() > 2 else input
    if type(weight) not in (Tensor, nn.Parameter) or not _is_slow(rows) or weight.dim() != 2:
        return None
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        return None  # torch raises the error
    multiply: Any = _Product.apply if torch.is_grad_enabled() else _Product.forward
    product: Tensor = multiply(rows, weight)
    result = product if bias is None else product + bias.float()
    return result.to(input.dtype).reshape(*input.shape[:-1], len(weight))


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """``weight`` [N, K] in groups of rows that are widened together."""
    return torch.split(weight, max(LEAST_ROWS, CHUNK // weight.shape[1]))


class _Product(torch.autograd.Function):
    """Computes rows [n, K] times the transpose of weight [N, K] as [n, N] float32.

    The autograd graph stores the 16-bit weight, not a float32 copy.
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
    """``torch.addmm`` in float32 for calls by a Conv1D; None to let torch compute other calls."""
    return _linear(mat1, mat2.t(), input) if beta == alpha == 1 and input.dim() == 1 else None


def _in_float32(func: Any) -> Callable[..., Tensor | None]:
    """A replacement of ``func`` that widens all tensor arguments, for products of activations."""

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
"""Maps torch functions to replacements; if a replacement returns None, torch computes the call."""


class WidePrompts(Replacement):
    """A model's forward with products of many tokens in float32; copies of the model keep it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        super().__init__(original, _wide_prompt)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return WidePrompts(copy.deepcopy(self.original, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return WidePrompts, (self.original,)


def _wide_prompt(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward of the model, with products in float32 if it has many tokens."""
    if torch.compiler.is_compiling() or _tokens(args, kwargs) <= FEW:
        return original(*args, **kwargs)
    if torch.is_autocast_enabled("cpu"):  # autocast would convert back to 16 bits
        return original(*args, **kwargs)
    with Float32Products():
        return original(*args, **kwargs)


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Number of tokens in all rows of a forward."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None and (embeddings := kwargs.get("inputs_embeds")) is not None:
        ids = embeddings[..., 0]
    return ids.numel() if isinstance(ids, Tensor) else 0


def compute_prompts_in_float32(model: Any) -> bool:
    """Make ``model`` compute products of many tokens in float32 from now on.

    Returns False, without a change, if float32 would not be faster or is already in use.  The
    weights do not change, and single tokens are decoded in the weights' dtype.
    """
    if not is_emulated(model) or _is_wide(model):
        return False
    model.forward = WidePrompts(model.forward)
    return True


def float32_note(model: Any) -> str:
    """A note for the user if prompts of ``model`` are not computed in its dtype, else ""."""
    if not _is_wide(model) or not is_emulated(model):
        return ""
    name = str(model.dtype).removeprefix("torch.")
    return (
        f"this CPU has no {name} arithmetic: prompts are computed in float32, decoding stays in "
        f"{name}; --dtype overrides this"
    )


def is_emulated(model: Any) -> bool:
    """Whether ``model`` is on the CPU, and torch emulates products of many tokens."""
    return model.device.type == "cpu" and emulates(model.dtype)


def _is_wide(model: nn.Module) -> bool:
    """Whether prompts of ``model`` are computed in float32, also while the model is pruned."""
    forward = model.__dict__.get("forward")
    while isinstance(forward, Replacement) and not isinstance(forward, WidePrompts):
        forward = forward.original
    return isinstance(forward, WidePrompts)


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[Any]:
    """Yield ``model``, or a replacement that processes many tokens faster.

    If torch emulates products in the model's dtype, the block gets a float32 copy.  If memory is
    short, it gets the model itself, with products in float32.  In both cases, results differ only
    by rounding, and weights get no gradients inside the block.
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
    """Whether ``model`` can be copied in float32: no offloaded weights, enough memory."""
    if any(weight.is_meta for weight in model.parameters()):
        return False
    return available() >= FREE_COPIES * copy_bytes(model)


def copy_bytes(model: Any) -> int:
    """Bytes of a float32 copy of ``model``."""
    return sum(4 * weight.numel() for weight in model.parameters())


def float32_copy(model: Any) -> Any:
    """A copy of ``model`` in float32, with quantised weights dequantised and tied weights tied."""
    memo: dict[int, Any] = {}  # deepcopy uses these converted weights
    for weight in model.parameters():
        plain = weight.dequantise() if isinstance(weight, PackedTensor) else weight.detach()
        wide = plain.to(torch.float32, copy=True)
        memo[id(weight)] = nn.Parameter(wide, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, memo).float()
