"""Inputs of a native whole step: a table of model types, and the weights of one model.

A native whole step decodes one token per row in a single call of C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dart_llm.models.agreement import Replacement, forward_of, parts_of
from dart_llm.models.architectures import LayerNames
from dart_llm.models.describe import decoder_layers, decoder_of
from dart_llm.models.ffn import HOMES, is_by_inputs, matrix_of
from dart_llm.models.packed import PackedTensor


@dataclass(frozen=True)
class Family:
    """How a decode step of one model type is computed, with transformers' names of its modules.

    ``before``: norms of the residual stream before attention and FFN.  ``after``: norms of the
    outputs of attention and FFN.  "" means that there is no norm.  ``last_norm``: the decoder's
    last norm.  ``offset``: number that is added to a norm's weight, which then multiplies in
    float32; None if the weight multiplies unchanged, in its dtype.  ``qkv``: names of the three
    projections, or of the fused projection.  ``by_heads``: True if the fused projection has q, k
    and v of one head, then those of the next head.  ``over_all``: True if the norms of q and k
    cover all heads together.  ``slides``: True if all layers have the configuration's sliding
    window; ignored if ``layer_types`` is set.  ``kinds``: True if each layer type has
    rotary angles of its own.  ``positions``: embedding of learned positions, or "".  ``capped``:
    True if attention scores have the configuration's soft cap.
    """

    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, str] = ("", "")
    last_norm: str = "norm"
    offset: float | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    by_heads: bool = False
    over_all: bool = False
    slides: bool = False
    kinds: bool = False
    positions: str = ""
    capped: bool = False


_LLAMA = Family()
_GEMMA = Family(offset=1.0)
_GEMMA_2 = Family(
    before=("input_layernorm", "pre_feedforward_layernorm"),
    after=("post_attention_layernorm", "post_feedforward_layernorm"),
    offset=1.0,
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "phi3": replace(_LLAMA, qkv=("qkv_proj",), slides=True),
    "olmo2": replace(_GEMMA_2, before=("", ""), offset=0.0, over_all=True),
    "mistral": replace(_LLAMA, slides=True),
    "gpt2": Family(("ln_1", "ln_2"), last_norm="ln_f", qkv=("c_attn",), positions="wpe"),
    "gpt_neox": Family(last_norm="final_layer_norm", qkv=("query_key_value",), by_heads=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA_2, capped=True),
    "gemma3_text": replace(_GEMMA_2, kinds=True),
}
"""The model types that whole steps support, by the configuration's ``model_type``."""

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Types of rotary embedding whose angles depend only on the position."""


class Norm(NamedTuple):
    """An RMS norm, or a layer norm if ``centred``.  ``factor``, ``bias``: [n]."""

    factor: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    def of(self, x: Tensor) -> Tensor:
        """x, normalised over the last dimension in float32, with the roundings of the model."""
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.factor, self.bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.factor.dtype == x.dtype:
            return self.factor * wide.to(x.dtype)
        return (self.factor * wide).to(x.dtype)


@dataclass(frozen=True)
class LayerParts:
    """Attention weights and norms of one layer.  ``before``, ``after``: norms as in ``Family``.

    ``qkv``: the fused matrix or the three matrices, each [outputs, D].  ``biases``: each matrix's
    bias or None.  ``head_norms``: norms of q and k.  ``window``: number of positions to which a
    token attends, including its own; None means all.  ``table``: index of the layer's rotary angles
    in ``StepParts.tables``; None if the layer has no rotary angles.
    """

    before: tuple[Norm | None, Norm | None]
    after: tuple[Norm | None, Norm | None]
    qkv: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    out: Tensor
    out_bias: Tensor | None
    head_norms: tuple[Norm | None, Norm | None]
    window: int | None
    table: int | None


@dataclass(frozen=True)
class StepParts:
    """Sizes and weights of a model, without its FFNs.

    ``sizes``: hidden size D, heads H, key-value heads K, size S of a head, neurons I per layer,
    vocabulary size V, rotated values R per head.  ``embedding_scale``: factor of embedding rows,
    rounded as in the model.  ``attention_cap``, ``logits_cap``: c of the soft cap c tanh(x / c); 0
    without a cap.  ``parallel``: True if FFN and attention read the same residual stream.
    ``tables``: one entry per table of rotary angles: the layer type that uses this table, or "" if
    all layers share one table.
    """

    family: Family
    sizes: list[int]
    eps: float
    scale: float
    embedding: Tensor
    positions: Tensor | None
    norm: Norm
    head: Tensor
    layers: list[LayerParts]
    rotary: nn.Module | None
    embedding_scale: float = 1.0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    parallel: bool = False
    tables: tuple[str, ...] = field(default=("",))

    @property
    def windows(self) -> list[int | None]:
        """Attention window of each layer; None means all positions."""
        return [layer.window for layer in self.layers]


def step_unsupported_reason(model: Any) -> str | None:
    """Why native whole steps cannot decode ``model``, as a clause; None if they can."""
    _, _, text = decoder_layers(model)
    if text.model_type not in FAMILIES:
        return f"is a {text.model_type} model, not one of {', '.join(sorted(FAMILIES))}"
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "has no language-model head, or its head has a bias"
    if getattr(model.get_input_embeddings(), "max_norm", None) is not None:
        return "has an embedding with max_norm, which changes its weights at every use"
    family = FAMILIES[text.model_type]
    return _attention_unsupported_reason(text, family) or _modules_unsupported_reason(model)


def _attention_unsupported_reason(text: Any, family: Family) -> str | None:
    """Why steps do not support the attention, as a clause; None if they support it."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [settings for settings in rope.values() if isinstance(settings, dict)]
    for settings in nested or [rope]:
        if settings.get("rope_type", "default") not in STATIC_ROPE:
            return f"has rotary embeddings of type {settings.get('rope_type')}"
    kinds = set(getattr(text, "layer_types", None) or ())
    if odd := kinds - {"full_attention", "sliding_attention"}:
        return f"has layers of {min(odd).replace('_', ' ')}"
    if getattr(text, "use_bidirectional_attention", False):
        return "has bidirectional attention"
    if family.capped and text.attn_logit_softcapping and text._attn_implementation == "sdpa":
        return "has a soft cap that its attention (sdpa) ignores"
    return None


