"""The root forward of an attached model whose decode steps run as a whole, where they can."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle

from dart_llm.models.calls import (
    PromptCall,
    SlimCall,
    as_output,
    new_cache,
    read_call,
    read_prompt,
)
from dart_llm.models.growing_cache import PreallocatedKVCache, is_static
from dart_llm.models.screen import Screen
from dart_llm.patching.executors.screened_head import ScreenedHead
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.sequence import SequenceState

OWN = ("dart_llm.", "transformers.")
"""Packages whose hooks are known to change nothing."""

PATCH = ("dart_llm.patching.", "transformers.")
"""Those of them whose hooks want nothing of a prompt that the plan does not say."""

WITHOUT = {"slim": "native", "graph": "compact", "triton": "triton"}
"""What runs where no whole step can."""


def effective_executor(executor: str, steps: int, states: Iterable[SequenceState]) -> str:
    """``executor``, or what ran in its place where tokens were decoded and none by a whole step."""
    if steps or not any(state.decoded for state in states):
        return executor
    return WITHOUT.get(executor, executor)


See = Callable[[int, LayerObservation], None]
"""Takes what a layer, by its number, saw of a prompt."""


class Hooks:
    """Hooks inside a model, which a slim step would pass by."""

    def __init__(self, model: nn.Module) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._held = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._known, self._foreign = (0, 0), False
        self.watched = False
        """Whether, when they were looked at last, any saw more than a prompt's plan says."""

    def foreign(self, again: bool = False) -> bool:
        """Whether any is neither dart_llm's nor transformers' own (which only collect outputs).

        ``again``: modules are only looked at when torch has registered a hook since the last time.
        """
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        made = RemovableHandle.next_id
        if again and made == self._known[0] and not self._foreign:
            return False
        if (count := (made, sum(map(len, self._held)))) != self._known:
            owners = {
                getattr(one, "__module__", "") for held in self._held for one in held.values()
            }
            self._foreign = any(not owner.startswith(OWN) for owner in owners)
            self.watched = any(not owner.startswith(PATCH) for owner in owners)
            self._known = count
        return self._foreign


