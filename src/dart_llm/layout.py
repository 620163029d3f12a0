"""Weight matrices whose neurons lie one after the other, without a second copy.

A down projection [D, I] holds a neuron as a column.  While a model is attached its values lie
transposed in the same memory, so that a neuron is a row that can be read alone; shape, values,
name and address of the parameter stay what they are.  ``restore`` puts the order back.

Only memory of the parameter's own is written: what PyTorch allocated, or mapped for this process
alone, and nothing else of the model lies on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from dart_llm.errors import ConfigError
from dart_llm.ffn import FfnBlock
from dart_llm.native_build import ops

MAPS = Path("/proc/self/maps")
"""What lies where in this process: one line per range of addresses."""

Span = tuple[int, int]
"""The first address of something, and the one after its last."""


class Layout:
    """Parameters that were laid out transposed, and where they lie."""

    def __init__(self) -> None:
        self._laid: list[tuple[nn.Parameter, int]] = []

    def neuron_rows(self, matrix: Tensor, parameter: nn.Parameter) -> Tensor:
        """``matrix`` [I, D], a view of ``parameter`` or of its transpose, as contiguous rows.

        Ask ``why_not_in_place`` first.  Raises ``ConfigError`` for a parameter not in one piece.
        """
        if matrix.is_contiguous():
            return matrix
        if not parameter.is_contiguous():
            raise ConfigError(
                "native kernels lay weights out anew, and these do not lie in one piece: use "
                "executor compact"
            )
        # noted first: an interrupt may come between any two steps, and none divides lay_out
        self._laid.append((parameter, parameter.data_ptr()))
        ops().lay_out(parameter, True)
        return parameter.data.t()

    def restore(self) -> None:
        """Every parameter lies as it did; safe to call again, wherever it was interrupted."""
        while self._laid:
            parameter, address = self._laid[-1]
            if not parameter.is_contiguous():
                if parameter.data_ptr() == address:
                    ops().lay_out(parameter, False)
                else:  # replaced or moved meanwhile, strides and all
                    parameter.data = parameter.data.contiguous()
            self._laid.pop()


def why_not_in_place(model: nn.Module, blocks: Sequence[FfnBlock]) -> str:
    """Why the projections that must be cannot be laid out where they are: "", or a clause.

    Needs the native kernels.
    """
    wanted = [found for block in blocks for found in _not_in_rows(block)]
    held = list(_held(model)) if wanted else []
    private: list[Span] | None = None
    for weight, place in wanted:
        start, end = _span(weight)
        if bool(weight.is_shared()):  # type: ignore[no-untyped-call]
            return f"{place} shares its memory with another process"
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != end - start:
            return f"{place} is a view of something larger"
        on_it = [name for (low, high), name in held if low < end and start < high]
        if len(on_it) > 1:
            return f"{' and '.join(on_it)} lie on the same memory"
        if not ops().allocated(weight):
            private = list(_private_maps()) if private is None else private
            if not any(low <= start and end <= high for low, high in private):
                return f"{place} lies in memory that PyTorch did not allocate"
    return ""


def _not_in_rows(block: FfnBlock) -> Iterator[tuple[nn.Parameter, str]]:
    """The projections whose neurons are columns, and what they are called."""
    _, up, down = block.matrices()
    for role, module, rows in (("up", block.up, up), ("down", block.down, down.t())):
        if not rows.is_contiguous() and (role == "down" or block.by_inputs):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            yield weight, f"the {role} projection of layer {block.index}"


def _held(model: nn.Module) -> Iterator[tuple[Span, str]]:
    """Where the parameters and buffers lie, by each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    for name, one in chain(parameters, model.named_buffers(remove_duplicate=False)):
        if type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu":
            yield _span(one), name


def _span(tensor: Tensor) -> Span:
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + (reach * tensor.element_size() if tensor.numel() else 0)


def _private_maps() -> Iterator[Span]:
    """Maps of files that this process alone writes to, as safetensors makes them; joined."""
    start = end = 0
    lines = MAPS.read_text("utf-8", "replace").splitlines() if MAPS.is_file() else []
    for line in lines:
        where, rights, _, _, inode, *_ = line.split(maxsplit=5)
        if not rights.startswith("rw") or not rights.endswith("p") or inode == "0":
            continue
        low, high = (int(address, 16) for address in where.split("-"))
        if low != end:
            if end:
                yield start, end
            start = low
        end = high
    if end:
        yield start, end
