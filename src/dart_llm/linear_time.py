"""The largest of many values without sorting them."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(values: Tensor, count: int) -> Tensor:
    """Marks of the ``count`` largest of values [n], bool [n]; ties go to the lower index.

    Not-a-number counts as infinite.  In linear time: sorting takes longer than all else that a mask
    needs.
    """
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    edge = values.kthvalue(len(values) - count + 1).values
    marks = values > edge
    ties = (values == edge).nonzero().flatten()
    marks[ties[: count - int(marks.sum())]] = True
    return marks