def _modules_unsupported_reason(model: Any) -> str | None:
    """Why steps cannot read a model's modules and weights, as a clause; None if they can."""
    tensors = [*model.parameters()]
    kinds = {type(t) for t in (*tensors, *model.buffers())}
    if kinds - {Tensor, nn.Parameter, PackedTensor}:
        return "has weights of an unknown tensor class"
    if len({(p.device, p.dtype) for p in tensors}) > 1 or not tensors[0].is_floating_point():
        return "has weights that differ in dtype or device, or are not floating-point"
    if tensors[0].device.type != "cpu":
        return "is not on the CPU"
    if tensors[0].dtype not in (torch.float32, torch.bfloat16):
        return "is not float32 or bfloat16 throughout"
    modules = parts_of(model)
    if any("_hf_hook" in module.__dict__ for module in modules):
        return "is dispatched by accelerate"
    odd = next((module for module in modules if not _is_known(module)), None)
    if odd is not None:
        return f"has a changed forward in a {type(odd).__name__}"
    for name in ("variance_epsilon", "eps", "scaling"):
        if len({m.__dict__[name] for m in modules if name in m.__dict__}) > 1:
            return f"has layers that differ in their {name}"
    return None if _fits(model) else "has weights with other shapes or layouts than its model type"


def _is_known(module: nn.Module) -> bool:
    """Whether the class and the forward of a module are from transformers or torch."""
    patched = module.__dict__.get("forward")
    original = patched is None or isinstance(patched, Replacement)
    if not original or "parametrizations" in module._modules:  # weights computed at every use
        return False
    names = type(module).__module__, forward_of(module)[0].__module__
    return all(name.startswith(HOMES) for name in names)


def _fits(model: Any) -> bool:
    """Whether ops.cpp can read all weights: rows are contiguous, and layers have equal shapes."""
    try:
        parts = step_parts(model)
    except AttributeError:  # a module is missing
        return False
    hidden, heads, kv_heads, size, width, vocabulary, _ = parts.sizes
    rows = [heads * size, kv_heads * size, kv_heads * size]
    rows = rows if len(parts.family.qkv) == 3 else [sum(rows)]
    if parts.family.by_heads and heads != kv_heads:
        return False
    layers, names, _ = decoder_layers(model)
    for layer_parts, layer in zip(parts.layers, layers, strict=True):
        ffn: Any = layer.get_submodule(names.ffn)
        ffns = [getattr(ffn, name) for name in (names.gate, names.up, names.down) if name]
        attention = _attention_of(layer, names, parts.family)
        expected = [*((n, hidden) for n in rows), (hidden, heads * size)]
        expected += [(width * (2 if names.fused else 1), hidden)] * (len(ffns) - 1)
        expected += [(hidden, width)]
        matrices = [*layer_parts.qkv, layer_parts.out, *(matrix_of(module) for module in ffns)]
        if [tuple(t.shape) for t in matrices] != expected:
            return False
        if not all(_has_contiguous_rows(module) for module in (*attention, *ffns[:-1])):
            return False
    ends = (parts.embedding, parts.head, parts.norm.factor)
    return len(parts.embedding) >= vocabulary and all(t.is_contiguous() for t in ends)


def _attention_of(layer: nn.Module, names: LayerNames, family: Family) -> list[Any]:
    """The projections of one layer's attention, the output projection last."""
    path, _, out = names.attention_out.rpartition(".")
    attention = layer.get_submodule(path)
    return [getattr(attention, name) for name in (*family.qkv, out)]


def _has_contiguous_rows(module: Any) -> bool:
    weight = module.weight
    # the second layout is that of a Conv1D in an attached model
    return weight.is_contiguous() or (is_by_inputs(module) and weight.t().is_contiguous())


