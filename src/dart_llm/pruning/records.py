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
    """Masks of all layers were built; they apply from decode step ``step`` of ``sequence`` on."""

    sequence: int
    row: int | None
    """Batch row, or None when one mask serves the whole batch."""
    step: int
    """Decoded tokens before the first forward that used these masks."""
    cause: str
    """``first``, ``prompt`` (new prefill tokens), ``drift``, ``interval``, ``fixed`` or ``forced``
    (at a set moment)."""
    evidence_tokens: float
    """Tokens that the masks were made from; after a decay they count less."""
    kept: tuple[int, ...]
    """Neurons kept, per layer."""
    overlap: float | None
    """Share of the kept neurons that the mask before also kept; None for a first mask."""


@dataclass(frozen=True)
class DriftCheck:
    """One completed window of the drift detector (one row of drift.csv).

    ``step``: decoded tokens up to its end; ``layer``: whose output is watched; ``window``: its
    number since the reference was made; ``counter``: the rule's, after this window.
    """

    sequence: int
    row: int
    step: int
    layer: int
    window: int
    similarity: float
    """Cosine of the window's mean and the reference, -1 to 1."""
    threshold: float | None
    """The detector's threshold; None while it is not armed."""
    counter: int
    trigger: bool
    """Whether the masks are rebuilt after it."""
    state: str
    """``arming``, ``armed``, or ``suppressed`` (a trigger that the guards do not let through)."""


@dataclass(frozen=True)
class LayerStat:
    """One layer at the end of a run."""

    layer: int
    width: int
    kept: int
    """Neurons kept by the mask in force at the end (the width when dense)."""
    kept_share: float
    sparsity_decoded: float
    """Mean over decoded tokens, dense tokens counting 0."""


@dataclass(frozen=True)
class SequenceReport:
    """One sequence (one batch row, or one batch that shares its masks); as in ``RunReport``."""

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
    """Bandwidth limit of the speed-up: what selecting reads counts on top.

    ``head_saved``: of all bytes, those of the output head that a screened one leaves out.
    """
    return 1.0 / max(1e-9, 1.0 - ffn_share * (sparsity - proxy_share) - head_saved)


@dataclass(frozen=True)
class HeadReport:
    """What a screened head read and lost over the tokens that it scored."""

    tokens: int
    bytes_share: float
    """Bytes of one token over the whole head's: rough scores, exact entries, and the samples."""
    sampled: int
    """Tokens that the whole head scored too."""
    same_share: float
    """Share of these whose best vocabulary entry is the same."""
    kl: float
    """Mean KL of the whole head against the screened one over these, in nats."""
    share_of_bytes: float = 0.0
    """The whole head's bytes over all weight bytes that one decoded token reads."""

    def read(self, decoded: float) -> float:
        """Bytes over the whole head's, on average over ``decoded`` tokens; others read it all."""
        screened = min(1.0, self.tokens / decoded) if decoded else 1.0
        return 1 - screened * (1 - self.bytes_share)

    def saved(self, decoded: float) -> float:
        """Mean share of all weight bytes that none of ``decoded`` tokens reads."""
        return self.share_of_bytes * (1 - self.read(decoded))

    def __str__(self) -> str:
        return (
            f"head screened at {self.bytes_share:.2f} of its bytes (KL {self.kl:.4f}, same best "
            f"token in {self.same_share:.1%} of {self.sampled} samples)"
        )


def merge_heads(heads: Iterable[HeadReport | None]) -> HeadReport | None:
    """The reports merged over all tokens; None where no head was screened."""
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
    """Mean over decoded tokens and layers of the fraction removed; dense tokens count 0."""
    sparsity_while_pruned: float
    """The same over the tokens that ran with masks."""
    dense_token_share: float
    """Decoded tokens that ran dense, over all of them."""
    prompt_tokens: int
    decoded_tokens: int
    remasks: int
    """Masks built after the first of each sequence."""
    remask_causes: dict[str, int]
    layers: tuple[LayerStat, ...]
    executor: str
    ffn_bytes_share: float
    """FFN bytes read per decode forward over dense, as executed, with tracing and mask building."""
    ffn_bytes_share_if_compact: float
    """The same if every forward read its winners alone."""
    ffn_share_of_bytes: float
    """FFN bytes over all weight bytes that one decoded token reads (embedding rows left out)."""
    extra_memory_bytes: int
    """Memory beside the model: evidence, detector, masks, compact weights, low-bit proxies."""
    sequences: tuple[SequenceReport, ...]
    proxy_bytes_share: float = 0.0
    """Part of the FFN bytes over dense that per-token selection reads, if run compactly: low-bit
    proxies, or the losers' rows of a projection that is read whole."""
    token_bytes_share: float | None = None
    """Bytes that a decoded token reads over those of the dense model at bfloat16, if run compactly:
    FFN, attention, head and cache, selection included, weights in blocks as stored, all else as
    two bytes, whatever the dtype of the run."""
    dense_token_bytes_share: float | None = None
    """The same of the model with nothing removed: less than 1 where weights are in blocks."""
    mean_context: float | None = None
    """Positions of the cache that these tokens see, on average."""
    head: HeadReport | None = None
    """Of a screened output head; None where it is whole."""

    @property
    def bytes_limit(self) -> float:
        """Bandwidth limit of the speed-up at the achieved sparsity."""
        saved = 0.0 if self.head is None else self.head.saved(self.decoded_tokens)
        shares = self.ffn_share_of_bytes, self.achieved_sparsity, self.proxy_bytes_share
        return bytes_limit(*shares, saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``head`` only where it was screened."""
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


# Adding up reports, as ``RunReport.to_dict``, of several runs of the same configuration.

_MEANS = "achieved_sparsity dense_token_share ffn_bytes_share ffn_bytes_share_if_compact".split()
_MEANS += "proxy_bytes_share token_bytes_share dense_token_bytes_share mean_context".split()
_SUMS = ("prompt_tokens", "decoded_tokens", "remasks")


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All reports merged; means are weighted by decoded tokens, None where a report has none.

    ``layers`` keeps the last run's counts with the mean sparsity; ``sequences`` are joined.
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
    """The report without its list of sequences, for keeping one per item."""
    return {**report, "sequences": []}


def add_dense(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The report with ``tokens`` decoded tokens more that ran dense, outside any run."""
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
