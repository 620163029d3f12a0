"""A text against a reference in numbers: ROUGE, BLEU, BERTScore, embeddings, sentences.

Every number is on the same scale: 1 for equal texts, larger is closer.  Degenerate texts have
defined values.  Where one text is empty (white space alone) and the other is not, every number is
0, for nothing of the reference is there; where both are empty, every number is None, for there is
nothing to compare.  ``sentence_order`` is None with fewer than two matched sentences, and a ROUGE
is None when the reference has no such n-gram (ROUGE-2 of one word, a text without a letter a-z).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dart_llm import bleu, rouge, sentence_match
from dart_llm.bertscore import BertScorer, load_bertscore
from dart_llm.embeddings import Embedder, cosine, load_embedder
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.pip_file import Progress


@dataclass(frozen=True)
class Number:
    """One column: its name in files, its title in tables, what it says, which way is better."""

    name: str
    title: str
    meaning: str
    higher_is_better: bool = True


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
            f"BLEU: sacrebleu / 100, each text one segment, {bleu.signature()}",
            f"BERTScore: F1 with {self.bert.label}",
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
            "bleu": bleu.signature(),
            "sentence_threshold": self.threshold,
        }


def load_tools(
    embedder: str | None = None,
    *,
    bertscore: str | None = None,
    bertscore_layers: int | None = None,
    threshold: float = sentence_match.THRESHOLD,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> TextTools:
    """Everything that ``compare`` needs, loaded once, before anything long is computed.

    ``embedder``, ``bertscore``: all-MiniLM-L6-v2 (if None), a folder or a hub id.
    ``bertscore_layers``: layers of the BERTScore encoder that are used, where bert-score has no
    number for it.  Raises ``MissingExtra`` when a package of the extra ``drift`` is missing,
    ``LoadError`` when a model cannot be had, ``ConfigError`` for settings out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"sentences match from a cosine in (0, 1], not from {threshold:g}")
    try:
        rouge.scorer()
    except MissingExtra as error:
        raise MissingExtra("rouge-score", "drift") from error
    bleu.scorer()
    where: dict[str, Any] = {"device": "cpu", "cache_dir": cache_dir, "progress": progress}
    bert = load_bertscore(bertscore, bertscore_layers, **where)
    return TextTools(load_embedder(embedder, **where), bert, threshold)


def compare(candidate: str, reference: str, tools: TextTools) -> TextMetrics:
    """The numbers of ``candidate`` against ``reference``; see the module for degenerate texts."""
    if not candidate.strip() or not reference.strip():
        return _empty(both=not (candidate.strip() or reference.strip()))
    first, second = tools.embedder.embed([candidate, reference])
    found = sentence_match.match(candidate, reference, tools.embedder, tools.threshold)
    return TextMetrics(
        **_rouge(candidate, reference),
        bleu=bleu.score(candidate, reference),
        bertscore=tools.bert.score(candidate, reference).f1,
        document_similarity=cosine(first, second),
        sentence_similarity=found.similarity,
        sentence_coverage=found.coverage,
        sentence_order=found.order,
    )


def _empty(*, both: bool) -> TextMetrics:
    value = None if both else 0.0
    return TextMetrics(**{**dict.fromkeys(NAMES, value), "sentence_order": None})


def _rouge(candidate: str, reference: str) -> dict[str, float | None]:
    """ROUGE, without the numbers that need more words than the reference has."""
    words = len(re.findall(r"[a-z0-9]+", reference.lower()))
    needed = {name: 2 if name == "rouge2" else 1 for name in rouge.METRICS}
    found = rouge.score(candidate, reference)
    return {name: found[name] if words >= needed[name] else None for name in rouge.METRICS}
