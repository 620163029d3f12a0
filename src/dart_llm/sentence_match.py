"""Which sentences of a reference a text holds, and in which order, by sentence embeddings.

Sentences are split by the package's own rules (``rouge.sentences``).  With S the matrix of cosines
between the sentences of the reference (rows) and of the candidate (columns):

- *similarity*: the mean of the rows' largest and the columns' largest cosines, averaged over both
  directions, so that what is missing and what was added count alike;
- *coverage*: the share of reference sentences whose largest cosine is at least the threshold;
- *order*: sentences are matched one to one, the most similar pairs first, down to the threshold;
  of all pairs of matched sentences, the share that stands in the same order in both texts, which
  is (1 + Kendall's tau) / 2.  Fewer than two matched sentences have no order: None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dart_llm.embeddings import Array, Embedder, unit
from dart_llm.rouge import sentences

THRESHOLD = 0.65
"""Cosine from which two sentences count as saying the same.  For all-MiniLM-L6-v2 it lies between
six pairs of paraphrases (0.70 to 0.91) and six pairs that share a topic and say something else
(0.15 to 0.61); tests/test_sentence_match.py holds them.  Another embedder may want another."""

DIGITS = 6
"""Cosines that agree to as many digits are equal: then the nearer places are matched."""


@dataclass(frozen=True)
class SentenceMatch:
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
    pairs = matched_pairs(cosines, threshold)
    return SentenceMatch(
        similarity=float((best.mean() + cosines.max(axis=0).mean()) / 2),
        coverage=float((best >= threshold).mean()),
        order=ordered_share([place for _, place in pairs]),
        pairs=tuple(pairs),
    )


def matched_pairs(cosines: Array, threshold: float) -> list[tuple[int, int]]:
    """One-to-one matches (row, column) by falling cosine; of equal ones, the nearest places first.

    Nearness is measured in shares of each text, so that repeated sentences meet their own copy.
    """
    count_rows, count_columns = cosines.shape
    found: list[tuple[float, float, int, int]] = []
    for row, column in np.argwhere(cosines >= threshold).tolist():
        distance = abs((row + 0.5) / count_rows - (column + 0.5) / count_columns)
        found.append((-float(cosines[row, column]), distance, row, column))
    rows: set[int] = set()
    columns: set[int] = set()
    pairs = []
    for _, _, row, column in sorted(found):
        if row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
            pairs.append((row, column))
    return sorted(pairs)


def ordered_share(places: list[int]) -> float | None:
    """Of all pairs of ``places``, which differ, the share that rises; None with fewer than two."""
    if len(places) < 2:
        return None
    one = np.array(places)
    above = np.triu(one[None, :] > one[:, None], k=1).sum()
    return float(above / (len(places) * (len(places) - 1) / 2))
