"""Rows of speed.json and tune.json: times, ratios, bytes, limits, losses, and the recommendation.

Losses are relative to a reference: the dense model with weights that were not rounded on loading.
There are two estimates of a candidate's loss on a text.  The first is the candidate's perplexity,
divided by the reference's perplexity on the same tokens, minus 1.  The second is exp(mean KL) - 1,
where KL is the divergence of the candidate from the reference.  This is the expected loss on text
that the reference would generate at the same positions.  The loss is the larger estimate, because
on few tokens the first can be too low by chance.  With too few slices for an interval, the loss is
the second estimate: it varies little, but perplexities of so few tokens vary a lot.  A row's loss
is the largest of the candidate's losses on the texts.

A row's bandwidth limit is the speed-up that its bytes allow: the bytes that a dense token reads,
divided by the bytes that a token of this row reads.  Its share of the memory speed is the bytes
that it reads per second, divided by those that a program reads that does nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.evaluation.perplexity import perplexity
from dart_llm.experiments import stats
from dart_llm.experiments.stats import contradicting, judge
from dart_llm.experiments.timing import WARM, token_seconds
from dart_llm.pruning.records import bytes_limit
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import FEWEST_ITEMS, TRANSFORMERS
from dart_llm.studies.bench.settings import Candidate

Sample = Mapping[str, Any]
"""The measurements of a candidate in one repetition, as ``timing.repetition`` returns them."""

Line = Mapping[str, Any]
"""A candidate's scores on a slice, with the keys ``candidate``, ``text``, ``slice``, ``loss``,
``kl``, ``tokens`` and ``accounting``."""

Row = dict[str, Any]
"""A row of speed.json or tune.json, or some of its columns."""

DISTURBED = "disturbed: other work ran; repeat it on a quiet machine"
"""Marks a row with an unreliable speed-up, which exceeds the bandwidth limit, scatters too much, or
contradicts another row."""

REFERENCE = "reference"
"""The value of ``candidate`` in the lines of the reference."""


# Times, ratios and bytes.


def mean_context(prompt: int, tokens: int) -> float:
    """The mean number of KV-cache positions that a timed token reads.

    This includes the token's own position.  ``WARM`` untimed tokens precede the timed tokens.
    """
    return prompt + WARM + (tokens + 1) / 2


@dataclass(frozen=True)
class DecodeTraffic:
    """The bytes that one decoded token reads if it runs dense.

    ``ffn``: the weights of all FFNs.  ``head``: the weights of the output head.  ``weights``: all
    weights, including these.  ``cache``: the KV cache.
    """

    ffn: float
    weights: float
    cache: float
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def share(self) -> float:
        """The FFNs' share f of all bytes that a dense token reads, including the KV cache."""
        return self.ffn / self.total

    def limit(self, sparsity: float, proxy_share: float = 0.0, head_share: float = 1.0) -> float:
        """The bandwidth limit at ``sparsity`` s: 1 / (1 - f s) without proxies or a screened head.

        ``proxy_share``: bytes of the low-bit proxies, divided by FFN bytes; proxies are
        read in addition to weights.  ``head_share``: the fraction of the head's bytes that is read.
        """
        saved = self.head / self.total * (1 - head_share)
        return bytes_limit(self.share, sparsity, proxy_share, saved)

    def read(self, ffn_share: float, head_share: float = 1.0) -> float:
        """The bytes that a token reads if it reads these fractions of the FFN and head bytes."""
        return self.total + self.ffn * (ffn_share - 1) + self.head * (head_share - 1)


def time_columns(
    samples: Sequence[Sample], base: Sequence[Sample] | None, limit: float | None = None
) -> Row:
    """``ms`` per decoded token, the speed-up over ``base`` (``times_dense``), and its ``scatter``.

    ``limit``: the bandwidth limit relative to ``base``.  If the speed-up exceeds ``limit`` or
    scatters too much, ``times_dense`` is None and ``disturbed`` is ``DISTURBED``.  Without samples,
    all these columns are None; without ``base``, only ``ms`` has a value.
    """
    names = ("ms", "times_dense", "scatter", "disturbed")
    row: Row = {**dict.fromkeys(names), "bandwidth_limit": limit}
    if not samples:
        return row
    seconds = token_seconds(samples)
    row["ms"] = 1000 * statistics.median(seconds)
    if base is None:
        return row
    judged = judge(token_seconds(base), seconds, limit)
    disturbed = DISTURBED if judged.disturbed else None
    return {**row, "times_dense": judged.ratio, "scatter": judged.scatter, "disturbed": disturbed}


