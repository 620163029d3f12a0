"""A text against a reference in numbers: ROUGE, BLEU, BERTScore, embeddings, sentences.

Every number is on the same scale: 1 for equal texts, larger is closer.  Degenerate texts have
defined values.  Where one text is empty (white space alone) and the other is not, every number
is 0, for nothing of the reference is there; where both are empty, every number is None, for
there is nothing to compare.  ``sentence_order`` is None with fewer than two matched sentences,
and a ROUGE is None when the reference has no such n-gram (ROUGE-2 of one word, a text without a
letter a-z).  The only file that imports ``bert_score``, ``sacrebleu`` and ``rouge_score``.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dart_llm.errors import LoadError, MissingExtra
from dart_llm.evaluation.encoders import (
    Array,
    Embedder,
    EncoderSource,
    cosine,
    count_tokens,
    find_encoder,
    load_embedder,
    sentences,
    unit,
)
from dart_llm.hub import bars, plain
from dart_llm.models import cached
from dart_llm.models.cached import Progress
from dart_llm.models.loading import memory_failure


def _package(module: str, name: str, extra: str = "drift") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(name, extra) from error


# BERTScore (Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020): every token of
# one text is matched with the most similar token of the other, by the cosine of their contextual
# embeddings.  No IDF, so that the score of a pair depends on that pair alone, and no rescaling:
# unrelated texts are far above 0.  Tokens beyond the encoder's window are not compared.

LAYERS = {cached.ENCODER_NAME: 5, cached.ENCODER_HUB_ID: 5}
"""Layers below the embeddings used, for encoders that bert-score has no number for.  MiniLM: 5 of
its 6, the share of the depth that bert-score uses for the encoders that were trained on sentence
similarity (sup-simcse-bert-base: 10 of 12)."""


@dataclass(frozen=True)
class BertScorer:
    """bert-score's scorer on the first ``layers`` layers; ``window``: text tokens that it reads."""

    scorer: Any
    tokenizer: Any
    source: EncoderSource
    layers: int
    window: int

    def score(self, candidate: str, reference: str) -> float:
        """F1: the harmonic mean of the mean cosines of both texts' tokens; 0 without a token."""
        if not all(count_tokens(self.tokenizer, text) for text in (candidate, reference)):
            return 0.0
        return min(1.0, float(self.scorer.score([candidate], [reference])[2]))


def load_bertscore(
    name: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> BertScorer:
    """Load the encoder ``name``: all-MiniLM-L6-v2 (if None), a folder, or a hub id.

    As many of its layers are used as bert-score recommends, else five sixths of them.  Raises
    ``MissingExtra`` without bert-score, ``LoadError`` when the encoder cannot be had or read.
    """
    package = _package("bert_score", "bert-score")
    source = find_encoder(name, owner=None, cache_dir=cache_dir, progress=progress)
    try:
        with bars(shown=False):
            total, window, tokenizer = _read(source.folder)
            recommended = {**package.utils.model2layers, **LAYERS}
            layers = recommended.get(source.name) or max(1, round(total * 5 / 6))
            scorer = package.BERTScorer(
                model_type=str(source.folder),
                num_layers=layers,
                use_fast_tokenizer=True,
                device="cpu",
            )
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as an encoder: {plain(error)}"
        ) from error
    scorer._model.float()
    scorer._tokenizer.model_max_length = tokenizer.model_max_length
    return BertScorer(scorer, tokenizer, source, layers, window)


def _read(folder: Path) -> tuple[int, int, Any]:
    """An encoder's layers, the text tokens that fit it, and its tokenizer with that limit."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    positions = int(getattr(config, "max_position_embeddings", 512))
    stated = int(tokenizer.model_max_length)
    tokenizer.model_max_length = min(stated, positions) if stated < 1_000_000 else positions - 2
    window = int(tokenizer.model_max_length) - int(tokenizer.num_special_tokens_to_add())
    return int(config.num_hidden_layers), window, tokenizer


# BLEU: sacrebleu's score of one segment (Post, "A Call for Clarity in Reporting BLEU Scores",
# 2018), divided by 100.  The whole text is one segment, for the sentences of two generated texts
# do not correspond.  Orders of n-grams that the text is too short for are left out.


def bleu_score(candidate: str, reference: str) -> float:
    """BLEU in [0, 1]; 0 for an empty candidate or reference.

    White space is not compared.  Raises ``MissingExtra`` without the sacrebleu package.
    """
    one, other = (" ".join(text.split()) for text in (candidate, reference))
    score = float(bleu_scorer().sentence_score(one, [other]).score)
    return min(1.0, score / 100)  # equal texts: 100.00000000000004


@cache
def bleu_scorer() -> Any:
    """The package's scorer; call it before a long run, for it raises ``MissingExtra``."""
    return _package("sacrebleu.metrics", "sacrebleu").BLEU(effective_order=True)


