"""What flows out of a run: frozen, JSON-able records, one schema for every door.

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
    """Masks of all layers were built; they hold from decode step ``step`` of ``sequence`` on."""

    sequence: int
    row: int | None
    """Batch row, or None when one mask serves the whole batch."""
    step: int
    """Decoded tokens before the first forward that used these masks."""
    cause: str
    """``first``, ``prompt`` (new prefill tokens), ``drift``, ``interval``, ``given``, or ``forced``
    (at a known moment)."""
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
    """None while the detector is not armed."""
    counter: int
    trigger: bool
    """Whether the masks are made anew after it."""
    state: str
    """``arming``, ``armed``, or ``held`` (a trigger that the guards put off)."""


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
    """Accounting of one sequence (one batch row, or one batch that shares its masks).

    Numbers as in ``RunReport``.
    """

    sequence: int
    row: int | None
    prompt_tokens: int
    decoded_tokens: int
    dense_tokens: int
    achieved_sparsity: float
    sparsity_while_pruned: float
    dense_token_share: float
    remasks: tuple[Remask, ...]


def bytes_limit(
    ffn_share: float, sparsity: float, proxy_share: float = 0.0, head_saved: float = 0.0
) -> float:
    """Largest speed-up that the bytes read allow: low-bit copies are read on top.

    ``head_saved``: of all bytes, those of the output head that a screened one leaves out.
    """
    return 1.0 / max(1e-9, 1.0 - ffn_share * (sparsity - proxy_share) - head_saved)


@dataclass(frozen=True)
class HeadReport:
    """What a screened head read and lost over the tokens that it scored."""

    tokens: int
    bytes_share: float
    """Bytes of one token over the whole head's: rough scores, exact words, and the looks at it."""
    sampled: int
    """Tokens that the whole head scored too."""
    same_share: float
    """Share of these whose best word is the same."""
    kl: float
    """Mean KL of the whole head against the screened one over these, in nats."""
    share_of_bytes: float = 0.0
    """The whole head's bytes over all weight bytes that one decoded token reads."""

    def read(self, decoded: float) -> float:
        """Bytes over the whole head's, on average over ``decoded`` tokens; others read it all."""
        screened = min(1.0, self.tokens / decoded) if decoded else 1.0
        return 1 - screened * (1 - self.bytes_share)

    def saved(self, decoded: float) -> float:
        """Of all weight bytes those that none of ``decoded`` tokens reads, on average."""
        return self.share_of_bytes * (1 - self.read(decoded))

    def __str__(self) -> str:
        return (
            f"head screened at {self.bytes_share:.2f} of its bytes (KL {self.kl:.4f}, best word "
            f"kept in {self.same_share:.1%} of {self.sampled} tokens looked at)"
        )


def merge_heads(heads: Sequence[HeadReport | None]) -> HeadReport | None:
    """One over the tokens of all; None where no head was screened."""
    found = [one for one in heads if one is not None]
    if not found:
        return None
    tokens, sampled = sum(h.tokens for h in found), sum(h.sampled for h in found)
    return HeadReport(
        tokens,
        sum(h.bytes_share * h.tokens for h in found) / tokens,
        sampled,
        sum(h.same_share * h.sampled for h in found) / max(1, sampled),
        sum(h.kl * h.sampled for h in found) / max(1, sampled),
        sum(h.share_of_bytes * h.tokens for h in found) / tokens,
    )


@dataclass(frozen=True)
class RunReport:
    """Accounting of a run (docs/method.md, "Accounting")."""

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
    ffn_flops_share: float
    """FFN FLOPs per decoded token over dense, as executed, tracing and mask building included."""
    ffn_bytes_share: float
    """FFN bytes touched per decode forward over dense, as executed, likewise."""
    ffn_flops_share_if_compact: float
    ffn_bytes_share_if_compact: float
    ffn_share_of_bytes: float
    """FFN bytes over all weight bytes that one decoded token reads (embedding rows left out)."""
    extra_memory_bytes: int
    """Held beside the model: evidence, detector, masks, compact and low-bit copies."""
    sequences: tuple[SequenceReport, ...]
    proxy_flops_share: float = 0.0
    """Part of the FFN FLOPs over dense that estimating and ranking per token takes, likewise."""
    proxy_bytes_share: float = 0.0
    """Part of the FFN bytes over dense that choosing per token takes, if run compactly: low-bit
    copies, or the losers' rows of a projection that is read whole; 0 unless tokens choose."""
    proxy_error: float | None = None
    """Relative Frobenius error of the low-bit copies; None without them."""
    proxy_error_gaussian: float | None = None
    """The same of Gaussian matrices on the same grid: much more means a file that flatters it."""
    token_bytes_share: float | None = None
    """Bytes that a decoded token reads over those of the dense model at bfloat16, if run compactly:
    FFN, attention, head and cache, what chooses as read, weights in blocks as stored, all else as
    two bytes, whatever the dtype of the run."""
    dense_token_bytes_share: float | None = None
    """The same of the model with nothing removed: less than 1 where weights are in blocks."""
    mean_context: float | None = None
    """Positions of the cache that these tokens see, on average."""
    head: HeadReport | None = None
    """Of a screened output head; None where it is whole."""

    @property
    def bytes_limit(self) -> float:
        """Largest speed-up that the bytes read allow at the achieved sparsity."""
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
        asked = copies = ""
        if self.requested_sparsity is not None:
            asked = f" of {self.requested_sparsity:.0%} asked"
        if self.proxy_bytes_share:
            copies = f" ({self.proxy_bytes_share:.2f} to choose neurons)"
        remasks = f"{self.remasks} re-mask{'' if self.remasks == 1 else 's'}"
        return (
            f"{self.method}: {self.achieved_sparsity:.1%} of the FFN neurons removed{asked}, mean "
            f"over {self.decoded_tokens} decoded tokens ({self.dense_token_share:.1%} of them "
            f"dense; {self.sparsity_while_pruned:.1%} while pruned), {remasks}, "
            f"{self.executor} executor, {self.ffn_bytes_share:.2f} of the dense FFN bytes{copies}, "
            f"{self.extra_memory_bytes / 2**20:.1f} MiB held"
            f"{'' if self.head is None else f', {self.head}'}"
        )


