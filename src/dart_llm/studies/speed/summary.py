"""speed.json of ``bench speed``: bytes, limits, shares, spreads; its tables and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dart_llm.experiments.llama_bench import LLAMA_CPP
from dart_llm.experiments.timed_cases import TRANSFORMERS, Case
from dart_llm.experiments.timing import WARM, mad, token_ms, token_seconds
from dart_llm.pruning.records import bytes_limit
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    LOOKS,
    SOFT,
    Palette,
    Plot,
    key,
    looks_of,
    name_bars,
    panels,
    write_beside,
)
from dart_llm.reporting.speed_up import contradicting, judge
from dart_llm.reporting.table import Column, Table, escaped, grouped
from dart_llm.reporting.words import dtype_text, file_text, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Sample = Mapping[str, Any]
"""One repetition of one row, see ``timing.repetition``."""

Row = Mapping[str, Any]


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

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def share(self) -> float:
        """f: the FFN's share of all bytes that a token reads, the cache's among them."""
        return self.ffn / self.total

    def limit(self, sparsity: float, proxy_share: float = 0.0, head_share: float = 1.0) -> float:
        """1 / (1 - f s); ``proxy_share``: low-bit copies over the FFN's bytes, read on top.

        ``head_share``: of the head's bytes, what a screened one reads.
        """
        saved = self.head / self.total * (1 - head_share)
        return bytes_limit(self.share, sparsity, proxy_share, saved)

    def read(self, ffn_share: float, head_share: float = 1.0) -> float:
        """Bytes of one token that touches these shares of the bytes of FFN and head."""
        return self.total + self.ffn * (ffn_share - 1) + self.head * (head_share - 1)


DISTURBED = "disturbed: other work ran; repeat it on a quiet machine"
"""Stands in place of a ratio that the bytes do not allow, or whose repetitions scatter too far."""

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
    "x transformers": "ms of the untouched model over this row's, median of the repetitions",
    "x own dense": "ms of our own dense path over this row's, median of the repetitions; "
    "'disturbed' where it lies above the limit by more than it scatters, scatters by more than a "
    "quarter, or contradicts the same method at another sparsity: repeat the measurement",
    "limit": "1 / (1 - f s): s is what was achieved, f the FFN's share of the bytes that a token "
    "reads, the key-value cache at the mean context length among them; what a screened head leaves "
    "out is no longer read either",
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


COMPARED_DEFINITIONS = {
    "weights": "how they are held; of llama.cpp the type of its file",
    "x own dense": "ms of our own dense path on the same weights over this row's; of llama.cpp: on "
    "the same file, else on weights of its kind",
    "MB/token": "bytes of weights as they are stored, and of the cache, that a token reads; of "
    "llama.cpp the file's tensors and a float16 cache",
    "x main": "ms of the row that own_dense names over this row's",
    "bytes allow": "bytes per token of the row that own_dense names over this row's",
    "long first ms": "a prompt of prefill_tokens read and the first token chosen; median",
}
"""Of what ``formats`` asks for."""

COMPARED = ("weights", "bytes_per_token", "times_main", "bytes_allow", "prefill_ms")
"""What a row says more where formats or programs are compared."""


def summarise(
    cases: Sequence[Case], own: str, repetitions: Sequence[Mapping[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """speed.json.  ``about``: facts, with ``weights`` (ffn_bytes, weight_bytes, head_bytes where a
    row screens it, and the cache's cache_bytes_per_position), ``prompt_tokens`` and ``tokens``;
    ``own``: our own dense path.

    Where formats are compared, ``formats`` has by name how it is held, its own_dense and its
    weights, and ``reference`` by label what llama.cpp reads.
    """
    samples = {case.label: [one["samples"][case.label] for one in repetitions] for case in cases}
    formats = about.get("formats", {})
    context = mean_context(about["prompt_tokens"], about["tokens"])
    sizes = _traffic(about["weights"], context)
    speeds = [one["read_bandwidth"] for one in repetitions]
    read = statistics.median(speeds)

    def row(case: Case) -> dict[str, Any]:
        form = formats.get(case.form, {})
        base = samples[TRANSFORMERS], samples[form.get("own_dense") or own]
        traffic = _traffic(form["weights"], context) if form else sizes
        return _row(case, samples[case.label], base, traffic, about["prompt_tokens"], read)

    rows = [row(case) for case in cases if case.file is None]
    _mark_contradictions(rows, cases, samples)
    if formats:
        rows = _compared(rows, cases, samples, own, about, sizes.total, context, read)
    return {
        **about,
        "sittings": len({one["sitting"] for one in repetitions}),
        "own_dense": own,
        "mean_context": context,
        "ffn_share_of_bytes_read": sizes.share,
        "bytes_per_dense_token": sizes.total,
        "read_bandwidth": {"bytes_per_second": read, "repetitions": speeds},
        "rows": rows,
        "orders": [one["order"] for one in repetitions],
        "definitions": DEFINITIONS | (COMPARED_DEFINITIONS if formats else {}),
    }


def _mark_contradictions(
    rows: Sequence[dict[str, Any]], cases: Sequence[Case], samples: Mapping[str, Sequence[Sample]]
) -> None:
    """Of one method by the same kernels on the same weights, what reads less is faster by no more
    than it reads less; other methods choose neurons in other ways, which takes time of its own."""
    forms = {case.label: case.form for case in cases}
    known = [row for row in rows if row["times_own_dense"] is not None]
    kinds = grouped(known, lambda row: (row["variant"], row["executor"], forms[row["row"]]))
    for own in kinds.values():
        sizes = {row["row"]: row["bytes_per_token"] for row in own}
        wrong = contradicting({label: token_seconds(samples[label]) for label in sizes}, sizes)
        for row in own:
            if row["row"] in wrong:
                row |= {"times_own_dense": None, "share_of_limit": None, "disturbed": DISTURBED}


def _traffic(weights: Row, context: float) -> DecodeTraffic:
    cache = context * weights["cache_bytes_per_position"]
    head = weights.get("head_bytes", 0.0)
    return DecodeTraffic(weights["ffn_bytes"], weights["weight_bytes"], cache, head)


def _compared(
    rows: list[dict[str, Any]],
    cases: Sequence[Case],
    samples: Mapping[str, Sequence[Sample]],
    own: str,
    about: Row,
    total: float,
    context: float,
    read: float,
) -> list[dict[str, Any]]:
    """The rows, llama.cpp's behind them, each with what it is compared by.

    ``own``: the row that all are compared with, of which a token reads ``total`` bytes.
    """
    named = {case.label: case for case in cases}
    found = list(rows)
    for label, facts in about.get("reference", {}).items():
        form = about["formats"].get(facts["form"], {})
        same = samples.get(form.get("own_dense"))
        bases = samples[TRANSFORMERS], same
        moved = facts["bytes"] + context * facts["cache_bytes_per_position"]
        other = _other_row(label, samples[label], bases, moved, about["prompt_tokens"], read)
        found.append({**dict.fromkeys(rows[0]), **other})
    main = token_seconds(samples[own])
    for row in found:
        file = about.get("reference", {}).get(row["row"])
        long = _known(samples[row["row"]], "prefill_s")
        row |= {
            "weights": file["kind"] if file else named[row["row"]].form,
            "times_main": judge(main, token_seconds(samples[row["row"]])).ratio,
            "bytes_allow": total / row["bytes_per_token"],
            "prefill_ms": 1000 * statistics.median(long) if long else None,
        }
        if row["disturbed"]:
            row["times_main"] = None
    return found


def _other_row(
    label: str,
    samples: Sequence[Sample],
    bases: tuple[Sequence[Sample], Sequence[Sample] | None],
    moved: float,
    prompt: int,
    read: float,
) -> dict[str, Any]:
    """A row of llama.cpp, of which means over tokens are known; ``bases``: as of ``_row``.

    Its kernels are others: what it reads is no limit for ours.
    """
    ms, (plain, same) = token_ms(samples), bases
    over_plain = judge(token_seconds(plain), token_seconds(samples))
    over_same = None if same is None else judge(token_seconds(same), token_seconds(samples))
    disturbed = over_plain.disturbed or (over_same is not None and over_same.disturbed)
    first = statistics.median(one["first_token_s"] for one in samples)
    speed = moved / ms * 1000
    return {
        "row": label,
        "executor": LLAMA_CPP,
        "pp_tokens_per_second": prompt / first,
        "first_token_ms": 1000 * first,
        "tg_ms": ms,
        "tg_spread_ms": mad([1000 * one for one in token_seconds(samples)]),
        "tg_tokens_per_second": 1000 / ms,
        "times_transformers": over_plain.ratio,
        "times_own_dense": over_same and over_same.ratio,
        "disturbed": DISTURBED if disturbed else None,
        "bytes_per_token": moved,
        "bytes_per_second": speed,
        "share_of_read_bandwidth": speed / read,
    }


def all_ms(samples: Sequence[Sample]) -> float:
    """Median over repetitions of what prompt and tokens took, untimed tokens too, in ms."""
    parts = ([one["first_token_s"], *one["warm_s"], *one["steps_s"]] for one in samples)
    found: float = statistics.median(1000 * sum(part) for part in parts)
    return found


def _row(
    case: Case,
    samples: Sequence[Sample],
    bases: tuple[Sequence[Sample], Sequence[Sample]],
    sizes: DecodeTraffic,
    prompt: int,
    read: float,
) -> dict[str, Any]:
    """``bases``: the untouched model and our own dense path; ``read``: bytes per second."""
    ms, (plain, dense) = token_ms(samples), bases
    whole, (whole_plain, whole_dense) = all_ms(samples), map(all_ms, bases)
    first = statistics.median(one["first_token_s"] for one in samples)
    steps = [1000 * step for one in samples for step in one["steps_s"]]
    low, middle, high = np.percentile(steps, (5, 50, 95)).tolist()
    removed = _mean(samples, "achieved_sparsity", 0.0)
    head = _mean(samples, "head_bytes_share", 1.0)
    limit = sizes.limit(removed, _mean(samples, "proxy_bytes_share", 0.0), head)
    over_plain = judge(token_seconds(plain), token_seconds(samples))
    untouched = case.config is None  # whose kernels are others
    over_dense = judge(token_seconds(dense), token_seconds(samples), None if untouched else limit)
    disturbed = over_plain.disturbed or over_dense.disturbed
    moved = sizes.read(_mean(samples, "ffn_bytes_share", 1.0), head)
    speed = moved / ms * 1000
    attach = _known(samples, "attach_s")
    return {
        "row": case.label,
        "variant": case.variant,
        "asked": None if case.config is None else case.config.target,
        "executor": case.executor,
        "pp_tokens_per_second": prompt / first,
        "first_token_ms": 1000 * first,
        "tg_ms": ms,
        "tg_spread_ms": mad([1000 * one for one in token_seconds(samples)]),
        "token_ms_p5": low,
        "token_ms_median": middle,
        "token_ms_p95": high,
        "tg_tokens_per_second": 1000 / ms,
        "achieved_sparsity": removed,
        "dense_token_share": _mean(samples, "dense_token_share", 0.0) if case.config else 1.0,
        "remasks": _mean(samples, "remasks", 0.0),
        "times_transformers": over_plain.ratio,
        "times_own_dense": over_dense.ratio,
        "disturbed": DISTURBED if disturbed else None,
        "scatter": over_dense.scatter,
        "limit": limit,
        "share_of_limit": over_dense.ratio / limit if over_dense.ratio and case.variant else None,
        "bytes_per_token": moved,
        "bytes_per_second": speed,
        "share_of_read_bandwidth": speed / read,
        "attach_ms": 1000 * statistics.median(attach) if attach else None,
        "extra_memory_bytes": max(_known(samples, "extra_memory_bytes"), default=None),
        "peak_growth_bytes": max(_known(samples, "peak_growth_bytes"), default=None),
        "all_ms": whole,
        "all_times_transformers": whole_plain / whole if over_plain.ratio else None,
        "all_times_own_dense": whole_dense / whole if over_dense.ratio else None,
    }


def _mean(samples: Sequence[Sample], name: str, otherwise: float) -> float:
    return statistics.fmean(one.get(name, otherwise) for one in samples)


def _known(samples: Sequence[Sample], name: str) -> list[Any]:
    return [one[name] for one in samples if one.get(name) is not None]


def number(value: float) -> str:
    """To three digits or so: 0.042, 1.23, 17.6, 1234."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _percentiles(row: Row) -> str | None:
    found = [row[f"token_ms_{at}"] for at in ("p5", "median", "p95")]
    return None if None in found else "/".join(map(number, found))


def _ratio(name: str) -> Callable[[Row], str | None]:
    """A ratio of times, or that it was disturbed."""

    def text(row: Row) -> str | None:
        if row.get(name) is None:
            return "disturbed" if row.get("disturbed") else None
        return f"{row[name]:.2f}"

    return text


def _mib(value: float) -> str:
    return number(value / 2**20)


COLUMNS = (
    Column("row", "row", wrap=False),
    Column("pp tokens/s", "pp_tokens_per_second", number),
    Column("first token ms", "first_token_ms", number, terminal=False),
    Column("tg ms", "tg_ms", number),
    Column("+-", "tg_spread_ms", number),
    Column(
        "token 5/50/95 %",
        lambda row: _percentiles(row),
        terminal=False,
    ),
    Column("tg tokens/s", "tg_tokens_per_second", number, terminal=False),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent, terminal=False),
    Column("re-masks", "remasks", ".1f", terminal=False),
    Column("x transformers", _ratio("times_transformers")),
    Column("x own dense", _ratio("times_own_dense")),
    Column("limit", "limit", ".2f"),
    Column("of limit", "share_of_limit", percent),
    Column("GB/s", "bytes_per_second", lambda value: f"{value / 1e9:.1f}"),
    Column("of read", "share_of_read_bandwidth", lambda value: percent(value, 0), terminal=False),
    Column("attach ms", "attach_ms", number, terminal=False),
    Column("extra MiB", "extra_memory_bytes", _mib, terminal=False),
    Column("peak MiB", "peak_growth_bytes", _mib, terminal=False),
    Column("all ms", "all_ms", number, terminal=False),
    Column("all x transformers", _ratio("all_times_transformers"), terminal=False),
    Column("all x own dense", _ratio("all_times_own_dense"), terminal=False),
)


