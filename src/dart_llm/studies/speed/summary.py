"""Rows, costs and limits; tables and plot.

The tables of speed.json: Markdown, CSV, the terminal's, and sentences.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dart_llm.files import write_csv, write_text
from dart_llm.pruning.records import bytes_limit
from dart_llm.pruning.sequence import Phase
from dart_llm.reporting.figures import DASHES, INK, SOFT, Palette, Plot, key, panels
from dart_llm.reporting.table import escaped, table_lines
from dart_llm.reporting.words import percent
from dart_llm.studies.speed.cases import FOREVER, OWN, TRANSFORMERS, Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The arithmetic of ``dart-llm bench speed``: bytes, limits, shares, spreads.


WARM = 2
"""Tokens of a repetition that are not timed."""


def mean_context(prompt: int, tokens: int) -> float:
    """Positions of the key-value cache that a timed token reads, its own included, on average.

    The first timed token is number ``WARM`` after the prompt, counted from 0.
    """
    return prompt + WARM + (tokens + 1) / 2


@dataclass(frozen=True)
class DecodeTraffic:
    """What one dense token reads: ``ffn`` of ``weights`` bytes, and ``cache`` bytes."""

    ffn: float
    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache

    @property
    def share(self) -> float:
        """f: the FFN's share of all bytes that a token reads, the cache's among them."""
        return self.ffn / self.total

    def limit(self, sparsity: float, proxy_share: float = 0.0) -> float:
        """1 / (1 - f s); ``proxy_share``: low-bit copies over the FFN's bytes, read on top."""
        return bytes_limit(self.share, sparsity, proxy_share)

    def read(self, ffn_share: float) -> float:
        """Bytes of one token that touches the share ``ffn_share`` of the FFN's bytes."""
        return self.total + self.ffn * (ffn_share - 1)


def timed_mean(end: float, tokens_end: int, warm: float, tokens_warm: int) -> float:
    """A mean over the timed tokens, from means over all tokens and over the untimed ones."""
    timed = tokens_end - tokens_warm
    return (end * tokens_end - warm * tokens_warm) / timed if timed else 0.0


def mad(values: Sequence[float]) -> float:
    """Median of the absolute distances to the median."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


def percentile(values: Sequence[float], percent: float) -> float:
    """With straight lines between the sorted values; the lowest is at 0, the highest at 100."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# What parts of a method cost: differences between rows that decode in turns.


Sample = Mapping[str, Any]

Samples = Mapping[str, Sequence[Sample]]

ATTACHED, OBSERVING, CHECKS, REMASK = "attaching", "observing", "drift checks", "a re-mask"

WHAT = {
    ATTACHED: "per token of a model attached at sparsity 0, against the untouched model; medians "
    "of turns",
    OBSERVING: "per observed token (no mask is ever built), against the row that is named; means "
    "of turns",
    CHECKS: "per pruned token, against the same row with the drift rule never; means of turns",
    REMASK: "of the step that builds masks, beyond the median pruned step of the same repetition",
}


def costs(cases: Sequence[Case], samples: Samples) -> list[dict[str, Any]]:
    """One entry per cost that was measured: ms, its spread, and its share of a dense token."""
    found = []
    for case in cases:
        if case.kind == "cost":
            kind = kind_of(case)
            values = _values(kind, case, samples)
            reference = case.against if case.against in OWN else TRANSFORMERS
            if values:
                found.append(_entry(kind, case, values, reference, samples))
    return found


def kind_of(case: Case) -> str:
    """Which of ``WHAT`` a case measures."""
    assert case.config is not None
    if not case.config.target:
        return ATTACHED
    if case.config.masking_step == FOREVER:
        return OBSERVING
    return CHECKS if case.against else REMASK


def _values(kind: str, case: Case, samples: Samples) -> list[float]:
    """The cost in ms, one value per turn, or per mask that was built."""
    own = samples[case.label]
    if kind == REMASK:
        return [value for one in own for value in builds(one)]
    turns = [turn for one in own for turn in one.get("turns", ())]
    if kind == OBSERVING and not any(Phase.OBSERVE in turn["own"]["phases"] for turn in turns):
        return []  # a method whose masks are made beforehand observes nothing
    if kind == CHECKS:  # here the row that is named is the one that costs more
        each = [(_pruned_mean(turn["base"]), _pruned_mean(turn["own"])) for turn in turns]
        return [more - less for more, less in each if more is not None and less is not None]
    # every step costs the same while attached: medians scatter less; observing has its rare steps
    each_ms = _median_ms if kind == ATTACHED else _mean_ms
    return [each_ms(turn["own"]) - each_ms(turn["base"]) for turn in turns]


def builds(sample: Sample) -> list[float]:
    """What each step that built masks took beyond a pruned step, in ms."""
    usual = pruned_ms(sample)
    if usual is None:
        return []
    return [1000 * sample["steps_s"][at] - usual for at in sample["built"]]


def pruned_ms(sample: Sample) -> float | None:
    """Median time of a pruned step that builds no masks; None without such a step."""
    steps = _pruned(sample)
    return statistics.median(steps) if steps else None


