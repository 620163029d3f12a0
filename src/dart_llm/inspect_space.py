"""Two texts in the space of the residual stream: per layer, per token, per window from a centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dart_llm.drift import SINKS
from dart_llm.inspect_overlap import jaccard
from dart_llm.inspect_study import Study
from dart_llm.scores import EPS


def compare(a: Tensor, b: Tensor, dims: int) -> dict[str, float]:
    """Two vectors [D] beside each other; ``dims``: how many dimensions count as largest.

    cos(a, b); ||a - b||; ||b|| / ||a||; Jaccard of the dimensions with the largest magnitudes.
    """
    a, b = a.float(), b.float()
    size_a, size_b = a.norm(), b.norm()
    top = [t.abs().topk(min(dims, len(t))).indices for t in (a, b)]
    return {
        "cosine": float(a @ b / (size_a * size_b).clamp_min(EPS)),
        "distance": float((a - b).norm()),
        "norm_ratio": float(size_b / size_a.clamp_min(EPS)),
        "jaccard": jaccard(*top),
    }


def space(study: Study) -> dict[str, Any]:
    """x of A beside x of B, both read by the dense model.

    ``layers``: mean vectors over all tokens but the first (attention sinks).  ``tokens``: of one
    layer, token by token at the same position.  ``windows``: of that layer, mean vectors over the
    tokens at most ``half_width`` from the middle of each text.
    """
    dims = study.settings.top_dims
    readings = [study.reading(text) for text in (0, 1)]
    layers = [
        {"layer": layer, **compare(a.centre, b.centre, dims)}
        for layer, (a, b) in enumerate(zip(*readings, strict=True))
    ]
    streams = [reading[study.layer].stream for reading in readings]
    a, b = (stream for stream in streams if stream is not None)
    tokens = [
        {"position": position, **compare(one, other, dims)}
        for position, (one, other) in enumerate(zip(a, b, strict=False))
    ]
    windows = [
        {
            "half_width": half,
            "tokens_a": len(part_a),
            "tokens_b": len(part_b),
            **compare(part_a.mean(0), part_b.mean(0), dims),
        }
        for half, part_a, part_b in _windows(a, b)
    ]
    return {
        "layer": study.layer,
        "top_dims": dims,
        "sinks": SINKS,
        "layers": layers,
        "tokens": tokens,
        "windows": windows,
    }


def half_widths(longest: int) -> list[int]:
    """0, 1, 2, 4, ... and ``longest``."""
    found, step = [0], 1
    while step < longest:
        found.append(step)
        step *= 2
    return sorted({*found, longest})


def _windows(a: Tensor, b: Tensor) -> Sequence[tuple[int, Tensor, Tensor]]:
    """Growing windows around the middle of each text, cut at its ends and at the sinks."""
    own = [t[SINKS:] if len(t) > SINKS else t for t in (a, b)]
    longest = max(len(t) // 2 for t in own)
    return [(half, *(_around(t, half) for t in own)) for half in half_widths(longest)]  # type: ignore[misc]


def _around(stream: Tensor, half: int) -> Tensor:
    middle = len(stream) // 2
    return stream[max(0, middle - half) : middle + half + 1]
