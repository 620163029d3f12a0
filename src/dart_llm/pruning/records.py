"""The frozen, JSON-able records that a run returns.

Sparsity is always the fraction of FFN neurons removed.  "Decoded tokens" are the inputs of decode
forwards.  The first generated token comes from the prompt's logits and needs no decode forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Remask:
    """One build of all layers' masks, which apply from decode step ``step`` of ``sequence``."""

    sequence: int
    row: int | None
    """Batch row; None if all rows share the masks."""
    step: int
    """Number of decoded tokens before the first forward that used these masks."""
    cause: str
    """``first``, ``prompt`` (a further prompt came), ``drift``, ``interval``, ``fixed`` (masks that
    were set in advance) or ``forced`` (at a step that was set in advance)."""
    evidence_tokens: float
    """Number of tokens from which the masks were made; decayed tokens count less than 1."""
    kept: tuple[int, ...]
    """Number of neurons that each layer keeps."""
    overlap: float | None
    """Share of the kept neurons that the previous masks also kept; None for a sequence's first
    masks, and with per-token selection."""


@dataclass(frozen=True)
class DriftCheck:
    """One completed window of the drift detector (one row of drift.csv).

    The detector averages a signal over each window of tokens and compares this mean with a
    reference, usually the mean over the tokens that the masks were made from.  ``row``: batch row.
    ``step``: number of decoded tokens at the end of the window.  ``layer``: the layer whose output
    is watched.  ``window``: number of the window, counted from 1 for each mask.  ``counter``:
    the drift rule's counter of low windows, updated with this window.
    """

    sequence: int
    row: int
    step: int
    layer: int
    window: int
    similarity: float
    """Cosine similarity of the window's mean and the reference, from -1 to 1."""
    threshold: float | None
    """Similarity below which a window is low; None until the detector is armed, that is, until the
    reference has enough windows."""
    counter: int
    trigger: bool
    """Whether this window triggered a re-mask."""
    state: str
    """``arming``, ``armed``, or ``suppressed`` (the guards did not allow the trigger)."""


@dataclass(frozen=True)
class LayerStat:
    """One layer at the end of a run; ``width``: all neurons, ``kept_share``: kept / width."""

    layer: int
    width: int
    kept: int
    """Number of neurons that the last mask kept (all of them if the layer was dense)."""
    kept_share: float
    sparsity_decoded: float
    """Mean sparsity over decoded tokens; dense tokens count as 0."""


@dataclass(frozen=True)
class SequenceReport:
    """One sequence: a batch row, or a batch whose rows share masks.

    Fields are as in ``RunReport``, but ``remasks`` has a record of each build of masks, including
    the first.
    """

    sequence: int
    row: int | None
    prompt_tokens: int
    decoded_tokens: int
    dense_tokens: int
    achieved_sparsity: float
    remasks: tuple[Remask, ...]


def bytes_limit(
    ffn_share: float, sparsity: float, proxy_share: float = 0.0, head_saved: float = 0.0
) -> float:
    """Bandwidth limit of the speed-up: bytes of the dense model, divided by the bytes read.

    ``ffn_share``: FFN bytes, divided by all weight bytes.  ``proxy_share``: bytes read for
    per-token selection, divided by dense FFN bytes.  ``head_saved``: share of all weight bytes that
    a screened head does not read.
    """
    return 1.0 / max(1e-9, 1.0 - ffn_share * (sparsity - proxy_share) - head_saved)


@dataclass(frozen=True)
class HeadReport:
    """Bytes and accuracy of a screened head, which scores few vocabulary entries exactly."""

    tokens: int
    """Number of tokens that the screened head scored."""
    bytes_share: float
    """Bytes read per token (for rough scores, exact scores and samples), divided by the bytes of
    the whole head."""
    sampled: int
    """Number of tokens that the whole head also scored, to measure the accuracy."""
    same_share: float
    """Share of sampled tokens for which both heads have the same best vocabulary entry."""
    kl: float
    """Mean KL divergence of the screened head from the whole head over sampled tokens, in nats."""
    share_of_bytes: float = 0.0
    """The whole head's bytes, divided by all weight bytes that a dense decoded token reads."""

    def read(self, decoded: float) -> float:
        """Share of the head's bytes read, mean over ``decoded`` tokens; 1 for unscreened tokens."""
        screened = min(1.0, self.tokens / decoded) if decoded else 1.0
        return 1 - screened * (1 - self.bytes_share)

    def saved(self, decoded: float) -> float:
        """Share of all weight bytes that screening saved, mean over ``decoded`` tokens."""
        return self.share_of_bytes * (1 - self.read(decoded))

    def __str__(self) -> str:
        return (
            f"head screened at {self.bytes_share:.2f} of its bytes (KL {self.kl:.4f}, same best "
            f"token in {self.same_share:.1%} of {self.sampled} samples)"
        )


