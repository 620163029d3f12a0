"""Attaches a run to a model, and detaches it.

An attached model has a pre-hook, a post-hook, a replaced ``forward`` on each FFN, hooks that read
activations, and wrappers around ``generate`` and its prefill.  ``remove`` restores the exact
original.  With executor ``native``, a decode step can be a whole step: one native call computes
it, and the model's modules do not run.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.errors import AttachError, ConfigError
from dart_llm.models import calls, describe
from dart_llm.models.agreement import NotCopied, Replacement, is_compiled
from dart_llm.models.calls import Loop, OwnLoop, bare_call
from dart_llm.models.packed import memory_of
from dart_llm.models.screen import Screen
from dart_llm.models.steps import attention_by_inputs, step_unsupported_reason
from dart_llm.models.token_loop import TokenLoop, can_stand_in
from dart_llm.native.memory import into_huge_pages
from dart_llm.patching.changes import Changes
from dart_llm.patching.executors.native_ffn import (
    Layout,
    NativeFfn,
    native_linears,
    not_in_place_reason,
)
from dart_llm.patching.executors.screened_head import ScreenedHead
from dart_llm.patching.executors.step_check import disagreement_reason
from dart_llm.patching.executors.token_ffn import WHOLE_STEPS, token_ffn, warn_if_slower_than_dense
from dart_llm.patching.executors.whole_step import WholeSteps
from dart_llm.patching.patched_ffn import PatchedFFN
from dart_llm.patching.watch import Turn, Watch
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan, Kind, outside_inference
from dart_llm.pruning.token_level import TokenMask

logger = logging.getLogger("dart_llm")

_active: weakref.WeakSet[ModelPatch] = weakref.WeakSet()
"""All attached patches.  Weak, so that an attached model without other references can be freed."""


IDLE = ForwardPlan(False, False, ())
"""The plan between forwards: no masks, no observation."""

OnForward = Callable[[Tensor | None, bool], None]
"""Called before a forward, with the forward's ids [B, T] (None if its input is embeddings), and
with True if it is a decode forward."""


class ModelPatch(NotCopied):
    """Connects a model to a controller, which plans what each forward prunes.

    ``many``: True if ``serve`` will replace the controller; the FFNs are then patched even if the
    first controller does not need that.  ``screen``: a low-bit approximation of the output head.
    It finds the vocabulary entries that a decoded token must score exactly.  Controllers use it
    only if their configuration requests a screened head.  None: they use the whole head.
    """

    def __init__(
        self,
        model: nn.Module,
        view: describe.ModelView,
        controller: PruningController,
        executor: str,
        many: bool = False,
        screen: Screen | None = None,
    ) -> None:
        self.model, self.controller, self.executor = model, controller, executor
        self.layers = [PatchedFFN(block, self, executor) for block in view.blocks]
        self.plan, self.rows = IDLE, 1
        self.forced_decode = self.forced_prompt = 0
        self.loop: Loop | OwnLoop | None = None
        self.layout = Layout()
        self.whole_steps: WholeSteps | None = None
        self.no_steps: str | None = None
        """Under executor ``native``: why whole steps cannot run; None if they can."""
        self.head = None if screen is None else ScreenedHead(model, screen, view.parameter_bytes)
        self._view, self._many = view, many
        self._native: list[NativeFfn] = []
        self._changes = Changes()
        self._watch = Watch(model, self.layers, self._changes)
        self._turn = Turn(model, self)
        self._is_planned = False
        """True if ``decode`` has already planned the next forward of the model."""
        self._decodes = False
        """True if the current forward is a decode forward."""
        self._on_forward: OnForward | None = None
        self._steps_before = self._released = self._served = 0
        """``_steps_before``: number of whole steps before the current forward; ``_served``: before
        the last ``serve``.  ``_released``: extra bytes just before ``remove``."""
        self._hooked: set[str] = set()
        """Kinds of hooks that were added so far: stream, attention, and "signal NAME"."""
        self._token: TokenConfig | None = None

    def install(self) -> None:
        """Attach.  Raises ``AttachError``, changing nothing, if a run or thread uses the model."""
        check_free(self.model)
        _active.add(self)
        try:
            self._turn.reserve()
            self._install()
            self._turn.reserve(False)
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        """Make all changes.  Later lines replace or lay out modules that earlier lines hooked."""
        native = self.executor == "native"
        if native:  # while the model is still unchanged
            self.no_steps = _no_steps_reason(self.model)
        self._changes.hook(self.model, self._before, before=True, with_kwargs=True)
        self._changes.hook(self.model, self._after)
        for name, run in ((calls.GENERATE, self._run_generate), (calls.PREFILL, self._run_prefill)):
            if hasattr(self.model, name):
                self._changes.replace(self.model, name, run)
        self._turn.check_others()
        # only kernels, later controllers, masks and observation need patched layers
        if native or self._many or not _only_counts(self.controller):
            for layer in self.layers:
                host = layer.block.host
                name = "_old_forward" if hasattr(host, "_hf_hook") else "forward"
                self._changes.replace(host, name, layer.run)
            self._equip(self.controller)
        if native:
            self._native = [layer.lay_out(self.layout) for layer in self.layers]
            self._measure_selection()
            for module, run in native_linears(self.model, self._view.blocks):
                self._changes.replace(module, "forward", run)
        if self.head is not None:
            if native:  # before whole steps read the layout of the head
                self.head.go_native(self.layout)
            self._changes.replace(self.head.module, "forward", self._run_head)
        if native:
            self._replace_steps()
            screen = () if self.head is None else self.head.screen.tensors()
            into_huge_pages([*memory_of(self.model), *screen])
        self._watch.check(reads_weights=native)

    def _measure_selection(self) -> None:
        """Measure how down rows are best read, so that the first mask need not wait for it."""
        token = self._native[0].token
        if token is not None and token.rule.by_weights and self.layout.downs:
            self.layout.skips(1 - self.controller.config.target)

    def _run_head(self, original: Callable[..., Any], hidden: Tensor) -> Any:
        """The head's forward: screened for decoded tokens if the controller uses the screen."""
        head = self._head_of(self.controller)
        if head is None or not self._decodes or (torch.is_grad_enabled() and hidden.requires_grad):
            return original(hidden)
        return head.run(hidden)

    def _head_of(self, controller: PruningController) -> ScreenedHead | None:
        """Return the screened head if ``controller`` uses it, else None."""
        return self.head if controller.config.screens else None

    def _replace_steps(self) -> None:
        """If whole steps can run, replace the model's forward by one that runs them."""
        if self.no_steps is None:
            weights: list[Any] = [part.weight for part in attention_by_inputs(self.model)]
            for weight in weights:
                self.layout.neuron_rows(weight.detach().t(), weight)
            self.no_steps = disagreement_reason(self.model, self._native)
        if self.no_steps is not None:
            logger.info("executor native runs without whole steps: the model %s", self.no_steps)
            return
        self.whole_steps = WholeSteps(self.model, self._native, lambda: self.controller)
        self.whole_steps.use_head(self._head_of(self.controller))
        self._changes.replace(self.model, "forward", self._run_forward)

    def serve(self, controller: PruningController) -> None:
        """Switch to ``controller``; the previous controller keeps its records."""
        for layer in self.layers:
            layer.unload()
        if self.whole_steps is not None:
            self.whole_steps.unload()
            self._served = self.whole_steps.steps
            self.whole_steps.use_head(self._head_of(controller))
        if self.head is not None:
            self.head.forget()
        self.plan, self.layout.room = IDLE, None
        self._equip(controller)
        self.controller = controller

    def _equip(self, controller: PruningController) -> None:
        """Add the missing hooks and low-bit proxies of weights that ``controller`` needs."""
        if _only_counts(controller):
            return
        if controller.selector.statistics.needs_stream and "stream" not in self._hooked:
            self._hooked.add("stream")
            for layer in self.layers:
                layer.hook_stream(self._changes)
        config, fixed = controller.config, controller.fixed_masks
        selects = fixed is None or any(isinstance(mask, TokenMask) for mask in fixed)
        if config.token is not None and selects and config.token != self._token:
            self._select_per_token(config.token)
        signal = config.drift.signal
        if controller.rule.window and f"signal {signal}" not in self._hooked:
            self._hooked.add(f"signal {signal}")
            self._changes.hook(self._view.signal(signal), self._signal_hook(signal))

    def _select_per_token(self, config: TokenConfig) -> None:
        """Prepare all layers for per-token selection; hook the attention if the rule needs it."""
        tokens = [token_ffn(layer.block, config) for layer in self.layers]
        for layer, token in zip(self.layers, tokens, strict=True):
            layer.select_per_token(token, self._changes)
        if tokens[0].rule.attention and "attention" not in self._hooked:
            self._hooked.add("attention")
            for layer, projections in zip(self.layers, self._view.attention, strict=True):
                layer.hook_attention(projections, self._changes)
        self._token = config

    def _run_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the whole model: a whole step where possible, else the original."""
        assert self.whole_steps is not None
        # torch.compile cannot trace native calls
        if not self._watch.steps or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return self.whole_steps.forward(original, *args, **kwargs)

    def remove(self) -> None:
        """Restore the original model; safe to call twice.

        If an interrupt comes, everything is restored before it is raised again.  If a second one
        comes meanwhile, call ``restore``.
        """
        try:
            self._remove()
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        self._released = self.nbytes()
        self._changes.end()
        self._turn.close()
        self.layout.restore()  # while the replaced forwards still keep the layout alive
        self._changes.undo()
        if self.whole_steps is not None:
            self.whole_steps.unload()  # frees copies: a detached run may be kept for its report
        for layer in self.layers:
            layer.release()
        _active.discard(self)

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model's pre-hook: plans the forward, unless ``decode`` has planned it."""
        if self._is_planned:
            self._is_planned = False
            return
        with outside_inference():
            self._plan_forward(calls.read_forward(model, args, kwargs))

    def _begin_forward(self) -> None:
        if self._turn.begin_forward():  # the previous forward was interrupted
            for layer in self.layers:
                layer.forget()

    def _plan_forward(self, forward: calls.ForwardArgs) -> None:
        self._begin_forward()
        self.rows = forward.rows
        call = self.loop.call(forward) if self.loop else bare_call(forward, self.forced_decode > 0)
        if call.kind is Kind.PREFILL:  # not at every token: the check takes as long as a layer
            self._watch.check()
            token, config = self.layers[0].token, self.controller.config
            if config.token and token is not None:
                executor = self.executor if self.whole_steps is None else WHOLE_STEPS
                warn_if_slower_than_dense(config.method, token, executor, self.rows)
        if self.forced_prompt:
            call = dataclasses.replace(call, kind=Kind.DECODE, observable=None)
        self._decodes = call.kind is Kind.DECODE
        self.plan = self.controller.before_forward(call)
        if self._on_forward is not None:
            for layer in self.layers:
                if layer.token is not None:
                    layer.token.marks = None
            self._steps_before = self.whole_steps.steps if self.whole_steps else 0
            self._on_forward(forward.input_ids, self._decodes)

    def watch(self, on_forward: OnForward | None) -> None:
        """Call ``on_forward`` before forwards and record selected neurons; None: do neither."""
        self._on_forward = on_forward
        for layer in self.layers:
            if layer.token is not None:
                layer.token.watched = on_forward is not None
                layer.token.marks = None
        if self.whole_steps is not None:
            self.whole_steps.native.watch(on_forward is not None)

    def selected(self, layers: Sequence[int]) -> Tensor | list[Tensor]:
        """Return the neurons that tokens selected in ``layers`` in the newest forward.

        ``watch`` must be called before that forward.  Returns one tensor per layer, in the format
        of ``PatchedFFN.selected``.  After a whole step, the tensors are stacked to one.
        """
        if self.whole_steps is not None and self.whole_steps.steps > self._steps_before:
            marks: Tensor = self.whole_steps.native.marks()  # [L, B, I / 8]: zeros in other layers
            return marks if len(layers) == len(marks) else marks[list(layers)]
        return [self.layers[index].selected() for index in layers]

    def decode(self, ids: Tensor, cache: Any, forbidden: list[int] | None = None) -> Tensor | None:
        """Run ids [1, 1] as a whole step, without calling the model, and return logits [1, V].

        With ``forbidden`` (see ``TokenCall``), the likeliest token [1] may be returned instead.
        Returns None if the model must be called: for the first step on a cache, if the user has
        added hooks, and if whole steps do not support the plan.
        """
        whole = self.whole_steps
        self._turn.check()
        if whole is None or not self._has_no_other_hooks() or not whole.continues(cache):
            return None
        cached = cache.get_seq_length()
        if self._on_forward is None and self.controller.repeats(cached):
            self._begin_forward()
            self.plan = self.controller.plan
        else:
            with outside_inference():
                self._plan_forward(calls.ForwardArgs(cached, 1, 1, ids, None, cache))
        logits = whole.decode(ids, cache, forbidden)
        if logits is None:
            self._is_planned = True
        else:
            self._after()
        return logits

    def _has_no_other_hooks(self) -> bool:
        """Return True if a call of the model would run only this patch's hooks and forward."""
        hooks = len(self.model._forward_pre_hooks), len(self.model._forward_hooks)
        forward = self.model.__dict__.get("forward")
        ours = isinstance(forward, Replacement) and forward.make == self._run_forward
        return hooks == (1, 1) and self._watch.steps and ours

    def _after(self, *_: Any) -> None:
        """The model's post-hook: reports the end of the forward to the controller."""
        self._turn.end_forward()
        self.controller.after_forward()
        self.plan = IDLE

    def _signal_hook(self, signal: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.plan.signal and self.controller.config.drift.signal == signal:
                v: Tensor = output if isinstance(output, Tensor) else output[0]
                self.controller.observe_signal(v.reshape(self.rows, -1, v.shape[-1]))

        return hook

    def _run_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = calls.read_generate(self.model, args, kwargs)
        if loop.beams > 1 and self.controller.config.batch == "per_row":
            raise ConfigError('beam search reorders rows: use batch "shared"')
        if self.loop is not None:
            raise ConfigError(
                "this model is generating already: a pruned model runs one generate at a time; use "
                "one lock per model, and a separate model as assistant_model"
            )
        self.loop = loop
        self._turn.reserve()
        if self.whole_steps and loop.plain and can_stand_in(self.model, original):
            token_loop = TokenLoop(self.decode, kwargs.get("streamer"))
            kwargs = {**kwargs, "custom_generate": token_loop}
        try:
            generated = original(*args, **kwargs)
            self._turn.check()  # raises if the run was closed meanwhile: some tokens ran dense
            return generated
        finally:
            self.loop, self.plan, self._is_planned = None, IDLE, False
            self._turn.reserve(False)
            if loop.cache is not None:
                self.controller.end_generate(int(loop.cache.get_seq_length()))

    def _run_prefill(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = self.loop
        if not isinstance(loop, Loop):
            return original(*args, **kwargs)
        loop.read_prefill(original, args, kwargs)
        loop.in_prefill = True
        try:
            return original(*args, **kwargs)
        finally:
            loop.in_prefill = False

    def nbytes(self) -> int:
        """Return the extra bytes, without KV cache and controller; constant after ``remove``."""
        steps = 0 if self.whole_steps is None else self.whole_steps.nbytes()
        head = 0 if self.head is None else self.head.nbytes()
        return self._released or steps + head + sum(layer.nbytes() for layer in self.layers)

    @property
    def steps(self) -> int:
        """Number of whole steps since the current controller was set."""
        return self.whole_steps.steps - self._served if self.whole_steps else 0

    @property
    def installed(self) -> bool:
        """True from ``install`` to ``remove``."""
        return self in _active


def _no_steps_reason(model: nn.Module) -> str | None:
    """Return why whole steps cannot decode the unchanged ``model``; None if they can."""
    if is_compiled(model):
        return "was compiled by torch"
    if reason := step_unsupported_reason(model):
        return reason
    return not_in_place_reason(model, (), attention_by_inputs(model))


def _only_counts(controller: PruningController) -> bool:
    """Return True if ``controller`` only counts tokens: it has no masks and observes nothing."""
    return controller.selector.removes_nothing and controller.fixed_masks is None


def _patches_of(model: nn.Module) -> list[ModelPatch]:
    """Return all patches on FFNs of ``model``, whichever part or wrapper of it was attached."""
    modules = {id(module) for module in model.modules()}
    return [
        patch for patch in _active if any(id(layer.block.host) in modules for layer in patch.layers)
    ]


def check_free(model: nn.Module) -> None:
    """Raise ``AttachError`` if ``model``, a part of it or a wrapper around it is being pruned."""
    if _patches_of(model):
        raise AttachError(
            "this model is already being pruned: leave that block first, or call "
            "dart_llm.restore(model)"
        )


def restore(model: nn.Module) -> None:
    """Detach everything that dart_llm has attached to ``model``; safe to call at any time."""
    for patch in _patches_of(model):
        patch.remove()
