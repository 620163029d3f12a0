"""Write a GGUF file of a model shape, for llama-bench: random bfloat16 weights, no vocabulary.

    python benchmarks/random_gguf.py shapes/qwen2.5-1.5b-shape/config.json shape.gguf
    llama-quantize --pure shape.gguf shape-Q4_0.gguf Q4_0

Supports shapes of llama, qwen2 and qwen3.  ``bench speed --model FOLDER --reference llama.cpp
--reference-file FILE`` times the file beside the same shape in dart-llm (random_checkpoint.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

FAMILIES = ("llama", "qwen2", "qwen3")


def matrices(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every matrix."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, config.get("num_key_value_heads", heads) * size
    yield "token_embd", config["vocab_size"], hidden
    if not config.get("tie_word_embeddings", False):
        yield "output", config["vocab_size"], hidden
    parts = (("attn_q", queries, hidden), ("attn_k", keys, hidden), ("attn_v", keys, hidden))
    parts += (("attn_output", hidden, queries), ("ffn_gate", width, hidden))
    parts += (("ffn_up", width, hidden), ("ffn_down", hidden, width))
    for layer in range(config["num_hidden_layers"]):
        yield from ((f"blk.{layer}.{name}", rows, columns) for name, rows, columns in parts)


def vectors(config: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Name, length and value of norms and biases."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * size
    yield "output_norm.weight", hidden, 1.0
    for layer in range(config["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", hidden, 1.0
        if config["model_type"] == "qwen3":
            yield f"blk.{layer}.attn_q_norm.weight", size, 1.0
            yield f"blk.{layer}.attn_k_norm.weight", size, 1.0
        if config["model_type"] == "qwen2":
            for name, length in (("q", heads * size), ("k", keys), ("v", keys)):
                yield f"blk.{layer}.attn_{name}.bias", length, 0.0


def header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the metadata that llama.cpp needs."""
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path, help="a config.json")
    options.add_argument("out", type=Path, help="the file to write")
    args = options.parse_args()
    config = json.loads(args.config.read_text(encoding="utf-8"))
    if config["model_type"] not in FAMILIES:
        raise SystemExit(f"supported are {', '.join(FAMILIES)}, not {config['model_type']}")
    writer = gguf.GGUFWriter(str(args.out), config["model_type"], use_temp_file=True)
    header(writer, config)
    generator = torch.Generator().manual_seed(0)
    for name, rows, columns in matrices(config):
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16)
        drawn.normal_(0, 0.02, generator=generator)
        data = drawn.view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", data, raw_dtype=Kind.BF16)
    for name, length, value in vectors(config):
        writer.add_tensor(name, np.full(length, value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
