"""Weight matrices whose neurons lie one after the other, without a second copy.

A down projection [D, I] holds a neuron as a column.  While a model is attached its values lie
transposed in the same memory, so that a neuron is a row that can be read alone; shape, values,
name and address of the parameter stay what they are.  ``restore`` puts the order back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dart_llm.errors import ConfigError


class Layout:
    """Parameters that were laid out transposed, and how they were."""

    def __init__(self) -> None:
        self._laid: list[nn.Parameter] = []

    def neuron_rows(self, matrix: Tensor, parameter: nn.Parameter) -> Tensor:
        """``matrix`` [I, D], a view of ``parameter`` or of its transpose, as contiguous rows.

        Raises ``ConfigError`` for a parameter whose memory others see.
        """
        if matrix.is_contiguous():
            return matrix
        if not can_lay_out(matrix, parameter):
            raise ConfigError(
                "native kernels lay weights out anew, and these are shared with another process "
                "or are views of something: use executor compact"
            )
        _transpose(parameter, parameter.data.t().contiguous(), transposed=True)
        self._laid.append(parameter)
        return parameter.data.t()

    def restore(self) -> None:
        """Every parameter lies as it did; safe to call twice."""
        while self._laid:
            parameter = self._laid.pop()
            _transpose(parameter, parameter.data.contiguous(), transposed=False)


def can_lay_out(matrix: Tensor, parameter: nn.Parameter) -> bool:
    """Whether ``neuron_rows`` takes these: neurons are rows already, or nobody else is known."""
    shared = bool(parameter.is_shared())  # type: ignore[no-untyped-call]
    return matrix.is_contiguous() or (parameter.data.is_contiguous() and not shared)


@torch.no_grad()
def _transpose(parameter: nn.Parameter, values: Tensor, transposed: bool) -> None:
    """Write ``values`` into the memory of ``parameter``, and read it by rows or by columns."""
    rows, columns = parameter.shape
    strides = (1, rows) if transposed else (columns, 1)
    with torch.inference_mode(parameter.is_inference()):
        memory = parameter.data
        place = memory.as_strided((rows, columns), strides, memory.storage_offset())
        (place.t() if transposed else place).copy_(values)
        parameter.data = place