def _pruned_mean(sample: Sample) -> float | None:
    """The mean of the same steps: a check falls into few of them."""
    steps = _pruned(sample)
    return statistics.fmean(steps) if steps else None


def _pruned(sample: Sample) -> list[float]:
    return [
        1000 * seconds
        for at, (seconds, phase) in enumerate(zip(sample["steps_s"], sample["phases"], strict=True))
        if phase == Phase.PRUNED and at not in sample["built"]
    ]


def _median_ms(sample: Sample) -> float:
    found: float = 1000 * statistics.median(sample["steps_s"])
    return found


def _mean_ms(sample: Sample) -> float:
    return 1000 * statistics.fmean(sample["steps_s"])


def _entry(
    kind: str, case: Case, values: Sequence[float], reference: str, samples: Samples
) -> dict[str, Any]:
    token = statistics.median(map(_mean_ms, samples[reference]))
    ms = statistics.median(values)
    return {
        "cost": kind,
        "row": case.label,
        "against": case.against or case.label,
        "ms": ms,
        "spread_ms": mad(values),
        "values": len(values),
        "token_of": reference,
        "share_of_token": ms / token,
        "what": WHAT[kind],
    }


# From the repetitions of ``dart-llm bench speed`` to speed.json: rows, costs, notes.


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
    sizes = DecodeTraffic(weights["ffn_bytes"], weights["weight_bytes"], cache)
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
    sizes: DecodeTraffic,
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
        "tg_spread_ms": mad([1000 * statistics.fmean(one["steps_s"]) for one in samples]),
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


MIB = 2**20

HEADS = (
    "row",
    "pp tokens/s",
    "first token ms",
    "tg ms",
    "+-",
    "token 5/50/95 %",
    "tg tokens/s",
    "achieved",
    "dense tokens",
    "re-masks",
    "x transformers",
    "x own dense",
    "limit",
    "of limit",
    "GB/s",
    "of read",
    "attach ms",
    "extra MiB",
    "peak MiB",
    "all ms",
    "all x transformers",
    "all x own dense",
)

TERMINAL = (0, 1, 3, 4, 7, 10, 11, 12, 13, 14)
"""Columns that fit a terminal."""

COST_HEADS = ("cost", "row", "against", "ms", "+-", "of a token of", "share of it")

Row = Mapping[str, Any]


def cells(row: Row) -> list[str]:
    """One row for people, under ``HEADS``."""
    return [
        row["row"],
        number(row["pp_tokens_per_second"]),
        number(row["first_token_ms"]),
        number(row["tg_ms"]),
        number(row["tg_spread_ms"]),
        "/".join(number(row[f"token_ms_{at}"]) for at in ("p5", "median", "p95")),
        number(row["tg_tokens_per_second"]),
        percent(row["achieved_sparsity"]),
        percent(row["dense_token_share"]),
        f"{row['remasks']:.1f}",
        f"{row['times_transformers']:.2f}",
        f"{row['times_own_dense']:.2f}",
        f"{row['limit']:.2f}",
        "" if row["share_of_limit"] is None else percent(row["share_of_limit"]),
        f"{row['bytes_per_second'] / 1e9:.1f}",
        percent(row["share_of_read_bandwidth"], 0),
        number(row["attach_ms"]),
        _mib(row["extra_memory_bytes"]),
        _mib(row["peak_growth_bytes"]),
        number(row.get("all_ms")),
        _times(row.get("all_times_transformers")),
        _times(row.get("all_times_own_dense")),
    ]


def cost_cells(cost: Row) -> list[str]:
    """One cost for people, under ``COST_HEADS``."""
    return [
        cost["cost"],
        cost["row"],
        cost["against"],
        number(cost["ms"]),
        number(cost["spread_ms"]),
        cost["token_of"],
        percent(cost["share_of_token"]),
    ]


def number(value: float | None) -> str:
    """To three digits or so: 0.042, 1.23, 17.6, 1234; "" for what was not measured."""
    if value is None:
        return ""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else number(value / MIB)


def caption(document: Row) -> str:
    """What was measured, and where."""
    facts, machine = document["checkpoint"], document["machine"]
    read = document["read_bandwidth"]["bytes_per_second"] / 1e9
    sittings = document["sittings"]
    return (
        f"{facts['name']} (file quantisation {facts['file_quantisation'] or 'none'}, "
        f"{facts['dtype']}): {document['prompt_tokens']} prompt + {document['tokens']} timed "
        f"tokens, {document['repeats']} repetitions in shuffled order"
        f"{f', in {sittings} sittings' if sittings > 1 else ''}; {machine['processor']}, "
        f"{machine['threads']} threads, device {machine['device']}, torch "
        f"{document['versions']['torch']}, kernels {document['kernels'] or 'none'}; it reads "
        f"{read:.1f} GB/s; f = {document['ffn_share_of_bytes_read']:.3f} at a mean context of "
        f"{document['mean_context']:.0f} tokens"
    )


