"""From the repetitions of ``dart-llm bench speed`` to speed.json: rows, costs, notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.speed_cases import TRANSFORMERS, Case
from dart_llm.speed_costs import costs
from dart_llm.speed_limit import Bytes, mean_context, percentile, spread

Sample = Mapping[str, Any]

DEFINITIONS = {
    "pp tokens/s": "prompt tokens over the time to the first token; the prompt is always dense",
    "first token ms": "the prompt read and the first token chosen, attaching left out; median",
    "tg ms": "mean over a repetition's timed tokens, dense tokens and mask builds among them; "
    "median over repetitions",
    "+-": "median absolute distance of the repetitions to their median",
    "token 5/50/95 %": "percentiles over single tokens of all repetitions, ms",
    "achieved": "fraction of FFN neurons removed, mean over the timed tokens, dense ones count 0",
    "dense tokens": "share of the timed tokens that ran dense",
    "re-masks": "masks built per repetition after the first",
    "x transformers": "ms of the untouched model over this row's",
    "x own dense": "ms of our own dense path over this row's",
    "limit": "1 / (1 - f s): s is what was achieved, f the FFN's share of the bytes that a token "
    "reads, the key-value cache at the mean context length among them",
    "of limit": "x own dense over the limit",
    "GB/s": "bytes of the weights and cache that a token reads, over its time",
    "of read": "GB/s over the read bandwidth of the same run",
    "attach ms": "from a configuration to an attached model, what is learnt once left out; median",
    "extra MiB": "held beside the model while attached",
    "peak MiB": "largest growth of resident memory in a repetition, cache and activations included",
    "all ms": "the prompt, the untimed tokens with the first masks, and the timed ones; median",
    "all x transformers": "all ms of the untouched model over this row's",
    "all x own dense": "all ms of our own dense path over this row's",
}


def summarise(
    cases: Sequence[Case], own: str, repetitions: Sequence[Mapping[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """speed.json.  ``about``: facts, with ``weights`` (ffn_bytes, weight_bytes, and the cache's
    cache_bytes_per_position), ``prompt_tokens`` and ``tokens``; ``own``: our own dense path.
    """
    samples = {case.label: [one["samples"][case.label] for one in repetitions] for case in cases}
    weights = about["weights"]
    context = mean_context(about["prompt_tokens"], about["tokens"])
    cache = context * weights["cache_bytes_per_position"]
    sizes = Bytes(weights["ffn_bytes"], weights["weight_bytes"], cache)
    speeds = [one["read_bandwidth"] for one in repetitions]
    read = statistics.median(speeds)
    shown = [case for case in cases if case.kind != "cost"]
    dense = {label: token_ms(samples[label]) for label in (TRANSFORMERS, own)}
    rows = [
        _row(case, samples[case.label], sizes, about["prompt_tokens"], read, dense, own)
        | _whole(samples, case.label, own)
        for case in shown
    ]
    return {
        **about,
        "sittings": len({one["sitting"] for one in repetitions}),
        "own_dense": own,
        "mean_context": context,
        "ffn_share_of_bytes_read": sizes.share,
        "bytes_per_dense_token": sizes.total,
        "read_bandwidth": {"bytes_per_second": read, "repetitions": speeds},
        "rows": rows,
        "costs": costs(cases, samples),
        "orders": [one["order"] for one in repetitions],
        "definitions": DEFINITIONS,
    }


def token_ms(samples: Sequence[Sample]) -> float:
    """Median over repetitions of the mean time of a timed token, in ms."""
    return statistics.median(1000 * statistics.fmean(one["steps_s"]) for one in samples)


def all_ms(samples: Sequence[Sample]) -> float:
    """Median over repetitions of what prompt and tokens took, untimed tokens too, in ms."""
    parts = ([one["first_token_s"], *one["warm_s"], *one["steps_s"]] for one in samples)
    found: float = statistics.median(1000 * sum(part) for part in parts)
    return found


def _whole(samples: Mapping[str, Sequence[Sample]], label: str, own: str) -> dict[str, float]:
    ms, plain, dense = (all_ms(samples[name]) for name in (label, TRANSFORMERS, own))
    return {"all_ms": ms, "all_times_transformers": plain / ms, "all_times_own_dense": dense / ms}


def _row(
    case: Case,
    samples: Sequence[Sample],
    sizes: Bytes,
    prompt: int,
    read: float,
    dense: Mapping[str, float],
    own: str,
) -> dict[str, Any]:
    ms = token_ms(samples)
    first = statistics.median(one["first_token_s"] for one in samples)
    steps = [1000 * step for one in samples for step in one["steps_s"]]
    removed = _mean(samples, "achieved_sparsity", 0.0)
    proxy = _mean(samples, "proxy_bytes_share", 0.0)
    limit = sizes.limit(removed, proxy)
    moved = sizes.read(_mean(samples, "ffn_bytes_share", 1.0))
    speed = moved / ms * 1000
    return {
        "row": case.label,
        "variant": case.variant,
        "asked": None if case.config is None else case.config.target,
        "executor": case.executor,
        "pp_tokens_per_second": prompt / first,
        "first_token_ms": 1000 * first,
        "tg_ms": ms,
        "tg_spread_ms": spread([1000 * statistics.fmean(one["steps_s"]) for one in samples]),
        "token_ms_p5": percentile(steps, 5),
        "token_ms_median": statistics.median(steps),
        "token_ms_p95": percentile(steps, 95),
        "tg_tokens_per_second": 1000 / ms,
        "achieved_sparsity": removed,
        "dense_token_share": _mean(samples, "dense_token_share", 0.0) if case.config else 1.0,
        "remasks": _mean(samples, "remasks", 0.0),
        "times_transformers": dense[TRANSFORMERS] / ms,
        "times_own_dense": dense[own] / ms,
        "limit": limit,
        "share_of_limit": None if case.variant is None else dense[own] / ms / limit,
        "bytes_per_token": moved,
        "bytes_per_second": speed,
        "share_of_read_bandwidth": speed / read,
        "attach_ms": _ms(samples, "attach_s"),
        "extra_memory_bytes": _most(samples, "extra_memory_bytes"),
        "peak_growth_bytes": _most(samples, "peak_growth_bytes"),
    }


def _mean(samples: Sequence[Sample], name: str, otherwise: float) -> float:
    return statistics.fmean(one.get(name, otherwise) for one in samples)


def _ms(samples: Sequence[Sample], name: str) -> float | None:
    known = [one[name] for one in samples if name in one]
    return 1000 * statistics.median(known) if known else None


def _most(samples: Sequence[Sample], name: str) -> int | None:
    return max((one[name] for one in samples if one.get(name) is not None), default=None)