def _mean(samples: Sequence[Sample], name: str, default: float) -> float:
    return statistics.fmean(sample.get(name, default) for sample in samples)


def speed_document(
    candidates: Sequence[Candidate], samples: Mapping[str, Sequence[Sample]], about: Row
) -> Row:
    """The content of speed.json: the entries of ``about``, and a row per candidate.

    ``about["formats"]`` has an entry per weight format.  In an entry, ``weights`` has sizes in
    bytes, and ``base`` is the label of the row with which this format's rows are compared: dense
    (native), or transformers if that cannot run.  ``base`` is None for a format that only the
    transformers row uses.  ``about["reference"]`` has an entry per row of llama.cpp; ``bytes`` in
    it are the weight bytes that a token reads.
    """
    formats = about["formats"]
    bases = {name: samples.get(facts["base"]) for name, facts in formats.items()}
    context = mean_context(about["prompt_tokens"], about["tokens"])
    traffic = {}
    for name, facts in formats.items():
        sizes = facts["weights"]
        cache, head = context * sizes["cache_bytes_per_position"], sizes.get("head_bytes", 0.0)
        traffic[name] = DecodeTraffic(sizes["ffn_bytes"], sizes["weight_bytes"], cache, head)
    main = traffic[about["main"]]
    rows = []
    for candidate in candidates:
        timed = samples[candidate.label]
        dense: Sequence[Sample] | None
        if candidate.file is None:
            dense = bases[candidate.weights] or samples[about["base"]]
            row = _accounting(candidate, timed, traffic[candidate.weights])
        else:
            facts = about["reference"][candidate.label]
            row = {"bytes_per_token": facts["bytes"] + context * about["reference_cache_bytes"]}
            dense = bases.get(facts["format"])
        row = _speed_row(candidate, timed, row, samples[TRANSFORMERS], dense)
        row["pp_tokens_per_second"] = 1000 * about["prompt_tokens"] / row["first_token_ms"]
        rows.append(row)
    _mark_contradictions(rows, samples)
    for row in rows:
        row["verdict"] = "disturbed: repeat it" if row["disturbed"] else None
    speeds = [s["read_speed"] for row in samples.values() for s in row if "read_speed" in s]
    shared = {
        "mean_context": context,
        "ffn_share_of_bytes_read": main.share,
        "read_speed": statistics.median(speeds) if speeds else None,
    }
    return {**about, **shared, "bytes_per_dense_token": main.total, "rows": rows}


def _accounting(candidate: Candidate, samples: Sequence[Sample], traffic: DecodeTraffic) -> Row:
    """Columns that llama.cpp's rows lack: limit, accounting of the timed tokens, memory."""
    removed, head = _mean(samples, "achieved_sparsity", 0.0), _mean(samples, "head_bytes_share", 1)
    limit = traffic.limit(removed, _mean(samples, "proxy_bytes_share", 0.0), head)
    memory = [sample.get("extra_memory_bytes") for sample in samples]
    return {
        "bandwidth_limit": None if candidate.config is None else limit,
        "achieved_sparsity": removed,
        "dense_token_share": _mean(samples, "dense_token_share", float(candidate.config is None)),
        "remasks": _mean(samples, "remasks", 0.0),
        "bytes_per_token": traffic.read(_mean(samples, "ffn_bytes_share", 1.0), head),
        "extra_memory_bytes": max((size for size in memory if size is not None), default=None),
    }