# Adding up the reports of several runs of the same configuration.


_WEIGHTED = (
    "achieved_sparsity",
    "dense_token_share",
    "ffn_flops_share",
    "ffn_bytes_share",
    "ffn_flops_share_if_compact",
    "ffn_bytes_share_if_compact",
    "proxy_flops_share",
    "proxy_bytes_share",
)

_KNOWN_LATELY = ("token_bytes_share", "dense_token_bytes_share", "mean_context")
"""As ``_WEIGHTED``, where all reports have them."""

_NONE_WHEN_DENSE = ("achieved_sparsity", "proxy_flops_share", "proxy_bytes_share")

_ADDED = ("prompt_tokens", "decoded_tokens", "remasks")


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report (as ``RunReport.to_dict``) over all; means are weighted by decoded tokens.

    ``layers`` keeps the last run's counts with the mean sparsity; ``sequences`` are joined.
    """
    total = sum(report["decoded_tokens"] for report in reports)
    merged = dict(reports[-1])

    def mean(values: Iterable[float]) -> float:
        weighted = zip(values, reports, strict=True)
        return float(sum(value * r["decoded_tokens"] for value, r in weighted) / max(1, total))

    merged.update({key: mean(report[key] for report in reports) for key in _WEIGHTED})
    for key in _KNOWN_LATELY:
        known = [report.get(key) for report in reports]
        merged[key] = None if None in known else mean(one for one in known if one is not None)
    merged.update({key: sum(report[key] for report in reports) for key in _ADDED})
    pruned = 1 - merged["dense_token_share"]
    merged["sparsity_while_pruned"] = merged["achieved_sparsity"] / pruned if pruned else 0.0
    merged["extra_memory_bytes"] = max(report["extra_memory_bytes"] for report in reports)
    causes = Counter[str]()
    for report in reports:
        causes.update(report["remask_causes"])
    merged["remask_causes"] = dict(causes)
    merged["layers"] = [
        {**each[-1], "sparsity_decoded": mean(layer["sparsity_decoded"] for layer in each)}
        for each in zip(*(report["layers"] for report in reports), strict=True)
    ]
    merged["sequences"] = [
        {**sequence, "sequence": number}
        for number, sequence in enumerate(s for r in reports for s in r["sequences"])
    ]
    head = merge_heads([_head(report) for report in reports])
    if head is not None:
        merged["head"] = asdict(head)
    merged["bytes_limit"] = _limit(merged)
    return merged


def _head(report: dict[str, Any]) -> HeadReport | None:
    found = report.get("head")
    return None if found is None else HeadReport(**found)


def _limit(report: dict[str, Any]) -> float:
    head, proxy = _head(report), report["proxy_bytes_share"]
    saved = 0.0 if head is None else head.saved(report["decoded_tokens"])
    return bytes_limit(report["ffn_share_of_bytes"], report["achieved_sparsity"], proxy, saved)


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its list of sequences, for keeping one per item."""
    return {**report, "sequences": []}


def add_dense(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The report with ``tokens`` decoded tokens more that ran dense, outside any run."""
    if not tokens:
        return report
    before = report["decoded_tokens"]
    total = before + tokens

    def mixed(value: float, dense: float) -> float:
        return float((value * before + dense * tokens) / total)

    merged = dict(report)
    for key in _WEIGHTED:
        merged[key] = mixed(report[key], 0.0 if key in _NONE_WHEN_DENSE else 1.0)
    if (whole := report.get("dense_token_bytes_share")) is not None:
        merged["token_bytes_share"] = mixed(report["token_bytes_share"], whole)
    merged["decoded_tokens"] = total
    merged["layers"] = [
        {**layer, "sparsity_decoded": mixed(layer["sparsity_decoded"], 0.0)}
        for layer in report["layers"]
    ]
    merged["bytes_limit"] = _limit(merged)
    return merged