COMPARED_COLUMNS = {
    "weights": Column("weights", "weights", terminal=False),
    "MB/token": Column("MB/token", "bytes_per_token", lambda value: number(value / 1e6)),
    "x main": Column("x main", _ratio("times_main")),
    "bytes allow": Column("bytes allow", "bytes_allow", ".2f"),
    "long first ms": Column("long first ms", "prefill_ms", number),
}

TOO_WIDE = ("pp tokens/s", "+-", "achieved", "limit")
"""Columns that the terminal has no room for then."""


def columns(document: Row) -> tuple[Column, ...]:
    """What people see of the rows."""
    if "formats" not in document:
        return COLUMNS
    more = dict(COMPARED_COLUMNS)
    if not document["prefill_tokens"]:
        del more["long first ms"]
    first, *rest = COLUMNS
    rest = [replace(one, terminal=one.terminal and one.head not in TOO_WIDE) for one in rest]
    at = next(n for n, one in enumerate(rest) if one.head == "limit")
    return (first, more.pop("weights"), *rest[:at], *more.values(), *rest[at:])


def table(document: Row) -> Table:
    """The rows for people, and speed.csv."""
    rows = document["rows"]
    fields = list(rows[0]) if rows else []
    shown = columns(document)
    return Table("speed", caption(document), shown, rows, nothing="", fields=fields, tight=True)


