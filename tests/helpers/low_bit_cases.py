"""Low-bit copies by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def by_hand(w: Tensor, bits: int, group: int) -> list[list[float]]:
    """Round-to-nearest, group by group; halves to even, as IEEE does."""
    most, found = 2 ** (bits - 1) - 1, []
    for row in w.float().numpy():
        values: list[float] = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            largest = torch.tensor(np.abs(part).max() / np.float32(most))
            scale = np.float32(largest.to(torch.bfloat16).item())
            levels = np.rint(part / scale) if scale else 0 * part
            values += (np.clip(levels, -most, most) * scale).tolist()
        found.append(values)
    return found
