"""Finds the modules of a Hugging Face model that pruning uses.

Only this file and architectures.py use transformers' names for these modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dart_llm.errors import UnsupportedModel
from dart_llm.models.agreement import check_ffns
from dart_llm.models.architectures import LAYER_NAMES, LayerNames
from dart_llm.models.ffn import FfnBlock, is_plain, matrix_of
from dart_llm.pruning.accounting import BFLOAT16, TokenTraffic
from dart_llm.pruning.weights import FfnWeights, stored_bytes


@dataclass(frozen=True)
class ModelView:
    """A causal language model as the rest of the package sees it."""

    blocks: tuple[FfnBlock, ...]
    attention_out: nn.Module
    """Output projection of the last layer's attention; a drift detector may watch its output."""
    decoder: nn.Module
    """The decoder without its head; a drift detector may watch its first output."""
    input_embedding: Tensor | None
    output_embedding: Tensor | None
    attention: tuple[tuple[nn.Module, ...], ...]
    """The projections of each layer's attention, the output projection last."""
    parameter_bytes: int
    """Bytes of the weights that one decoded token reads, without its row of the input embedding."""
    traffic: TokenTraffic
    """Bytes that one decoded token reads, by part of the model and for the KV cache.

    Unquantised values count as bfloat16.
    """

    def signal(self, name: str) -> nn.Module:
        """The module whose output a drift detector watches; ``name``: "hidden" or "attention"."""
        return self.decoder if name == "hidden" else self.attention_out

    def weights(self, proxy_embedding: str, seed: int) -> tuple[FfnWeights, ...]:
        """The FFN weights of all layers, with the output or input embedding for proxy scores."""
        rows = self.output_embedding if proxy_embedding == "output" else self.input_embedding
        last = max(1, len(self.blocks) - 1)
        return tuple(block.weights(block.index / last, rows, seed) for block in self.blocks)


def widths(model: nn.Module) -> list[int]:
    """Number of neurons in each layer's FFN; raises ``UnsupportedModel`` as ``describe`` does."""
    return [block.down_width for block in describe(model).blocks]


def describe(model: nn.Module) -> ModelView:
    """Find the parts of a model; raise ``UnsupportedModel`` if one of them is not supported."""
    if type(model).__module__.startswith("peft."):
        raise UnsupportedModel(
            f"{type(model).__module__}.{type(model).__name__} is a PEFT model: call "
            "merge_and_unload() and prune the model that it returns"
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            f"{type(model).__name__} wraps a compiled model, and its generate bypasses the "
            "wrapper: prune the model inside it, prune(model._orig_mod, ...)"
        )
    layers, names, text = decoder_layers(model)
    blocks = tuple(_block(index, layer, names, text) for index, layer in enumerate(layers))
    check_ffns(type(model).__name__, blocks)
    attention = tuple(_attention(layer, names) for layer in layers)
    return ModelView(
        blocks,
        layers[-1].get_submodule(names.attention_out),
        decoder_of(model),
        _weight(model.get_input_embeddings()),  # type: ignore[operator]
        _weight(model.get_output_embeddings()),  # type: ignore[operator]
        attention,
        sum(weight.nbytes for weight in _read(model)),
        token_traffic(model, blocks, attention),
    )


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, LayerNames, Any]:
    """The decoder's layers, the names of their modules, and the text model's configuration.

    Raises ``UnsupportedModel`` if the class or model type is not supported.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model: pass the model that load or "
            "from_pretrained returns"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is an encoder-decoder; only causal language models can be "
            "pruned"
        )
    text = config.get_text_config()
    names = LAYER_NAMES.get(text.model_type)
    layers = _layer_list(model, text.num_hidden_layers, text.model_type)
    if names is None:
        raise UnsupportedModel(
            f"model type {text.model_type!r} (its layer is {type(layers[0]).__name__}) is not "
            f"supported; supported are {', '.join(sorted(LAYER_NAMES))}"
        )
    return layers, names, text


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder, whose first output is the last hidden state, after the last norm."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]


def _layer_list(model: nn.Module, count: int, model_type: str) -> nn.ModuleList:
    for root in (decoder_of(model), model):
        for name, module in root.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) != count:
                continue
            if name.split(".")[-1] in ("layers", "h"):
                return module
    raise UnsupportedModel(
        f"{type(model).__name__} (model type {model_type!r}) has no list of {count} decoder layers"
    )


def _block(index: int, layer: nn.Module, names: LayerNames, text: Any) -> FfnBlock:
    ffn = layer.get_submodule(names.ffn) if names.ffn else layer
    for name in filter(None, (names.up, names.down, names.act, names.gate)):
        if not hasattr(ffn, name):
            kind = "a mixture of experts" if hasattr(ffn, "experts") else "unknown"
            raise UnsupportedModel(
                f"layer {index}: {type(ffn).__name__} has no {name!r} (its FFN is {kind}); only "
                f"dense FFNs of {text.model_type} can be pruned"
            )
    if getattr(ffn, "slow_but_exact", False):
        raise UnsupportedModel(
            f"layer {index}: {type(ffn).__name__} with slow_but_exact=True splits its down "
            "projection, which cannot be pruned; set slow_but_exact=False"
        )
    return FfnBlock(
        index=index,
        ffn=ffn,
        up=getattr(ffn, names.up),
        gate=getattr(ffn, names.gate) if names.gate else None,
        down=getattr(ffn, names.down),
        act=getattr(ffn, names.act),
        fused=names.fused,
        inline=not names.ffn,
        adds_residual=names.adds_residual,
        dropout=getattr(ffn, names.dropout) if names.dropout else None,
        x_from=_x_from(layer, names),
        post_norm=getattr(layer, names.post_norm) if names.post_norm else None,
        width_key=names.width,
    )


def _x_from(layer: nn.Module, names: LayerNames) -> nn.Module | None:
    if names.up == "fc1" and not names.ffn and not getattr(layer, "do_layer_norm_before", True):
        return getattr(layer, names.up)  # type: ignore[no-any-return]  # OPT-350m norms after the FFN
    # a module that the configuration turns off may be None (StableLM)
    modules = (getattr(layer, name, None) for name in names.x_from)
    return next((module for module in modules if module is not None), None)


def _attention(layer: nn.Module, names: LayerNames) -> tuple[nn.Module, ...]:
    """The projections of a layer's attention, the output projection last."""
    out = layer.get_submodule(names.attention_out)
    attention = layer.get_submodule(names.attention_out.rpartition(".")[0])
    inputs = (module for module in attention.modules() if is_plain(module) and module is not out)
    return *inputs, out


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def context_length(model: Any) -> int | None:
    """The model's context length in tokens, or None when its configuration does not state it."""
    return configured_context(model.config)