def _speed_row(
    candidate: Candidate,
    samples: Sequence[Sample],
    row: Row,
    transformers: Sequence[Sample],
    dense: Sequence[Sample] | None,
) -> Row:
    """``row``, with added times and speed-ups over ``transformers`` and ``dense`` (native)."""
    limit = row.get("bandwidth_limit")
    times = time_columns(samples, dense, limit)
    over_transformers = judge(token_seconds(transformers), token_seconds(samples))
    if over_transformers.disturbed:
        times["disturbed"] = DISTURBED
    ratio = times["times_dense"]
    return {
        "row": candidate.label,
        "method": candidate.method,
        "requested": None if candidate.config is None else candidate.config.target,
        "executor": candidate.executor,
        "head": None if candidate.config is None else candidate.config.head.kind,
        "weights": candidate.weights,
        **row,
        **times,
        "share_of_limit": ratio / limit if ratio and limit and not candidate.dense else None,
        "share_of_memory_speed": _share_of_memory_speed(samples, row["bytes_per_token"]),
        "times_transformers": over_transformers.ratio,
        "first_token_ms": 1000 * statistics.median(s["first_token_s"] for s in samples),
    }


def _share_of_memory_speed(samples: Sequence[Sample], size: float) -> float | None:
    """The median over the repetitions; ``size``: bytes per token.  None if it was not measured."""
    pairs = zip(samples, token_seconds(samples), strict=True)
    shares = [size / s / sample["read_speed"] for sample, s in pairs if sample.get("read_speed")]
    return statistics.median(shares) if shares else None


def _mark_contradictions(rows: Sequence[Row], samples: Mapping[str, Sequence[Sample]]) -> None:
    """Mark both rows of a pair as disturbed if their times contradict their bytes.

    Only rows of the same method, executor, head and weight format are compared, because methods
    differ in the time that selection takes.
    """
    judged = [row for row in rows if row["bandwidth_limit"] and row["times_dense"] is not None]
    names = ("method", "executor", "head", "weights")
    groups = grouped(judged, lambda row: tuple(row[name] for name in names))
    for same in groups.values():
        sizes = {row["row"]: row["bytes_per_token"] for row in same}
        wrong = contradicting({label: token_seconds(samples[label]) for label in sizes}, sizes)
        for row in same:
            if row["row"] in wrong:
                row |= {"times_dense": None, "share_of_limit": None, "disturbed": DISTURBED}


# Losses.


def quality_row(label: str, lines: Sequence[Line], seed: int) -> Row:
    """A candidate's columns: largest loss, KL, accounting, and ``texts`` (columns per text)."""
    by_candidate = grouped(lines, lambda line: line["candidate"])
    scored, reference = by_candidate[label], by_candidate[REFERENCE]
    dense = {line["slice"]: line for line in reference}
    texts = {
        text: _on_text(on_text, [dense[line["slice"]] for line in on_text], seed)
        for text, on_text in grouped(scored, lambda line: line["text"]).items()
    }
    worse_text = max(texts, key=lambda text: texts[text]["loss"])
    names = ("loss", "loss_interval", "loss_range", "perplexity")
    return {
        "worse_text": worse_text,
        **{name: texts[worse_text][name] for name in names},
        "kl": max(row["kl"] for row in texts.values()),
        "slices": len(scored),
        **_mean_accounting([line["accounting"] for line in scored]),
        "texts": texts,
    }


def _on_text(scored: Sequence[Line], base: Sequence[Line], seed: int) -> Row:
    """A candidate's columns for one text; ``base``: the reference's lines on the same slices."""
    losses, dense = (
        {line["slice"]: (line["loss"], line["tokens"]) for line in lines}
        for lines in (scored, base)
    )
    tokens = sum(line["tokens"] for line in scored)
    loss, dense_loss = (
        sum(line["loss"] * line["tokens"] for line in lines) / tokens for lines in (scored, base)
    )
    kls = [line["kl"] for line in scored]
    kl = sum(line["kl"] * line["tokens"] for line in scored) / tokens
    paired = stats.paired_interval(losses, dense, "ratio_of_exp_mean", seed)
    over_kl = stats.interval(kls, seed=seed)
    by_tokens = (
        perplexity(loss - dense_loss) - 1,
        paired and paired.ends and [end - 1 for end in paired.ends],
    )
    by_kl = math.expm1(kl), over_kl and over_kl.ends and [*map(math.expm1, over_kl.ends)]
    enough = len(scored) >= FEWEST_ITEMS
    candidate_loss, interval = max(by_tokens, by_kl, key=lambda pair: pair[0]) if enough else by_kl
    return {
        "loss": candidate_loss,
        "loss_interval": interval,
        "loss_range": [math.expm1(min(kls)), math.expm1(max(kls))],
        "kl": kl,
        "perplexity": perplexity(loss),
        "dense_perplexity": perplexity(dense_loss),
        "slices": len(scored),
    }


