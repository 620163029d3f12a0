"""Whole decode steps of an attached model: one native call per step.

Norms, attention, FFN and head of a step run in C++ (native/csrc/decode.cpp) on the model's weights,
with the masks of the current plan (what the controller has decided for this forward).
``WholeSteps.forward`` replaces the forward of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from dart_llm.models.calls import TokenCall, as_output, new_cache, read_prompt, read_step
from dart_llm.models.growing_cache import PreallocatedKVCache, Steps, fill_layer
from dart_llm.models.packed import PackedTensor, few
from dart_llm.models.steps import Norm, StepParts, angles, norms_of, step_parts
from dart_llm.patching.executors.native_ffn import KernelMask, NativeFfn
from dart_llm.patching.executors.screened_head import ScreenedHead
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.token_level import TokenMask

POSITIONS = 256
"""Number of positions whose rotary angles are computed at a time."""

OBSERVED = 1 << 21
"""Maximum number of activations of a prompt that are passed on at a time."""

TRUSTED = ("dart_llm.", "transformers.")
"""Packages whose hooks only read, so that whole steps may skip them."""

PATCH = ("dart_llm.patching.", "transformers.")
"""Packages whose hooks need no activations of a prompt except those that the plan requests."""


class Hooks:
    """The hooks on the modules inside a model.  A whole step would skip them."""

    def __init__(self, model: nn.Module) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._hooks = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._newest, self._foreign = (0, 0), False
        self.watched = False
        """True if the last check found a hook from outside ``PATCH``; prompts must not skip it."""

    def foreign(self, again: bool = False) -> bool:
        """Return True if any hook belongs to a package that is not ``TRUSTED``.

        ``again``: check modules only if torch has registered a hook since the last check.
        """
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        newest = RemovableHandle.next_id
        if again and newest == self._newest[0] and not self._foreign:
            return False
        if (count := (newest, sum(map(len, self._hooks)))) != self._newest:
            hooks = [hook for registered in self._hooks for hook in registered.values()]
            owners = {getattr(hook, "__module__", "") for hook in hooks}
            self._foreign = any(not owner.startswith(TRUSTED) for owner in owners)
            self.watched = any(not owner.startswith(PATCH) for owner in owners)
            self._newest = count
        return self._foreign


class WholeSteps:
    """Runs decode steps instead of ``model``'s modules; with packed weights, also prompts.

    ``ffns``: the model's FFN blocks, laid out for the kernels.  ``current``: returns the current
    controller.  ``steps``: number of whole steps so far.  ``head``: the screened output head; None
    if the whole head is used.
    """

    def __init__(
        self, model: Any, ffns: Sequence[NativeFfn], current: Callable[[], PruningController]
    ) -> None:
        parts = step_parts(model)
        self._model, self._ffns, self._parts, self._current = model, list(ffns), parts, current
        self._norms = norm_floats(norms_of(parts))
        self.native = native_decoder(parts, self._norms, ffns)
        self._everything = [ffn.everything() for ffn in ffns]
        self._masks: Sequence[LayerMask | None] | None = None
        self._loaded: list[KernelMask | None] = [None] * len(ffns)
        self._cache: PreallocatedKVCache | None = None
        self._bound: Steps | None = None
        """The ``Steps`` of the cache whose buffers were last passed to the native decoder."""
        self._angles: tuple[Tensor, ...] = ()
        self._dtype, self._windows = parts.head.dtype, parts.windows
        self._prompts = not parts.attention_cap and all(
            isinstance(matrix, PackedTensor) for matrix in _matrices(parts, ffns)
        )
        self._hooks = Hooks(model)
        self._fresh = True
        """True if the copies of norm weights are up to date."""
        self.head: ScreenedHead | None = None
        self.steps = 0

    def use_head(self, head: ScreenedHead | None) -> None:
        """Score tokens by ``head`` from now on, or by the whole head if it is None."""
        if head is None and self.head is not None:
            self.native.drop_screen()
        elif head is not None and head is not self.head:
            screen = head.screen
            self.native.set_screen(*screen.tensors(), screen.keep, screen.threshold)
        self.head = head

    def unload(self) -> None:
        """Run all neurons from now on; drop masks and cache buffers."""
        self.load(())
        self._cache = None

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the whole model."""
        if not self._must_run_modules():
            call = read_step(args, kwargs, self._dtype, self._windows, STEP_ROWS)
            if call is not None and self._load_plan():
                return as_output(self._run_step(call), call.cache)
            if (prompt := self._prompt_call(args, kwargs)) is not None:
                return self._run_prompt(prompt)
        self._fresh = False
        return original(*args, **kwargs)

    def continues(self, cache: Any) -> bool:
        """Return True if the newest step used ``cache`` and another whole step can follow."""
        buffers = self._cache
        ready = buffers is not None and buffers.of() is cache and buffers.ready(cache)
        return ready and not self._must_run_modules(again=True)

    def decode(self, ids: Tensor, cache: Any, forbidden: list[int] | None) -> Tensor | None:
        """Run ids [1, 1] and return logits [1, V]; None if the current plan needs the model.

        This is a faster ``forward``, for steps that ``continues`` allows.  With ``forbidden`` (see
        ``TokenCall``), the likeliest token [1] may be returned instead of logits.
        """
        return self._run_step(TokenCall(ids, cache, forbidden)) if self._load_plan() else None

    def _must_run_modules(self, again: bool = False) -> bool:
        """Return True if dropout, gradients, autocast, more outputs or hooks need the modules.

        ``again``: a whole step came just before, so check only what may have changed since.
        """
        if self._model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return True
        config = self._model.config
        outputs = () if again else ("output_hidden_states", "output_attentions")
        return any(getattr(config, name, False) for name in outputs) or self._hooks.foreign(again)

    def _signals_inside(self, plan: ForwardPlan) -> bool:
        """Return True if the plan needs a drift signal that a hook inside the model reads."""
        return plan.signal and self._current().config.drift.signal != "hidden"

    def _load_plan(self) -> bool:
        """Load the masks of the current plan; return whether a whole step supports the plan."""
        plan = self._current().plan
        if len(plan.masks) > 1 or self._signals_inside(plan) or (plan.observe and not plan.dense):
            return False
        masks = (plan.masks[0] if plan.masks else None) or ()
        if masks is not self._masks:
            pairs = zip(masks, self._ffns, strict=False)
            if not all(ffn.token_rows for mask, ffn in pairs if isinstance(mask, TokenMask)):
                return False
        self.load(masks)
        return True

    def load(self, masks: Sequence[LayerMask | None]) -> None:
        """Use ``masks`` from now on: one per layer (None: all neurons run), or () for all None."""
        if masks is self._masks and all(
            mask is None or ffn.mask is mask for mask, ffn in zip(masks, self._ffns, strict=False)
        ):
            return
        self._masks = None  # an interrupt may come between two layers
        for index, ffn in enumerate(self._ffns):
            mask = masks[index] if masks else None
            if mask is None:
                kept = self._everything[index]
            else:
                ffn.load(mask)
                kept = ffn.kept
            if kept is not self._loaded[index]:
                self.native.set_mask(index, *kept)
                self._loaded[index] = kept
        self._masks = masks

    def _refresh(self) -> None:
        """Update the copies of norm weights, which may have changed."""
        norms = _norm_tensors(norms_of(step_parts(self._model)))
        with torch.inference_mode(False), torch.no_grad():
            for copied, norm in zip(self._norms, norms, strict=True):
                if copied.data_ptr() != norm.data_ptr():
                    copied.copy_(norm)
        self._fresh = True

    def _run_step(self, call: TokenCall) -> Tensor:
        """Run a step with all that the plan requests; return the logits (or tokens) of ``step``."""
        controller = self._current()
        plan = controller.plan
        if not self._fresh:
            self._refresh()
        if self.head is not None:
            call = self.head.with_scores(call)
        logits, hidden = self.step(call, plan.observe)
        self.steps += 1
        if plan.observe:
            self._pass_on(controller)
        if plan.signal:
            controller.observe_signal(hidden[:, None])
        if self.head is not None:
            self.head.count(hidden, logits, sum(self.native.exact_words()))
        return logits

    def _pass_on(self, controller: PruningController) -> None:
        """Pass the step's activations to the controller.

        The activations are u and the inputs of the FFNs, [L, B, ...].  If the plan requests the
        stream, the outputs of the FFNs and the residual stream before the FFNs are passed too.
        """
        stream = controller.plan.stream
        parts = [t[:, :, None].unbind(0) for t in self.native.observed(stream)]
        layers = enumerate(zip(*parts[: 4 if stream else 2], strict=True))
        controller.observe_step({index: LayerObservation(*layer) for index, layer in layers})

    def step(self, call: TokenCall, observe: bool) -> tuple[Tensor, Tensor]:
        """Decode one token of each row; return logits [B, V] and the last hidden states [B, D].

        With ``call.forbidden``, the likeliest tokens [B], int64, may be returned instead of logits.
        """
        cache, buffers = call.cache, self._cache
        position, tokens = int(cache.get_seq_length()), call.ids.flatten().tolist()
        if buffers is None or buffers.of() is not cache:
            buffers = self._cache = PreallocatedKVCache(cache, self._windows)
        buffers.prepare(cache)
        if buffers.steps is not self._bound:  # bound once, not at every token
            self._bound = None
            self.native.bind(*buffers.places())
            self._bound = buffers.steps
        done, rotations = buffers.steps.done, self._rotations(position)
        logits, hidden = self.native.step(
            tokens, done, position, *rotations, observe, call.forbidden
        )
        buffers.advance()
        return logits, hidden

    def _rotations(self, position: int) -> tuple[Tensor, ...]:
        """Return cosines and sines of all positions up to at least ``position``."""
        if not self._angles or position >= len(self._angles[0]):
            count = (position // POSITIONS + 1) * POSITIONS
            with torch.inference_mode(False), torch.no_grad():
                self._angles = angles(self._parts, count, self._dtype, torch.device("cpu"))
        return self._angles

    def _prompt_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenCall | None:
        """Return the prompt in ``forward``'s arguments; None if there is none to run natively."""
        plan = self._current().plan
        dense = plan.dense and not plan.stream and not self._signals_inside(plan)
        if not self._prompts or self._hooks.watched or not dense:
            return None
        use_cache = bool(getattr(self._model.config, "use_cache", False))
        return read_prompt(args, kwargs, self._windows, use_cache)

    def _run_prompt(self, call: TokenCall) -> Any:
        """Return the model's output for a prompt."""
        controller = self._current()
        plan = controller.plan
        self.load(())
        self._refresh()  # at every prompt, because weights may have changed since the last prompt
        cache = new_cache(self._model) if call.cache is None and call.use_cache else call.cache

        observed = 1 + plan.inputs if plan.observe else 0
        logits, hidden = self.prompt(call, cache, observed, controller.observe_prompt)
        if plan.signal:
            controller.observe_signal(hidden)
        return as_output(logits, cache)

    def prompt(
        self,
        call: TokenCall,
        cache: Any,
        observed: int,
        observe: Callable[[tuple[int, ...], LayerObservation], None],
    ) -> tuple[Tensor, Tensor]:
        """Run a prompt and fill ``cache``; no mask may be loaded.

        Returns logits [B, n, V] of the last n tokens (n = ``call.keep``; 0: all) and last hidden
        states [B, T, D].  Calls ``observe`` with activations of some layers at a time if
        ``observed`` is 1, with the FFN's inputs too if it is 2, and not at all if it is 0.
        """
        rows, tokens = call.ids.shape
        rotations, limit, count = self._rotations(tokens - 1), few(), len(self._ffns)
        on_packed = rows * tokens <= limit  # else weights are dequantized, layer by layer
        stream, h = self.native.prompt_begin(call.ids, *rotations, on_packed)
        step = count if on_packed else 1
        if observed:  # few activations at a time
            step = min(step, max(1, OBSERVED // (rows * tokens * self._parts.sizes[4])))
        for first in range(0, count, step):
            layers = tuple(range(first, min(first + step, count)))
            if on_packed:
                last = first + len(layers)
                parts = self.native.prompt_layers(
                    first, last, stream, h, rows, *rotations, observed
                )
                seen = parts[2 * len(layers) :]
            else:
                *parts, h = self.native.prompt_layer(first, stream, h, rows, *rotations, limit)
                seen = [part[None] for part in parts[2 : 2 + observed]]
            for index in layers if cache is not None else ():
                keys, values = parts[2 * (index - first) :][:2]
                fill_layer(cache, keys, values, index)
            if observed:
                observe(layers, LayerObservation(*seen))
        logits, hidden = self.native.prompt_end(h, rows, call.keep, limit)
        return logits, hidden

    def nbytes(self) -> int:
        """Return the bytes of copied norms, angles, cache buffers and scratch memory."""
        copied = self._norms if self._dtype != torch.float32 else []
        cache = 0 if self._cache is None else self._cache.nbytes()
        return cache + int(self.native.nbytes()) + sum(t.nbytes for t in (*copied, *self._angles))


def _matrices(parts: StepParts, ffns: Sequence[NativeFfn]) -> Iterator[Tensor]:
    yield from (parts.embedding, parts.head)
    for layer, ffn in zip(parts.layers, ffns, strict=True):
        yield from (*layer.qkv, layer.out, ffn.up, ffn.down)
        if ffn.gate is not None:
            yield ffn.gate


def native_decoder(parts: StepParts, norms: list[Tensor], ffns: Sequence[NativeFfn]) -> Any:
    """Return the native decoder; ops.cpp explains the order of its arguments."""
    weights = [parts.embedding, parts.head, parts.positions]
    for layer, ffn in zip(parts.layers, ffns, strict=True):
        rest = (None,) * (3 - len(layer.qkv))  # a fused projection takes the place of q
        weights += [*layer.qkv, *rest, layer.out, *layer.biases, *rest, layer.out_bias]
        weights += [ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias]
    packed = {i: t.matrix for i, t in enumerate(weights) if isinstance(t, PackedTensor)}
    empty = torch.empty(0, dtype=parts.head.dtype, device="cpu")
    plain = [empty if t is None or i in packed else t for i, t in enumerate(weights)]
    flags = {
        "fused": len(parts.family.qkv) == 1,
        "by_heads": parts.family.by_heads,
        "over_all": parts.family.over_all,
        "parallel": parts.parallel,
        "centred": parts.norm.centred,
    }
    decoder: Any = torch.classes.dart_llm.Decoder(
        parts.sizes,
        [name for name, is_set in flags.items() if is_set],
        [parts.eps, parts.scale, parts.embedding_scale, parts.attention_cap, parts.logits_cap],
        plain,
        norms,
        [-1 if layer.table is None else layer.table for layer in parts.layers],
        ffns[0].act,
    )
    for index, matrix in packed.items():
        decoder.set_packed(index, matrix)
    return decoder


def norm_floats(norms: Iterable[Norm | None]) -> list[Tensor]:
    """Return the factor and the bias of each norm as contiguous float32, for the kernels."""
    with torch.inference_mode(False), torch.no_grad():
        return [t.float().contiguous() for t in _norm_tensors(norms)]


_NONE = torch.empty(0, device="cpu")
"""Stands for the factor or bias of a norm that has none."""


def _norm_tensors(norms: Iterable[Norm | None]) -> Iterator[Tensor]:
    """Yield the factor and the bias of each norm, as the model stores them."""
    for norm in norms:
        for t in (None, None) if norm is None else (norm.factor, norm.bias):
            yield _NONE if t is None else t
