"""Compensation: the mean contribution of the removed neurons, as a constant.

After FLAP (arXiv 2312.11983), which does so for static pruning.
"""

from __future__ import annotations

from torch import Tensor


def compensation(down: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """``b = W_down[:, removed] m[removed]``.

    down: [D, I]; mean: [I] float32, mean signed activation over the observed tokens; removed:
    [r] int64.  Returns [D] float32.
    """
    return down.detach().index_select(1, removed).float() @ mean.index_select(0, removed)