class StepDecoder(ABC):
    """Whole decode steps of one attached model.

    ``rows``: of the largest batch, None for any; ``static_caches``: whether it serves these too;
    ``prompts``: and whole prompts, by ``prompt``;
    ``device``: its type; ``dtype``: of weights and cache; ``windows``: positions that a token of
    each layer sees, None for all.
    """

    rows: int | None = None
    static_caches = False
    prompts = False
    device: str
    dtype: torch.dtype
    windows: list[int | None]

    def __init__(self) -> None:
        self._cache: PreallocatedKVCache | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def unload(self) -> None:
        """Run all neurons, and hold neither masks nor room for a cache."""
        self.load(())
        self._cache = None

    def nbytes(self) -> int:
        """Bytes held beside the model, its masks and its cache; graphs hold what CUDA says."""
        held = 0 if self._cache is None else self._cache.nbytes()
        return held + sum(t.nbytes for t in self._angles or ())

    def show_cache(self) -> None:
        """Leave the layers of a cache as whoever made them knows them."""
        if self._cache is not None:
            self._cache.show()

    def room(self, cache: Any) -> PreallocatedKVCache:
        """Of transformers' ``cache``: its tensors become views of larger buffers."""
        if self._cache is None or self._cache.of() is not cache:
            self._cache = PreallocatedKVCache(cache, self.windows)
        return self._cache

    def goes_on(self, cache: Any) -> bool:
        """Whether ``cache`` is as the newest step left it."""
        known = self._cache
        return known is not None and known.of() is cache and known.ready(cache)

    def take_screen(self, screen: Screen | None) -> None:
        """Score tokens by a screen of the head from now on; None: by the whole head again."""
        raise NotImplementedError

    def exact_words(self) -> int:
        """Words that the last step scored exactly, by a screen: the sum over its rows."""
        raise NotImplementedError

    def serves(self, masks: Sequence[LayerMask | None]) -> bool:
        """Whether it can run these masks."""
        return True

    @abstractmethod
    def refresh(self) -> None:
        """Read again what was copied of the weights: the model ran itself in between."""

    @abstractmethod
    def load(self, masks: Sequence[LayerMask | None]) -> None:
        """Run these masks from now on; () or None in a layer's place: all of its neurons."""

    @abstractmethod
    def step(self, call: SlimCall, observe: bool) -> tuple[Tensor, Tensor]:
        """Decode one token of each row: logits [B, V] and the last hidden states [B, D].

        With ``call.forbidden``, the likeliest tokens [B], int64, may stand in the place of logits.
        """

    def prompt(self, call: PromptCall, cache: Any, see: See | None) -> tuple[Tensor, Tensor]:
        """Logits [B, n, V] of a prompt and its last hidden states [B, T, D]; fills ``cache``.

        Hands what each layer saw to ``see`` as it goes.  No masks may be loaded.
        """
        raise NotImplementedError

    def watch(self, choices: bool) -> None:  # noqa: B027  most have nothing to remember
        """From the next step on remember what its tokens choose, or stop."""

    def chosen(self) -> Tensor:
        """What the tokens of the last step chose, if it was watched, uint8 [L, B, I / 8 rounded
        up]: bits as of ``PatchedFFN.chosen``; zeros in layers whose tokens chose nothing.
        """
        raise NotImplementedError

    @abstractmethod
    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the last step: u [L, B, I], the FFNs' inputs, their outputs, the stream before them,
        and what was added to it.

        [L, B, D] each; outputs and stream only with ``stream``, else nothing.
        """


class WholeStepForward:
    """Takes decode steps over from the model; ``current``: the controller of the run."""

    def __init__(
        self,
        model: nn.Module,
        decoder: StepDecoder,
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
        if (call := self._call(args, kwargs)) is not None:
            return as_output(self._step(call), call.cache)
        if (prompt := self._prompt_call(args, kwargs)) is not None:
            return self._prompt(prompt)
        self._fresh = False
        return original(*args, **kwargs)

    def goes_on(self, cache: Any) -> bool:
        """Whether the newest step was one on ``cache`` and nothing stands against another."""
        return self.decoder.goes_on(cache) and not self._asks_for_more(again=True)

    def decode(self, ids: Tensor, cache: Any, forbidden: list[int] | None) -> Tensor | None:
        """Logits [1, V] after ids [1, 1]; None where the plan in force needs the model.

        The model's forward in short, for a cache that ``goes_on``.
        ``forbidden``: as of ``SlimCall``.
        """
        return self._step(SlimCall(ids, cache, forbidden)) if self._take_plan() else None

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SlimCall | None:
        """The step that a call of the root's forward is, where one can serve it."""
        if self._asks_for_more():
            return None
        decoder = self.decoder
        call = read_call(kwargs, args, decoder.dtype, decoder.windows, decoder.rows)
        if call is None or (is_static(call.cache) and not decoder.static_caches):
            return None
        return call if self._take_plan() else None

    def _prompt_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PromptCall | None:
        """The prompt that a call of the root's forward is, where the decoder can serve it."""
        if not self.decoder.prompts or self._asks_for_more() or self.hooks.watched:
            return None
        plan = self.current().plan
        if not plan.dense or plan.stream or self._signals_inside(plan):
            return None
        cached = bool(getattr(self._model.config, "use_cache", False))
        return read_prompt(kwargs, args, self.decoder.windows, cached)

    def _prompt(self, call: PromptCall) -> Any:
        """What the model returns of a prompt."""
        controller, decoder = self.current(), self.decoder
        plan = controller.plan
        decoder.load(())
        decoder.refresh()  # at every prompt, as weights may have changed between two texts
        self._fresh = True
        cache = new_cache(self._model) if call.cache is None and call.cached else call.cache

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
        controller = self.current()
        plan = controller.plan
        if len(plan.masks) > 1 or self._signals_inside(plan) or (plan.observe and not plan.dense):
            return False
        masks = plan.masks[0] if plan.masks else None
        if masks and not self.decoder.serves(masks):
            return False
        self.decoder.load(masks or ())
        return True

    def _step(self, call: SlimCall) -> Tensor:
        """Logits [B, V] of a step, or what it gives with ``call.forbidden``."""
        controller = self.current()
        plan = controller.plan
        if not self._fresh:
            self.decoder.refresh()
            self._fresh = True
        if self.head is not None:
            call = self.head.ask(call)
        logits, hidden = self.decoder.step(call, plan.observe)
        self.steps += 1
        if plan.observe:
            self._observe(controller)
        if plan.signal:
            controller.observe_signal(hidden[:, None])
        if self.head is not None:
            self.head.count(hidden, logits, self.decoder.exact_words())
        return logits

    def _asks_for_more(self, again: bool = False) -> bool:
        """Whether the model must run itself: dropout, gradients, autocast, outputs, hooks."""
        config = self._model.config
        return (
            self._model.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(self.decoder.device)
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or self.hooks.foreign(again)
        )

    def _observe(self, controller: PruningController) -> None:
        stream = controller.plan.stream
        parts = [t[:, :, None].unbind(0) for t in self.decoder.observed(stream)]
        parts = parts[: 4 if stream else 2]
        controller.observe_step(
            {i: LayerObservation(*one) for i, one in enumerate(zip(*parts, strict=True))}
        )
