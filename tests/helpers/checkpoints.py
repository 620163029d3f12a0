"""Tiny checkpoints on disk: a GGUF file, and a transformers folder."""

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
    shape = Shape(architecture, width, settings.get("context", CONTEXT))
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in {**SETTINGS, **shape.facts(), "name": settings.get("name", "tiny")}.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in settings.get("facts", {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{name}", value)

    def add(name, rows, columns, kind):
        if (found := (change or {}).get(name, (rows, columns, kind))) is None:
            return
        rows, columns, kind = found
        if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):  # which gguf does not round to
            seed, size = int(draw.integers(1 << 30)), 0.005 if kind == Kind.Q6_K else 0.02
            blocks = drawn_blocks(kind.name.lower(), rows, columns, seed, size)[0].numpy()
        else:
            weights = 0.1 * draw.standard_normal((rows, columns), dtype=np.float32)
            blocks = gguf.quants.quantize(weights, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, width, settings.get("embedding", Kind.Q8_0))
    if not settings.get("tied", True):
        add("output.weight", VOCABULARY, width, attention)
    for layer in range(LAYERS):
        for part, sizes in shape.attention().items():
            add(f"blk.{layer}.{part}.weight", *sizes, attention)
        for part, sizes in shape.ffn().items():
            kind = settings.get("down", ffn) if part == "ffn_down" else ffn
            add(f"blk.{layer}.{part}.weight", *sizes, kind)
        for part, length in shape.drawn().items():
            values = 1 + 0.1 * draw.standard_normal(length, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.{part}", values)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    for name, values in shape.ends(draw).items():
        writer.add_tensor(name, values)
    for name, values in settings.get("tensors", {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Shape:
    """Names and sizes of what a file of ``architecture`` holds, of two heads."""

    def __init__(self, architecture, width, context):
        self.architecture, self.width, self.context = architecture, width, context
        self.size = 128 if architecture == "qwen3" else width // 2  # transformers has it fixed

    @property
    def ffn_width(self):
        if self.architecture == "gpt2":  # which transformers does not read from a file
            return 4 * self.width
        return 2 * self.width if self.width > WIDTH else FFN_WIDTH

    def facts(self):
        found = {"context_length": self.context, "embedding_length": self.width}
        found |= {"feed_forward_length": self.ffn_width}
        if self.architecture != "llama":
            found |= {"key_length": self.size, "value_length": self.size}
        if self.architecture == "gpt2":
            found |= {"layer_norm_eps": 1e-5}
        if self.architecture == "phi3":  # or it has one outside of a small vocabulary
            found |= {"pad_token_id": 1}
        return found

    def attention(self):
        inner = 2 * self.size
        if self.architecture in ("phi3", "gpt2"):
            found = {"attn_qkv": (3 * inner, self.width)}
        else:
            found = {f"attn_{part}": (inner, self.width) for part in "qkv"}
        return found | {"attn_output": (self.width, inner)}

    def ffn(self):
        gated, rows = {"ffn_gate": (self.ffn_width, self.width)}, self.ffn_width
        if self.architecture in ("phi3", "gpt2"):
            gated, rows = {}, rows * (2 if self.architecture == "phi3" else 1)
        return {**gated, "ffn_up": (rows, self.width), "ffn_down": (self.width, self.ffn_width)}

    def drawn(self):
        """Vectors that a layer has beside Llama's."""
        after = {f"post_{part}.weight": self.width for part in ("attention_norm", "ffw_norm")}
        normed = {f"attn_{part}_norm.weight": self.size for part in "qk"}
        matrices = {**self.attention(), **self.ffn()}
        biases = {f"{part}.bias": rows for part, (rows, _) in matrices.items()}
        biases |= {f"{part}.bias": self.width for part in ("attn_norm", "ffn_norm")}
        return {
            "qwen2": {f"attn_{part}.bias": 2 * self.size for part in "qkv"},
            "qwen3": normed,
            "gemma2": after,
            "gemma3": after | normed,
            "gpt2": biases,
        }.get(self.architecture, {})

    def ends(self, draw):
        """Vectors and positions that stand outside of the layers."""
        if self.architecture != "gpt2":
            return {}
        return {
            "position_embd.weight": 0.1
            * draw.standard_normal((self.context, self.width), dtype=np.float32),
            "output_norm.bias": 0.1 * draw.standard_normal(self.width, dtype=np.float32),
        }


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