def _mean_accounting(reports: Sequence[Mapping[str, Any]]) -> Row:
    """Means weighted by decoded tokens, the number of re-masks, and the largest extra memory."""
    total = sum(report["decoded_tokens"] for report in reports)

    def mean(name: str) -> float | None:
        if any(report[name] is None for report in reports):
            return None
        return float(sum(r[name] * r["decoded_tokens"] for r in reports) / total)

    return {
        "achieved_sparsity": mean("achieved_sparsity"),
        "dense_token_share": mean("dense_token_share"),
        "remasks": sum(report["remasks"] for report in reports),
        "bytes_share": mean("token_bytes_share"),
        "extra_memory_bytes": max(report["extra_memory_bytes"] for report in reports),
    }


# The recommendation.


def clearly_over(row: Row, max_loss: float) -> bool:
    """Whether the whole interval of the loss is above the budget ``max_loss``.

    With too few slices for an interval, the smallest loss of a slice is compared instead.
    """
    ends = row["loss_interval"]
    return bool((_lost(row, -1) if ends is None else ends[0]) > max_loss)


def recommend(rows: Sequence[Row], base: str, max_loss: float, noise: float) -> str:
    """The label of the fastest row whose estimated loss is within ``max_loss``.

    A row is recommended only if it is faster than simpler rows by more than ``noise``.  The fastest
    dense row is simpler than a pruned row, and ``base`` (the label of the dense model as loaded) is
    simpler than both.  Disturbed rows are ignored.  If no row is left, the result is ``base``.
    """
    fit = [row for row in rows if _is_trusted(row) and row["loss"] <= max_loss]
    if not fit:
        return base
    fit.sort(key=lambda row: float(row["ms"]))
    best, dense = fit[0], next((row for row in fit if row["dense"]), None)
    for simpler in (dense, next((row for row in fit if row["row"] == base), None)):
        if simpler is not None and simpler["ms"] <= best["ms"] * (1 + noise):
            best = simpler
    return str(best["row"])


def _is_trusted(row: Row) -> bool:
    """Whether a row was timed without disturbance."""
    return row["ms"] is not None and row["disturbed"] is None


def undecided(
    rows: Sequence[Row], base: str, recommended: str, max_loss: float, noise: float
) -> list[str]:
    """Labels of the timed rows that may still turn out to be better than ``base``.

    A row is clearly good if, even at the unfavourable end of the scatter, it is faster than dense
    by more than ``noise`` and loses at most ``max_loss``.  A row is clearly bad if, even at the
    favourable end, it misses one of these conditions.  The result has all rows that are not clearly
    bad, but it is empty if the recommended row is clearly good.
    """
    others = [row for row in rows if row["row"] != base]
    clear = [row for row in others if _gain(row, -1) > 1 + noise and _lost(row, 1) <= max_loss]
    if any(row["row"] == recommended for row in clear):
        return []
    return [
        row["row"]
        for row in others
        if row["ms"] is not None and _gain(row, 1) > 1 + noise and _lost(row, -1) <= max_loss
    ]


def _gain(row: Row, side: int) -> float:
    """The smallest (``side`` -1) or largest (1) speed-up within the scatter of the repetitions."""
    if not _is_trusted(row):
        return math.inf if side > 0 else 0.0
    return float(row["times_dense"] * (1 + side * (row["scatter"] or 0.0)))


def _lost(row: Row, side: int) -> float:
    """The smallest (``side`` -1) or largest (1) loss over the slices."""
    low, high = row["loss_range"]
    return float(min(low, row["loss"]) if side < 0 else max(high, row["loss"]))
