"""Packed weights: quantised matrices that torch treats as tensors of the model's dtype.

Packed weights are stored in *blocks*, as in GGUF files: groups of weights that share a scale.
Products with few vectors are computed from the blocks.  Every other operation gets a dequantised
copy, which exists only while the operation runs.  Packed weights are read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.models.gguf_file import ROUNDED
from dart_llm.native.build import ops

ORDERS = ("rows", "tiles")
"""Memory layouts of a matrix.  ``rows``: row by row.  ``tiles``: in tiles of sixteen interleaved
rows, the fastest layout if all rows are read."""

CHUNK = 1 << 22
"""About how many weights are rounded at a time."""

READ_ONLY = (
    'quantised weights are read-only: load the model with weights="dense" to change or train them'
)

NOT_SAVED = (
    "quantised weights cannot be saved, pickled or converted to another dtype: load the model "
    'with weights="dense" for that'
)


class PackedTensor(Tensor):
    """A quantised matrix that torch sees as [N, M] of a floating-point dtype.

    ``matrix``: the C++ object that stores it.  ``swapped``: True if the object stores the transpose
    [M, N].
    """

    matrix: Any
    swapped: bool

    @staticmethod
    def __new__(cls, matrix: Any, dtype: torch.dtype, swapped: bool = False) -> PackedTensor:
        rows, columns = matrix.shape()
        shape, strides = (
            ((columns, rows), (1, columns)) if swapped else ((rows, columns), (columns, 1))
        )
        with torch.inference_mode(False):  # torch refuses views across inference modes
            packed: PackedTensor = Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype
            )
        torch._C._set_throw_on_mutable_data_ptr(packed)  # C code would find no memory
        packed.matrix, packed.swapped = matrix, swapped
        return packed

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _OF_STORAGE or (func == _SET and not isinstance(args[1], PackedTensor)):
            raise DartError(NOT_SAVED)
        if func == Tensor.__setitem__ and isinstance(args[0], PackedTensor):
            raise DartError(READ_ONLY)  # the write would change only a dequantised copy
        if func in _OF_GRADIENTS and all([*args[1:], *(kwargs or {}).values()]):
            raise DartError(READ_ONLY)
        if func is Tensor.detach:  # the same without torch's dispatch, which is slow
            return _same(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return (_linear if func is F.linear else func)(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The same blocks in new memory, because pruning may change a matrix's memory layout."""
        copied: Tensor = PackedTensor(ops().packed_copy(self.matrix), self.dtype, self.swapped)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.untyped_storage()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        written = _written(func, args, kwargs or {})
        if any(isinstance(tensor, PackedTensor | PackedView) for tensor in written):
            raise DartError(READ_ONLY)
        if not func.is_view:
            return _computed(func, args, kwargs or {})
        with torch.inference_mode(False):  # as in __new__
            result = _computed(func, args, kwargs or {})
        return torch.utils._pytree.tree_map_only(Tensor, PackedView.of, result)

    def dequantise(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Dequantised rows ``begin`` to ``end`` of the stored matrix; transposed if ``swapped``."""
        last = self.matrix.shape()[0] if end is None else end
        values: Tensor = ops().packed_span(self.matrix, begin, last, _wide(self.dtype))
        stored = values.to(self.dtype)
        return stored.t() if self.swapped else stored

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] of the stored matrix, dequantised."""
        values: Tensor = ops().packed_rows(self.matrix, ids, _wide(self.dtype))
        return values.to(self.dtype)

    def part(self, begin: int, end: int) -> PackedTensor:
        """Rows ``begin`` to ``end``, quantised.  ``swapped`` must be False."""
        return PackedTensor(ops().packed_part(self.matrix, begin, end), self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For digests: names of attributes with the plain tensors; block type and ``swapped``."""
        matrix = self.matrix  # converted to one layout, because pruning may change the layout
        if matrix.order() == "rows":
            matrix = ops().packed_turned(matrix, "tiles", True)
        parts = {f"part{i}": part for i, part in enumerate(matrix.parts())}
        self.__dict__.update(parts)
        return list(parts), (self.matrix.type(), self.swapped)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({list(self.shape)}, {self.matrix.type()}, {self.dtype})"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the quantised weights."""
        return int(self.matrix.nbytes())


class PackedView(Tensor):
    """A dequantised copy that operations return where they would return a view of packed weights.

    It is read-only, because writes to a copy would not reach the weights.
    """

    @staticmethod
    def of(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(PackedView) if type(tensor) is Tensor else tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        views = [tensor for tensor in leaves if isinstance(tensor, PackedView)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [tensor._version for tensor in views]
            result = func(*args, **(kwargs or {}))
            if before != [tensor._version for tensor in views]:
                raise DartError(READ_ONLY)
            storages = {tensor.untyped_storage().data_ptr() for tensor in views}

            def kept(tensor: Tensor) -> Tensor:
                return cls.of(tensor) if tensor.untyped_storage().data_ptr() in storages else tensor

            return torch.utils._pytree.tree_map_only(Tensor, kept, result)


def few() -> int:
    """Largest number of vectors whose product is computed from blocks, not dequantised rows."""
    return int(ops().packed_few())


def memory_of(model: nn.Module) -> Iterator[Tensor]:
    """Plain tensors that together cover the memory of the weights of ``model``."""
    for weight in model.parameters():
        yield from weight.matrix.parts() if isinstance(weight, PackedTensor) else (weight.detach(),)


def place_of(tensor: Any) -> tuple[Any, ...]:
    """A key of the location and dtype of a weight's values; moving the values changes the key."""
    if isinstance(tensor, PackedTensor):  # its tensor attributes run Python, which is slow
        return id(tensor.matrix), tensor.swapped
    return tensor.data_ptr(), tensor.dtype, tensor.device


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments to which an operation writes."""
    if func._schema.is_mutable:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                yield from value if isinstance(value, list | tuple) else (value,)


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of ``func``, computed by the rule in ``RULES`` or with dequantised weights."""
    rule = None if "out" in kwargs else RULES.get(func.overloadpacket)
    result = NotImplemented if rule is None else rule(*args, **kwargs)
    if result is not NotImplemented:
        return result
    plain = torch.utils._pytree.tree_map_only(PackedTensor, PackedTensor.dequantise, (args, kwargs))
    return func(*plain[0], **plain[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values that the kernels return, before conversion to ``dtype``."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _swapped(weight: PackedTensor) -> PackedTensor:
    return PackedTensor(weight.matrix, weight.dtype, not weight.swapped)


def _same(weight: PackedTensor, **options: Any) -> Any:
    same = (None, weight.dtype, weight.device)
    if options.get("dtype") not in same or options.get("device") not in same:
        return NotImplemented
    return PackedTensor(weight.matrix, weight.dtype, weight.swapped)


def _transposed(weight: PackedTensor, first: int, second: int) -> Any:
    return _swapped(weight) if {first % 2, second % 2} == {0, 1} else NotImplemented


def _product(x: Tensor, weight: Any, transposed: bool = False) -> Any:
    """x [n, N] times weight [N, M]; if ``transposed``, times the transpose of weight [M, N].

    Returns ``NotImplemented`` if the kernels cannot compute the product.
    """
    if not isinstance(weight, PackedTensor) or isinstance(x, PackedTensor):
        return NotImplemented
    if x.dtype != weight.dtype or _has_gradients(x):
        return NotImplemented
    return ops().packed_product(x, weight.matrix, weight.swapped != transposed, few())


def _has_gradients(x: Tensor) -> bool:
    """Whether gradients of ``x`` are computed; the kernels' 8-bit inputs would distort them."""
    return (x.requires_grad and torch.is_grad_enabled()) or torch._C._current_graph_task_id() >= 0


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with x reshaped to 2-D, because torch would copy the weight for a 3-D x."""
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _product(rows, weight, transposed=True)
    if y is NotImplemented:
        y = torch.mm(rows, weight.t())
    result: Tensor = y.reshape(*x.shape[:-1], len(weight))
    return result if bias is None else result + bias


_OF_STORAGE = (
    *(Tensor.untyped_storage, Tensor.storage, Tensor.share_memory_),
    *(Tensor.data_ptr, Tensor.__dlpack__),
)
_OF_GRADIENTS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_SET = Tensor.data.__set__  # type: ignore[attr-defined]


def _sum(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _product(x, weight)
    if product is NotImplemented or beta != 1 or alpha != 1:
        return NotImplemented
    return product + bias


def _looked_up(weight: Any, ids: Tensor, *_: Any) -> Any:
    if not isinstance(weight, PackedTensor) or weight.swapped:
        return NotImplemented
    return weight.rows(ids.reshape(-1)).reshape(*ids.shape, -1)


def _selected(weight: Any, dim: int, ids: Tensor) -> Any:
    """``weight.index_select(dim, ids)``, implemented only for rows of the stored matrix."""
    if not isinstance(weight, PackedTensor) or weight.swapped != (dim % 2 == 1):
        return NotImplemented
    return weight.rows(ids).t() if weight.swapped else weight.rows(ids)


def _indexed(weight: Any, ids: Sequence[Tensor | None]) -> Any:
    first = ids[0] if len(ids) == 1 else None
    if first is None or first.dim() != 1 or not first.dtype.is_signed:
        return NotImplemented
    return _selected(weight, 0, torch.where(first < 0, first + len(weight), first))


def _sliced(
    weight: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """A dequantised slice, implemented only for rows of the stored matrix."""
    if not isinstance(weight, PackedTensor) or weight.swapped != (dim % 2 == 1) or step != 1:
        return NotImplemented
    begin, last, _ = slice(start, end).indices(weight.shape[dim])
    return weight.dequantise(begin, max(begin, last))


_aten = torch.ops.aten
RULES: Mapping[Any, Callable[..., Any]] = {
    _aten.t: _swapped,
    _aten.transpose: _transposed,
    _aten.detach: _same,
    _aten.alias: _same,
    _aten._to_copy: _same,
    _aten.mm: _product,
    _aten.addmm: _sum,
    _aten.embedding: _looked_up,
    _aten.index_select: _selected,
    _aten.index: _indexed,
    _aten.slice: _sliced,
}
"""Maps operations to rules; if a rule returns ``NotImplemented``, the matrix is dequantised."""


def pack(weight: Tensor, kind: str, order: str = "rows") -> PackedTensor:
    """``weight`` [N, M], rounded to blocks of type ``kind`` as llama.cpp rounds.

    ``order``: the memory layout, one of ``ORDERS``.  Raises ``ConfigError`` if ``kind`` is not in
    ``ROUNDED``, if M is not a multiple of 32, or if a weight is inf or NaN.
    """
    if kind not in ROUNDED:
        raise ConfigError(f"weights cannot be rounded to {kind}; choose {', '.join(ROUNDED)}")
    height, width = weight.shape
    if width % 32:
        raise ConfigError(f"rows of {width} weights do not divide into {kind}'s blocks of 32")
    matrix = ops().packed_zeros(kind, height, width, order)
    step = max(1, CHUNK // width)
    for begin in range(0, height, step):
        piece = weight[begin : begin + step].detach()
        if not bool(piece.isfinite().all()):
            raise ConfigError("weights with inf or NaN cannot be rounded")
        ops().packed_round(matrix, begin, piece)
    return PackedTensor(matrix, weight.dtype)
