"""Texts as vectors; the only file that imports ``sentence_transformers``.

Any sentence-transformers model will do.  A text that is longer than the model's window is cut into
windows (``text_windows``), and its vector is the mean of theirs, weighted by their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.bars import bars
from dart_llm.devices import memory_failure, parse_device
from dart_llm.encoder_source import EncoderSource, find_encoder
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.hub_errors import plain
from dart_llm.pip_file import Progress
from dart_llm.text_windows import windows

Array = NDArray[np.float64]
BATCH = 32
"""Windows that are encoded together."""


@dataclass(frozen=True)
class Embedder:
    """A loaded model.  ``window``: text tokens that fit it at once; None without a limit."""

    model: Any
    source: EncoderSource
    window: int | None

    def embed(self, texts: Sequence[str]) -> Array:
        """One row per text: [texts, dimensions], float64; the row of an empty text is zero."""
        pieces = [windows(text, self.count, self.window) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float64)
        if not flat:
            return rows
        encoded = iter(self._encode(flat))
        for row, of_text in zip(rows, pieces, strict=True):
            vectors = [next(encoded) for _ in of_text]
            if len(vectors) > 1:
                weights = [max(1, self.count(piece)) for piece in of_text]
                row[:] = np.average(vectors, axis=0, weights=weights)
            elif vectors:
                row[:] = vectors[0]
        return rows

    def count(self, text: str) -> int:
        """Tokens of ``text``, without those that the model adds at its ends."""
        found = self.model.tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        return len(found["input_ids"])

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self.model.get_embedding_dimension())

    def _encode(self, texts: list[str]) -> Array:
        found = self.model.encode(
            texts, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(found, dtype=np.float64)


def load_embedder(
    name: str | None = None,
    *,
    device: str | None = "cpu",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Embedder:
    """Load ``name``: all-MiniLM-L6-v2 (if None), a folder or a hub id.

    Raises ``MissingExtra`` without sentence-transformers, ``LoadError`` when the model cannot be
    had or read.
    """
    library = _library()
    source = find_encoder(name, cache_dir=cache_dir, progress=progress)
    try:
        with bars(shown=False):
            model = library.SentenceTransformer(
                str(source.folder), device=parse_device(device).first, local_files_only=True
            )
        window = _window(model)
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as a sentence-transformers model: {plain(error)}"
        ) from error
    return Embedder(model, source, window)


def unit(rows: Array) -> Array:
    """Rows [n, dimensions] scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return scaled


def cosine(a: Array, b: Array) -> float:
    """Cosine of two vectors [dimensions], in [-1, 1]; 0 if one of them is zero."""
    first, second = unit(np.stack([a, b]))
    return float(np.clip(first @ second, -1.0, 1.0))


def _library() -> Any:
    try:
        return import_module("sentence_transformers")
    except ImportError as error:
        raise MissingExtra("sentence-transformers", "drift") from error


def _window(model: Any) -> int | None:
    """Text tokens that the model reads at once: its window without the tokens that it adds."""
    longest = model.max_seq_length
    if longest is None or longest > 1_000_000:  # "no limit" is written as 1e30 or infinity
        return None
    return max(1, int(longest) - int(model.tokenizer.num_special_tokens_to_add()))
