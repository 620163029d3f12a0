"""Write a model of a given shape with random weights, as a folder that every command can load.

    python benchmarks/random_checkpoint.py benchmarks/shapes/qwen2.5-1.5b-shape/config.json FOLDER

The weights are bfloat16 and the tokenizer is the default model's, so only speed is meaningful.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dart_llm.models.loading import load


def write(config: Path, folder: Path) -> Path:
    """Write the checkpoint to ``folder`` unless it exists; return ``folder``."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer = load("smollm2-135m")[1]
    shape = AutoConfig.from_pretrained(config)
    if shape.vocab_size < len(tokenizer):
        raise SystemExit(f"{config}: its vocabulary is smaller than the tokenizer's")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("config", type=Path, help="a config.json")
    options.add_argument("folder", type=Path, help="the folder to write")
    args = options.parse_args()
    print(write(args.config, args.folder))


if __name__ == "__main__":
    main()
