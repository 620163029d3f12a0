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

from dart_llm.errors import ConfigError, LoadError, MissingExtra
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
from dart_llm.models import bundled
from dart_llm.models.bundled import FetchProgress
from dart_llm.models.devices import memory_failure, parse_device


def _package(module: str, name: str, extra: str = "drift") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(name, extra) from error


# BERTScore (Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020).
#
# Every token of one text is matched with the most similar token of the other, by the cosine of
# their contextual embeddings.  Tokens weigh the same: there is no IDF, so the score of a pair
# depends on that pair alone.  There is no rescaling either: unrelated texts are far above 0, and
# only differences between methods speak.  What lies beyond the encoder's window is not compared.

LAYERS = {bundled.ENCODER_NAME: 5, bundled.ENCODER_HUB_ID: 5}
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

    @property
    def label(self) -> str:
        """Encoder, layer and settings, for notes beside numbers."""
        return f"{self.source.label}, layer {self.layers}, no IDF, not rescaled"

    def score(self, candidate: str, reference: str) -> float:
        """F1: the harmonic mean of the mean cosines of both texts' tokens; 0 without a token."""
        if not all(count_tokens(self.tokenizer, text) for text in (candidate, reference)):
            return 0.0
        return min(1.0, float(self.scorer.score([candidate], [reference])[2]))


def load_bertscore(
    name: str | None = None,
    layers: int | None = None,
    *,
    device: str | None = "cpu",
    cache_dir: str | Path | None = None,
    progress: FetchProgress | None = None,
) -> BertScorer:
    """Load the encoder ``name``: all-MiniLM-L6-v2 (if None), a folder, or a hub id.

    ``layers``: how many of its layers are used; None takes bert-score's number for it.  Raises
    ``MissingExtra`` without bert-score, ``LoadError`` when the encoder cannot be had, read or cut,
    ``ConfigError`` for a number of layers that is missing or out of range.
    """
    package = _package("bert_score", "bert-score")
    source = find_encoder(name, owner=None, cache_dir=cache_dir, progress=progress)
    known = {**package.utils.model2layers, **LAYERS}
    chosen = known.get(source.name) if layers is None else layers
    if chosen is None:
        raise ConfigError(
            f"bert-score knows no best layer of {source.name}: say how many layers to use "
            "(about five sixths of them is usual)"
        )
    try:
        with bars(shown=False):
            total, window, tokenizer = _read(source.folder)
            if not 1 <= chosen <= total:
                raise ConfigError(
                    f"{source.name} has {total} layers: give BERTScore 1 to {total} of them, "
                    f"not {chosen}"
                )
            scorer = package.BERTScorer(
                model_type=str(source.folder),
                num_layers=chosen,
                use_fast_tokenizer=True,
                device=parse_device(device).first,
            )
    except ConfigError:
        raise
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as an encoder: {plain(error)}"
        ) from error
    scorer._model.float()
    scorer._tokenizer.model_max_length = tokenizer.model_max_length
    return BertScorer(scorer, tokenizer, source, chosen, window)


def _read(folder: Path) -> tuple[int, int, Any]:
    """An encoder's layers, the text tokens that fit it, and its tokenizer, told that limit."""
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


# Which sentences of a reference a text holds, and in which order.  With S the matrix of cosines
# between the sentences of the reference (rows) and of the candidate (columns):
#
# - *similarity*: the mean of the rows' largest and the columns' largest cosines, averaged over both
#   directions, so that what is missing and what was added count alike;
# - *coverage*: the share of reference sentences whose largest cosine is at least the threshold;
# - *order*: sentences are matched one to one, the most similar pairs first, down to the threshold;
#   of all pairs of matched sentences, the share that stands in the same order in both texts, which
#   is (1 + Kendall's tau) / 2.  Fewer than two matched sentences have no order: None.

THRESHOLD = 0.65
"""Cosine from which two sentences count as saying the same.  For all-MiniLM-L6-v2 it lies between
six pairs of paraphrases (0.70 to 0.91) and six pairs that share a topic and say something else
(0.15 to 0.61); a test holds them.  Another embedder may want another."""

DIGITS = 6
"""Cosines that agree to as many digits are equal: then the nearer places are matched."""


class SentenceMatch(NamedTuple):
    """Numbers in [0, 1] (similarity: [-1, 1]).  ``order`` is None with fewer than two matches.

    ``pairs``: places of the matched sentences in reference and candidate, in reference order.
    """

    similarity: float
    coverage: float
    order: float | None
    pairs: tuple[tuple[int, int], ...]


def match(
    candidate: str, reference: str, embedder: Embedder, threshold: float = THRESHOLD
) -> SentenceMatch:
    """Compare the sentences of two texts; a text without sentences gives 0, 0 and no order."""
    wanted, written = sentences(reference), sentences(candidate)
    if not wanted or not written:
        return SentenceMatch(0.0, 0.0, None, ())
    rows = unit(embedder.embed([*wanted, *written]))
    return match_cosines(rows[: len(wanted)] @ rows[len(wanted) :].T, threshold)


def match_cosines(cosines: Array, threshold: float = THRESHOLD) -> SentenceMatch:
    """The numbers from cosines [reference sentences, candidate sentences], neither of them 0."""
    cosines = np.clip(np.round(cosines, DIGITS), -1.0, 1.0)
    best = cosines.max(axis=1)
    similarity = float((best.mean() + cosines.max(axis=0).mean()) / 2)
    pairs = matched_pairs(cosines, threshold)
    order = ordered_share([place for _, place in pairs])
    return SentenceMatch(similarity, float((best >= threshold).mean()), order, tuple(pairs))