def caption(document: Row) -> str:
    """What was measured, and where."""
    facts, machine = document["checkpoint"], document["machine"]
    read = document["read_bandwidth"]["bytes_per_second"] / 1e9
    sittings = document["sittings"]
    return (
        f"{facts['name']} ({file_text(facts)}, "
        f"{dtype_text(facts)}): {document['prompt_tokens']} prompt + {document['tokens']} timed "
        f"tokens, {document['repeats']} repetitions in shuffled order"
        f"{f', in {sittings} sittings' if sittings > 1 else ''}; {machine['processor']}, "
        f"{machine['threads']} threads, device {machine['device']}, torch "
        f"{document['versions']['torch']}, kernels {document['kernels'] or 'none'}; it reads "
        f"{read:.1f} GB/s; f = {document['ffn_share_of_bytes_read']:.3f} at a mean context of "
        f"{document['mean_context']:.0f} tokens{_held(document)}"
    )


def _held(document: Row) -> str:
    """What is compared: formats, programs, and the row that stands for 1."""
    if "formats" not in document:
        return ""
    words = ", ".join(f"{name}: {one['held']}" for name, one in document["formats"].items())
    prompt = document["prefill_tokens"]
    files = (f"{label}: {one['file']}" for label, one in document.get("reference", {}).items())
    parts = [f"weights {words}", f"main: {document['own_dense']}", *files]
    parts += [f"long first: {prompt} tokens"] if prompt else []
    return f"; {'; '.join(parts)}"