def merge_heads(heads: Iterable[HeadReport | None]) -> HeadReport | None:
    """Merge the reports, with means weighted by numbers of tokens; None if no head was screened."""
    screened = [head for head in heads if head is not None]
    if not screened:
        return None

    def mean(name: str, count: str) -> float:
        total = sum(getattr(h, name) * getattr(h, count) for h in screened)
        return float(total / max(1, sum(getattr(h, count) for h in screened)))

    return HeadReport(
        sum(h.tokens for h in screened),
        mean("bytes_share", "tokens"),
        sum(h.sampled for h in screened),
        mean("same_share", "sampled"),
        mean("kl", "sampled"),
        mean("share_of_bytes", "tokens"),
    )


@dataclass(frozen=True)
class RunReport:
    """Accounting of a run (docs/reference.md, "Accounting")."""

    method: str
    requested_sparsity: float | None
    achieved_sparsity: float
    """Fraction of neurons removed, mean over decoded tokens; dense tokens count as 0."""
    sparsity_while_pruned: float
    """The same mean, but only over decoded tokens that ran with masks."""
    dense_token_share: float
    """Share of the decoded tokens that ran dense."""
    prompt_tokens: int
    decoded_tokens: int
    remasks: int
    """Number of masks built after the first mask of each sequence."""
    remask_causes: dict[str, int]
    layers: tuple[LayerStat, ...]
    executor: str
    ffn_bytes_share: float
    """FFN bytes read, divided by those of dense decoding.  The bytes read include those for
    observing tokens and for building masks."""
    ffn_bytes_share_if_compact: float
    """The same share if every forward read only the kept neurons (below: "if run compactly")."""
    ffn_share_of_bytes: float
    """FFN weight bytes, divided by the bytes of all weights that a decoded token reads (embeddings
    are not counted)."""
    extra_memory_bytes: int
    """Bytes of extra memory: evidence, detector, masks, compact weights, low-bit proxies."""
    sequences: tuple[SequenceReport, ...]
    proxy_bytes_share: float = 0.0
    """Bytes read for per-token selection, divided by dense FFN bytes, if run compactly.  They are
    the bytes of low-bit proxies, or of rows that are read only to rank neurons."""
    token_bytes_share: float | None = None
    """Bytes that a decoded token reads (FFN, attention, head, KV cache and selection), divided by
    those of the dense model in bfloat16, if run compactly.  Quantized weights count as stored, all
    others as two bytes each, whatever the dtype of the run."""
    dense_token_bytes_share: float | None = None
    """The same share with nothing removed; it is less than 1 if weights are quantized."""
    mean_context: float | None = None
    """Mean number of cached positions that decoded tokens attend to."""
    head: HeadReport | None = None
    """Report on the screened output head; None if the run used the whole head."""
    selection: str | None = None
    """How native kernels read down rows after per-token selection, and why; None if they do not."""

    @property
    def bytes_limit(self) -> float:
        """Bandwidth limit of the speed-up at the achieved sparsity."""
        saved = 0.0 if self.head is None else self.head.saved(self.decoded_tokens)
        shares = self.ffn_share_of_bytes, self.achieved_sparsity, self.proxy_bytes_share
        return bytes_limit(*shares, saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; it has the key ``head`` only if the output head was screened."""
        data = {**asdict(self), "bytes_limit": self.bytes_limit}
        if self.head is None:
            del data["head"]
        return data

    def __str__(self) -> str:
        requested, proxy = self.requested_sparsity, self.proxy_bytes_share
        of = "" if requested is None else f" of {requested:.0%} requested"
        selection = f" ({proxy:.2f}x for neuron selection)" if proxy else ""
        head = "" if self.head is None else f", {self.head}"
        how = "" if self.selection is None else f", {self.selection}"
        return (
            f"{self.method}: {self.achieved_sparsity:.1%} of the FFN neurons removed{of}, "
            f"mean over {self.decoded_tokens} decoded tokens ({self.dense_token_share:.1%} of them "
            f"dense; {self.sparsity_while_pruned:.1%} while pruned), {self.remasks} re-mask"
            f"{'' if self.remasks == 1 else 's'}, {self.executor} executor, reads "
            f"{self.ffn_bytes_share:.2f}x of the dense FFN bytes{selection}, "
            f"{self.extra_memory_bytes / 2**20:.1f} MiB extra memory{head}{how}"
        )


# The functions below merge reports (``RunReport.to_dict``).  The reports come from several runs
# with the same configuration.

_MEANS = "achieved_sparsity dense_token_share ffn_bytes_share ffn_bytes_share_if_compact".split()
_MEANS += "proxy_bytes_share token_bytes_share dense_token_bytes_share mean_context".split()
_SUMS = ("prompt_tokens", "decoded_tokens", "remasks")


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports into one.

    Means are weighted by decoded tokens; a mean is None if any report lacks the value.  ``layers``
    has the last report's counts and the mean sparsity.  ``sequences`` are concatenated.
    """
    weights = [report["decoded_tokens"] for report in reports]

    def mean(values: Sequence[float | None]) -> float | None:
        terms = [v * w for v, w in zip(values, weights, strict=True) if v is not None]
        return float(sum(terms) / max(1, sum(weights))) if len(terms) == len(values) else None

    merged = dict(reports[-1])
    merged |= {key: mean([report.get(key) for report in reports]) for key in _MEANS}
    merged |= {key: sum(report[key] for report in reports) for key in _SUMS}
    pruned = 1 - merged["dense_token_share"]
    merged["sparsity_while_pruned"] = merged["achieved_sparsity"] / pruned if pruned else 0.0
    merged["extra_memory_bytes"] = max(report["extra_memory_bytes"] for report in reports)
    causes = Counter[str]()
    for report in reports:
        causes.update(report["remask_causes"])
    merged["remask_causes"] = dict(causes)
    merged["layers"] = [
        {**runs[-1], "sparsity_decoded": mean([layer["sparsity_decoded"] for layer in runs])}
        for runs in zip(*(report["layers"] for report in reports), strict=True)
    ]
    sequences = [sequence for report in reports for sequence in report["sequences"]]
    merged["sequences"] = [{**s, "sequence": number} for number, s in enumerate(sequences)]
    heads = [HeadReport(**report["head"]) if report.get("head") else None for report in reports]
    if (head := merge_heads(heads)) is not None:
        merged["head"] = asdict(head)
    saved = 0.0 if head is None else head.saved(merged["decoded_tokens"])
    sparsity, proxy = merged["achieved_sparsity"], merged["proxy_bytes_share"]
    merged["bytes_limit"] = bytes_limit(merged["ffn_share_of_bytes"], sparsity, proxy, saved)
    return merged


def without_sequences(report: dict[str, Any]) -> dict[str, Any]:
    """A copy of the report without its sequences, small enough to store with each item."""
    return {**report, "sequences": []}


def add_dense(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The report with ``tokens`` more decoded tokens, which ran dense outside any run."""
    if not tokens:
        return report
    zeros = "achieved_sparsity proxy_bytes_share prompt_tokens remasks".split()
    ones = "dense_token_share ffn_bytes_share ffn_bytes_share_if_compact".split()
    dense = {**report, **dict.fromkeys(zeros, 0), **dict.fromkeys(ones, 1.0)}
    dense |= {"decoded_tokens": tokens, "remask_causes": {}, "sequences": [], "head": None}
    dense["token_bytes_share"] = report.get("dense_token_bytes_share")
    dense["layers"] = [{**layer, "sparsity_decoded": 0.0} for layer in report["layers"]]
    unchanged = ("sparsity_while_pruned", "mean_context", "sequences")
    return {**merge_reports([dense, report]), **{key: report.get(key) for key in unchanged}}
