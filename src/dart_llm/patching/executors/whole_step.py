"""The root forward of an attached model: whole decode steps run natively where they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from dart_llm.models.calls import TokenCall, as_output, new_cache, read_prompt, read_step
from dart_llm.patching.executors.native_step import NativeDecoder
from dart_llm.patching.executors.screened_head import ScreenedHead
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.observations import LayerObservation

TRUSTED = ("dart_llm.", "transformers.")
"""Packages whose hooks change nothing."""

PATCH = ("dart_llm.patching.", "transformers.")
"""Those of them whose hooks need nothing of a prompt beside what the plan names."""


class Hooks:
    """Hooks inside a model, which a whole step would pass by."""

    def __init__(self, model: nn.Module) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._hooks = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._newest, self._foreign = (0, 0), False
        self.watched = False
        """Whether, at the last look, any read more than a prompt's plan names."""

    def foreign(self, again: bool = False) -> bool:
        """Whether any is neither dart_llm's nor transformers' own (which only collect outputs).

        ``again``: modules are only looked at when torch has registered a hook since the last time.
        """
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        newest = RemovableHandle.next_id
        if again and newest == self._newest[0] and not self._foreign:
            return False
        if (count := (newest, sum(map(len, self._hooks)))) != self._newest:
            owners = {
                getattr(hook, "__module__", "") for hooks in self._hooks for hook in hooks.values()
            }
            self._foreign = any(not owner.startswith(TRUSTED) for owner in owners)
            self.watched = any(not owner.startswith(PATCH) for owner in owners)
            self._newest = count
        return self._foreign


class WholeStepForward:
    """Takes decode steps and prompts over from the model; ``current``: the run's controller."""

    def __init__(
        self,
        model: nn.Module,
        decoder: NativeDecoder,
        current: Callable[[], PruningController],
    ):
        self.decoder = decoder
        self.head: ScreenedHead | None = None
        self.current = current
        self.hooks = Hooks(model)
        self._model: Any = model
        self.steps = 0
        self._fresh = True

    def take_head(self, head: ScreenedHead | None) -> None:
        """What scores the tokens of steps from now on, and counts that; None: the whole head."""
        if head is not self.head:
            self.decoder.take_screen(None if head is None else head.screen)
            self.head = head

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The root's forward."""
        if not self._asks_for_more():
            decoder = self.decoder
            call = read_step(args, kwargs, decoder.dtype, decoder.windows, decoder.rows)
            if call is not None and self._take_plan():
                return as_output(self._step(call), call.cache)
            if (prompt := self._prompt_call(args, kwargs)) is not None:
                return self._prompt(prompt)
        self._fresh = False
        return original(*args, **kwargs)

    def continues(self, cache: Any) -> bool:
        """Whether the newest step was one on ``cache`` and nothing prevents another."""
        return self.decoder.continues(cache) and not self._asks_for_more(again=True)

    def decode(self, ids: Tensor, cache: Any, forbidden: list[int] | None) -> Tensor | None:
        """Logits [1, V] after ids [1, 1]; None where the plan in force needs the model.

        ``forward`` in short, for a cache that ``continues``.  ``forbidden``: as of ``TokenCall``.
        """
        return self._step(TokenCall(ids, cache, forbidden)) if self._take_plan() else None

    def _prompt_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenCall | None:
        """The prompt that a call of the root's forward is, where the decoder can serve it."""
        if not self.decoder.prompts or self.hooks.watched:
            return None
        plan = self.current().plan
        if not plan.dense or plan.stream or self._signals_inside(plan):
            return None
        use_cache = bool(getattr(self._model.config, "use_cache", False))
        return read_prompt(args, kwargs, self.decoder.windows, use_cache)

    def _prompt(self, call: TokenCall) -> Any:
        """What the model returns of a prompt."""
        controller, decoder = self.current(), self.decoder
        plan = controller.plan
        decoder.load(())
        decoder.refresh()  # at every prompt, as weights may have changed between two sequences
        self._fresh = True
        cache = new_cache(self._model) if call.cache is None and call.use_cache else call.cache

        def see(layer: int, seen: LayerObservation) -> None:
            controller.observe(layer, seen if plan.inputs else LayerObservation(seen.u))

        logits, hidden = decoder.prompt(call, cache, see if plan.observe else None)
        if plan.signal:
            controller.observe_signal(hidden)
        return as_output(logits, cache)

    def _signals_inside(self, plan: ForwardPlan) -> bool:
        """Whether drift watches what a hook reads inside the model."""
        return plan.signal and self.current().config.drift.signal != "hidden"

    def _take_plan(self) -> bool:
        """Load the masks of the plan in force; False where a step can not serve it."""
        plan = self.current().plan
        if len(plan.masks) > 1 or self._signals_inside(plan) or (plan.observe and not plan.dense):
            return False
        masks = plan.masks[0] if plan.masks else None
        if masks and not self.decoder.serves(masks):
            return False
        self.decoder.load(masks or ())
        return True

    def _step(self, call: TokenCall) -> Tensor:
        """Logits [B, V] of a step, or the tokens that it gives with ``call.forbidden``."""
        controller = self.current()
        plan = controller.plan
        if not self._fresh:
            self.decoder.refresh()
            self._fresh = True
        if self.head is not None:
            call = self.head.with_scores(call)
        logits, hidden = self.decoder.step(call, plan.observe)
        self.steps += 1
        if plan.observe:
            self._observe(controller)
        if plan.signal:
            controller.observe_signal(hidden[:, None])
        if self.head is not None:
            self.head.count(hidden, logits, self.decoder.exact_entries())
        return logits

    def _asks_for_more(self, again: bool = False) -> bool:
        """Whether the model must run itself: dropout, gradients, autocast, outputs, hooks."""
        config = self._model.config
        return (
            self._model.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or self.hooks.foreign(again)
        )

    def _observe(self, controller: PruningController) -> None:
        stream = controller.plan.stream
        parts = [t[:, :, None].unbind(0) for t in self.decoder.observed(stream)]
        parts = parts[: 4 if stream else 2]
        controller.observe_step(
            {i: LayerObservation(*tensors) for i, tensors in enumerate(zip(*parts, strict=True))}
        )