def matched_pairs(cosines: Array, threshold: float) -> list[tuple[int, int]]:
    """One-to-one matches (row, column) by falling cosine; of equal ones, the nearest places first.

    Nearness is measured in shares of each text, so that repeated sentences meet their own copy.
    """
    places = [(np.arange(size) + 0.5) / size for size in cosines.shape]
    distances = np.abs(places[0][:, None] - places[1])
    matches = np.argwhere(cosines >= threshold)
    rows, columns = matches.T
    order = np.lexsort((columns, rows, distances[rows, columns], -cosines[rows, columns]))
    pairs = dict[int, int]()
    for row, column in matches[order].tolist():
        if row not in pairs and column not in pairs.values():
            pairs[row] = column
    return sorted(pairs.items())


def ordered_share(places: list[int]) -> float | None:
    """Of all pairs of ``places``, which differ, the share that rises; None with fewer than two."""
    rising = [one < other for one, other in combinations(places, 2)]
    return sum(rising) / len(rising) if rising else None


# All numbers of a pair of texts.


class Number(NamedTuple):
    """One column: its name in files, its title in tables, what it says."""

    name: str
    title: str
    meaning: str


NUMBERS: tuple[Number, ...] = (
    Number("rouge1", "ROUGE-1", "F-measure of shared words"),
    Number("rouge2", "ROUGE-2", "F-measure of shared word pairs"),
    Number("rougeL", "ROUGE-L", "F-measure of the longest common subsequence of words"),
    Number("rougeLsum", "ROUGE-Lsum", "ROUGE-L sentence by sentence"),
    Number("bleu", "BLEU", "shared n-grams of 1 to 4 words, 0 to 1 (sacrebleu's score / 100)"),
    Number("bertscore", "BERTScore F1", "tokens matched by contextual embedding, not rescaled"),
    Number("document_similarity", "document", "cosine of the embeddings of the whole texts"),
    Number("sentence_similarity", "sentences", "mean best cosine of sentences, both directions"),
    Number("sentence_coverage", "coverage", "share of reference sentences that have a match"),
    Number("sentence_order", "order", "share of pairs of matched sentences in the same order"),
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
    sentence_similarity: float | None
    sentence_coverage: float | None
    sentence_order: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The numbers under the names of ``NUMBERS``, in that order."""
        return asdict(self)


@dataclass(frozen=True)
class TextTools:
    """Loaded models and settings.  ``threshold``: cosine from which two sentences match."""

    embedder: Embedder
    bert: BertScorer
    threshold: float

    @property
    def notes(self) -> tuple[str, ...]:
        """What made the numbers, one sentence each, for the foot of a table."""
        window = self.embedder.window
        cut = f"; longer texts: mean over windows of {window} tokens" if window else ""
        return (
            "ROUGE: F-measures with Porter stemming, over the letters a-z and digits",
            f"BLEU: sacrebleu / 100, each text one segment, {signature()}",
            f"BERTScore: F1 with {self.bert.label}; texts are cut at {self.bert.window} tokens",
            f"document and sentences: {self.embedder.source.label}{cut}",
            f"coverage and order: sentences match from a cosine of {self.threshold:g}",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts, for the configuration of a run."""
        return {
            "embedder": {**self.embedder.source.to_dict(), "window": self.embedder.window},
            "bertscore": {
                **self.bert.source.to_dict(),
                "window": self.bert.window,
                "layers": self.bert.layers,
                "idf": False,
                "rescaled": False,
            },
            "bleu": signature(),
            "sentence_threshold": self.threshold,
        }


def load_tools(
    embedder: str | None = None,
    *,
    bertscore: str | None = None,
    bertscore_layers: int | None = None,
    threshold: float = THRESHOLD,
    cache_dir: str | Path | None = None,
    progress: FetchProgress | None = None,
) -> TextTools:
    """Everything that ``compare`` needs, loaded once, before anything long is computed.

    ``embedder``, ``bertscore``: all-MiniLM-L6-v2 (if None), a folder or a hub id.
    ``bertscore_layers``: layers of the BERTScore encoder that are used, where bert-score has no
    number for it.  Raises ``MissingExtra`` when a package of the extra ``drift`` is missing,
    ``LoadError`` when a model cannot be had, ``ConfigError`` for settings out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"sentences match from a cosine in (0, 1], not from {threshold:g}")
    rouge_scorer("drift")
    bleu_scorer()
    where: dict[str, Any] = {"device": "cpu", "cache_dir": cache_dir, "progress": progress}
    bert = load_bertscore(bertscore, bertscore_layers, **where)
    return TextTools(load_embedder(embedder, **where), bert, threshold)


def compare(candidate: str, reference: str, tools: TextTools) -> TextMetrics:
    """The numbers of ``candidate`` against ``reference``; see the module for degenerate texts."""
    if not candidate.strip() or not reference.strip():
        value = 0.0 if candidate.strip() or reference.strip() else None
        return TextMetrics(**{**dict.fromkeys(NAMES, value), "sentence_order": None})
    first, second = tools.embedder.embed([candidate, reference])
    found = match(candidate, reference, tools.embedder, tools.threshold)
    return TextMetrics(
        **_rouge(candidate, reference),
        bleu=bleu_score(candidate, reference),
        bertscore=tools.bert.score(candidate, reference),
        document_similarity=cosine(first, second),
        sentence_similarity=found.similarity,
        sentence_coverage=found.coverage,
        sentence_order=found.order,
    )


def _rouge(candidate: str, reference: str) -> dict[str, float | None]:
    """ROUGE, without the numbers that need more words than the reference has."""
    words = len(re.findall(r"[a-z0-9]+", reference.lower()))
    found = rouge_scores(candidate, reference)
    return {name: found[name] if words > (name == "rouge2") else None for name in METRICS}
