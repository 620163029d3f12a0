"""Checks that whole steps (tokens decoded in one native call) compute the same as the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dart_llm.models.agreement import UnhookedView, isolated, signature
from dart_llm.models.calls import cache_name
from dart_llm.models.describe import decoder_layers, decoder_of
from dart_llm.models.packed import PackedTensor
from dart_llm.models.steps import StepParts, angles, norms_of, step_parts
from dart_llm.patching.executors.native_ffn import NativeFfn
from dart_llm.patching.executors.whole_step import native_decoder, norm_floats

PROMPT = 6
"""Number of tokens in the cache before the compared step."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative difference (Frobenius norms) per layer that counts as rounding.  Tiny models of
all families differ by 1e-7 (float32) and 2e-2 (bfloat16).  Products with quantized weights round
their inputs to 8 bits, so models with such weights get the tolerance of bfloat16.
"""


def disagreement_reason(model: Any, ffns: Sequence[NativeFfn]) -> str | None:
    """Return a clause: how a whole step differs from ``model``; None if it does not.

    Among layers that differ only in their weights, only the first is compared.  Call this after
    the weights were laid out for the kernels.
    """
    from transformers import DynamicCache

    layers, _, text = decoder_layers(model)
    if len({ffn.act for ffn in ffns}) > 1:
        return "has layers that differ in their activation"
    parts, view, cache = step_parts(model), UnhookedView(), DynamicCache(config=text)
    pairs = zip(layers, cache.layers, strict=True)
    marks = [(signature(layer), type(cached)) for layer, cached in pairs]
    chosen = [index for index, mark in enumerate(marks) if mark not in marks[:index]]
    copies = [view.copy_of(layer) if i in chosen else _Skip() for i, layer in enumerate(layers)]
    view.copy_of(layers).__dict__["_modules"] = dict(zip(layers._modules, copies, strict=True))
    rotary = None if parts.rotary is None else view.copy_of(parts.rotary)
    parts = replace(parts, layers=[parts.layers[i] for i in chosen], rotary=rotary)
    rounded = any(isinstance(weight, PackedTensor) for weight in model.parameters())
    tolerance = len(chosen) * TOLERANCE[torch.bfloat16 if rounded else parts.head.dtype]
    with isolated(parts.head.device):
        try:
            token, *expected = _model_step(model, view, cache, parts)
            result = _native_step(parts, [ffns[i] for i in chosen], token, cache, chosen)
            agrees = all(_error(a, b) <= tolerance for a, b in zip(result, expected, strict=True))
        except Exception as error:  # e.g. a module of its own that takes other arguments
            return f"cannot run like other {text.model_type} models ({type(error).__name__})"
    return None if agrees else f"does not compute the same as a {text.model_type} model"


class _Skip(nn.Module):
    """Takes the place of a layer that is not compared."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _model_step(
    model: Any, view: UnhookedView, cache: Any, parts: StepParts
) -> tuple[int, Tensor, Tensor]:
    """Decode one token after ``PROMPT`` others, with a copy of ``model``; fills ``cache``.

    Returns the token's id, the logits [1, V] and the last hidden state [1, D].
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(parts.embedding), (1, PROMPT + 1), generator=generator, device="cpu")
    norm: Any = view.copy_of(getattr(decoder_of(model), parts.family.last_norm))
    hidden: list[Tensor] = []

    def record_norm(x: Tensor) -> Tensor:
        hidden.append(norm.forward(x))
        return hidden[-1]

    norm.__dict__["_compiled_call_impl"] = record_norm
    options = {cache_name(): cache, "use_cache": True}
    options |= {"output_attentions": False, "output_hidden_states": False}
    run = view.copy_of(model)
    run(input_ids=ids[:, :PROMPT], **options)
    logits = run(input_ids=ids[:, PROMPT:], **options).logits
    return int(ids[0, PROMPT]), logits[:, 0], hidden[-1][:, 0]


def _native_step(
    parts: StepParts, ffns: Sequence[NativeFfn], token: int, cache: Any, chosen: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Decode ``token`` by a whole step; return logits [1, V] and the last hidden state [1, D]."""
    native = native_decoder(parts, norm_floats(norms_of(parts)), ffns)
    for index, ffn in enumerate(ffns):
        native.set_mask(index, *ffn.everything())
    layers = [cache.layers[index] for index in chosen]
    keys, values = (
        [getattr(layer, name).clone(memory_format=torch.contiguous_format) for layer in layers]
        for name in ("keys", "values")
    )
    counts = [t.shape[2] - 1 for t in keys]  # without ``token``, which the step writes again
    seen = [-1 if window is None else window - 1 for window in parts.windows]
    native.bind(keys, values, counts, counts, seen)
    rotations = angles(parts, PROMPT + 1, parts.head.dtype, torch.device("cpu"))
    logits, hidden = native.step([token], 0, PROMPT, *rotations, False, None)
    return logits, hidden


def _error(result: Tensor, expected: Tensor) -> float:
    """Return the relative error; infinite if shapes differ, or only one of two values is finite."""
    if result.shape != expected.shape or not torch.equal(result.isfinite(), expected.isfinite()):
        return float("inf")
    a, b = (t.float().nan_to_num(0, 0, 0) for t in (result, expected))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