def sentences(document: Row) -> list[str]:
    """What every row of a method reached, and ours beside llama.cpp: a line each."""
    rows = {row["row"]: row for row in document["rows"]}
    beside = [
        beside_reference(rows[own], rows[label])
        for label, facts in document.get("reference", {}).items()
        if (own := document["formats"].get(facts["form"], {}).get("own_dense"))
    ]
    return beside + [_sentence(document, row) for row in document["rows"] if row["variant"]]


def _sentence(document: Row, row: Row) -> str:
    removed = f"at {percent(row['achieved_sparsity'])} removed"
    if row["times_own_dense"] is None:
        return f"{row['row']} {removed}: {row['disturbed']}"
    plain = "disturbed beside transformers"
    if row["times_transformers"] is not None:
        plain = f"{row['times_transformers']:.2f} x as fast as transformers"
    return (
        f"{row['row']}: {plain}, {row['times_own_dense']:.2f} x as fast as "
        f"{_own_of(document, row)}, {percent(row['share_of_limit'])} of the {row['limit']:.2f} x "
        f"that the bytes allow {removed}"
    )


def _own_of(document: Row, row: Row) -> str:
    """Our own dense path on the weights of a row."""
    form = document.get("formats", {}).get(row.get("weights"), {})
    return str(form.get("own_dense") or document["own_dense"])


