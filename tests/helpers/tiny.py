"""Tiny random models of every supported architecture, made from configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, HIDDEN, WIDTH, LAYERS = 96, 32, 48, 4

_GATED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256}
_NEOX = {key: value for key, value in _GATED.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "llama-bias": ("llama", {**_GATED, "mlp_bias": True}),
    "mistral": ("mistral", {**_GATED, "head_dim": 8}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 8}),
    "smollm3": ("smollm3", _GATED),
    "gemma": ("gemma", {**_GATED, "head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "olmo2": ("olmo2", _GATED),
    "phi3": ("phi3", _GATED),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_inner": WIDTH,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "falcon": (
        "falcon",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "n_layer": LAYERS,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "phi": ("phi", _NEOX),
    "stablelm": ("stablelm", _GATED),
    "stablelm-parallel": ("stablelm", {**_GATED, "use_parallel_residual": True}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "ffn_dim": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": HIDDEN,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}
CONFIGS["falcon-new"] = (
    "falcon",
    {**CONFIGS["falcon"][1], "new_decoder_architecture": True, "num_kv_heads": 2},
)
CONFIGS["falcon-serial"] = ("falcon", {**CONFIGS["falcon"][1], "parallel_attn": False})
CONFIGS["opt-postnorm"] = ("opt", {**CONFIGS["opt"][1], "do_layer_norm_before": False})

NAMES = tuple(CONFIGS)


def tiny(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model; weights are scaled up so that tokens differ and attention is not flat."""
    model_type, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**settings)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / max(parameter.shape[-1], 1) ** 0.5)
            elif parameter.dim() == 1 and not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def tokens(rows: int = 1, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)
