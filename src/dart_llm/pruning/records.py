"""What a run returns: frozen, JSON-able records.

Sparsity is always the fraction of FFN neurons removed.  "Decoded tokens" are those fed in decode
forwards; the first generated token, which comes from the prompt's logits, is not one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Remask:
    """Masks of all layers were built; they apply from decode step ``step`` of ``sequence``."""

    sequence: int
    row: int | None
    """Batch row, or None when one mask serves the whole batch."""
    step: int
    """Decoded tokens before the first forward that used these masks."""
    cause: str
    """``first``, ``prompt`` (new prefill tokens), ``drift``, ``interval``, ``fixed`` or ``forced``
    (at a set moment)."""
    evidence_tokens: float
    """Tokens that the masks were made from; decayed tokens count less than 1."""
    kept: tuple[int, ...]
    """Neurons kept, per layer."""
    overlap: float | None
    """Share of the kept neurons that the previous mask also kept; None for a first mask."""


@dataclass(frozen=True)
class DriftCheck:
    """One completed window of the drift detector (one row of drift.csv).

    ``step``: decoded tokens up to its end; ``layer``: the layer whose output is watched;
    ``window``: its number since the reference was made; ``counter``: low windows as the rule counts
    them, after this window.
    """

    sequence: int
    row: int
    step: int
    layer: int
    window: int
    similarity: float
    """Cosine of the window's mean and the reference, -1 to 1."""
    threshold: float | None
    """The detector's threshold; None before the detector is armed."""
    counter: int
    trigger: bool
    """Whether the masks are rebuilt after this window."""
    state: str
    """``arming``, ``armed``, or ``suppressed`` (a trigger that the guards did not allow)."""


@dataclass(frozen=True)
class LayerStat:
    """One layer at the end of a run."""

    layer: int
    width: int
    kept: int
    """Neurons kept by the last mask (all of them if dense)."""
    kept_share: float
    sparsity_decoded: float
    """Mean over decoded tokens; dense tokens count as 0."""


@dataclass(frozen=True)
class SequenceReport:
    """One sequence (a batch row, or a batch that shares its masks); fields as in ``RunReport``."""

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
    """Bandwidth limit of the speed-up: dense bytes over those that are read.

    ``proxy_share``: FFN bytes read for selecting, over dense FFN bytes.  ``head_saved``: share of
    all bytes that a screened head does not read.
    """
    return 1.0 / max(1e-9, 1.0 - ffn_share * (sparsity - proxy_share) - head_saved)


@dataclass(frozen=True)
class HeadReport:
    """Bytes and accuracy of a screened head over the tokens that it scored."""

    tokens: int
    bytes_share: float
    """Bytes read per token over the whole head's: rough scores, exact entries, samples."""
    sampled: int
    """Tokens that the whole head also scored."""
    same_share: float
    """Share of sampled tokens with the same best vocabulary entry."""
    kl: float
    """Mean KL divergence of the screened head from the whole head over sampled tokens, in nats."""
    share_of_bytes: float = 0.0
    """The whole head's bytes over all weight bytes that a dense decoded token reads."""

    def read(self, decoded: float) -> float:
        """Mean share of the head's bytes over ``decoded`` tokens; unscreened tokens read it all."""
        screened = min(1.0, self.tokens / decoded) if decoded else 1.0
        return 1 - screened * (1 - self.bytes_share)

    def saved(self, decoded: float) -> float:
        """Mean share of all weight bytes that screening saves over ``decoded`` tokens."""
        return self.share_of_bytes * (1 - self.read(decoded))

    def __str__(self) -> str:
        return (
            f"head screened at {self.bytes_share:.2f} of its bytes (KL {self.kl:.4f}, same best "
            f"token in {self.same_share:.1%} of {self.sampled} samples)"
        )