def signature() -> str:
    """sacrebleu's own description of the settings, with its version."""
    bleu = bleu_scorer()
    bleu.sentence_score("a", ["a"])  # the signature wants to know the number of references
    return str(bleu.get_signature())


# ROUGE: F-measures with Porter stemming, as published tables give them.  ROUGE-L takes a text as
# one sequence; ROUGE-Lsum compares sentence by sentence, split by rules that need no download.  The
# package's tokenizer keeps the letters a-z and digits only: other alphabets score 0.

METRICS: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F-measures in [0, 1] under the names of ``METRICS``; an empty prediction scores 0.

    Raises ``MissingExtra`` without the rouge-score package.
    """
    lines = ["\n".join(sentences(text)) for text in (reference, prediction)]
    found = rouge_scorer().score(*lines)
    return {name: float(found[name].fmeasure) for name in METRICS}


@cache
def rouge_scorer(extra: str = "eval") -> Any:
    """The package's scorer; call it before a long run, for it raises ``MissingExtra``."""
    module = _package("rouge_score.rouge_scorer", "rouge-score", extra)
    return module.RougeScorer(list(METRICS), use_stemmer=True)


# Which sentences of a reference a text has, and in which order, from the cosines between the
# sentences of the reference (rows) and of the candidate (columns):
#
# - *coverage*: the share of reference sentences whose largest cosine is at least the threshold;
# - *order*: sentences are matched one to one, the most similar pairs first, down to the threshold;
#   of all pairs of matched sentences, the share that has the same order in both texts, which is
#   (1 + Kendall's tau) / 2.  Fewer than two matched sentences have no order: None.

THRESHOLD = 0.65
"""Cosine from which two sentences count as saying the same.  For all-MiniLM-L6-v2 it lies between
six pairs of paraphrases (0.70 to 0.91) and six pairs that share a topic and say something else
(0.15 to 0.61).  Another embedder may need another."""

DIGITS = 6
"""Cosines that agree to as many digits are equal: then the nearer positions are matched."""


class SentenceMatch(NamedTuple):
    """Shares in [0, 1].  ``order`` is None with fewer than two matches."""

    coverage: float
    order: float | None


def match(candidate: str, reference: str, embedder: Embedder) -> SentenceMatch:
    """Compare the sentences of two texts; a text without sentences gives 0 and no order."""
    wanted, written = sentences(reference), sentences(candidate)
    if not wanted or not written:
        return SentenceMatch(0.0, None)
    rows = unit(embedder.embed([*wanted, *written]))
    cosines = rows[: len(wanted)] @ rows[len(wanted) :].T
    cosines = np.clip(np.round(cosines, DIGITS), -1.0, 1.0)
    pairs = matched_pairs(cosines, THRESHOLD)
    order = ordered_share([column for _, column in pairs])
    return SentenceMatch(float((cosines.max(axis=1) >= THRESHOLD).mean()), order)


def matched_pairs(cosines: Array, threshold: float) -> list[tuple[int, int]]:
    """One-to-one matches (row, column) by falling cosine; of equal ones, the nearest positions.

    Nearness is measured in shares of each text, so that repeated sentences match in order.
    """
    positions = [(np.arange(size) + 0.5) / size for size in cosines.shape]
    distances = np.abs(positions[0][:, None] - positions[1])
    matches = np.argwhere(cosines >= threshold)
    rows, columns = matches.T
    order = np.lexsort((columns, rows, distances[rows, columns], -cosines[rows, columns]))
    pairs = dict[int, int]()
    for row, column in matches[order].tolist():
        if row not in pairs and column not in pairs.values():
            pairs[row] = column
    return sorted(pairs.items())


