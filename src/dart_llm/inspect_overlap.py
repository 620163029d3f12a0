"""Which neurons two texts keep: their overlap per layer beside chance and beside one text's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dart_llm.inspect_study import FIRST, SECOND, WHOLE, Study


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a & b| / |a | b| of two sets of unique ids; 1 for two empty sets."""
    same = int(torch.isin(a, b).sum())
    union = len(a) + len(b) - same
    return same / union if union else 1.0


def expected_jaccard(width: int, a: int, b: int) -> float:
    """The mean Jaccard of random sets of ``a`` and ``b`` of ``width`` neurons, exactly.

    The size of their intersection is hypergeometric.
    """
    if not a + b:
        return 1.0
    same = torch.arange(max(0, a + b - width), min(a, b) + 1, dtype=torch.float64)
    logs = _choose(a, same) + _choose(width - a, b - same) - _choose(width, torch.tensor(float(b)))
    return float((logs.exp() * same / (a + b - same)).sum())


def _choose(n: int, k: Tensor) -> Tensor:
    k = k.double()
    return (
        torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    )


def overlap(study: Study) -> dict[str, Any]:
    """Per layer the Jaccard of the neurons that the method keeps for A and for B.

    ``jaccard``: of the whole texts; ``chance``: of random sets of the same sizes.  Halves of the
    texts serve as a yardstick with equal evidence: ``same_text`` (A's halves, and B's: the mean),
    ``across`` (a half of A with a half of B: the mean of the four pairs).
    """
    whole = [_kept(study, text, WHOLE) for text in (0, 1)]
    halves = [[_kept(study, text, part) for part in (FIRST, SECOND)] for text in (0, 1)]
    layers = []
    for index, block in enumerate(study.view.blocks):
        a, b = (kept[index] for kept in whole)
        own = [[half[index] for half in text] for text in halves]
        layers.append(
            {
                "layer": index,
                "width": block.down_width,
                "kept_a": len(a),
                "kept_b": len(b),
                "jaccard": jaccard(a, b),
                "chance": expected_jaccard(block.down_width, len(a), len(b)),
                "same_text": _mean([jaccard(*own[0]), jaccard(*own[1])]),
                "across": _mean([jaccard(x, y) for x, y in product(own[0], own[1])]),
            }
        )
    keys = ("jaccard", "chance", "same_text", "across")
    config = study.settings.prune_config()
    return {
        "method": config.method,
        "sparsity": config.sparsity,
        "removed": 1 - sum(one["kept_a"] for one in layers) / sum(one["width"] for one in layers),
        "mean": {key: _mean([layer[key] for layer in layers]) for key in keys},
        "layers": layers,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _kept(study: Study, text: int, part: str) -> list[Tensor]:
    """Ids of the kept neurons per layer, on the host; all of them where a layer stays dense."""
    selection = study.selector.select(study.evidence(text, part))
    return [
        torch.arange(block.down_width) if mask is None else mask.ids.cpu()
        for block, mask in zip(study.view.blocks, selection.masks, strict=True)
    ]
