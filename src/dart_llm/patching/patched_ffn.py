"""The replaced forward of one FFN: runs the executor, and passes on what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dart_llm.models.ffn import FfnBlock
from dart_llm.patching.changes import Changes
from dart_llm.patching.executors.cuda_ffn import CudaFfn
from dart_llm.patching.executors.native_ffn import Layout, NativeFfn
from dart_llm.patching.executors.token_ffn import TokenFfn
from dart_llm.patching.executors.torch_ffn import CompactFfn, run_masked, stacked
from dart_llm.pruning.compensation import LowRank
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.forward import ForwardPlan, detached
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.token_level import TokenMask

Stacked = tuple[list[LayerMask | None], Tensor, Tensor | None, LowRank | None]
"""Cached multipliers of the current masks."""


class PatchContext(Protocol):
    """What a layer reads of its patch."""

    controller: PruningController
    executor: str
    plan: ForwardPlan
    rows: int


@dataclass
class CapturedInputs:
    """What hooks of other modules pass to an FFN during a forward, in the order of a layer.

    1. ``x``: the stream, before the FFN's norm
    2. ``fed``: the input of fc1, where only the down projection is replaced
    3. the FFN runs, and takes both
    """

    x: Tensor | None = None
    fed: Tensor | None = None


class PatchedFFN:
    """One FFN while its model is patched."""

    def __init__(self, block: FfnBlock, context: PatchContext) -> None:
        self.block = block
        self.context = context
        self.kept: CompactFfn | NativeFfn | CudaFfn = CompactFfn(block)
        self.token: TokenFfn | None = None
        self.by_weights = True
        """Whether its weights may replace its projections; else it runs as by ``masked``."""
        self._captured = CapturedInputs()
        self._stacked: Stacked | None = None

    def hook_stream(self, changes: Changes) -> None:
        """Read x before the FFN's norm."""
        if self.block.x_from is not None:
            changes.hook(self.block.x_from, self._take_x, before=True)

    def go_native(self, layout: Layout) -> NativeFfn:
        """Run masks by the native kernels; the weights are laid out for them."""
        self.kept = kept = NativeFfn(self.block, layout)
        kept.token = self.token
        return kept

    def go_cuda(self) -> None:
        """Run masks by Triton's kernels."""
        self.kept = CudaFfn(self.block)

    def select_per_token(self, token: TokenFfn, changes: Changes) -> None:
        """Tokens select their neurons by ``token`` where the plan has ``TokenMask``s."""
        first, self.token = self.token is None, token
        if not isinstance(self.kept, CompactFfn):
            self.kept.token = token
        # neurons are ranked by fc1's input, which the host does not get
        if self.block.inline and first:
            changes.hook(self.block.up, self._take_fed, before=True)

    def hook_attention(self, projections: Sequence[nn.Module], changes: Changes) -> None:
        """Under per-token selection, keep the largest inputs of attention projections."""
        for module in projections:
            changes.hook(module, self._drop_inputs, before=True)

    def _drop_inputs(self, module: nn.Module, args: Any) -> Any:
        token, plan = self.token, self.context.plan
        if token is None or not token.rule.attention or plan.dense:
            return None
        masks = [None if layers is None else layers[self.block.index] for layers in plan.masks]
        return token.attention_input(module, args[0], masks), *args[1:]

    def forget(self) -> None:
        """Drop the leftovers of an interrupted forward."""
        self._captured = CapturedInputs()

    def unload(self) -> None:
        """Free the compact weights and the multipliers of masks."""
        self.forget()
        self.kept.unload()
        self._stacked = None

    def release(self) -> None:
        """Free everything beside the model."""
        self.unload()
        self.kept, self.token = CompactFfn(self.block), None

    def _take_x(self, module: nn.Module, args: Any) -> None:
        if self.context.plan.stream:
            self._captured.x = detached(args[0])

    def _take_fed(self, module: nn.Module, args: Any) -> None:
        if not self.context.plan.dense:
            self._captured.fed = detached(args[0])

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the FFN (of the down projection, for an inline block)."""
        plan = self.context.plan
        if plan.dense and not plan.observe:
            return original(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        masks = [None if layers is None else layers[self.block.index] for layers in plan.masks]
        only = masks[0] if len(masks) == 1 else None
        if plan.into is not None and not self.block.inline and not torch.is_grad_enabled():
            z = self._run_observed(plan, plan.into, x)  # inline blocks flatten their tokens
        elif plan.observe:
            z = self._run_masked(original, x, masks)
        elif all(mask is None for mask in masks):
            return original(*args, **kwargs)
        elif only is not None and self._compacts(x, only):
            self.kept.load(only)
            z = self.kept.run(x)
        else:
            z = self._run_masked(original, x, masks)
        return self.block.finish(z, (*args, *kwargs.values())[: 2 if args else None])

    def _run_observed(
        self, plan: ForwardPlan, into: dict[int, LayerObservation], x: Tensor
    ) -> Tensor:
        """Dense; its activations go straight ``into`` the plan."""
        u = self.block.hidden(x)
        into[self.block.index] = LayerObservation(u, x if plan.inputs else None)
        z: Tensor = self.block.down(u)
        return z

    def _compacts(self, x: Tensor, mask: LayerMask) -> bool:
        if self.context.executor == "masked" or not self.by_weights:
            return False
        if isinstance(mask, TokenMask):
            most = min(self.context.rows, self.kept.token_rows)
            if x.numel() > most * x.shape[-1]:
                return False
        # the copies are not parameters: gradients must go through the weights themselves
        return not torch.is_grad_enabled() or not (
            x.requires_grad or any(p.requires_grad for p in self.block.ffn.parameters())
        )

    def _run_masked(
        self, original: Callable[..., Any], x: Tensor, masks: list[LayerMask | None]
    ) -> Tensor:
        """All neurons, multiplied by masks."""
        project = original if self.block.inline else self.block.down
        if any(isinstance(mask, TokenMask) for mask in masks):
            assert self.token is not None
            fed = x if self._captured.fed is None else self._captured.fed
            u, z = self.token.run_dense(project, self._unfold(x), self._unfold(fed), masks)
            self._captured.fed = None
        else:
            masked = any(mask is not None for mask in masks)
            mask, bias, linear = self._multipliers(masks, x) if masked else (None, None, None)
            by_row = mask is not None and mask.dim() == 3  # then OPT's flat [B * T, D] is unfolded
            inputs = self._unfold(x) if by_row else x
            u, z = run_masked(self.block, project, inputs, mask, bias, linear)
        if self.context.plan.observe:
            self._observed(u, z, x)
        return z if z.dim() == x.dim() else z.reshape(*x.shape[:-1], z.shape[-1])

    def _unfold(self, x: Tensor) -> Tensor:
        return x.reshape(self.context.rows, -1, x.shape[-1])

    def _multipliers(
        self, masks: list[LayerMask | None], x: Tensor
    ) -> tuple[Tensor, Tensor | None, LowRank | None]:
        cached = self._stacked
        if (
            cached is None
            or list(map(id, cached[0])) != list(map(id, masks))
            or cached[1].dtype != x.dtype
        ):
            self._stacked = cached = (masks, *_stack(masks, x))
        return cached[1:]

    def _observed(self, u: Tensor, z: Tensor, x: Tensor) -> None:
        plan, rows = self.context.plan, self.context.rows
        before, self._captured.x = self._captured.x, None
        h = x if plan.inputs and not self.block.inline else None  # inline: it never sees the input
        seen = LayerObservation(u, h)
        if plan.stream:
            seen = LayerObservation(u, h, z, detached(x) if before is None else before)
        if any(t is not None and (t.dim() != 3 or len(t) != rows) for t in seen):
            # OPT flattens its tokens: x, and u and z unless rows have masks of their own
            seen = seen.map(lambda t: t.reshape(rows, -1, t.shape[-1]))
        self.context.controller.observe(self.block.index, seen)

    def selected(self) -> Tensor:
        """What the tokens of the newest forward selected in this layer, if they did.

        uint8 [B T, I / 8 rounded up]: bit i % 8 of byte i / 8 is neuron i.
        """
        if self.token is not None and self.token.marks is not None:
            marks = self.token.marks.flatten(0, -2).cpu().numpy()
            return torch.from_numpy(np.packbits(marks, axis=1, bitorder="little"))
        assert isinstance(self.kept, NativeFfn)
        return self.kept.kept.choice.marks()  # type: ignore[no-any-return]

    def nbytes(self) -> int:
        """Bytes of the compact weights and of the multipliers, beside the masks themselves."""
        total = self.kept.nbytes() + (0 if self.token is None else self.token.nbytes())
        if self._stacked is not None:
            masks, ones, bias, linear = self._stacked
            counted = [mask.bias for mask in masks if mask is not None]
            for t in (ones, bias):
                if t is not None and not any(t is mask_bias for mask_bias in counted):
                    total += t.numel() * t.element_size()
            if linear is not None and len(masks) > 1:
                total += linear.nbytes()
        return total


def _stack(
    masks: list[LayerMask | None], x: Tensor
) -> tuple[Tensor, Tensor | None, LowRank | None]:
    """Multipliers [I] (one state) or [B, 1, I], compensation [D] or [B, 1, D], and its map."""
    some = next(mask for mask in masks if mask is not None)
    with torch.inference_mode(False):
        ones = torch.ones(some.width, dtype=x.dtype, device=x.device)
        rows = [ones if mask is None else mask.dense(x.dtype).to(x.device) for mask in masks]
        biases = [None if mask is None or mask.bias is None else mask.bias.to(x) for mask in masks]
        linear = [None if mask is None else mask.low_rank for mask in masks]
        if len(masks) == 1:
            return rows[0], biases[0], linear[0]
        bias = stacked(biases)
        return torch.stack(rows)[:, None], None if bias is None else bias[:, None], _maps(linear)


def _maps(linear: Sequence[LowRank | None]) -> LowRank | None:
    """The rows' maps as one: they share the basis; ``out`` becomes [B, D, r]."""
    some = next((low_rank for low_rank in linear if low_rank is not None), None)
    out = stacked([None if low_rank is None else low_rank.out for low_rank in linear])
    return None if some is None or out is None else LowRank(some.basis, out)
