"""Guards on re-masking: a distance between triggers, and a cap on dense tokens."""

from __future__ import annotations


def guards_allow(
    decoded: int,
    last: int | None,
    spent: int,
    need: int,
    min_distance: int,
    max_dense_share: float | None,
    allowance: int = 0,
) -> bool:
    """Whether the guards of a rule let a trigger through (docs/method.md, "Drift", in tokens).

    ``decoded`` so far; ``last``: decoded at the trigger before, or None; ``spent``: dense ones on
    re-masks so far; ``need``: those of the coming one; ``allowance``: those beside the share.
    """
    if last is not None and decoded - last < min_distance:
        return False
    if max_dense_share is None:
        return True
    return spent + need <= allowance + max_dense_share * (decoded + need)
