"""Tiny random models of every supported architecture, made from configurations."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, HIDDEN, WIDTH, LAYERS = 96, 32, 48, 4

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAD = {"pad_token_id": 0}
_NEOX = {**_BASE, **_PAD, "intermediate_size": WIDTH}
_GATED = {**_NEOX, "num_key_value_heads": 2}
_HEADS = {**_GATED, "head_dim": 8}
_WINDOW = {**_HEADS, "sliding_window": 24}
"""Less than the texts of most tests."""

_GEMMA = {**_WINDOW, "query_pre_attn_scalar": 8}
_KINDS = ["sliding_attention", "full_attention", *["sliding_attention"] * 2]
_FALCON = {**_BASE, "ffn_hidden_size": WIDTH}
_OPT = {**_BASE, **_PAD, "ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN}
_BARE = {key: _BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
_GPT2 = _BARE | {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": 4}
_GPT2 |= {"n_positions": 512}
_BLOOM = _BARE | _PAD | {"hidden_size": 16, "n_layer": LAYERS, "n_head": 4}

CONFIGS = {
    "llama": ("llama", _GATED),
    "llama-bias": ("llama", {**_GATED, "mlp_bias": True}),
    "mistral": ("mistral", _WINDOW),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", _HEADS),
    "smollm3": ("smollm3", _GATED),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": _KINDS}),
    "olmo2": ("olmo2", _GATED),
    "phi3": ("phi3", _GATED),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "falcon": ("falcon", _FALCON),
    "bloom": ("bloom", _BLOOM),
    "phi": ("phi", _NEOX),
    "stablelm": ("stablelm", _GATED),
    "stablelm-parallel": ("stablelm", {**_GATED, "use_parallel_residual": True}),
    "opt": ("opt", _OPT),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-serial": ("falcon", {**_FALCON, "parallel_attn": False}),
    "opt-postnorm": ("opt", {**_OPT, "do_layer_norm_before": False}),
}

NAMES = tuple(CONFIGS)


def tiny(name="llama", seed=0, dtype=torch.float32, **sizes):
    """A random model, of large weights so that tokens differ; ``sizes``: of its configuration."""
    model_type, settings = CONFIGS[name]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**settings, **sizes})
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


def drawn(*shape, seed=0):
    """Normal random numbers of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows=1, length=24, seed=0):
    """Random token ids [rows, length] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)
