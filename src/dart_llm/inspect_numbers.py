"""Quantiles, moments and histograms of many numbers, as JSON-able data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles that are kept, by their names in ``quantiles``."""

NAMES = ("min", "q05", "q25", "median", "q75", "q95", "max")


def quantiles(values: Tensor) -> dict[str, float]:
    """``NAMES`` of all entries, linear between the two nearest; any shape, not empty."""
    flat = values.detach().float().cpu().numpy().reshape(-1)
    found = np.quantile(flat, LEVELS)
    return {name: float(value) for name, value in zip(NAMES, found, strict=True)}


def moments(values: Tensor) -> dict[str, float | None]:
    """``mean``, ``std`` (of the population), ``skewness``, ``kurtosis`` (excess; normal: 0).

    The last two are None where all values are equal.
    """
    flat = values.detach().double().flatten()
    mean = flat.mean()
    centred = flat - mean
    variance = centred.square().mean()
    std = variance.sqrt()
    found: dict[str, float | None] = {"mean": float(mean), "std": float(std)}
    flat_enough = float(std) <= 1e-9 * max(1e-30, float(flat.abs().max()))
    third, fourth = centred.pow(3).mean(), centred.pow(4).mean()
    found["skewness"] = None if flat_enough else float(third / std**3)
    found["kurtosis"] = None if flat_enough else float(fourth / variance.square() - 3)
    return found


def distribution(values: Tensor) -> dict[str, Any]:
    """``quantiles`` and ``moments``."""
    return {**quantiles(values), **moments(values)}


def histogram(values: Tensor, low: float, high: float, bins: int = 40) -> list[int]:
    """Counts in equal bins from ``low`` to ``high``; the end bins hold what lies beyond."""
    place = (values.detach().float().cpu() - low) / max(high - low, 1e-30) * bins
    found = torch.bincount(place.clamp(0, bins - 1).long().flatten(), minlength=bins)
    return [int(count) for count in found]
