"""Tiny encoders on disk and in memory: a random BERT that sentence-transformers reads, and counts
of words in place of embeddings, whose cosines are known by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = (
    "a the cat dog sat ran on in mat garden rain fell sun shone all day night red blue fish swam "
    "bird sang loud quiet house stood hill river ran deep wide moon rose . , ! ?"
).split()
WIDTH, LAYERS, POSITIONS = 16, 3, 24


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT (3 layers, window of 22 tokens between [CLS] and [SEP]) with mean pooling."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(
        vocab={word: place for place, word in enumerate(vocabulary)}, model_max_length=POSITIONS
    )
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write(folder / "1_Pooling" / "config.json", pooling())
    write(folder / "sentence_bert_config.json", {"max_seq_length": POSITIONS})
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    return folder


def pooling() -> dict[str, object]:
    """The settings of mean pooling."""
    return {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}


def write(path: Path, data: object) -> None:
    """Put JSON into ``path``."""
    path.write_text(json.dumps(data))


def count_words(text: str) -> int:
    """Words as tokens."""
    return len(text.split())


class WordCounts:
    """Stands for an ``Embedder``: a text's vector counts its words."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """One row per text, [texts, 200]."""
        rows = np.zeros((len(texts), 200))
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[self.places.setdefault(word, len(self.places))] += 1
        return rows
