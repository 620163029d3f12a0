"""Rows of speed.json and tune.json from repetitions: times, ratios, bytes and their limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dart_llm.experiments.stats import contradicting, judge
from dart_llm.experiments.timing import WARM, mad, token_seconds
from dart_llm.pruning.records import bytes_limit
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import TRANSFORMERS
from dart_llm.studies.bench.candidates import Candidate

Sample = Mapping[str, Any]
"""One repetition of one row, see ``timing.repetition``."""

Row = dict[str, Any]

DISTURBED = "disturbed: other work ran; repeat it on a quiet machine"
"""Replaces a ratio that the bytes do not allow, or whose repetitions scatter too far."""


def mean_context(prompt: int, tokens: int) -> float:
    """Positions of the key-value cache that a timed token reads, its own included, on average.

    The first timed token is number ``WARM`` after the prompt, counted from 0.
    """
    return prompt + WARM + (tokens + 1) / 2


@dataclass(frozen=True)
class DecodeTraffic:
    """What one dense token reads: bytes of weights, those of FFN and head in them, and of cache."""

    ffn: float
    weights: float
    cache: float
    head: float = 0.0

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, float], context: float) -> DecodeTraffic:
        """``sizes``: "weights" of speed.json; ``context``: positions of the cache."""
        cache = context * sizes["cache_bytes_per_position"]
        head = sizes.get("head_bytes", 0.0)
        return cls(sizes["ffn_bytes"], sizes["weight_bytes"], cache, head)

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def share(self) -> float:
        """f: the FFN's share of all bytes that a token reads, the cache's among them."""
        return self.ffn / self.total

    def limit(self, sparsity: float, proxy_share: float = 0.0, head_share: float = 1.0) -> float:
        """1 / (1 - f s); ``proxy_share``: low-bit proxies over the FFN's bytes, read on top.

        ``head_share``: of the head's bytes, what a screened one reads.
        """
        saved = self.head / self.total * (1 - head_share)
        return bytes_limit(self.share, sparsity, proxy_share, saved)

    def read(self, ffn_share: float, head_share: float = 1.0) -> float:
        """Bytes of one token that touches these shares of the bytes of FFN and head."""
        return self.total + self.ffn * (ffn_share - 1) + self.head * (head_share - 1)


def time_columns(
    samples: Sequence[Sample], base: Sequence[Sample] | None, limit: float | None = None
) -> Row:
    """Milliseconds of a decoded token, and how many times as fast as ``base``.

    All None without samples.  ``limit``: bytes of ``base`` over bytes of this, which no ratio
    exceeds; a timing that contradicts it is ``disturbed``, and has no ratio.
    """
    names = ("ms", "ms_spread", "times_dense", "scatter", "disturbed")
    row: Row = {**dict.fromkeys(names), "bandwidth_limit": limit}
    if not samples:
        return row
    seconds = token_seconds(samples)
    row |= {"ms": 1000 * statistics.median(seconds), "ms_spread": 1000 * mad(seconds)}
    if base is None:
        return row
    judged = judge(token_seconds(base), seconds, limit)
    disturbed = DISTURBED if judged.disturbed else None
    return {**row, "times_dense": judged.ratio, "scatter": judged.scatter, "disturbed": disturbed}


def all_ms(samples: Sequence[Sample]) -> float:
    """Median over repetitions of what prompt and tokens took, untimed tokens too, in ms."""
    parts = ([one["first_token_s"], *one["warm_s"], *one["steps_s"]] for one in samples)
    return 1000 * float(statistics.median(map(sum, parts)))


def _mean(samples: Sequence[Sample], name: str, default: float) -> float:
    return statistics.fmean(one.get(name, default) for one in samples)


def _median_ms(samples: Sequence[Sample], name: str) -> float | None:
    values = [one[name] for one in samples if one.get(name) is not None]
    return 1000 * statistics.median(values) if values else None


def _largest(samples: Sequence[Sample], name: str) -> Any:
    return max((one[name] for one in samples if one.get(name) is not None), default=None)


def speed_document(
    candidates: Sequence[Candidate], samples: Mapping[str, Sequence[Sample]], about: Row
) -> Row:
    """speed.json: ``about``, and a row per candidate.

    ``about``: of ``formats`` by name the ``weights`` (bytes) and ``base`` (label of dense (native),
    None where there is none), of ``reference`` by label what llama.cpp reads.
    """
    formats, base, rows = about["formats"], about["base"], []
    context = mean_context(about["prompt_tokens"], about["tokens"])
    traffic = {
        name: DecodeTraffic.from_sizes(one["weights"], context) for name, one in formats.items()
    }
    main = next((traffic[name] for name, one in formats.items() if one["base"] == base))
    for candidate in candidates:
        timed = samples[candidate.label]
        if candidate.file is None:
            row = _accounting(candidate, timed, traffic[candidate.weights])
            dense = formats[candidate.weights]["base"] or base
        else:
            facts = about["reference"][candidate.label]
            row = {"bytes_per_token": facts["bytes"] + context * facts["cache_bytes_per_position"]}
            dense = formats.get(facts["format"], {}).get("base")
        row = _times(candidate, timed, row, samples[TRANSFORMERS], samples.get(dense))
        first, speed = _median_ms(timed, "first_token_s") or 0.0, row["bytes_per_second"]
        over_base = judge(token_seconds(samples[base]), token_seconds(timed)).ratio
        row |= {
            "times_base": None if row["disturbed"] else over_base,
            "base_limit": main.total / row["bytes_per_token"],
            "first_token_ms": first,
            "pp_tokens_per_second": 1000 * about["prompt_tokens"] / first,
            "prefill_ms": _median_ms(timed, "prefill_s"),
            "share_of_read_bandwidth": speed / about["read_bandwidth"]["bytes_per_second"],
        }
        rows.append(row)
    _mark_contradictions(rows, samples)
    for row in rows:
        row["verdict"] = "disturbed: repeat it" if row["disturbed"] else None
    shared = {"mean_context": context, "ffn_share_of_bytes_read": main.share}
    return {**about, **shared, "bytes_per_dense_token": main.total, "rows": rows}


def _accounting(candidate: Candidate, samples: Sequence[Sample], traffic: DecodeTraffic) -> Row:
    """What llama.cpp does not report: accounting of the timed tokens, single steps, memory."""
    removed, head = _mean(samples, "achieved_sparsity", 0.0), _mean(samples, "head_bytes_share", 1)
    limit = traffic.limit(removed, _mean(samples, "proxy_bytes_share", 0.0), head)
    steps = [1000 * step for one in samples for step in one["steps_s"]]
    names = ("token_ms_p5", "token_ms_median", "token_ms_p95")
    return {
        "bandwidth_limit": None if candidate.config is None else limit,
        **dict(zip(names, np.percentile(steps, (5, 50, 95)).tolist(), strict=True)),
        "achieved_sparsity": removed,
        "dense_token_share": _mean(samples, "dense_token_share", float(candidate.config is None)),
        "remasks": _mean(samples, "remasks", 0.0),
        "bytes_per_token": traffic.read(_mean(samples, "ffn_bytes_share", 1.0), head),
        "attach_ms": _median_ms(samples, "attach_s"),
        "extra_memory_bytes": _largest(samples, "extra_memory_bytes"),
        "peak_growth_bytes": _largest(samples, "peak_growth_bytes"),
        "all_ms": all_ms(samples),
    }


def _times(
    candidate: Candidate,
    samples: Sequence[Sample],
    row: Row,
    transformers: Sequence[Sample],
    dense: Sequence[Sample] | None,
) -> Row:
    """A row with its times, and with its ratios over transformers and dense (native)."""
    limit = row.get("bandwidth_limit")
    times = time_columns(samples, dense, limit)
    plain = judge(token_seconds(transformers), token_seconds(samples))
    if plain.disturbed:
        times["disturbed"] = DISTURBED
    ratio, whole = times["times_dense"], row.get("all_ms")
    return {
        "row": candidate.label,
        "method": candidate.method,
        "requested": None if candidate.config is None else candidate.config.target,
        "executor": candidate.executor,
        "weights": candidate.weights,
        **row,
        **times,
        "share_of_limit": ratio / limit if ratio and limit and candidate.method else None,
        "times_transformers": plain.ratio,
        "tg_tokens_per_second": 1000 / times["ms"],
        "bytes_per_second": 1000 * row["bytes_per_token"] / times["ms"],
        "all_times_transformers": all_ms(transformers) / whole if plain.ratio and whole else None,
        "all_times_dense": all_ms(dense) / whole if dense and ratio and whole else None,
    }


def _mark_contradictions(rows: Sequence[Row], samples: Mapping[str, Sequence[Sample]]) -> None:
    """Of one method by the same kernels on the same weights, what reads less is faster by no more
    than it reads less; other methods choose neurons in other ways, which takes time of its own."""
    judged = [row for row in rows if row["bandwidth_limit"] and row["times_dense"] is not None]
    kinds = grouped(judged, lambda row: (row["method"], row["executor"], row["weights"]))
    ratios = ("times_dense", "share_of_limit", "times_base", "all_times_dense")
    for same in kinds.values():
        sizes = {row["row"]: row["bytes_per_token"] for row in same}
        wrong = contradicting({label: token_seconds(samples[label]) for label in sizes}, sizes)
        for row in same:
            if row["row"] in wrong:
                row |= {**dict.fromkeys(ratios), "disturbed": DISTURBED}
