"""How much each FFN changes the residual stream (docs/method.md, "Budgets": the sensitivities)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dart_llm.activations import Seen
from dart_llm.inspect_numbers import quantiles
from dart_llm.scores import EPS

VARIANTS = ("residual", "output")
"""``residual``: the stream before and after, x and x + r.  ``output``: x and the FFN's output z."""


def impact(seen: Seen) -> dict[str, Any]:
    """Of every variant: ``cosine``, ``change`` (mean, median, 5 % and 95 % over tokens) and ``s``.

    ``residual``: cos(x, x + r) and ||r|| / ||x||.  ``output``: cos(x, z) and ||z - x|| / ||x||.
    ``s`` = (1 - mean cosine) x mean change is what the budgets ``depth-residual`` and ``depth``
    weigh layers by.  One row; all tokens count.
    """
    x, z, r = (t[0].float() for t in (seen.x, seen.z, seen.r))
    found = {}
    for name, y, change in zip(VARIANTS, (x + r, z), (r, z - x), strict=True):
        size = x.norm(dim=-1).clamp_min(EPS)
        cosine = (x * y).sum(-1) / (size * y.norm(dim=-1)).clamp_min(EPS)
        relative = change.norm(dim=-1) / size
        found[name] = {
            "cosine": _spread(cosine),
            "change": _spread(relative),
            "s": float((1 - cosine.mean()) * relative.mean()),
        }
    return found


def _spread(values: Tensor) -> dict[str, float]:
    kept = quantiles(values)
    return {"mean": float(values.mean()), **{n: kept[n] for n in ("median", "q05", "q95")}}
