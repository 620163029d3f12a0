"""Whether a model computes what a whole decode step would compute in its place.

One step of the model's own, after a short prompt, is compared part by part with the formulas that
slim and graph go by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.models.agreement import Bare, parts_of, same, signature, unnoticed, weak
from dart_llm.models.calls import forward_names
from dart_llm.models.describe import decoder_layers, decoder_of
from dart_llm.models.packed import place_of
from dart_llm.models.steps import StepParts, angles, step_parts
from dart_llm.patching.executors.native_ffn import act_number
from dart_llm.patching.executors.step_formulas import (
    attended,
    capped,
    embedded,
    heads_of,
    normed,
)

PROMPT = 6
"""Tokens in the cache of the step that is compared."""

WORDS = 256
"""Rows of the output head that are compared."""


def model_signature(model: nn.Module, parts: Sequence[nn.Module] | None = None) -> tuple[Any, ...]:
    """What decides what a model computes beside the values of its weights; equal while unchanged.

    Hooks are no part of it.  ``parts``: ``parts_of(model)``, where they are known.
    """
    modules = parts_of(model) if parts is None else parts
    configs = {id(c): c for m in modules if (c := m.__dict__.get("config")) is not None}
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return (
        [(id(t), *place_of(t)) for t in tensors if t is not None],
        signature(model, modules),
        *map(_attention_function, configs.values()),
        *_functions({type(m).__module__ for m in modules}),
    )


def _attention_function(config: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None)
    return name, weak(ALL_ATTENTION_FUNCTIONS.get(name, None))


def _functions(modules: set[str]) -> Iterator[Any]:
    """The functions of the files that hold a model's classes."""
    for name in sorted(modules):
        for value in vars(sys.modules.get(name, nn)).values():
            if callable(value) and not name.startswith("torch."):
                yield weak(value)


def disagreement_reason(model: Any) -> str:
    """What of ``model`` a whole decode step would compute differently: "", or a clause.

    For models of which ``step_unsupported_reason`` says nothing.  Layers that are alike but for
    their weights are compared once.
    """
    parts, bare = step_parts(model), Bare()
    layers, _, _ = decoder_layers(model)
    seen: list[Any] = []
    with unnoticed(parts.head.device):
        for index, layer in enumerate(layers):
            mark = signature(layer), *map(_attention_function, _configs(layer))
            if mark in seen:
                continue
            seen.append(mark)
            try:
                odd = _odd_part(model, parts, bare, index)
            except Exception as error:  # not called as its kind is
                odd = f"its forward ({type(error).__name__})"
            if odd:
                return f"computes {odd} of layer {index} otherwise than its kind"
    return ""


def _configs(layer: nn.Module) -> Iterator[Any]:
    return (m.__dict__["config"] for m in parts_of(layer) if "config" in m.__dict__)


class _Through(nn.Module):
    """In the place of a layer that is left out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _odd_part(model: Any, parts: StepParts, bare: Bare, index: int) -> str:
    """The part of layer ``index`` that differs, or "": a model of this one layer takes a step."""
    layers, names, _ = decoder_layers(model)
    layer: Any = bare.of(layers[index])
    ffn, first = (bare.of(one.get_submodule(names.ffn)) for one in (layers[index], layers[0]))
    if act_number(getattr(ffn, names.act)) != act_number(getattr(first, names.act)):
        return "the activation"
    before = {str(place): _Through() for place in range(index)}
    bare.of(layers).__dict__["_modules"] = {**before, str(index): layer}
    head = parts.head[:WORDS]
    bare.of(model.get_output_embeddings()).__dict__["_parameters"] = {"weight": head, "bias": None}
    tape: dict[str, tuple[Tensor, Tensor]] = {}
    told = {
        "layer": layer,
        "attention": layer.get_submodule(names.attention_out.rpartition(".")[0]),
        "ffn": ffn,
        "norm": getattr(bare.of(decoder_of(model)), parts.family.last_norm),
    }
    plain = {name: one.__dict__["_compiled_call_impl"] for name, one in told.items()}
    try:
        for name, one in told.items():
            one.__dict__["_compiled_call_impl"] = _taped(plain[name], name, tape)
        token, before_it, logits = _own_step(model, bare, len(parts.embedding), index)
    finally:
        for name, one in told.items():
            one.__dict__["_compiled_call_impl"] = plain[name]
    stand_in = None if parts.rotary is None else bare.of(parts.rotary)
    own = replace(parts, rotary=stand_in)
    for name, found, expected in _pairs(own, index, tape, token, before_it, logits):
        if not same(found.reshape(expected.shape), expected):
            return name
    return ""


def _taped(
    call: Callable[..., Any], name: str, tape: dict[str, tuple[Tensor, Tensor]]
) -> Callable[..., Any]:
    """``call`` that notes its newest input and output."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        made = call(*args, **kwargs)
        given = args[0] if args else kwargs["hidden_states"]
        tape[name] = given, made[0] if isinstance(made, tuple) else made
        return made

    return noting


def _own_step(
    model: Any, bare: Bare, vocabulary: int, index: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A token [1, 1] that a stand-in of ``model`` decodes; the keys and values before; logits."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROMPT + 1), generator=generator, device="cpu")
    ids = ids.to(next(model.parameters()).device)
    cache = DynamicCache(config=model.config.get_text_config())
    known = forward_names(type(model))  # type: ignore[arg-type]
    name = "cache" if "cache" in known else "past_key_values"
    options = {name: cache, "use_cache": True, "output_attentions": False}
    options["output_hidden_states"] = False
    run = bare.of(model)
    run(input_ids=ids[:, :PROMPT], **options)
    held: Any = cache.layers[index]
    before = held.keys.clone(), held.values.clone()
    if index:  # the first layer's cache says how long the text is
        told = before[0].new_zeros(*before[0].shape[:2], PROMPT, before[0].shape[3])
        cache.update(told, told, 0)
    return ids[:, PROMPT:], before, run(input_ids=ids[:, PROMPT:], **options).logits


def _pairs(
    parts: StepParts,
    index: int,
    tape: dict[str, tuple[Tensor, Tensor]],
    token: Tensor,
    before: tuple[Tensor, Tensor],
    logits: Tensor,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(part, what the model made of it, what a whole step makes of the same input [1, D])."""
    layer, head = parts.layers[index], parts.head[:WORDS]
    dtype, device = head.dtype, head.device
    (x, end), (h, mixed), (fed, z), (last, found) = (
        tuple(t.reshape(1, -1) for t in tape[name])
        for name in ("layer", "attention", "ffn", "norm")
    )
    cosine, sine = (t.to(dtype) for t in angles(parts, PROMPT + 1, dtype, device))
    q, k, v = heads_of(parts, layer, h, cosine[PROMPT:], sine[PROMPT:])
    keys, values = (
        torch.cat([t, new[:, :, None]], 2) for t, new in zip(before, (k, v), strict=True)
    )
    visible = torch.ones(keys.shape[2], dtype=torch.bool, device=device)
    position = torch.tensor([PROMPT], device=device)
    yield "the embedding", x, embedded(parts, token[:, 0], position)
    yield "the first norm", h, normed(x, layer.before[0])
    yield "the attention", mixed, attended(parts, layer, q, keys, values, visible)
    added = normed(mixed, layer.after[0])
    yield "the second norm", fed, normed(x if parts.parallel else x + added, layer.before[1])
    yield "the sum", end, x + added + normed(z, layer.after[1])
    yield "the stream", last, end
    yield "the last norm", found, parts.norm.of(last)
    yield "the head", logits, capped(F.linear(found, head), parts.logits_cap)