def ordered_share(positions: list[int]) -> float | None:
    """Of all pairs of ``positions``, which differ, the share that rises; None with fewer than 2."""
    rising = [one < other for one, other in combinations(positions, 2)]
    return sum(rising) / len(rising) if rising else None


# All numbers of a pair of texts.


class Number(NamedTuple):
    """One column: its name in files and its title in tables."""

    name: str
    title: str


NUMBERS: tuple[Number, ...] = (
    Number("rouge1", "ROUGE-1"),
    Number("rouge2", "ROUGE-2"),
    Number("rougeL", "ROUGE-L"),
    Number("rougeLsum", "ROUGE-Lsum"),
    Number("bleu", "BLEU"),
    Number("bertscore", "BERTScore F1"),
    Number("document_similarity", "document"),
    Number("sentence_coverage", "coverage"),
    Number("sentence_order", "order"),
)
"""Every number, in the order of tables."""

NAMES: tuple[str, ...] = tuple(number.name for number in NUMBERS)


@dataclass(frozen=True)
class TextMetrics:
    """The numbers of one pair of texts; None where a number is not defined."""

    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    rougeLsum: float | None
    bleu: float | None
    bertscore: float | None
    document_similarity: float | None
    sentence_coverage: float | None
    sentence_order: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The numbers under the names of ``NUMBERS``, in that order."""
        return asdict(self)


@dataclass(frozen=True)
class TextTools:
    """The loaded models."""

    embedder: Embedder
    bert: BertScorer

    @property
    def notes(self) -> tuple[str, ...]:
        """How the numbers were made, one sentence each, for the foot of a table."""
        window, bert = self.embedder.window, self.bert
        cut = f"; longer texts: mean over windows of {window} tokens" if window else ""
        return (
            "ROUGE: F-measures with Porter stemming, over the letters a-z and digits",
            f"BLEU: sacrebleu / 100, each text one segment, {signature()}",
            f"BERTScore: F1 with {bert.source.label}, layer {bert.layers}, no IDF, not rescaled; "
            f"texts are cut at {bert.window} tokens",
            f"document and sentences: {self.embedder.source.label}{cut}",
            f"coverage and order: sentences match from a cosine of {THRESHOLD:g}",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts, for the configuration of a run."""
        bert = {"window": self.bert.window, "layers": self.bert.layers}
        return {
            "embedder": {**self.embedder.source.to_dict(), "window": self.embedder.window},
            "bertscore": {**self.bert.source.to_dict(), **bert},
            "bleu": signature(),
            "sentence_threshold": THRESHOLD,
        }


def load_tools(
    embedder: str | None = None,
    *,
    bertscore: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> TextTools:
    """Everything that ``compare`` needs, loaded once, before anything long is computed.

    ``embedder``, ``bertscore``: all-MiniLM-L6-v2 (if None), a folder or a hub id.  Raises
    ``MissingExtra`` when a package of the extra ``drift`` is missing, ``LoadError`` when a model
    cannot be had.
    """
    rouge_scorer("drift")
    bleu_scorer()
    bert = load_bertscore(bertscore, cache_dir=cache_dir, progress=progress)
    return TextTools(load_embedder(embedder, cache_dir=cache_dir, progress=progress), bert)


def compare(candidate: str, reference: str, tools: TextTools) -> TextMetrics:
    """The numbers of ``candidate`` against ``reference``; see the module for degenerate texts."""
    if not candidate.strip() or not reference.strip():
        value = 0.0 if candidate.strip() or reference.strip() else None
        return TextMetrics(**{**dict.fromkeys(NAMES, value), "sentence_order": None})
    first, second = tools.embedder.embed([candidate, reference])
    matched = match(candidate, reference, tools.embedder)
    words = len(re.findall(r"[a-z0-9]+", reference.lower()))
    rouge = rouge_scores(candidate, reference)
    return TextMetrics(
        **{name: rouge[name] if words > (name == "rouge2") else None for name in METRICS},
        bleu=bleu_score(candidate, reference),
        bertscore=tools.bert.score(candidate, reference),
        document_similarity=cosine(first, second),
        sentence_coverage=matched.coverage,
        sentence_order=matched.order,
    )