def beside_reference(own: Row, other: Row) -> str:
    """Ours on the same weights: times, bytes, first tokens."""
    if other["times_own_dense"] is None and other.get("disturbed"):
        return f"{own['row']} beside {other['row']}: {other['disturbed']}"
    ratio = other["tg_ms"] / own["tg_ms"]
    first = other["prefill_ms"] or other["first_token_ms"]
    ours = own["prefill_ms"] or own["first_token_ms"]
    return (
        f"{own['row']}: {number(own['tg_ms'])} ms per token, {ratio:.2f} x as fast as "
        f"{other['row']} ({number(other['tg_ms'])} ms) at "
        f"{own['bytes_per_token'] / other['bytes_per_token']:.2f} x its bytes; first token "
        f"{ours / first:.2f} x its time"
    )


def markdown(document: Row) -> str:
    """The table, the notes, and what the columns mean."""
    lines = ["# Speed", "", escaped(caption(document)), ""]
    lines += [*table(document).lines(), ""]
    lines += ["## In words", "", *(f"- {escaped(line)}" for line in sentences(document)), ""]
    if document["notes"]:
        lines += ["## Notes", "", *(f"- {escaped(line)}" for line in document["notes"]), ""]
    lines += ["## What the columns mean", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    return "\n".join(lines) + "\n"


# The plot of speed.json: speed-up against achieved sparsity, with the byte limit as a line.


COLOURS: dict[str | None, int] = {
    None: 5,
    LLAMA_CPP: 1,
    "masked": 8,
    "compact": 4,
    "native": 3,
    "slim": 0,
    "graph": 2,
    "triton": 6,
}
"""By executor; None is plain transformers."""


def make(document: Row) -> list[Plot]:
    """Methods over what they remove, where one could run; what is compared, in ms per token."""
    found = [_speed_up(document)] if any(row["variant"] for row in document["rows"]) else []
    return [*found, *([_times(document)] if "formats" in document else [])]


def _times(document: Row) -> Plot:
    """A bar per row, and a line where its bytes would be read at the machine's bandwidth.

    No line where a cache was faster than that.
    """
    rows = sorted(document["rows"], key=lambda row: row["tg_ms"], reverse=True)
    read = document["read_bandwidth"]["bytes_per_second"]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            axes.barh(place, row["tg_ms"], 0.62, color=palette[COLOURS[row["executor"]]])
            text = f"{number(row['tg_ms'])}{' (disturbed)' if row.get('disturbed') else ''}"
            write_beside(axes, text, row["tg_ms"], place, 7.5)
            fastest = 1000 * row["bytes_per_token"] / read
            if fastest <= row["tg_ms"]:
                for colour, width in (("white", 3.2), (INK, 1.5)):
                    ends = [place - 0.4, place + 0.4]
                    axes.plot([fastest] * 2, ends, color=colour, linewidth=width)
        name_bars(axes, [row["row"] for row in rows])
        axes.set_xlim(0, 1.12 * max(row["tg_ms"] for row in rows))
        axes.set_xlabel("ms per token", fontsize=8, color=SOFT)

    title = "Time per token, and what reading its bytes would take (lines)"
    told = "; ".join(f"{row['row']} {number(row['tg_ms'])} ms" for row in reversed(rows))
    height = 1.0 + 0.26 * len(rows)
    return Plot("speed-rows", title, f"A bar per row: {told}.", caption(document), height, draw)


def _speed_up(document: Row) -> Plot:
    rows = [row for row in document["rows"] if row["executor"] != LLAMA_CPP]
    shares = {"": document["ffn_share_of_bytes_read"]}
    base = document["own_dense"]
    if "formats" in document:
        shares = {
            name: _traffic(one["weights"], document["mean_context"]).share
            for name, one in document["formats"].items()
            if one["own_dense"]
        }
        base = "our own dense path on the same weights" if len(shares) > 1 else base

    named = dict.fromkeys(_names(rows))
    left_out = [row["row"] for row in rows if row["times_own_dense"] is None]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        columns = 2 if narrow else 4
        above, axes = panels(figure, 1, narrow, 1 + len(named) // columns)
        for place, share in enumerate(shares.values()):
            colour = palette[LOOKS[place % len(LOOKS)][0]] if len(shares) > 1 else INK
            _draw_limit(axes, share, rows, colour, named=not place)
        _draw_rows(axes, rows, palette, list(shares))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("achieved sparsity (%)", fontsize=8, color=SOFT)
        axes.set_ylabel(f"times as fast as {base}", fontsize=8, color=SOFT)
        axes.grid(axis="y")
        key(above, [axes], columns)

    title = f"Speed-up over our own dense path ({base}), and what the bytes allow"
    if base != document["own_dense"]:
        title = f"Speed-up over {base}, and what the bytes allow"
    told = " ".join(f"{line}." for line in sentences(document))
    alt = f"Points per row over a line that rises with the sparsity. {told}"
    small = f"disturbed, not drawn: {', '.join(left_out)} · " if left_out else ""
    height = 3.5 + 0.2 * (1 + len(named) // 4)
    return Plot("speed", title, alt, small + caption(document), height, draw)


def _draw_limit(axes: Axes, share: float, rows: Sequence[Row], colour: Any, *, named: bool) -> None:
    last = min(0.95, max(row["achieved_sparsity"] for row in rows) + 0.1)
    x = np.linspace(0, last, 61)
    limits = [bytes_limit(share, value) for value in x]
    look: dict[str, Any] = {"color": colour, "linewidth": 1.5, "linestyle": DASHES}
    axes.plot(100 * x, limits, label=f"{'' if named else '_'}byte limit 1 / (1 - f s)", **look)


def _names(rows: Sequence[Row]) -> list[str]:
    """What the legend calls each row: a method by executor and weights only where they differ."""
    pruned = [row for row in rows if row["variant"]]
    varied = [key for key in ("executor", "weights") if len({row.get(key) for row in pruned}) > 1]
    return [
        ", ".join([row["variant"], *(str(row[key]) for key in varied)])
        if row["variant"]
        else ("dense" if row["executor"] else TRANSFORMERS)
        for row in rows
    ]


def _draw_rows(axes: Axes, rows: Sequence[Row], palette: Palette, forms: Sequence[str]) -> None:
    """A point per row: a mark for each method, a colour for each format, else for each executor,
    or for each method where there is one executor."""
    methods = dict.fromkeys(row["variant"] for row in rows if row["variant"])
    executors = {row["executor"] for row in rows if row["variant"]}
    looks = looks_of(list(methods), palette)
    named = set[str]()
    for row, name in zip(rows, _names(rows), strict=True):
        if row["times_own_dense"] is None:
            continue
        look = {"color": palette[COLOURS[row["executor"]]], "marker": "x", "markeredgewidth": 1.8}
        if row["executor"]:
            look = {"color": "white", "marker": "o", "markeredgecolor": INK, "markeredgewidth": 1.2}
        if row["variant"]:
            colour = palette[COLOURS[row["executor"]]]
            if len(forms) > 1:
                colour = palette[LOOKS[forms.index(row["weights"]) % len(LOOKS)][0]]
            elif len(executors) == 1:
                colour = looks[row["variant"]]["color"]
            look = {**looks[row["variant"]], "color": colour}
        place = [100 * row["achieved_sparsity"]], [row["times_own_dense"]]
        label = f"_{name}" if name in named else name
        axes.plot(*place, label=label, **{**look, "markersize": 6.5, "linestyle": "none"})
        named.add(name)
