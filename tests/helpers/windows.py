"""Attention outputs for the drift detector: windows whose means are given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dart_llm.pruning.drift import Detector, Rule

PAIRS = Rule(2, lambda mu, sigma: mu - 0.5 * sigma, 2)
"""Windows of two tokens, small enough for numbers by hand."""


def tokens(*pairs: tuple[float, float]) -> Tensor:
    """[1, T, 2]"""
    return torch.tensor([pairs], dtype=torch.float32)


def windows(*means: tuple[float, float], size: int = 2) -> Tensor:
    """[1, T, 2] tokens whose window means are ``means``, no token equal to its mean."""
    found = []
    for a, b in means:
        for index in range(size):
            shift = (index - (size - 1) / 2) * 0.1
            found.append((a + shift, b - shift))
    return tokens(*found)


def at(angle: float) -> tuple[float, float]:
    """The unit vector whose cosine with (1, 0) is cos(angle)."""
    return math.cos(angle), math.sin(angle)


def armed(rule: Rule, reference: Tensor) -> Detector:
    detector = Detector(rule)
    detector.observe(reference, None)
    detector.start()
    assert detector.armed
    return detector


REFERENCE = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0))
# each against the sum of the others: (2, 2), (3, 1), (2, 1), (2, 2)
LEFT_OUT = (math.sqrt(0.5), math.sqrt(0.1), 3 / math.sqrt(10), math.sqrt(0.5))
MU = sum(LEFT_OUT) / 4
SIGMA = math.sqrt(sum((s - MU) ** 2 for s in LEFT_OUT) / 3)
