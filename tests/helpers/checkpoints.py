"""Tiny checkpoints on disk: a GGUF file, a transformers folder; a program that times them."""

import sys

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packed_cases import drawn_blocks

WIDTH, FFN_WIDTH, LAYERS, VOCABULARY, CONTEXT = 64, 96, 2, 300, 128


def write_gguf(path, ffn=Kind.Q4_1, architecture="llama", change=None, **settings):
    """A random model of 2 layers: embedding Q8_0, attention Q4_1, FFN ``ffn``, norms float32.

    ``change``: a tensor's name -> (rows, columns, kind), or None to leave it out.  ``settings``:
    kinds of ``embedding``, ``attention`` and ``down``; ``width``: 64, or one that blocks of
    256 divide; ``context``; ``tied``: no head; ``name``; ``facts``: more metadata of the
    architecture; ``tensors``: more of them.
    """
    draw = np.random.default_rng(0)
    width, attention = settings.get("width", WIDTH), settings.get("attention", Kind.Q4_1)
    context = settings.get("context", CONTEXT)
    facts, matrices, vectors = _layer(architecture, width)
    writer = gguf.GGUFWriter(str(path), architecture)
    facts |= {"context_length": context, "name": settings.get("name", "tiny")}
    for name, value in {**SETTINGS, **facts}.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in settings.get("facts", {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{name}", value)

    def add(name, rows, columns, kind):
        if (size := (change or {}).get(name, (rows, columns, kind))) is None:
            return
        rows, columns, kind = size
        if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):  # which gguf does not round to
            seed, scale = int(draw.integers(1 << 30)), 0.005 if kind == Kind.Q6_K else 0.02
            blocks = drawn_blocks(kind.name.lower(), rows, columns, seed, scale)[0].numpy()
        else:
            weights = 0.1 * draw.standard_normal((rows, columns), dtype=np.float32)
            blocks = gguf.quants.quantize(weights, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, width, settings.get("embedding", Kind.Q8_0))
    if not settings.get("tied", True):
        add("output.weight", VOCABULARY, width, attention)
    plain = {"output_norm.weight": np.ones(width)}
    for layer in range(LAYERS):
        for part, sizes in matrices.items():
            kind = attention if part.startswith("attn") else ffn
            kind = settings.get("down", ffn) if part == "ffn_down" else kind
            add(f"blk.{layer}.{part}.weight", *sizes, kind)
        for part, length in vectors.items():
            plain[f"blk.{layer}.{part}"] = 1 + 0.1 * draw.standard_normal(length)
        for part in ("attn_norm", "ffn_norm"):
            plain[f"blk.{layer}.{part}.weight"] = np.ones(width)
    if architecture == "gpt2":
        plain["position_embd.weight"] = 0.1 * draw.standard_normal((context, width))
        plain["output_norm.bias"] = 0.1 * draw.standard_normal(width)
    for name, values in {**plain, **settings.get("tensors", {})}.items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _layer(architecture, width):
    """Metadata, matrices and vectors beside Llama's norms, of a layer with two heads."""
    size = 128 if architecture == "qwen3" else width // 2  # transformers has it fixed
    neurons = 2 * width if width > WIDTH else FFN_WIDTH
    neurons = 4 * width if architecture == "gpt2" else neurons  # transformers does not read it
    fused = architecture in ("phi3", "gpt2")
    facts = {"embedding_length": width, "feed_forward_length": neurons}
    if architecture != "llama":
        facts |= {"key_length": size, "value_length": size}
    if architecture == "gpt2":
        facts |= {"layer_norm_eps": 1e-5}
    if architecture == "phi3":  # or it has one outside of a small vocabulary
        facts |= {"pad_token_id": 1}
    matrices = {"attn_qkv": (6 * size, width)} if fused else {}
    matrices |= {} if fused else {f"attn_{part}": (2 * size, width) for part in "qkv"}
    matrices |= {"attn_output": (width, 2 * size)}
    matrices |= {} if fused else {"ffn_gate": (neurons, width)}
    matrices |= {"ffn_up": (neurons * (2 if architecture == "phi3" else 1), width)}
    matrices |= {"ffn_down": (width, neurons)}
    after = {f"post_{part}.weight": width for part in ("attention_norm", "ffw_norm")}
    normed = {f"attn_{part}_norm.weight": size for part in "qk"}
    biases = {f"{part}.bias": rows for part, (rows, _) in matrices.items()}
    biases |= {f"{part}.bias": width for part in ("attn_norm", "ffn_norm")}
    vectors = {
        "qwen2": {f"attn_{part}.bias": 2 * size for part in "qkv"},
        "qwen3": normed,
        "gemma2": after,
        "gemma3": after | normed,
        "gpt2": biases,
    }
    return facts, matrices, vectors.get(architecture, {})


def facts(**stated):
    """What is recorded of a checkpoint, where nothing else is stated."""
    return {"revision": None, "file_quantisation": "none", "dtype": "bfloat16", **stated}


def write_folder(folder, **settings):
    """A random Llama in bfloat16 with a byte-level tokenizer; ``settings``: of its config."""
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


SETTINGS = {
    "name": "tiny",
    "file_type": gguf.LlamaFileType.MOSTLY_Q4_1,
    "block_count": LAYERS,
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

FAKE = '''#!{python}
import json, os, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    seen = sorted(name for name in os.environ if name.startswith(("OMP_", "KMP_")))
    log.write(json.dumps([asked, seen]) + "\\n")
new, prompt = int(asked["-n"]), int(asked["-p"])
rows = [(0, new)] if new else [(prompt, 0)]
print(json.dumps([
    {{"n_prompt": p, "n_gen": n, "avg_ns": (p or n) * 2_000_000, "build_commit": "abc"}}
    for p, n in rows
]))
'''  # fmt: skip


def write_bench(folder):
    """A program that says 2 ms per token, and the log of what it was asked."""
    program, log = folder / "llama-bench", folder / "log"
    program.write_text(FAKE.format(python=sys.executable, log=str(log)), encoding="utf-8")
    program.chmod(0o755)
    return program, log
