"""The root forward of an attached model with executor slim: native steps where they can serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as everywhere

from dart_llm.layer_prior import LayerPrior
from dart_llm.slim import SlimDecoder
from dart_llm.slim_parts import as_output, read_call
from dart_llm.tracer import Tracer

OWN = ("dart_llm.", "transformers.")
"""Packages whose hooks are known to change nothing."""


class Hooks:
    """Hooks inside a model, which a slim step would pass by."""

    def __init__(self, model: nn.Module) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._held = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._known, self._foreign = 0, False

    def foreign(self) -> bool:
        """Whether any is neither dart_llm's nor transformers' own (which only collect outputs)."""
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        if (count := sum(map(len, self._held))) != self._known:
            owners = {
                getattr(one, "__module__", "") for held in self._held for one in held.values()
            }
            self._foreign = any(not owner.startswith(OWN) for owner in owners)
            self._known = count
        return self._foreign


class SlimRun:
    """Takes decode steps over from the model; ``current``: the tracer of the run."""

    def __init__(self, model: nn.Module, decoder: SlimDecoder, current: Callable[[], Tracer]):
        self.decoder = decoder
        self.current = current
        self.hooks = Hooks(model)
        self._model: Any = model
        self._learnt: list[LayerPrior | None] = []
        self._bases = False
        self.steps = 0

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The root's forward."""
        tracer = self.current()
        plan = tracer.plan
        masks = plan.masks[0] if len(plan.masks) == 1 else None
        watched = plan.features and tracer.config.drift.signal != "hidden"
        if len(plan.masks) > 1 or watched or self._asks_for_more():
            return original(*args, **kwargs)
        call = read_call(kwargs, args)
        if call is None or (masks and not self.decoder.serves(masks)):
            return original(*args, **kwargs)
        self.decoder.load(masks or ())
        if plan.observe:
            self._read_features(tracer)
        logits, hidden = self.decoder.step(call, plan.observe)
        self.steps += 1
        if plan.observe:
            self._observe(tracer)
        if plan.features:
            tracer.feature(hidden[None, None])
        return as_output(logits, call.cache)

    def _asks_for_more(self) -> bool:
        """Whether the model must run itself: dropout, gradients, autocast, outputs, hooks."""
        config = self._model.config
        return (
            self._model.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or self.hooks.foreign()
        )

    def _observe(self, tracer: Tracer) -> None:
        u, x, z, f = (t[:, None, None].unbind(0) for t in self.decoder.observed())
        for index in range(len(u)):
            tracer.observe(
                index, u[index], z[index], x[index], z[index], f[index] if self._bases else None
            )

    def _read_features(self, tracer: Tracer) -> None:
        """Let observed steps read what low-rank compensation wants of each layer's FFN input."""
        learnt = [layer.learnt for layer in tracer.selector.layers]
        same = len(learnt) == len(self._learnt)  # by identity: priors of two configurations differ
        if same and all(new is old for new, old in zip(learnt, self._learnt, strict=True)):
            return
        bases = [one.basis for one in learnt if one is not None and one.basis is not None]
        self._learnt, self._bases = learnt, len(bases) == len(learnt)
        self.decoder.reads(bases if self._bases else ())
