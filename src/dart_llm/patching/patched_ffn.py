"""The replaced forward of one FFN: it runs the executor and passes activations to the controller.

u is the input of the down projection (one value per neuron), z the output of the down projection.
An inline FFN (as in OPT) has no module of its own.  There the forward of the down projection is
replaced, and it receives u instead of the FFN's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dart_llm.models.ffn import FfnBlock
from dart_llm.patching.changes import Changes
from dart_llm.patching.executors.native_ffn import Layout, NativeFfn
from dart_llm.patching.executors.token_ffn import TokenFfn
from dart_llm.patching.executors.torch_ffn import CompactFfn, run_masked
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan, detached
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.token_level import TokenMask


class PatchContext(Protocol):
    """What ``PatchedFFN`` reads of a ``ModelPatch``; ``rows``: batch size of the forward."""

    controller: PruningController
    plan: ForwardPlan
    rows: int


class PatchedFFN:
    """One FFN of a patched model."""

    def __init__(self, block: FfnBlock, context: PatchContext, executor: str) -> None:
        self.block, self.context, self.executor = block, context, executor
        self.kept: Any = CompactFfn(block)
        """Runs only the kept neurons.  For executor native, ``lay_out`` sets a ``NativeFfn``."""
        if executor == "cuda":
            from dart_llm.patching.executors.cuda import CudaFfn

            self.kept = CudaFfn(block)
        self.token: TokenFfn | None = None
        self.by_weights = True
        """True if executors may compute with the weights and skip the projections' forwards.  If
        False (e.g. because a projection has hooks), the FFN runs masked."""
        self._multipliers: dict[int, tuple[LayerMask, Tensor, Tensor | None]] = {}
        """Key: batch row (0 for a mask shared by all rows).  Value: the mask, its zeros and ones
        [I], and its bias [D] or None.  The last two have the dtype of the FFN's input."""
        self.forget()

    def forget(self) -> None:
        """Drop tensors that hooks left behind in an interrupted forward.

        ``_x``: the residual stream before the FFN's norm.  ``_fed``: the input of an inline FFN's
        fc1.  Hooks on modules that run before the FFN set ``_x`` and ``_fed``; the FFN reads them.
        """
        self._x: Tensor | None = None
        self._fed: Tensor | None = None

    def hook_stream(self, changes: Changes) -> None:
        """Add the hook that reads the residual stream before the FFN's norm."""

        def read_stream(module: nn.Module, args: Any) -> None:
            if self.context.plan.stream:
                self._x = detached(args[0])

        if self.block.x_from is not None:
            changes.hook(self.block.x_from, read_stream, before=True)

    def lay_out(self, layout: Layout) -> NativeFfn:
        """Lay out the weights for native kernels; use and return the executor that runs these."""
        self.kept = kept = NativeFfn(self.block, layout)
        kept.token = self.token
        return kept

    def select_per_token(self, token: TokenFfn, changes: Changes) -> None:
        """From now on, tokens whose mask is a ``TokenMask`` select neurons by ``token.rule``."""

        def read_input(module: nn.Module, args: Any) -> None:
            if not self.context.plan.dense:
                self._fed = detached(args[0])

        is_first, self.token = self.token is None, token
        if isinstance(self.kept, NativeFfn):
            self.kept.token = token
        # the rule ranks neurons by fc1's input, which the replaced down projection does not receive
        if self.block.inline and is_first:
            changes.hook(self.block.up, read_input, before=True)

    def hook_attention(self, projections: Sequence[nn.Module], changes: Changes) -> None:
        """Hook attention ``projections``, so that the rule can keep only their largest inputs."""

        def keep_largest(module: nn.Module, args: Any) -> Any:
            token = self.token
            if token is None or not token.rule.attention or self.context.plan.dense:
                return None
            return token.attention_input(module, args[0], self._masks()), *args[1:]

        for module in projections:
            changes.hook(module, keep_largest, before=True)

    def unload(self) -> None:
        """Free the compact weights, and the tensors that were made from masks."""
        self.forget()
        self.kept.unload()
        self._multipliers = {}

    def release(self) -> None:
        """Free all extra memory."""
        self.unload()
        self.kept, self.token = CompactFfn(self.block), None

    def _masks(self) -> list[LayerMask | None]:
        """Return the masks of this layer (None: dense): one for all batch rows, or one per row."""
        plan = self.context.plan
        return [None if layers is None else layers[self.block.index] for layers in plan.masks]

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The replaced forward: of the FFN, or of an inline FFN's down projection."""
        plan = self.context.plan
        if plan.dense and not plan.observe:
            return original(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        masks = self._masks()
        shared = masks[0] if len(masks) == 1 else None
        if plan.observations is not None and not self.block.inline and not torch.is_grad_enabled():
            u = self.block.hidden(x)  # not for inline FFNs, whose models flatten the tokens
            plan.observations[self.block.index] = LayerObservation(u, x if plan.inputs else None)
            z = self.block.down(u)
        elif not plan.observe and all(mask is None for mask in masks):
            return original(*args, **kwargs)
        elif not plan.observe and shared is not None and self._can_skip(x, shared):
            self.kept.load(shared)
            z = self.kept.run(x)
        else:
            z = self._run_masked(original, x, masks)
        return self.block.finish(z, (*args, *kwargs.values())[: 2 if args else None])

    def _can_skip(self, x: Tensor, mask: LayerMask) -> bool:
        """Return True if the executor can compute only the kept neurons for ``x``."""
        if self.executor == "masked" or not self.by_weights:
            return False
        max_tokens = min(self.context.rows, self.kept.token_rows)
        if isinstance(mask, TokenMask) and x.numel() > max_tokens * x.shape[-1]:
            return False
        # compact weights pass no gradients
        return not torch.is_grad_enabled() or not (
            x.requires_grad or any(p.requires_grad for p in self.block.ffn.parameters())
        )

    def _run_masked(
        self, original: Callable[..., Any], x: Tensor, masks: list[LayerMask | None]
    ) -> Tensor:
        """Return z from all neurons times the masks; pass on activations if the plan observes."""
        masks = masks or [None]
        if len(masks) == 1 and not isinstance(masks[0], TokenMask):
            u, z = self._run_row(original, x, x, masks[0])
        else:
            u, z = self._run_rows(original, x, masks)
        if self.context.plan.observe:
            self._pass_on(u, z, x)
        return z if z.dim() == x.dim() else z.reshape(*x.shape[:-1], z.shape[-1])

    def _run_rows(
        self, original: Callable[..., Any], x: Tensor, masks: list[LayerMask | None]
    ) -> tuple[Tensor, Tensor]:
        """Return ``(u, z)`` of all batch rows: each under its own mask, or all under one mask."""
        fed, self._fed = (x if self._fed is None else self._fed), None
        size, token = self.context.rows // len(masks), self.token
        parts, marks = [], []
        for row, mask in enumerate(masks):
            row_x, row_fed = (self._unfold(t)[row * size : (row + 1) * size] for t in (x, fed))
            parts.append(self._run_row(original, row_x, row_fed, mask, row))
            if token is not None and token.watched:
                selected = token.marks if isinstance(mask, TokenMask) else None
                all_neurons = torch.ones_like(parts[-1][0], dtype=torch.bool)
                marks.append(all_neurons if selected is None else selected)
        if token is not None and marks:
            token.marks = torch.cat(marks)
        u, z = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return u, z

    def _run_row(
        self, original: Callable[..., Any], x: Tensor, fed: Tensor, mask: Any, row: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return ``(u, z)`` of one batch row, or of all rows, under ``mask``; None means dense."""
        project = original if self.block.inline else self.block.down
        if mask is None:
            return run_masked(self.block, project, x, None, None)
        if isinstance(mask, TokenMask):
            assert self.token is not None
            return self.token.run_dense(project, x, fed, mask)
        cached = self._multipliers.get(row)
        if cached is None or cached[0] is not mask or cached[1].dtype != x.dtype:
            with torch.inference_mode(False):
                bias = None if mask.bias is None else mask.bias.to(x)
                cached = mask, mask.dense(x.dtype).to(x.device), bias
            self._multipliers[row] = cached
        return run_masked(self.block, project, x, *cached[1:], mask.low_rank)

    def _unfold(self, x: Tensor) -> Tensor:
        return x.reshape(self.context.rows, -1, x.shape[-1])

    def _pass_on(self, u: Tensor, z: Tensor, x: Tensor) -> None:
        """Pass the activations of this forward to the controller."""
        plan, rows = self.context.plan, self.context.rows
        stream, self._x = self._x, None
        h = x if plan.inputs and not self.block.inline else None  # an inline FFN receives u instead
        observation = LayerObservation(u, h)
        if plan.stream:
            observation = LayerObservation(u, h, z, detached(x) if stream is None else stream)
        if any(t is not None and (t.dim() != 3 or len(t) != rows) for t in observation):
            # OPT flattens x to [B * T, D]; u and z are flat too, unless each row has its own mask
            observation = observation.map(lambda t: t.reshape(rows, -1, t.shape[-1]))
        self.context.controller.observe(self.block.index, observation)

    def selected(self) -> Tensor:
        """Return the neurons that each token of the newest forward selected in this layer.

        uint8 [B * T, I / 8 rounded up]: bit i % 8 of byte i // 8 is set if neuron i was selected.
        Requires per-token selection.
        """
        if self.token is not None and self.token.marks is not None:
            marks = self.token.marks.flatten(0, -2).cpu().numpy()
            return torch.from_numpy(np.packbits(marks, axis=1, bitorder="little"))
        return self.kept.kept.choice.marks()  # type: ignore[no-any-return]

    def nbytes(self) -> int:
        """Return the bytes of compact weights, low-bit proxies and tensors made from masks."""
        token = 0 if self.token is None else self.token.nbytes()
        multipliers = 0
        for mask, factor, bias in self._multipliers.values():
            multipliers += factor.nbytes + (0 if bias is None or bias is mask.bias else bias.nbytes)
        return int(self.kept.nbytes()) + token + multipliers