def configured_context(config: Any) -> int | None:
    """The context length in tokens that a configuration states, or None."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _read(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a decoded token reads in full; the input embedding only if it is the head."""
    inputs = _weight(model.get_input_embeddings())  # type: ignore[operator]
    head = _weight(model.get_output_embeddings())  # type: ignore[operator]
    return [p for p in model.parameters() if p is not inputs or p is head]


def token_traffic(
    model: nn.Module, blocks: Sequence[FfnBlock], attention: Sequence[Sequence[nn.Module]]
) -> TokenTraffic:
    """Bytes that a decoded token reads, by part of the model; unquantised weights as bfloat16."""
    ffn = {id(part.weight) for block in blocks for part in block.projections}
    heads = {id(module.weight) for layer in attention for module in layer}
    parts = dict.fromkeys(("ffn", "attention", "others"), 0.0)
    read, output = _read(model), _weight(model.get_output_embeddings())  # type: ignore[operator]
    stored = {id(weight): stored_bytes(weight, BFLOAT16) for weight in read}
    for weight in read:
        part = "ffn" if id(weight) in ffn else "attention" if id(weight) in heads else "others"
        parts[part] += stored[id(weight)]
    cache = Counter[int | None]()
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    for index, (*inputs, out) in enumerate(attention):
        # values in k and v: outputs of q, k and v, without q's (as many as ``out`` has inputs)
        values = sum(len(matrix_of(module)) for module in inputs) - matrix_of(out).shape[1]
        slides = kinds is None or kinds[index] == "sliding_attention"
        cache[window if slides else None] += BFLOAT16 * values
    dense = BFLOAT16 * sum(weight.numel() for weight in read)
    caches = tuple((size, most) for most, size in cache.items())
    head = sum(stored[id(weight)] for weight in read if weight is output)
    return TokenTraffic(dense, **parts, cache=caches, head=head)


def weight_facts(model: Any) -> dict[str, Any]:
    """Exact bytes of the weights, under the names that results use.

    The result has ``weight_bytes``: bytes of all weights; ``dtype_bytes``: bytes that they would
    need in the model's dtype; ``weight_bits``: bits of that dtype; and ``mean_weight_bits``: stored
    bits per weight.  If the model can be pruned, it also has ``bytes_per_token``: bytes of weights
    that one decoded token reads; ``ffn_bytes_share``: bytes of the FFNs, divided by their bytes in
    the model's dtype; ``ffn_share_of_bfloat16``: bytes of the FFNs, divided by their bytes in
    bfloat16, with unquantised weights as bfloat16; and ``token_traffic``: a ``TokenTraffic`` as
    plain data.
    """
    stored = {id(weight): weight.nbytes for weight in model.parameters()}
    total, count = sum(stored.values()), sum(weight.numel() for weight in model.parameters())
    facts = {
        "weight_bytes": total,
        "dtype_bytes": sum(_dtype_bytes(weight) for weight in model.parameters()),
        "weight_bits": 8 * model.dtype.itemsize,
        "mean_weight_bits": 8 * total / count,
    }
    try:
        view = describe(model)
    except UnsupportedModel:
        return facts
    ffn: list[Any] = [part.weight for block in view.blocks for part in block.projections]
    rows, head = view.input_embedding, view.output_embedding
    looked_up = stored.get(id(rows), 0) if rows is not None and rows is not head else 0
    traffic = token_traffic(model, view.blocks, view.attention)
    return {
        **facts,
        "bytes_per_token": total - looked_up,
        "token_traffic": traffic.to_dict(),
        "ffn_share_of_bfloat16": traffic.ffn / (BFLOAT16 * sum(weight.numel() for weight in ffn)),
        "ffn_bytes_share": sum(stored[id(weight)] for weight in ffn) / sum(map(_dtype_bytes, ffn)),
    }


def _dtype_bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
