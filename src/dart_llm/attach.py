"""The only file that installs anything on a model, or removes it.

While attached: a pre- and a post-hook on the root, a replaced ``forward`` on each FFN, hooks where
x, r and v are read, and wrappers around ``generate``.  ``remove`` puts back exactly what was there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm import arch
from dart_llm.errors import AttachError, ConfigError
from dart_llm.ffn import CompactFfn, FfnBlock, run_masked
from dart_llm.masks import LayerMask
from dart_llm.plan import Call, Kind, Plan
from dart_llm.tracer import Tracer

_active: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """One tracer attached to one model."""

    def __init__(
        self, model: nn.Module, view: arch.ModelView, tracer: Tracer, executor: str
    ) -> None:
        self.model = model
        self.tracer = tracer
        self.executor = executor
        self.layers = [_Layer(block, self) for block in view.blocks]
        self.plan = Plan(False, False, ())
        self.forced_decode = 0
        self._view = view
        self._undo: list[Callable[[], None]] = []
        self._generate: _Generate | None = None

    def install(self) -> None:
        """Attach; raises ``AttachError`` when the model already is, and leaves nothing behind."""
        if self.model in _active:
            raise AttachError(
                "this model is already being pruned: leave that block first, or call "
                "dart_llm.restore(model)"
            )
        _active[self.model] = self
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        self._hook(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hook(self.model.register_forward_hook(self._after))
        for name in (arch.GENERATE, arch.PREFILL):
            if hasattr(self.model, name):
                self._replace(self.model, name, getattr(self, f"_run{name.strip('_')}"))
        stream = self.tracer.selector.statistics.needs_stream
        for layer in self.layers:
            host = layer.block.host
            name = "_old_forward" if hasattr(host, "_hf_hook") else "forward"
            self._replace(host, name, layer.run)
            if stream:
                layer.hook_stream(self._hook)
        if self.tracer.rule.window:
            self._hook(self._view.attention_out.register_forward_hook(self._feature))

    def remove(self) -> None:
        """Put back exactly what was there; safe to call twice."""
        while self._undo:
            self._undo.pop()()
        if _active.get(self.model) is self:
            del _active[self.model]

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _replace(self, module: nn.Module, name: str, make: Callable[..., Any]) -> None:
        """Set an instance attribute that calls ``make(original, *args, **kwargs)``."""
        held = name in module.__dict__
        original = getattr(module, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return make(original, *args, **kwargs)

        def undo() -> None:
            if held:
                module.__dict__[name] = original
            else:
                module.__dict__.pop(name, None)

        module.__dict__[name] = replacement
        self._undo.append(undo)

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.plan = self.tracer.begin_forward(self._call(arch.read_forward(model, args, kwargs)))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        self.tracer.end_forward()
        self.plan = Plan(False, False, ())

    def _feature(self, module: nn.Module, args: Any, v: Tensor) -> None:
        if self.plan.features:
            self.tracer.feature(v.reshape(self.plan_rows, -1, v.shape[-1]))

    def _call(self, seen: arch.ForwardArgs) -> Call:
        """Say what this forward is (docs/method.md, "Life of a sequence")."""
        loop = self._generate
        self.plan_rows = seen.rows
        live, observable = None, None
        if loop is None:
            bare_decode = seen.tokens == 1 or self.forced_decode > 0
            kind = Kind.DECODE if seen.cached and bare_decode else Kind.PREFILL
        elif loop.in_prefill:
            kind = Kind.PREFILL
        elif loop.forwards == 0:
            kind = Kind.PREFILL
            prompt = loop.prompt_tokens
            observable = prompt - seen.cached if prompt > seen.cached else prompt
        else:
            kind, live = Kind.DECODE, loop.update_live(seen.input_ids)
            if not seen.cached:
                raise ConfigError("this generation runs without a cache, so nothing is decoded")
        if loop is not None:
            loop.forwards += 1
        return Call(kind, seen.cached, seen.tokens, seen.rows, seen.valid, live, observable)

    def _rungenerate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = arch.read_generate(self.model, args, kwargs)
        if given.beams > 1 and self.tracer.config.batch == "per_row":
            raise ConfigError('beam search reorders rows: use batch "shared"')
        self._generate = _Generate(given)
        try:
            return original(*args, **kwargs)
        finally:
            self._generate = None

    def _runprefill(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loop = self._generate
        if loop is None:
            return original(*args, **kwargs)
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        ids = args[0] if args else kwargs["input_ids"]
        loop.ends = arch.end_tokens(config, ids.device)
        loop.in_prefill = True
        try:
            return original(*args, **kwargs)
        finally:
            loop.in_prefill = False

    def nbytes(self) -> int:
        """Bytes of the compact copies."""
        return sum(layer.compact.nbytes() for layer in self.layers)


class _Generate:
    """State of one call of ``generate``: is it in its prompt step, and which rows have ended."""

    def __init__(self, given: arch.GenerateArgs) -> None:
        self.prompt_tokens = given.prompt_tokens
        self.beams = given.beams
        self.in_prefill = False
        self.forwards = 0
        self.ends: Tensor | None = None
        self.live: Tensor | None = None

    def update_live(self, ids: Tensor | None) -> Tensor | None:
        """[B] bool: rows whose newest token does not end them; None when all count."""
        if ids is None or self.ends is None or len(ids) == 1 or self.beams > 1:
            return None
        alive = ~torch.isin(ids, self.ends).any(1)
        self.live = alive if self.live is None else self.live & alive
        return self.live


class _Layer:
    """The replaced forward of one FFN."""

    def __init__(self, block: FfnBlock, owner: Attachment) -> None:
        self.block = block
        self.owner = owner
        self.compact = CompactFfn(block)
        self.x: Tensor | None = None
        self.waiting: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[list[LayerMask | None], Tensor, Tensor | None] | None = None

    def hook_stream(self, keep: Callable[[Any], None]) -> None:
        """Read x before the FFN's norm, and r after its post-norm."""
        if self.block.x_from is not None:
            keep(self.block.x_from.register_forward_pre_hook(self._take_x))
        if self.block.post_norm is not None:
            keep(self.block.post_norm.register_forward_hook(self._take_r))

    def _take_x(self, module: nn.Module, args: Any) -> None:
        if self.owner.plan.observe:
            self.x = args[0]

    def _take_r(self, module: nn.Module, args: Any, r: Tensor) -> None:
        if self.waiting is not None:
            u, z = self.waiting
            self.waiting = None
            self._observe(u, z, r)

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the FFN (of the down projection, for an inline block)."""
        plan = self.owner.plan
        masks = [None if life is None else life[self.block.index] for life in plan.masks]
        masked = any(mask is not None for mask in masks)
        if not masked and not plan.observe:
            return original(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        rest = (*args, *kwargs.values())[: 2 if args else None]
        only = masks[0] if len(masks) == 1 else None
        if only is not None and not plan.observe and self._compacts(x):
            self.compact.load(only)
            return self.block.finish(self.compact.run(x)[1], rest)
        project = original if self.block.inline else self.block.down
        mask, bias = self._mask_tensors(masks, x) if masked else (None, None)
        u, z = run_masked(self.block, project, x, mask, bias)
        if plan.observe:
            self._observed(u, z, x)
        return self.block.finish(z, rest)

    def _compacts(self, x: Tensor) -> bool:
        if self.owner.executor != "compact" or self.block.inline or self.block.offloaded:
            return False
        graded = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.block.ffn.parameters())
        )
        return not graded

    def _mask_tensors(
        self, masks: list[LayerMask | None], x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        known = self._rows
        if (
            known is None
            or len(known[0]) != len(masks)
            or any(new is not old for new, old in zip(masks, known[0], strict=True))
        ):
            self._rows = known = (masks, *_stack(masks, x))
        return known[1], known[2]

    def _observed(self, u: Tensor, z: Tensor, x: Tensor) -> None:
        if not self.owner.tracer.selector.statistics.needs_stream:
            self._observe(u, z, None)
            return
        if self.block.x_from is None:
            self.x = x
        if self.block.post_norm is None:
            self._observe(u, z, z)
        else:
            self.waiting = (u, z)

    def _observe(self, u: Tensor, z: Tensor, r: Tensor | None) -> None:
        rows = self.owner.plan_rows
        x, self.x = self.x, None
        shaped = [None if t is None else t.reshape(rows, -1, t.shape[-1]) for t in (u, z, x, r)]
        assert shaped[0] is not None and shaped[1] is not None
        self.owner.tracer.observe(self.block.index, shaped[0], shaped[1], shaped[2], shaped[3])


def _stack(masks: list[LayerMask | None], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Multipliers [I] (one life) or [B, 1, I], and compensation [D] or [B, 1, D]."""
    some = next(mask for mask in masks if mask is not None)
    with torch.inference_mode(False):
        ones = torch.ones(some.width, dtype=x.dtype, device=x.device)
        rows = [ones if mask is None else mask.dense(x.dtype).to(x.device) for mask in masks]
        biases = None
        sample = next((m.bias for m in masks if m is not None and m.bias is not None), None)
        if sample is not None:
            zero = torch.zeros_like(sample)
            each = [zero if m is None or m.bias is None else m.bias for m in masks]
            biases = [bias.to(x) for bias in each]
        if len(masks) == 1:
            return rows[0], None if biases is None else biases[0]
        stacked = None if biases is None else torch.stack(biases)[:, None]
        return torch.stack(rows)[:, None], stacked


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to ``model`` now, or None."""
    return _active.get(model)


def restore(model: nn.Module) -> None:
    """Detach whatever dart_llm attached to ``model``; always safe, also when nothing is."""
    found = _active.get(model)
    if found is not None:
        found.remove()
