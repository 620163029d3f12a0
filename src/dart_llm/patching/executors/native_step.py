"""Whole decode steps of one model: one native call per step.

Norms, attention, FFN and head of a step run in C++ (native/csrc/decode.cpp) on the model's own
weights, with the masks in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import TokenCall
from dart_llm.models.growing_cache import PreallocatedKVCache, Steps, fill_layer
from dart_llm.models.packed import PackedTensor, few
from dart_llm.models.screen import Screen
from dart_llm.models.steps import (
    LayerParts,
    Norm,
    StepParts,
    angles,
    attention_by_inputs,
    norms_of,
    step_parts,
)
from dart_llm.native.build import ops
from dart_llm.patching.executors.native_ffn import KernelMask, Layout, NativeFfn
from dart_llm.patching.executors.token_ffn import STEP_ROWS
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.observations import LayerObservation
from dart_llm.pruning.token_level import TokenMask

POSITIONS = 256
"""Positions whose angles are computed at a time."""

OnLayer = Callable[[int, LayerObservation], None]
"""Called with a layer's index and what it computed of a prompt."""


class NativeDecoder:
    """``ffns``: the model's blocks, laid out for the kernels.

    ``rows``: of the largest batch of a step; ``prompts``: whether it serves whole prompts too;
    ``windows``: positions that a token of each layer sees, None for all.
    """

    rows = STEP_ROWS

    def __init__(self, model: Any, ffns: Sequence[NativeFfn], layout: Layout) -> None:
        ops()
        for projection in attention_by_inputs(model):
            weight: Any = projection.weight
            layout.neuron_rows(weight.detach().t(), weight)
        parts = step_parts(model)
        self._model, self._ffns, self._parts = model, list(ffns), parts
        self._norms = _norm_floats(norms_of(parts))
        self._native = _decoder(parts, self._norms, ffns)
        self._everything = [ffn.everything() for ffn in ffns]
        self._masks: Sequence[LayerMask | None] | None = None
        self._loaded: list[KernelMask | None] = [None] * len(ffns)
        self._cache: PreallocatedKVCache | None = None
        self._angles: tuple[Tensor, Tensor] | None = None
        self._bound: Steps | None = None
        """Those of the buffers that the native object reads; it does not keep them alive."""
        self.dtype, self.windows = parts.head.dtype, parts.windows
        self.prompts = not parts.attention_cap and all(
            isinstance(matrix, PackedTensor) for matrix in _matrices(parts, ffns)
        )

    def unload(self) -> None:
        """Run all neurons, and keep neither masks nor room for a cache."""
        self.load(())
        self._cache = None

    def continues(self, cache: Any) -> bool:
        """Whether ``cache`` is as the newest step left it."""
        current = self._cache
        return current is not None and current.of() is cache and current.ready(cache)

    def take_screen(self, screen: Screen | None) -> None:
        """Score tokens by a screen of the head from now on; None: by the whole head again."""
        if screen is None:
            self._native.drop_screen()
        else:
            self._native.set_screen(*screen.tensors(), screen.keep, screen.threshold)

    def exact_entries(self) -> int:
        """Vocabulary entries that the last step scored exactly, summed over its rows."""
        return sum(self._native.exact_words())

    def nbytes(self) -> int:
        """Bytes beside the model, its masks and its cache; scratch memory too."""
        norms = sum(t.nbytes for t in self._norms) if self.dtype != torch.float32 else 0
        cache = 0 if self._cache is None else self._cache.nbytes()
        rotations = sum(t.nbytes for t in self._angles or ())
        return cache + rotations + int(self._native.nbytes()) + norms

    def watch(self, selections: bool) -> None:
        """From the next step on remember which neurons its tokens select, or stop."""
        self._native.watch(selections)

    def selected(self) -> Tensor:
        """What the tokens of the last step selected, if it was watched, uint8
        [L, B, I / 8 rounded up]: bits as of ``PatchedFFN.selected``; zeros in other layers.
        """
        return self._native.marks()  # type: ignore[no-any-return]

    def serves(self, masks: Sequence[LayerMask | None]) -> bool:
        """Whether a step can run these masks."""
        return all(
            ffn.selects
            for mask, ffn in zip(masks, self._ffns, strict=False)
            if isinstance(mask, TokenMask)
        )

    def refresh(self) -> None:
        """Read again what was copied of the weights: they may have changed in between."""
        with torch.inference_mode(False), torch.no_grad():
            for copied, norm in zip(
                self._norms, _norm_tensors(norms_of(step_parts(self._model))), strict=True
            ):
                if copied.data_ptr() != norm.data_ptr():
                    copied.copy_(norm)

    def load(self, masks: Sequence[LayerMask | None]) -> None:
        """Run these masks from now on; () or None for a layer: all of its neurons."""
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
                self._native.set_mask(index, *kept)
                self._loaded[index] = kept
        self._masks = masks

    def step(self, call: TokenCall, observe: bool) -> tuple[Tensor, Tensor]:
        """Decode one token of each row: logits [B, V] and the last hidden states [B, D].

        With ``call.forbidden``, the likeliest tokens [B], int64, may take the place of logits.
        """
        cache = call.cache
        position, tokens = int(cache.get_seq_length()), call.ids.flatten().tolist()
        rotations = self._rotations(position)
        room = self._cache
        if room is None or room.of() is not cache:
            room = self._cache = PreallocatedKVCache(cache, self.windows)
        room.prepare(cache)
        if room.steps is not self._bound:
            self._bind(room)
        done = room.steps.done
        logits, hidden = self._native.step(
            tokens, done, position, *rotations, observe, call.forbidden
        )
        room.advance()
        return logits, hidden

    def prompt(self, call: TokenCall, cache: Any, see: OnLayer | None) -> tuple[Tensor, Tensor]:
        """Logits [B, n, V] of a prompt and its last hidden states [B, T, D]; fills ``cache``.

        Calls ``see`` with each layer's activations as it proceeds.  No masks may be loaded.
        """
        rows, tokens = call.ids.shape
        rotations, most, count = self._rotations(tokens - 1), few(), len(self._ffns)
        on_blocks = rows * tokens <= most
        stream, h = self._native.prompt_begin(call.ids, *rotations, on_blocks)
        step = count if on_blocks and see is None else 1
        for first in range(0, count, step):
            last = first + step
            if on_blocks:
                parts = self._native.prompt_layers(
                    first, last, stream, h, rows, *rotations, see is not None
                )
            else:
                *parts, h = self._native.prompt_layer(first, stream, h, rows, *rotations, most)
            each = len(parts) // step
            for index in range(first, last):
                keys, values, *seen = parts[(index - first) * each : (index - first + 1) * each]
                if cache is not None:
                    fill_layer(cache, keys, values, index)
                if see is not None:
                    see(index, LayerObservation(*seen))
        logits, hidden = self._native.prompt_end(h, rows, call.keep, most)
        return logits, hidden

    def observed(self, stream: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the last step: u [L, B, I], the FFNs' inputs, their outputs, the stream before them,
        and what was added to it.

        [L, B, D] each; outputs and stream only with ``stream``, else empty.
        """
        u, h, z, x, r = self._native.observed(stream)
        return u, h, z, x, r

    def _bind(self, room: PreallocatedKVCache) -> None:
        """Name the buffers once, not at every token: a step passes how many came before it."""
        self._bound = None
        self._native.bind(*room.places())
        self._bound = room.steps

    def _rotations(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to ``position``, and some more."""
        if self._angles is None or position >= len(self._angles[0]):
            count = (position // POSITIONS + 1) * POSITIONS
            with torch.inference_mode(False), torch.no_grad():
                self._angles = angles(self._parts, count, self.dtype, torch.device("cpu"))
        return self._angles


def _matrices(parts: StepParts, ffns: Sequence[NativeFfn]) -> Iterator[Tensor]:
    yield from (parts.embedding, parts.head)
    for layer, ffn in zip(parts.layers, ffns, strict=True):
        yield from (*layer.qkv, layer.out, ffn.up, ffn.down)
        if ffn.gate is not None:
            yield ffn.gate


def _decoder(parts: StepParts, norms: list[Tensor], ffns: Sequence[NativeFfn]) -> Any:
    """The native object that decodes; see ops.cpp for the order of what it takes."""
    layers = zip(parts.layers, ffns, strict=True)
    weights = [parts.embedding, parts.head, parts.positions]
    weights += [t for pair in layers for t in _weights(*pair)]
    packed = {i: t.matrix for i, t in enumerate(weights) if isinstance(t, PackedTensor)}
    empty = torch.empty(0, dtype=parts.head.dtype, device="cpu")
    plain = [empty if t is None or i in packed else t for i, t in enumerate(weights)]
    kind = {
        "fused": len(parts.family.qkv) == 1,
        "by_heads": parts.family.by_heads,
        "over_all": parts.family.over_all,
        "parallel": parts.parallel,
        "centred": parts.norm.centred,
    }
    decoder: Any = torch.classes.dart_llm.Decoder(
        parts.sizes,
        [name for name, holds in kind.items() if holds],
        [parts.eps, parts.scale, parts.embedding_scale, parts.attention_cap, parts.logits_cap],
        plain,
        norms,
        [-1 if layer.table is None else layer.table for layer in parts.layers],
        ffns[0].act,
    )
    for index, matrix in packed.items():
        decoder.set_packed(index, matrix)
    return decoder


def _weights(layer: LayerParts, ffn: NativeFfn) -> list[Tensor | None]:
    """Of one layer, in the order of ops.cpp; a fused projection takes the place of q."""
    rest = (None,) * (3 - len(layer.qkv))
    attention = [*layer.qkv, *rest, layer.out, *layer.biases, *rest, layer.out_bias]
    return [*attention, ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias]


def _norm_floats(norms: Iterable[Norm | None]) -> list[Tensor]:
    """Factors and biases as the kernels read them."""
    with torch.inference_mode(False), torch.no_grad():
        return [t.float().contiguous() for t in _norm_tensors(norms)]


_NONE = torch.empty(0, device="cpu")
"""For a factor or bias that a model does not have."""


def _norm_tensors(norms: Iterable[Norm | None]) -> Iterator[Tensor]:
    """Factor and bias of each norm, as the model stores them."""
    for norm in norms:
        for t in (None, None) if norm is None else (norm.factor, norm.bias):
            yield _NONE if t is None else t
