"""Decode steps with little overhead: one native call per step.

Norms, attention, FFN and head of a whole step run in C++ (native/decode.cpp) on the model's own
weights, with the masks in force.  Whatever it cannot serve, the model's own forward does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import PromptCall, SlimCall
from dart_llm.models.growing_cache import (
    PreallocatedKVCache,
    Steps,
    begin,
    count_static,
    is_static,
    static_places,
)
from dart_llm.models.packed import PackedTensor, few
from dart_llm.models.screen import Screen
from dart_llm.models.steps import (
    LayerParts,
    Norm,
    StepParts,
    angles,
    attention_by_inputs,
    copy_again,
    norms_now,
    norms_of,
    step_parts,
)
from dart_llm.native.build import ops
from dart_llm.patching.executors.native_ffn import KernelMask, Layout, NativeFfn
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.patching.executors.whole_step import See, StepDecoder
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.token_level import TokenMask

POSITIONS = 256
"""Positions whose angles are computed at a time."""


class SlimDecoder(StepDecoder):
    """``ffns``: the model's blocks, laid out for the kernels."""

    rows: int | None = STEP_ROWS
    static_caches = True
    device = "cpu"

    def __init__(self, model: Any, ffns: Sequence[NativeFfn], layout: Layout) -> None:
        super().__init__()
        ops()
        for one in attention_by_inputs(model):
            weight: Any = one.weight
            layout.neuron_rows(weight.detach().t(), weight)
        parts = step_parts(model)
        self._model, self._ffns, self._parts = model, list(ffns), parts
        self._norms = _norm_floats(norms_of(parts))
        self._native = _decoder(parts, self._norms, ffns)
        self._everything = [ffn.everything() for ffn in ffns]
        self._masks: Sequence[LayerMask | None] | None = None
        self._loaded: list[KernelMask | None] = [None] * len(ffns)
        self._bound: Steps | None = None
        """Those of the buffers that the native object knows; it does not keep them alive."""
        self.dtype, self.windows = parts.head.dtype, parts.windows
        self.prompts = not parts.attention_cap and all(
            isinstance(one, PackedTensor) for one in _matrices(parts, ffns)
        )

    def take_screen(self, screen: Screen | None) -> None:
        if screen is None:
            self._native.drop_screen()
        else:
            self._native.set_screen(*screen.tensors(), screen.keep, screen.threshold)

    def exact_words(self) -> int:
        return sum(self._native.exact_words())

    def nbytes(self) -> int:
        norms = sum(t.nbytes for t in self._norms) if self.dtype != torch.float32 else 0
        return super().nbytes() + int(self._native.nbytes()) + norms  # scratch memory too

    def watch(self, choices: bool) -> None:
        self._native.watch(choices)

    def chosen(self) -> Tensor:
        return self._native.marks()  # type: ignore[no-any-return]

    def serves(self, masks: Sequence[LayerMask | None]) -> bool:
        return all(
            ffn.chooses
            for mask, ffn in zip(masks, self._ffns, strict=False)
            if isinstance(mask, TokenMask)
        )

    def refresh(self) -> None:
        copy_again(self._norms, _norm_tensors(norms_now(self._model)))

    def load(self, masks: Sequence[LayerMask | None]) -> None:
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
                self._native.set_mask(
                    index,
                    kept.ids,
                    kept.bias,
                    kept.basis,
                    kept.features,
                    kept.choice,
                    kept.matrices,
                )
                self._loaded[index] = kept
        self._masks = masks

    def step(self, call: SlimCall, observe: bool) -> tuple[Tensor, Tensor]:
        cache = call.cache
        position, tokens = int(cache.get_seq_length()), call.ids.flatten().tolist()
        turning = self._turning(position)
        if is_static(cache):
            self._bound = None  # where its tensors lie is its own business between two steps
            self._native.bind(*static_places(cache, self.windows))
            found, hidden = self._native.step(
                tokens, 0, position, *turning, observe, call.forbidden
            )
            count_static(cache)
            return found, hidden
        room = self.room(cache)
        room.prepare(cache)
        if room.steps is not self._bound:
            self._bind(room)
        done = room.steps.done
        found, hidden = self._native.step(tokens, done, position, *turning, observe, call.forbidden)
        room.advance()
        return found, hidden

    def prompt(self, call: PromptCall, cache: Any, see: See | None) -> tuple[Tensor, Tensor]:
        texts, tokens = call.ids.shape
        turning, most, count = self._turning(tokens - 1), few(), len(self._ffns)
        on_blocks = texts * tokens <= most
        stream, given = self._native.prompt_begin(call.ids, *turning, on_blocks)
        step = count if on_blocks and see is None else 1
        for first in range(0, count, step):
            last = first + step
            if on_blocks:
                left = self._native.prompt_layers(
                    first, last, stream, given, texts, *turning, see is not None
                )
            else:
                *left, given = self._native.prompt_layer(
                    first, stream, given, texts, *turning, most
                )
            each = len(left) // step
            for index in range(first, last):
                keys, values, *seen = left[(index - first) * each : (index - first + 1) * each]
                if cache is not None:
                    begin(cache, keys, values, index)
                if see is not None:
                    see(index, LayerObservation(*seen))
        logits, hidden = self._native.prompt_end(given, texts, call.keep, most)
        return logits, hidden

    def _bind(self, room: PreallocatedKVCache) -> None:
        """Name the buffers once, not at every token: a step says how many came before it."""
        rooms, self._bound = room.rooms, None
        keys, values = [one.keys for one in rooms], [one.values for one in rooms]
        ends, counts = [one.end for one in rooms], [one.count for one in rooms]
        seen = [-1 if one.seen is None else one.seen for one in rooms]
        self._native.bind(keys, values, ends, counts, seen)
        self._bound = room.steps

    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, h, z, x, r = self._native.observed(stream)
        return u, h, z, x, r

    def _turning(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``position`` and others."""
        if self._angles is None or position >= len(self._angles[0]):
            count = (position // POSITIONS + 1) * POSITIONS
            with torch.inference_mode(False), torch.no_grad():
                self._angles = angles(self._parts, count, self.dtype, torch.device(self.device))
        return self._angles


def _matrices(parts: StepParts, ffns: Sequence[NativeFfn]) -> Iterator[Tensor]:
    yield from (parts.embedding, parts.head)
    for layer, ffn in zip(parts.layers, ffns, strict=True):
        yield from (*layer.qkv, layer.out, ffn.up, ffn.down)
        if ffn.gate is not None:
            yield ffn.gate


NOTHING = torch.empty(0, device="cpu")
"""In the place of a weight that a model has not."""


def _decoder(parts: StepParts, norms: list[Tensor], ffns: Sequence[NativeFfn]) -> Any:
    """The native object that decodes; see ops.cpp for the order of what it takes."""
    dtype = parts.head.dtype
    ends = (parts.embedding, parts.head, parts.positions)
    weights = [
        *ends,
        *(t for pair in zip(parts.layers, ffns, strict=True) for t in _weights(*pair)),
    ]
    packed = {i: t.matrix for i, t in enumerate(weights) if isinstance(t, PackedTensor)}
    empty = torch.empty(0, dtype=dtype, device="cpu")
    plain = [empty if t is None or i in packed else t for i, t in enumerate(weights)]
    kind = {
        "fused": len(parts.family.qkv) == 1,
        "by_heads": parts.family.by_heads,
        "over_all": parts.family.over_all,
        "parallel": parts.parallel,
        "centred": parts.norm.centred,
    }
    made: Any = torch.classes.dart_llm.Decoder(
        parts.sizes,
        [name for name, holds in kind.items() if holds],
        [parts.eps, parts.scale, parts.embedding_scale, parts.attention_cap, parts.logits_cap],
        plain,
        norms,
        [-1 if layer.table is None else layer.table for layer in parts.layers],
        ffns[0].act,
    )
    for index, matrix in packed.items():
        made.set_packed(index, matrix)
    return made


def _weights(layer: LayerParts, ffn: NativeFfn) -> list[Tensor | None]:
    """Of one layer, in the order of ops.cpp; a fused projection stands in the place of q."""
    rest = (None,) * (3 - len(layer.qkv))
    attention = [*layer.qkv, *rest, layer.out, *layer.biases, *rest, layer.out_bias]
    return [*attention, ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias]


def _norm_floats(norms: Iterable[Norm | None]) -> list[Tensor]:
    """Factors and biases as the kernels read them."""
    with torch.inference_mode(False), torch.no_grad():
        return [t.float().contiguous() for t in _norm_tensors(norms)]


def _norm_tensors(norms: Iterable[Norm | None]) -> Iterator[Tensor]:
    """Factors and biases in turn, as the model holds them."""
    for one in norms:
        for t in (None, None) if one is None else (one.factor, one.bias):
            yield NOTHING if t is None else t