def attention_by_inputs(model: Any) -> list[nn.Module]:
    """The attention projections that store weights as [in, out]; steps must support the model."""
    layers, names, text = decoder_layers(model)
    family = FAMILIES[text.model_type]
    projections = [module for layer in layers for module in _attention_of(layer, names, family)]
    return [module for module in projections if is_by_inputs(module)]


def step_parts(model: Any) -> StepParts:
    """The parts of ``model`` that steps use; ``step_unsupported_reason(model)`` must be None."""
    layers, names, text = decoder_layers(model)
    family = FAMILIES[text.model_type]
    decoder: Any = decoder_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first: Any = layers[0]
    path = names.attention_out.rpartition(".")
    attention = first.get_submodule(path[0])
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    size = int(getattr(attention, "head_dim", None) or attention.head_size)
    tables = tuple(sorted(set(text.layer_types))) if family.kinds else ("",)
    rotary = getattr(decoder, "rotary_emb", None)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    down = getattr(first.get_submodule(names.ffn), names.down)
    width, vocabulary = int(matrix_of(down).shape[1]), int(head.weight.shape[0])
    norm = _norm(family, getattr(decoder, family.last_norm))
    assert norm is not None
    scale = getattr(embedding, "embed_scale", None)
    return StepParts(
        family,
        [hidden, heads, kv_heads, size, width, vocabulary, _rotated_size(rotary)],
        norm.eps,
        float(attention.scaling),
        embedding.weight.detach(),
        getattr(decoder, family.positions).weight.detach() if family.positions else None,
        norm,
        head.weight.detach(),
        [_layer(layer, index, family, path, tables, text) for index, layer in enumerate(layers)],
        rotary,
        1.0 if scale is None else float(scale.to(head.weight.dtype)),
        float(text.attn_logit_softcapping or 0) if family.capped else 0.0,
        float(getattr(text, "final_logit_softcapping", None) or 0),
        bool(getattr(first, "use_parallel_residual", False)),
        tables,
    )


def _rotated_size(rotary: nn.Module | None) -> int:
    """Number of values of an attention head that are rotated."""
    buffers = () if rotary is None else rotary.named_buffers()
    frequencies = [t for name, t in buffers if name.endswith("inv_freq") and "original" not in name]
    return 2 * len(frequencies[0]) if frequencies else 0


def _layer(
    layer: Any, index: int, family: Family, path: Any, tables: tuple[str, ...], text: Any
) -> LayerParts:
    attention = layer.get_submodule(path[0])
    qkv = [getattr(attention, name) for name in family.qkv]
    out = getattr(attention, path[2])
    kinds = getattr(text, "layer_types", None)
    kind = kinds[index] if kinds else ("sliding_attention" if family.slides else "full_attention")
    window = getattr(text, "sliding_window", None) if kind == "sliding_attention" else None
    rotates = not family.positions and getattr(attention, "use_rope", True)
    table = tables.index(kind) if family.kinds else 0

    def norms(module: Any, names: tuple[str, str]) -> tuple[Norm | None, Norm | None]:
        # faster than getattr where the attribute is missing
        first, second = (module._modules.get(name) for name in names)
        return _norm(family, first), _norm(family, second)

    return LayerParts(
        norms(layer, family.before),
        norms(layer, family.after),
        tuple(matrix_of(module).detach() for module in qkv),
        tuple(None if module.bias is None else module.bias.detach() for module in qkv),
        matrix_of(out).detach(),
        None if out.bias is None else out.bias.detach(),
        norms(attention, ("q_norm", "k_norm")),
        window,
        table if rotates else None,
    )


def _norm(family: Family, module: Any) -> Norm | None:
    if module is None:
        return None
    factor, bias = module.weight.detach(), module._parameters.get("bias")
    if family.offset is not None:
        with torch.inference_mode(False), torch.no_grad():
            factor = family.offset + factor.float()
    bias = None if bias is None else bias.detach()
    eps = getattr(module, "variance_epsilon", None)
    eps = float(module.eps if eps is None else eps)
    return Norm(factor, bias, eps, isinstance(module, nn.LayerNorm))


def norms_of(parts: StepParts) -> Iterator[Norm | None]:
    """The decoder's last norm, then each layer's norms of attention, FFN, q and k."""
    yield parts.norm
    for layer in parts.layers:
        for pair in zip(layer.before, layer.after, strict=True):
            yield from pair
        yield from layer.head_norms


def angles(
    parts: StepParts, count: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, tables, R] float32 of the first ``count`` positions.

    They are rounded as in the model.
    """
    if parts.rotary is None:
        return torch.empty(count, 0, 0, device=device), torch.empty(count, 0, 0, device=device)
    positions = torch.arange(count, device=device)[None]
    like = torch.empty(0, dtype=dtype, device=device)
    kinds = [(kind,) if kind else () for kind in parts.tables]
    tables = [parts.rotary(like, positions, *kind) for kind in kinds]
    cosine, sine = (torch.stack([table[side][0].float() for table in tables], 1) for side in (0, 1))
    return cosine, sine
