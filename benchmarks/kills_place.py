"""What benchmarks/kills.py kills: a tiny model made on the spot, texts for it, and the commands."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEES = "The bees fly from flower to flower and carry what they find home. "
LOANS = "A loan of 900 is paid back in 12 parts; the bank adds 3 to each. "
WINDOWS = ["--prompt-tokens", "64", "--scored-tokens", "24"]
GRID = ["--methods", "dense,griffin,static", "--sparsities", "0.3,0.5", *WINDOWS, "--limit", "4"]
RUN_WINDOWS = [word.replace("--", "--ppl-") for word in WINDOWS]
COMMANDS: dict[str, list[str]] = {
    "run": [
        *("run", "--method", "dart-prompt", "--sparsity", "0.5", "--prompt", BEES + BEES),
        *("--generation", "60", "--eval-perplexity", "--ppl-datasets", "text.txt", *RUN_WINDOWS),
        *("--ppl-max-samples", "8"),
    ],
    "eval": [
        *("eval", "--tasks", "perplexity:text.txt,perplexity:other.txt", "--dense"),
        *("--method", "griffin", "--sparsity", "0.5", "--limit", "6", *WINDOWS),
    ],
    "sweep": ["sweep", *GRID, "--tasks", "perplexity:text.txt,perplexity:other.txt"],
    "compare": ["compare", *GRID, "--tasks", "perplexity:text.txt,perplexity:other.txt"],
    "drift": [
        *("drift", "--passages", "passages.jsonl", "--prompt-tokens", "64", "--sparsity", "0.5"),
        *("--methods", "dense,never,interval:16,griffin,published"),
    ],
}
SERVE = ["serve", "--method", "griffin", "--sparsity", "0.5", "--results-dir", ""]
OPTIONS = ["--model", "model", "--device", "cpu"]


def write_place(folder: Path) -> None:
    """Put ``model`` and the texts into ``folder``."""
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *letters])}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    for name, step in (("text.txt", 7), ("other.txt", 11)):
        lines = [f"Line {n}: the {n * step % 97} birds of winter.\n" for n in range(60)]
        (folder / name).write_text("".join(lines))
    _write_rows(folder / "passages.jsonl", [_passage("one", 3), _passage("two", 4)])


def _passage(name: str, times: int) -> dict[str, Any]:
    first, second = (BEES * times).strip(), (LOANS * times).strip()
    topics = [{"name": topic, "domain": topic} for topic in ("bees", "loans")]
    text = f"{first}\n\n{second}"
    return {"id": name, "text": text, "topics": topics, "changes": [len(first) + 2]}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
