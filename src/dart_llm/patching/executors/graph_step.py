"""Decode steps in torch as CUDA graphs: recorded once per set of buffers, replayed as one launch.

A step is plain torch calls on tensors that stay where they are: no shape and no address depends on
the token or the position.  Without a GPU it runs call by call, so that what a graph would record
can be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.models.calls import SlimCall
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.steps import (
    LayerParts,
    StepParts,
    angles,
    copy_again,
    norms_of,
    step_parts,
)
from dart_llm.patching.executors.step_formulas import (
    attended,
    capped,
    embedded,
    heads_of,
    normed,
)
from dart_llm.patching.executors.torch_ffn import CompactFfn
from dart_llm.patching.executors.triton_ffn import FEW, TritonFfn
from dart_llm.patching.executors.whole_step import StepDecoder
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask

Kept = CompactFfn | TritonFfn
"""Runs the kept neurons of a layer within a step."""


@dataclass(frozen=True)
class StepInput:
    """What a step reads and writes.

    ``token``: [B] int64; ``position``: [1] int64, the cache's length before the step; ``cosine``,
    ``sine``: [capacity, tables, R] in the model's dtype; ``keys``, ``values``: [B, K, capacity, S]
    per layer, written at ``position``.
    """

    token: Tensor
    position: Tensor
    cosine: Tensor
    sine: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class StepOutput:
    """``logits``: [B, V]; ``hidden``: [B, D], the last state after its norm; ``observed``: of each
    layer u [B, I], the FFN's input, its output, the stream before it and what is added to that
    [B, D], or nothing.
    """

    logits: Tensor
    hidden: Tensor
    observed: tuple[tuple[Tensor, ...], ...]


def run_step(
    parts: StepParts,
    ffns: Sequence[FfnBlock | Kept],
    given: StepInput,
    observe: bool,
) -> StepOutput:
    """Decode one token of every row.  ``ffns``: a layer's block where it is dense."""
    x = embedded(parts, given.token, given.position)
    capacity = given.keys[0].shape[2]
    visible = torch.arange(capacity, device=x.device) <= given.position
    seen = []
    for index, (layer, ffn) in enumerate(zip(parts.layers, ffns, strict=True)):
        mixed = _attention(parts, layer, normed(x, layer.before[0]), given, index, visible)
        mixed = normed(mixed, layer.after[0])
        before = x if parts.parallel else x + mixed
        h = normed(before, layer.before[1])
        if isinstance(ffn, FfnBlock):
            u = ffn.hidden(h)
            z = ffn.down(u)
            r = normed(z, layer.after[1])
            if observe:
                seen.append((u, h, z, before, r))
        else:
            r = normed(ffn.run(h), layer.after[1])
        x = x + mixed + r
    hidden = parts.norm.of(x)
    logits = capped(F.linear(hidden, parts.head), parts.logits_cap)
    return StepOutput(logits, hidden, tuple(seen))


def _attention(
    parts: StepParts, layer: LayerParts, h: Tensor, given: StepInput, index: int, visible: Tensor
) -> Tensor:
    """What the attention of layer ``index`` gives, [B, D]; keys and values are written."""
    turning = (t.index_select(0, given.position) for t in (given.cosine, given.sine))
    q, k, v = heads_of(parts, layer, h, *turning)
    keys, values = given.keys[index], given.values[index]
    keys.index_copy_(2, given.position, k[:, :, None])
    values.index_copy_(2, given.position, v[:, :, None])
    return attended(parts, layer, q, keys, values, visible)


GRAPHS = 4
"""Recorded steps that are kept: dense, observing, pruned, and one to spare."""

WARM_UPS = 3
"""Steps that run before a recording, as CUDA asks for."""


class Recorded:
    """A step on fixed tensors; on a GPU recorded as a graph.

    ``work`` may run several times before it counts: it writes the same to the same place.
    """

    def __init__(self, work: Callable[[], StepOutput], device: torch.device) -> None:
        self._work = work
        self._graph: Any = None
        if device.type == "cuda":
            side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = work()

    def __call__(self) -> StepOutput:
        if self._graph is None:
            return self._work()
        self._graph.replay()
        return self._output