def merge_heads(heads: Iterable[HeadReport | None]) -> HeadReport | None:
    """The reports merged over all tokens; None if no head was screened."""
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
    """Fraction removed, mean over decoded tokens and layers; dense tokens count as 0."""
    sparsity_while_pruned: float
    """The same over tokens that ran with masks."""
    dense_token_share: float
    """Share of the decoded tokens that ran dense."""
    prompt_tokens: int
    decoded_tokens: int
    remasks: int
    """Masks built after the first of each sequence."""
    remask_causes: dict[str, int]
    layers: tuple[LayerStat, ...]
    executor: str
    ffn_bytes_share: float
    """FFN bytes read over dense, as executed, with observation and mask building."""
    ffn_bytes_share_if_compact: float
    """The same if every forward read only the kept neurons."""
    ffn_share_of_bytes: float
    """FFN bytes over all weight bytes that one decoded token reads (without embedding rows)."""
    extra_memory_bytes: int
    """Extra memory: evidence, detector, masks, compact weights, low-bit proxies."""
    sequences: tuple[SequenceReport, ...]
    proxy_bytes_share: float = 0.0
    """Bytes read for per-token selection, over dense FFN bytes, if run compactly: low-bit proxies,
    or rows of removed neurons in a projection that is read as a whole."""
    token_bytes_share: float | None = None
    """Bytes that a decoded token reads over those of the dense model at bfloat16, if run compactly:
    FFN, attention, head, cache and selection.  Weights in blocks count as stored, all others as two
    bytes, whatever the dtype of the run."""
    dense_token_bytes_share: float | None = None
    """The same with nothing removed: less than 1 if weights are stored in blocks."""
    mean_context: float | None = None
    """Mean number of cached positions that these tokens attend to."""
    head: HeadReport | None = None
    """Report on the screened output head; None with the whole head."""

    @property
    def bytes_limit(self) -> float:
        """Bandwidth limit of the speed-up at the achieved sparsity."""
        saved = 0.0 if self.head is None else self.head.saved(self.decoded_tokens)
        shares = self.ffn_share_of_bytes, self.achieved_sparsity, self.proxy_bytes_share
        return bytes_limit(*shares, saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``head`` only if it was screened."""
        data = {**asdict(self), "bytes_limit": self.bytes_limit}
        if self.head is None:
            del data["head"]
        return data

    def __str__(self) -> str:
        requested, proxy = self.requested_sparsity, self.proxy_bytes_share
        of = "" if requested is None else f" of {requested:.0%} requested"
        selection = f" ({proxy:.2f}x for neuron selection)" if proxy else ""
        head = "" if self.head is None else f", {self.head}"
        return (
            f"{self.method}: {self.achieved_sparsity:.1%} of the FFN neurons removed{of}, "
            f"mean over {self.decoded_tokens} decoded tokens ({self.dense_token_share:.1%} of them "
            f"dense; {self.sparsity_while_pruned:.1%} while pruned), {self.remasks} re-mask"
            f"{'' if self.remasks == 1 else 's'}, {self.executor} executor, reads "
            f"{self.ffn_bytes_share:.2f}x of the dense FFN bytes{selection}, "
            f"{self.extra_memory_bytes / 2**20:.1f} MiB extra memory{head}"
        )


# Merging the reports (``RunReport.to_dict``) of several runs of one configuration.

_MEANS = "achieved_sparsity dense_token_share ffn_bytes_share ffn_bytes_share_if_compact".split()
_MEANS += "proxy_bytes_share token_bytes_share dense_token_bytes_share mean_context".split()
_SUMS = ("prompt_tokens", "decoded_tokens", "remasks")


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All reports merged; means are weighted by decoded tokens, None if any report lacks the value.

    ``layers`` has the last run's counts and the mean sparsity; ``sequences`` are concatenated.
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
        {**each[-1], "sparsity_decoded": mean([layer["sparsity_decoded"] for layer in each])}
        for each in zip(*(report["layers"] for report in reports), strict=True)
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
    """The report without its list of sequences, small enough to store per item."""
    return {**report, "sequences": []}


def add_dense(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The report plus ``tokens`` decoded tokens that ran dense, outside any run."""
    if not tokens:
        return report
    zeros = "achieved_sparsity proxy_bytes_share prompt_tokens remasks".split()
    ones = "dense_token_share ffn_bytes_share ffn_bytes_share_if_compact".split()
    dense = {**report, **dict.fromkeys(zeros, 0), **dict.fromkeys(ones, 1.0)}
    dense |= {"decoded_tokens": tokens, "remask_causes": {}, "sequences": [], "head": None}
    dense["token_bytes_share"] = report.get("dense_token_bytes_share")
    dense["layers"] = [{**layer, "sparsity_decoded": 0.0} for layer in report["layers"]]
    kept = ("sparsity_while_pruned", "mean_context", "sequences")
    return {**merge_reports([dense, report]), **{key: report.get(key) for key in kept}}
