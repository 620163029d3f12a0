"""Which neurons each request of a batch keeps: GRIFFIN's statistic, summed by slices of the batch.

Knows requests by their names and tensors by their layers, nothing of vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dart_llm.pruning.masks import top_ids
from dart_llm.pruning.scores import squared_share

logger = logging.getLogger("dart_vllm")

SETTING = "dart_sparsity"
"""Of ``SamplingParams.extra_args`` and ``vllm_xargs``, which takes numbers and words alone."""


@dataclass
class Request:
    """``sums``: of each layer's statistic, [I] float32; ``ids``: made from them, [k] each."""

    sparsity: float
    tokens: int = 0
    sums: dict[int, Tensor] = field(default_factory=dict)
    ids: dict[int, Tensor] = field(default_factory=dict)


class RequestMasks:
    """Evidence and masks of all requests that are running, and of which one the step is.

    ``least``: prompt tokens that must have been seen; those whose cache was found are not computed
    and leave nothing.
    """

    def __init__(self, least: int = 16) -> None:
        self.least = least
        self._requests: dict[str, Request] = {}
        self._observed: list[tuple[Request, slice]] = []
        self._active: Request | None = None
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._loaded: dict[int, Request] = {}

    def add(self, name: str, extra_args: Mapping[str, Any] | None) -> None:
        """A request begins, or goes on after it was preempted; without the setting it is dense."""
        self.forget(name)
        sparsity = _sparsity(extra_args)
        if sparsity:
            self._requests[name] = Request(sparsity)

    def forget(self, name: str) -> None:
        """A request has ended or was preempted: its sums and ids go."""
        gone = self._requests.pop(name, None)
        self._loaded = {layer: one for layer, one in self._loaded.items() if one is not gone}

    def begin(self, names: Sequence[str], starts: Sequence[int], reads: Sequence[bool]) -> None:
        """A step comes: tokens starts[i] to starts[i + 1] of the batch are of names[i].

        ``reads``: whether a request's tokens are of its prompt.  Pruned is a step of one decoded
        token, alone in its batch; all else is dense.
        """
        self._observed, self._active = [], None
        for name, (start, end), of_prompt in zip(names, pairwise(starts), reads, strict=True):
            request = self._requests.get(name)
            if request is None:
                continue
            if of_prompt:
                self._observed.append((request, slice(start, end)))
                request.tokens += end - start
                request.ids = {}
            elif starts[-1] == 1 and request.tokens >= self.least:
                self._active = request

    def observe(self, layer: int, u: Tensor) -> None:
        """Add the activations [T, I] of the step's prompt tokens; what pads them is left out."""
        for request, span in self._observed:
            new = squared_share(u[span].float()).sum(0)
            known = request.sums.get(layer)
            request.sums[layer] = new if known is None else known + new

    def ids(self, layer: int) -> Tensor | None:
        """Neurons that the step keeps, [k] int64, ascending; None: all.

        In a buffer that stays where it is for as long as k does, so that a recorded step may go on
        reading it.
        """
        request = self._active
        if request is None or layer not in request.sums:
            return None
        if layer not in request.ids:
            sums = request.sums[layer]
            keep = max(1, round((1 - request.sparsity) * len(sums)))
            request.ids[layer] = top_ids(sums, keep)
            self._loaded.pop(layer, None)
        new = request.ids[layer]
        buffer = self._buffers.setdefault((layer, len(new)), torch.empty_like(new))
        if self._loaded.get(layer) is not request:
            buffer.copy_(new)
            self._loaded[layer] = request
        return buffer


def _sparsity(extra_args: Mapping[str, Any] | None) -> float:
    """0 where nothing was asked for, or nothing that makes sense: an engine serves others too."""
    given = (extra_args or {}).get(SETTING, 0)
    try:
        sparsity = float(given)
    except (TypeError, ValueError):
        sparsity = -1.0
    if not 0 <= sparsity < 1:
        logger.warning("%s %r is no number from 0 to below 1: the request is dense", SETTING, given)
        return 0.0
    return sparsity
