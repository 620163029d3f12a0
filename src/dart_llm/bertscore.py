"""BERTScore of a text against a reference; the only file that imports ``bert_score``.

Every token of one text is matched with the most similar token of the other, by the cosine of their
contextual embeddings (Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020).
Tokens weigh the same: there is no IDF, so the score of a pair depends on that pair alone.  There is
no rescaling either: unrelated texts are far above 0, and only differences between methods speak.

A text beyond the encoder's window is embedded window by window (``text_windows``), and the tokens
of all windows together are then matched with all tokens of the other text: no window is compared
with whichever window happens to have its number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm import default_embedder
from dart_llm.bars import bars
from dart_llm.devices import memory_failure, parse_device
from dart_llm.encoder_source import EncoderSource, find_encoder
from dart_llm.errors import ConfigError, LoadError, MissingExtra
from dart_llm.hub_errors import plain
from dart_llm.pip_file import Progress
from dart_llm.text_windows import windows

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = {default_embedder.NAME: 5, default_embedder.HUB_ID: 5}
"""Layers below the embeddings used, for encoders that bert-score has no number for.  MiniLM: 5 of
its 6, the share of the depth that bert-score uses for the encoders that were trained on sentence
similarity (sup-simcse-bert-base: 10 of 12)."""

BATCH = 16
"""Windows that are embedded together."""


@dataclass(frozen=True)
class BertScore:
    """Mean cosine of the candidate's tokens, of the reference's tokens, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class BertScorer:
    """A loaded encoder, cut off after ``layers`` layers.  ``window``: text tokens that fit it."""

    model: nn.Module
    tokenizer: Any
    source: EncoderSource
    layers: int
    window: int

    @property
    def label(self) -> str:
        """Encoder, layer and settings, for notes beside numbers."""
        return f"{self.source.label}, layer {self.layers}, no IDF, not rescaled"

    def score(self, candidate: str, reference: str) -> BertScore:
        """BERTScore, each number at most 1; all 0 when a text holds no token.

        Raises ``MissingExtra`` without the bert-score package.
        """
        if not (self.count(candidate) and self.count(reference)):
            return BertScore(0.0, 0.0, 0.0)
        found = _library().greedy_cos_idf(*self._embed(reference), *self._embed(candidate))
        precision, recall, f1 = (min(1.0, float(value)) for value in found)
        return BertScore(precision, recall, f1)

    def count(self, text: str) -> int:
        """Tokens of ``text``, without those that the model adds at its ends."""
        found = self.tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        return len(found["input_ids"])

    def _embed(self, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [1, tokens, D], mask [1, tokens] and weights [1, tokens] of all windows."""
        weights: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
        weights[self.tokenizer.cls_token_id] = weights[self.tokenizer.sep_token_id] = 0.0
        embeddings, mask, weight = _library().get_bert_embedding(
            windows(text, self.count, self.window),
            self.model,
            self.tokenizer,
            weights,
            batch_size=BATCH,
            device=next(self.model.parameters()).device,
        )
        real = mask.bool().cpu()
        joined: Tensor = embeddings.float().cpu()[real]
        return joined[None], real[real][None], weight.cpu()[real][None]


def load_bertscore(
    name: str | None = None,
    layers: int | None = None,
    *,
    device: str | None = "cpu",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> BertScorer:
    """Load the encoder ``name``: all-MiniLM-L6-v2 (if None), a folder, or a hub id.

    ``layers``: how many of its layers are used; None takes bert-score's number for it.  Raises
    ``MissingExtra`` without bert-score, ``LoadError`` when the encoder cannot be had, read or cut,
    ``ConfigError`` for a number of layers that is missing or out of range.
    """
    known: Mapping[str, int] = {**_library().model2layers, **LAYERS}
    source = find_encoder(name, owner=None, cache_dir=cache_dir, progress=progress)
    chosen = layers if layers is not None else known.get(source.name)
    if chosen is None:
        raise ConfigError(
            f"bert-score knows no best layer of {source.name}: say how many layers to use "
            "(about five sixths of them is usual)"
        )
    try:
        model, tokenizer = _read(source, parse_device(device).first)
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as an encoder: {plain(error)}"
        ) from error
    _cut(model, chosen, source.name)
    window = _window(model, tokenizer)
    return BertScorer(model, tokenizer, source, chosen, window)


def _library() -> Any:
    try:
        return import_module("bert_score.utils")
    except ImportError as error:
        raise MissingExtra("bert-score", "drift") from error


def _read(source: EncoderSource, device: str) -> tuple[nn.Module, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    with bars(shown=False):
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), local_files_only=True)
        model = AutoModel.from_pretrained(
            str(source.folder), dtype=torch.float32, local_files_only=True
        )
    model.to(device)
    model.train(False)
    return model, tokenizer


def _cut(model: nn.Module, layers: int, name: str) -> None:
    """Drop the layers above the first ``layers``: the output is then theirs."""
    from torch import nn

    for part in (getattr(model, "encoder", None), getattr(model, "transformer", None)):
        stack = getattr(part, "layer", None)
        if part is None or not isinstance(stack, nn.ModuleList):
            continue
        if not 1 <= layers <= len(stack):
            raise ConfigError(
                f"{name} has {len(stack)} layers: give BERTScore 1 to {len(stack)} of them, "
                f"not {layers}"
            )
        part.layer = stack[:layers]
        return
    raise LoadError(
        f"{name} ({type(model).__name__}) is no encoder that BERTScore can use here: give one of "
        "the kind of BERT, RoBERTa, DeBERTa, MPNet or DistilBERT"
    )


def _window(model: nn.Module, tokenizer: Any) -> int:
    """Text tokens that fit the encoder; its tokenizer is told the limit where it knows none."""
    positions = int(getattr(model.config, "max_position_embeddings", 512))
    stated = int(tokenizer.model_max_length)
    tokenizer.model_max_length = min(stated, positions) if stated < 1_000_000 else positions - 2
    return int(tokenizer.model_max_length) - int(tokenizer.num_special_tokens_to_add())
