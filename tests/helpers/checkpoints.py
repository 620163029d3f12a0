"""Tiny checkpoints on disk: a GGUF file, and a transformers folder."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, FFN_WIDTH, LAYERS, VOCABULARY, CONTEXT = 64, 96, 2, 300, 128


def write_gguf(path, ffn=Kind.Q4_1, architecture="llama", change=None):
    """A random Llama of 2 layers: embedding Q8_0, attention Q4_1, FFN ``ffn``, norms float32.

    ``change``: a tensor's name -> (rows, columns, kind), or None to leave it out.
    """
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in SETTINGS.items():
        getattr(writer, f"add_{name}")(value)
    size = 128 if architecture == "qwen3" else WIDTH // 2  # of a head: transformers has it fixed
    if architecture != "llama":
        writer.add_key_length(size)
        writer.add_value_length(size)

    def add(name, rows, columns, kind):
        if (shape := (change or {}).get(name, (rows, columns, kind))) is None:
            return
        rows, columns, kind = shape
        weights = 0.1 * draw.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH, Kind.Q8_0)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v"):
            add(f"blk.{layer}.{part}.weight", 2 * size, WIDTH, Kind.Q4_1)
        add(f"blk.{layer}.attn_output.weight", WIDTH, 2 * size, Kind.Q4_1)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", FFN_WIDTH, WIDTH, ffn)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FFN_WIDTH, ffn)
        for part, length in FURTHER.get(architecture, {}).items():
            values = 1 + 0.1 * draw.standard_normal(length, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.{part}", values)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def facts(**known):
    """What is recorded of a checkpoint, where nothing else is known."""
    plain = {"revision": None, "file_quantisation": "none", "dtype": "bfloat16"}
    return {**plain, **known}


def write_folder(folder, **settings):
    """A random Llama in bfloat16 with a byte-level tokenizer, as ``save_pretrained`` writes it.

    ``settings``: further ones of its configuration.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**sizes, **settings)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def _tokens():
    tokens = ["<s>", "</s>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    return tokens + [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]


_AFTER = {"post_attention_norm.weight": WIDTH, "post_ffw_norm.weight": WIDTH}
FURTHER = {
    "qwen2": {f"attn_{part}.bias": WIDTH for part in "qkv"},
    "qwen3": {f"attn_{part}_norm.weight": 128 for part in "qk"},
    "gemma2": _AFTER,
    "gemma3": _AFTER | {f"attn_{part}_norm.weight": WIDTH // 2 for part in "qk"},
}
"""Vectors that layers of an architecture have beside Llama's."""

SETTINGS = {
    "name": "tiny",
    "file_type": gguf.LlamaFileType.MOSTLY_Q4_1,
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "feed_forward_length": FFN_WIDTH,
    "head_count": 2,
    "head_count_kv": 2,
    "layer_norm_rms_eps": 1e-5,
    "rope_freq_base": 10000.0,
    "vocab_size": VOCABULARY,
    "tokenizer_model": "gpt2",
    "token_list": _tokens(),
    "token_types": [3, 3, 3] + [1] * (VOCABULARY - 3),
    "token_merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "unk_token_id": 2,
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