class GraphDecoder(StepDecoder):
    """``kept``: what runs a layer's mask on buffers that are refilled in place."""

    def __init__(self, model: Any, blocks: Sequence[FfnBlock], kept: Callable[[int], Kept]) -> None:
        super().__init__()
        self._model, self._parts = model, step_parts(model)
        self.windows = self._parts.windows
        self.device, self.dtype = self._parts.head.device.type, self._parts.head.dtype
        self._blocks, self._kept = list(blocks), kept
        if any(isinstance(kept(index), TritonFfn) for index in range(len(blocks))):
            self.rows = FEW  # more take the kernels longer than whole matrix products
        self._ffns: list[FfnBlock | Kept] = list(blocks)
        self._masks: Sequence[LayerMask | None] = ()
        self._input: StepInput | None = None
        self._recorded: dict[Any, Recorded] = {}
        self._observed: tuple[tuple[Tensor, ...], ...] = ()

    def serves(self, masks: Sequence[LayerMask | None]) -> bool:
        # where the kept neurons are copied, those of a token would change a step's shapes
        return all(
            not isinstance(mask, TokenMask) or self._kept(index).token_rows
            for index, mask in enumerate(masks)
        )

    def unload(self) -> None:
        super().unload()
        self._input = None
        self._recorded, self._observed = {}, ()

    def refresh(self) -> None:
        kept, now = self._parts, step_parts(self._model)
        both = [[one.factor for one in norms_of(parts) if one] for parts in (kept, now)]
        copy_again(*both)

    def load(self, masks: Sequence[LayerMask | None]) -> None:
        if masks is self._masks:
            return
        self._masks = masks
        for index, block in enumerate(self._blocks):
            mask = masks[index] if masks else None
            self._ffns[index] = block
            if mask is not None:
                kept = self._kept(index)
                kept.load(mask)
                self._ffns[index] = kept

    def step(self, call: SlimCall, observe: bool) -> tuple[Tensor, Tensor]:
        room = self.room(call.cache)
        with torch.inference_mode(False), torch.no_grad():  # leaving that mode turns gradients on
            room.prepare(call.cache)
            keys, values = ([one.keys for one in room.rooms], [one.values for one in room.rooms])
            given = self._given(call.ids, keys, values)
            given.token.copy_(call.ids[:, 0])
            given.position.fill_(room.rooms[0].kept)
            output = self._step_of(given, observe)()
            room.advance()
            self._observed = output.observed
            # the graph's own tensors are written again by the next step
            return output.logits.clone(), output.hidden.clone()

    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, h, *rest = zip(*self._observed, strict=True)
        z, x, r = (torch.stack(t) if stream else u[0][:0] for t in rest)
        return torch.stack(u), torch.stack(h), z, x, r

    def _given(self, ids: Tensor, keys: list[Tensor], values: list[Tensor]) -> StepInput:
        known = self._input
        if known is not None and known.keys[0] is keys[0] and len(known.token) == len(ids):
            return known
        self._recorded = {}
        capacity, device = keys[0].shape[2], ids.device
        if self._angles is None or len(self._angles[0]) < capacity:
            both = angles(self._parts, capacity, self.dtype, device)
            self._angles = both[0].to(self.dtype), both[1].to(self.dtype)
        self._input = StepInput(
            torch.zeros(len(ids), dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            *self._angles,
            keys,
            values,
        )
        return self._input

    def _step_of(self, given: StepInput, observe: bool) -> Recorded:
        """The step for the tensors that it would read now."""
        places = (() if isinstance(ffn, FfnBlock) else ffn.places() for ffn in self._ffns)
        key = (observe, *places)
        known = self._recorded.get(key)
        if known is None:
            while len(self._recorded) >= GRAPHS:
                del self._recorded[next(iter(self._recorded))]
            ffns = list(self._ffns)
            device = given.token.device
            known = Recorded(lambda: run_step(self._parts, ffns, given, observe), device)
            self._recorded[key] = known
        return known
