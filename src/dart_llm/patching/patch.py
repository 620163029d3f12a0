"""The only file that installs anything on a model, or removes it.

While attached: a pre- and a post-hook on the root, a replaced ``forward`` on each FFN, hooks where
x, r and v are read, and wrappers around ``generate``.  ``remove`` puts back exactly what was there.
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
from dart_llm.models.agreement import NotCopied, Replacement
from dart_llm.models.calls import Loop, OwnLoop, bare_call
from dart_llm.models.packed import memory_of
from dart_llm.models.screen import Screen
from dart_llm.models.steps import attention_by_inputs
from dart_llm.models.token_loop import TokenLoop, can_stand_in
from dart_llm.native.memory import into_huge_pages
from dart_llm.patching.changes import Changes
from dart_llm.patching.executors.native_ffn import (
    Layout,
    NativeFfn,
    native_linears,
    not_in_place_reason,
)
from dart_llm.patching.executors.native_step import NativeDecoder
from dart_llm.patching.executors.screened_head import ScreenedHead
from dart_llm.patching.executors.step_check import no_steps_reason
from dart_llm.patching.executors.token_ffn import (
    WHOLE_STEPS,
    token_ffn,
    warn_if_slower_than_dense,
)
from dart_llm.patching.executors.whole_step import WholeStepForward
from dart_llm.patching.patched_ffn import PatchedFFN
from dart_llm.patching.watch import Turn, Watch
from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan, Kind, outside_inference
from dart_llm.pruning.token_level import TokenMask

logger = logging.getLogger("dart_llm")

_active: weakref.WeakSet[ModelPatch] = weakref.WeakSet()
"""Weak: an attached model without other references is freed with its patch."""


OnForward = Callable[[Tensor | None, bool], None]
"""Called with the ids [B, T] of the next forward, and whether it decodes."""


class ModelPatch(NotCopied):
    """One controller on one model.

    ``many``: more will follow it (``serve``), so that everything is prepared at once.
    ``screen``: of its output head, for decoded tokens; None: the head is whole.  With ``many`` it
    serves the controllers whose configuration requests it.
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
        self.model = model
        self.controller = controller
        self.executor = executor
        self.layers = [PatchedFFN(block, self) for block in view.blocks]
        self.plan = ForwardPlan(False, False, ())
        self.rows = 1
        self.forced_decode = 0
        self.forced_prompt = 0
        self._turn = Turn(model, self)
        self._begun = False
        """Whether the next forward of the model was planned already."""
        self.loop: Loop | OwnLoop | None = None
        self._view, self._many = view, many
        self.layout = Layout()
        self._native: list[NativeFfn] = []
        self.whole_steps: WholeStepForward | None = None
        self.no_steps: str | None = None
        """Under ``native``: why whole steps cannot run; None if they can."""
        self.head: ScreenedHead | None = None
        if screen is not None:
            self.head = ScreenedHead(model, screen, view.parameter_bytes)
        self._watch = Watch(model, self.layers)
        self._changes = Changes()
        self._on_forward: OnForward | None = None
        self._steps_before = 0
        self._released = self._served = 0
        self._streams = False
        self._signals: set[str] = set()
        self._token: TokenConfig | None = None
        self._attention = False
        """Whether the projections of attention are hooked."""
        self._decodes = False
        """Whether the forward that runs is one of decoded tokens."""

    def install(self) -> None:
        """Attach; raises ``AttachError`` if the model is attached already, without a trace."""
        check_free(self.model)
        _active.add(self)
        try:
            self._turn.reserve()
            self._install()
            self._turn.free()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        """Later steps replace or lay out what earlier ones hooked."""
        native = self.executor == "native"
        # without masks or observation only tokens are counted, except by the native kernels
        prunes = native or self._many or not _only_counts(self.controller)
        if native:  # before anything stands on the model
            self.no_steps = no_steps_reason(self.model) or not_in_place_reason(
                self.model, (), attention_by_inputs(self.model)
            )
        self._hook_root()
        self._wrap_generate()
        self._turn.begin()
        if prunes:
            self._replace_ffns()
            if self.executor == "cuda":
                for layer in self.layers:
                    layer.go_cuda()
            self._equip(self.controller)
        if native:
            self._lay_out_weights()
        if self.head is not None:
            self._screen_head(self.head, native)
        if native:
            self._replace_steps()
            screen = () if self.head is None else self.head.screen.tensors()
            into_huge_pages([*memory_of(self.model), *screen])
            self._make_room(self.controller)
            self._watch.remember_places()
        self._watch.look()

    def _hook_root(self) -> None:
        self._changes.hook(self.model, self._before, before=True, with_kwargs=True)
        self._changes.hook(self.model, self._after)

    def _wrap_generate(self) -> None:
        runs = {calls.GENERATE: self._run_generate, calls.PREFILL: self._run_prefill}
        for name, run in runs.items():
            if hasattr(self.model, name):
                self._changes.replace(self.model, name, run)

    def _replace_ffns(self) -> None:
        for layer in self.layers:
            host = layer.block.host
            name = "_old_forward" if hasattr(host, "_hf_hook") else "forward"
            self._changes.replace(host, name, layer.run)
            self._watch.hosts.append((host, name, type(host).forward))

    def _lay_out_weights(self) -> None:
        """Lay the weights out for the native kernels, which run other projections too."""
        self._native = [layer.go_native(self.layout) for layer in self.layers]
        for linear in native_linears(self.model, self._view.blocks):
            self._changes.replace(linear.module, "forward", linear.run)
            self._watch.linears.append(linear.module)

    def _screen_head(self, head: ScreenedHead, native: bool) -> None:
        """Score decoded tokens by the screen, before anything reads the layout of the head."""
        if native:
            head.go_native(self.layout)
        self._changes.replace(head.module, "forward", self._run_head)

    def _run_head(self, original: Callable[..., Any], hidden: Tensor) -> Any:
        head = self._head_of(self.controller)
        if head is None or not self._decodes or (torch.is_grad_enabled() and hidden.requires_grad):
            return original(hidden)
        return head.run(hidden)

    def _head_of(self, controller: PruningController) -> ScreenedHead | None:
        """The screened head, if the tokens of ``controller`` are scored by it."""
        return self.head if controller.config.screens else None

    def _replace_steps(self) -> None:
        """Take whole decode steps over, where that is possible."""
        if self.no_steps is not None:
            logger.info("native without whole steps: the model %s", self.no_steps)
            return
        decoder = NativeDecoder(self.model, self._native, self.layout)
        self.whole_steps = WholeStepForward(self.model, decoder, lambda: self.controller)
        self.whole_steps.take_head(self._head_of(self.controller))
        self._changes.replace(self.model, "forward", self._run_forward)

    def serve(self, controller: PruningController) -> None:
        """Run by ``controller`` from now on; the one before keeps its records."""
        for layer in self.layers:
            layer.unload()
        if self.whole_steps is not None:
            self.whole_steps.decoder.unload()
            self._served = self.whole_steps.steps
            self.whole_steps.take_head(self._head_of(controller))
        if self.head is not None:
            self.head.forget()
        self.plan = ForwardPlan(False, False, ())
        self._make_room(controller)
        self._equip(controller)
        self.controller = controller

    def _equip(self, controller: PruningController) -> None:
        """Add what ``controller`` is the first to need: hooks, low-bit proxies."""
        if _only_counts(controller):
            return
        if controller.selector.statistics.needs_stream and not self._streams:
            self._streams = True
            for layer in self.layers:
                layer.hook_stream(self._changes)
        self._equip_tokens(controller)
        signal = controller.config.drift.signal
        if controller.rule.window and signal not in self._signals:
            self._signals.add(signal)
            source = self._view.signal(signal)
            self._changes.hook(source, self._signal_hook(signal))

    def _make_room(self, controller: PruningController) -> None:
        """Reserve memory for the compact weights of ``controller``'s masks, if their size is known.

        Now, as the system takes longer to provide it than the copying does.
        """
        counts = controller.expected_counts() if self._native else []
        pairs = zip(self._native, counts, strict=True)
        self.layout.make_room(sum(ffn.copied_bytes(count) for ffn, count in pairs))

    def _equip_tokens(self, controller: PruningController) -> None:
        """Prepare per-token selection: low-bit proxies, hooks on attention."""
        config, fixed = controller.config.token, controller.fixed_masks
        selects = fixed is None or any(isinstance(mask, TokenMask) for mask in fixed)
        if config is None or not selects or config == self._token:
            return
        tokens = [token_ffn(layer.block, config) for layer in self.layers]
        for layer, token in zip(self.layers, tokens, strict=True):
            layer.select_per_token(token, self._changes)
        if tokens[0].rule.attention and not self._attention:
            self._attention = True
            for layer, projections in zip(self.layers, self._view.attention, strict=True):
                layer.hook_attention(projections, self._changes)
        self._token = config

    def _run_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.whole_steps is not None
        if not self._watch.steps or torch.compiler.is_compiling():  # which traces no native call
            return original(*args, **kwargs)
        return self.whole_steps.forward(original, *args, **kwargs)

    def remove(self) -> None:
        """Put back exactly what was there; safe to call twice.

        An interrupt is raised when all is done; after a second one the rest is ``restore``'s.
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
        self.layout.restore()  # while the hooks keep the layout alive
        self._changes.undo()
        if self.whole_steps is not None:
            self.whole_steps.decoder.unload()  # a run that is kept for its report keeps no copies
        for layer in self.layers:
            layer.release()
        _active.discard(self)

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._begun:
            self._begun = False
            return
        self._take_turn()
        with outside_inference():
            self._plan_forward(calls.read_forward(model, args, kwargs))

    def _take_turn(self) -> None:
        if self._turn.take():  # the forward before was interrupted
            for layer in self.layers:
                layer.forget()

    def _plan_forward(self, seen: calls.ForwardArgs) -> None:
        self.rows = seen.rows
        call = self.loop.call(seen) if self.loop else bare_call(seen, self.forced_decode > 0)
        if call.kind is Kind.PREFILL:  # not at every token: it takes as long as a layer
            self._watch.look()
            token, config = self.layers[0].token, self.controller.config
            if config.token and token is not None:
                executor = self.executor if self.whole_steps is None else WHOLE_STEPS
                warn_if_slower_than_dense(config.method, token, executor, self.rows)
        if self.forced_prompt:
            call = dataclasses.replace(call, kind=Kind.DECODE, observable=None)
        self._decodes = call.kind is Kind.DECODE
        self.plan = self.controller.before_forward(call)
        if self._on_forward is not None:
            steps = self.whole_steps.steps if self.whole_steps else 0
            if steps == self._steps_before:  # the layers ran one by one since
                self._forget_selections()
            self._steps_before = steps
            self._on_forward(seen.input_ids, self._decodes)

    def watch(self, on_forward: OnForward | None) -> None:
        """Call ``on_forward`` before each forward, and record what its tokens select; or stop."""
        self._on_forward = on_forward
        for layer in self.layers:
            if layer.token is not None:
                layer.token.watched = on_forward is not None
        if self.whole_steps is not None:
            self.whole_steps.decoder.watch(on_forward is not None)
        self._forget_selections()

    def _forget_selections(self) -> None:
        for layer in self.layers:
            if layer.token is not None:
                layer.token.marks = None

    def selected(self, layers: Sequence[int]) -> Tensor | list[Tensor]:
        """What the tokens of the newest forward selected in ``layers``, while watched.

        As of ``PatchedFFN.selected``; after a whole step one tensor of all these layers.
        """
        if self.whole_steps is not None and self.whole_steps.steps > self._steps_before:
            every = self.whole_steps.decoder.selected()
            return every if len(layers) == len(every) else every[list(layers)]
        return [self.layers[index].selected() for index in layers]

    def _decode(self, ids: Tensor, cache: Any, forbidden: list[int] | None) -> Tensor | None:
        """Logits [1, V] after ids [1, 1], by a whole step, without a call of the model.

        ``forbidden``: as of ``TokenCall``.

        None where the model must be called: before the first step on a cache, and with user hooks.
        """
        whole = self.whole_steps
        self._turn.check()
        if whole is None or not self._is_alone() or not whole.continues(cache):
            return None
        self._take_turn()
        with outside_inference():
            seen = calls.ForwardArgs(cache.get_seq_length(), 1, 1, ids, None, cache)
            self._plan_forward(seen)
        logits = whole.decode(ids, cache, forbidden)
        if logits is None:
            self._begun = True
        else:
            self._end_forward()
        return logits

    def _is_alone(self) -> bool:
        """Whether a call of the model runs nothing but this patch."""
        model = self.model
        hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
        forward = model.__dict__.get("forward")
        ours = isinstance(forward, Replacement) and forward.make == self._run_forward
        return hooks == (1, 1) and self._watch.steps and ours

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        self._end_forward()

    def _end_forward(self) -> None:
        self._turn.end()
        self.controller.after_forward()
        self.plan = ForwardPlan(False, False, ())

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
            token_loop = TokenLoop(self._decode, kwargs.get("streamer"))
            kwargs = {**kwargs, "custom_generate": token_loop}
        try:
            generated = original(*args, **kwargs)
            self._turn.check()  # else some of its tokens are dense
            return generated
        finally:
            self.loop, self.plan, self._begun = None, ForwardPlan(False, False, ()), False
            self._turn.free()
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
        """Bytes beside model, cache and states; after ``remove`` those before it."""
        steps = 0 if self.whole_steps is None else self.whole_steps.decoder.nbytes()
        steps += 0 if self.head is None else self.head.nbytes()
        return self._released or steps + sum(layer.nbytes() for layer in self.layers)

    @property
    def steps(self) -> int:
        """Whole decode steps that ran for the controller in force."""
        return self.whole_steps.steps - self._served if self.whole_steps else 0

    @property
    def installed(self) -> bool:
        """False after its run or ``restore`` removed it."""
        return self in _active


def _only_counts(controller: PruningController) -> bool:  # nothing is masked or watched
    return controller.selector.removes_nothing and controller.fixed_masks is None


def _patches_of(model: nn.Module) -> list[ModelPatch]:
    """Patches with an FFN of ``model``, whether through it, a part or a wrapper of it."""
    modules = {id(module) for module in model.modules()}
    return [
        patch for patch in _active if any(id(layer.block.host) in modules for layer in patch.layers)
    ]


def check_free(model: nn.Module) -> None:
    """Raise ``AttachError`` when ``model``, a part or a wrapper of it is being pruned."""
    if _patches_of(model):
        raise AttachError(
            "this model is already being pruned: leave that block first, or call "
            "dart_llm.restore(model)"
        )


def restore(model: nn.Module) -> None:
    """Detach whatever dart_llm attached to ``model``; always safe, also when nothing is."""
    for patch in _patches_of(model):
        patch.remove()
