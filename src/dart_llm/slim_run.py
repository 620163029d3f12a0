"""The root forward of an attached model with executor slim: native steps where they can serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from dart_llm.slim import SlimDecoder
from dart_llm.slim_parts import as_output, read_call
from dart_llm.tracer import Tracer


class SlimRun:
    """Takes decode steps over from the model; ``current``: the tracer of the run."""

    def __init__(self, decoder: SlimDecoder, current: Callable[[], Tracer]) -> None:
        self.decoder = decoder
        self.current = current
        self.steps = 0

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The root's forward."""
        tracer = self.current()
        plan = tracer.plan
        masks = plan.masks[0] if len(plan.masks) == 1 else None
        watched = plan.features and tracer.config.drift.signal != "hidden"
        if len(plan.masks) > 1 or watched or torch.is_grad_enabled():
            return original(*args, **kwargs)
        call = read_call(kwargs, args)
        if call is None or (masks and not self.decoder.serves(masks)):
            return original(*args, **kwargs)
        self.decoder.load(masks or ())
        logits, hidden = self.decoder.step(call, plan.observe)
        self.steps += 1
        if plan.observe:
            self._observe(tracer)
        if plan.features:
            tracer.feature(hidden[None, None])
        return as_output(logits, call.cache)

    def _observe(self, tracer: Tracer) -> None:
        u, x, h, z = self.decoder.observed()
        for index, layer in enumerate(tracer.selector.layers):
            basis = None if layer.learnt is None else layer.learnt.basis
            f = None if basis is None else F.linear(h[index], basis)[None, None]
            now = {"u": u, "z": z, "x": x, "r": z}
            tracer.observe(index, **{name: t[index][None, None] for name, t in now.items()}, f=f)