def sentences(document: Row) -> list[str]:
    """What every row of a method reached: a line each."""
    return [
        f"{row['row']}: {row['times_transformers']:.2f} x as fast as transformers, "
        f"{row['times_own_dense']:.2f} x as fast as {document['own_dense']}, "
        f"{percent(row['share_of_limit'])} of the {row['limit']:.2f} x that the bytes allow at "
        f"{percent(row['achieved_sparsity'])} removed"
        for row in document["rows"]
        if row["variant"] is not None
    ]


def tables(document: Row) -> tuple[list[list[str]], list[list[str]]]:
    """Rows and costs with their heads; costs may be the head alone."""
    rows = [list(HEADS), *map(cells, document["rows"])]
    return rows, [list(COST_HEADS), *map(cost_cells, document["costs"])]


def markdown(document: Row) -> str:
    """All tables, the notes, and what the columns mean."""
    rows, costs = tables(document)
    lines = ["# Speed", "", escaped(caption(document)), "", *table_lines(rows[0], rows[1:]), ""]
    if len(costs) > 1:
        lines += ["## Costs", "", *table_lines(costs[0], costs[1:]), ""]
        what = {cost["cost"]: cost["what"] for cost in document["costs"]}
        lines += [*(f"- {name}: {words}" for name, words in what.items()), ""]
    lines += ["## In words", "", *(f"- {escaped(line)}" for line in sentences(document)), ""]
    if document["notes"]:
        lines += ["## Notes", "", *(f"- {escaped(line)}" for line in document["notes"]), ""]
    lines += ["## What the columns mean", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    return "\n".join(lines) + "\n"


def rich_tables(document: Row) -> list[Table]:
    """The tables without the columns that a terminal has no room for."""
    rows, costs = tables(document)
    picked = [[row[place] for place in TERMINAL] for row in rows]
    found = [_rich(caption(document), picked)]
    if len(costs) > 1:
        found.append(_rich("Costs", costs))
    return found


def _rich(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if place else "left", no_wrap=not place)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def write(folder: Path, document: Row) -> None:
    """speed.md, and speed.csv with a line per row and per cost."""
    write_text(folder / "speed.md", markdown(document))
    rows: list[Row] = [*document["rows"], *document["costs"]]
    head = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "speed.csv", head, ([row.get(name) for name in head] for row in rows))


# The plot of speed.json: speed-up against achieved sparsity, with the byte limit as a line.


LOOKS: dict[str | None, tuple[int, str]] = {
    None: (5, "x"),
    "masked": (8, "v"),
    "compact": (4, "s"),
    "native": (3, "^"),
    "slim": (0, "o"),
    "graph": (2, "D"),
}
"""Colour and marker by executor; None is plain transformers."""

POINTS = 60
"""Of the line of the limit."""


def make(document: Row) -> list[Plot]:
    """One plot; none where no method could run."""
    rows = document["rows"]
    if not any(row["variant"] for row in rows):
        return []

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        above, axes = panels(figure, 1, narrow, 2)
        _draw(axes, rows, document["ffn_share_of_bytes_read"], document["own_dense"], palette)
        key(above, [axes], 2 if narrow else 4)

    return [
        Plot(
            "speed",
            f"Speed-up over our own dense path ({document['own_dense']}), and what the bytes allow",
            "Points per row over a line that rises with the sparsity. "
            + " ".join(f"{line}." for line in sentences(document)),
            caption(document),
            3.9,
            draw,
        )
    ]


def _draw(axes: Axes, rows: Sequence[Row], share: float, own: str, palette: Palette) -> None:
    last = min(0.95, max(row["achieved_sparsity"] for row in rows) + 0.1)
    x = [last * at / POINTS for at in range(POINTS + 1)]
    limits = [bytes_limit(share, value) for value in x]
    look: dict[str, Any] = {"color": INK, "linewidth": 1.5, "linestyle": DASHES}
    axes.plot([100 * value for value in x], limits, label="byte limit 1 / (1 - f s)", **look)
    named: set[str | None] = set()
    several = len({row["variant"] for row in rows} - {None}) > 1
    for row in rows:
        executor = row["executor"]
        colour, marker = LOOKS[executor]
        words = "transformers" if executor is None else executor
        axes.plot(
            [100 * row["achieved_sparsity"]],
            [row["times_own_dense"]],
            label=f"_{words}" if executor in named else words,
            color=palette[colour],
            marker=marker,
            markersize=6,
            markeredgecolor=INK if marker != "x" else palette[colour],
            markeredgewidth=0.6 if marker != "x" else 1.8,
            linestyle="none",
        )
        named.add(executor)
        if several and row["variant"]:
            place = (100 * row["achieved_sparsity"], row["times_own_dense"])
            beside: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(row["variant"], place, fontsize=7, color=SOFT, va="center", **beside)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("achieved sparsity (%)", fontsize=8, color=SOFT)
    axes.set_ylabel(f"times as fast as {own}", fontsize=8, color=SOFT)
    axes.grid(axis="y")
