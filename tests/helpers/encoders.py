"""Tiny encoders: a random BERT on disk that sentence-transformers reads, and counts of words in
place of embeddings, whose cosines are known by hand."""

import json
import re

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = (
    "a the cat dog sat ran on in mat garden rain fell sun shone all day night red blue fish swam "
    "bird sang loud quiet house stood hill river ran deep wide moon rose . , ! ?"
).split()
WIDTH, LAYERS, POSITIONS = 16, 3, 24
FILES = {
    "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": POSITIONS},
    "modules.json": [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ],
}


def write_encoder(folder, seed=0):
    """A random BERT (3 layers, window of 22 tokens between [CLS] and [SEP]) with mean pooling."""
    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
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
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(
        vocab={word: place for place, word in enumerate(vocabulary)}, model_max_length=POSITIONS
    ).save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def count_words(text):
    return len(text.split())


class WordCounts:
    """Stands for an ``Embedder``: a text's vector counts its words."""

    def __init__(self):
        self.places = {}

    def embed(self, texts):
        rows = np.zeros((len(texts), 200))
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[self.places.setdefault(word, len(self.places))] += 1
        return rows
