"""Tables, sentences and plots that show speed.json (``bench speed``) and tune.json (``tune``).

Both documents have one row per candidate.  A candidate is a weight format of the model together
with a pruning configuration.  "Dense (native)" is the dense model with dart-llm's native kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dart_llm.experiments.store import ResultLine
from dart_llm.reporting.figures import (
    GREY,
    INK,
    SOFT,
    Look,
    Palette,
    Plot,
    legend,
    looks_of,
    reference_line,
    write_beside,
)
from dart_llm.reporting.table import Column, Table, grouped
from dart_llm.reporting.words import count, dtype_text, figure, file_text, percent
from dart_llm.studies.bench.settings import LLAMA_CPP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Row = Mapping[str, Any]

METRICS = {"loss": "loss", "ms": "ms_per_token", "times_dense": "speed_up"}
"""Maps a column of speed.json or tune.json to the name of the metric in rows.jsonl."""


def result_lines(task: str, document: Row, packed: Mapping[str, str]) -> list[ResultLine]:
    """One line of rows.jsonl per row and metric; ``packed`` maps format to quantisation type."""
    lines = []
    for row in document["rows"]:
        is_llama_cpp = row["executor"] == LLAMA_CPP
        ends = row.get("loss_interval") or (None, None)
        fields: dict[str, Any] = {
            "label": row["row"],
            "method": row["method"] or (LLAMA_CPP if is_llama_cpp else "dense"),
            "model": document["model"],
            "task": task,
            "requested": row.get("requested"),
            "achieved": row.get("achieved_sparsity"),
            "dense_share": row.get("dense_token_share"),
            "remasks": None if row.get("remasks") is None else round(row["remasks"]),
            "seed": document["seed"],
            "dtype": None if is_llama_cpp else document["checkpoint"]["dtype"],
            "weights": row["weights"] if is_llama_cpp else packed.get(row["weights"]),
        }
        for name, metric in METRICS.items():
            value, error = row.get(name), row["disturbed"] if name == "times_dense" else None
            if value is not None or error:
                low, high = ends if name == "loss" else (None, None)
                fields |= {"metric": metric, "value": value, "error": None if value else error}
                fields |= {"higher_is_better": name == "times_dense", "low": low, "high": high}
                lines.append(ResultLine(**fields))
    return lines


def number(value: float) -> str:
    """A number with about three significant digits: 0.042, 1.23, 17.6, 1234."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


COLUMNS = (
    Column("row", "row"),
    Column("weights", "weights", terminal=False),
    Column("loss", "loss", percent, interval="loss_interval"),
    Column("KL", "kl", ".3f"),
    Column("ms", "ms", number),
    Column("x transformers", "times_transformers", ".2f"),
    Column("x dense", "times_dense", ".2f"),
    Column("bandwidth limit", "bandwidth_limit", ".2f"),
    Column("of limit", "share_of_limit", percent, terminal=False),
    Column("of memory speed", "share_of_memory_speed", percent, terminal=False),
    Column("MB/token", "bytes_per_token", lambda size: number(size / 1e6)),
    Column("bytes", "bytes_share", ".2f"),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent, terminal=False),
    Column("re-masks", "remasks", ".3g", terminal=False),
    Column("pp tokens/s", "pp_tokens_per_second", number),
    Column("first token ms", "first_token_ms", number, terminal=False),
    Column("extra MiB", "extra_memory_bytes", lambda size: number(size / 2**20), terminal=False),
    Column("worse text", "worse_text", terminal=False),
    Column("perplexity", "perplexity", figure, terminal=False),
    Column("", "verdict", needed=True),
)
"""The columns of both commands' tables; docs/bench.md and docs/tune.md define them."""


def table(kind: str, document: Row) -> Table:
    """A table named ``kind`` with all rows; columns without any value are omitted."""
    rows = document["rows"]
    columns = [column for column in COLUMNS if any(column.raw(row) is not None for row in rows)]
    recommended = next((n for n, row in enumerate(rows) if row.get("recommended")), None)
    options: dict[str, Any] = {"nothing": "", "strong": recommended}
    return Table(kind, caption(document), tuple(columns), rows, **options)


def caption(document: Row) -> str:
    """A caption that names the model, the measurement and the machine."""
    checkpoint, machine = document["checkpoint"], document["machine"]
    formats = ", ".join(f"{name}: {f['stored_as']}" for name, f in document["formats"].items())
    timed = document.get("timed_tokens", document["tokens"])
    bases = {f["base"] for f in document["formats"].values() if f.get("base")}
    dense = "dense on the same weights" if len(bases) > 1 else document["base"]
    speed = document.get("read_speed")
    memory = f" that read {number(speed / 1e9)} GB/s" if speed else ""
    loss = ""
    if "slices" in document:
        loss = (
            f"loss on {count(document['slices'], 'slice')} of {document['prompt_tokens']} prompt + "
            f"{document['tokens']} scored tokens of self-generated text and of {document['text']}; "
        )
    return (
        f"{checkpoint['name']} ({file_text(checkpoint)}, {dtype_text(checkpoint)}; {formats}): "
        f"{document['prompt_tokens']} prompt + {timed} timed tokens, "
        f'{count(document["repeats"], "repetition")} in shuffled order, "x dense" '
        f"compares with {dense}; {loss}{machine['processor']}, "
        f"{machine['threads']} threads{memory}, device {machine['device']}, "
        f"torch {document['versions']['torch']}, kernels {document['kernels'] or 'none'}"
    )


def left_out(reasons: Mapping[str, str]) -> list[str]:
    """One sentence per reason, naming the skipped candidates; ``reasons``: reason by label."""
    return [
        f"{'; '.join(labels)} {'is' if len(labels) == 1 else 'are'} skipped: {reason}"
        for reason, labels in grouped(reasons, lambda label: reasons[label]).items()
    ]


def speed_sentences(document: Row) -> list[str]:
    """Sentences that compare the fastest method with its limit, and dense with llama.cpp."""
    rows = {row["row"]: row for row in document["rows"]}
    sentences = []
    methods = [row for row in rows.values() if row["method"]]
    undisturbed = [row for row in methods if row["times_dense"] is not None]
    if undisturbed:
        row = min(undisturbed, key=lambda row: float(row["ms"]))
        speed_up = row["times_transformers"]
        first = "its comparison with transformers was disturbed"
        if speed_up:
            first = f"{speed_up:.2f} x as fast as transformers"
        sentences.append(
            f"{row['row']}: {first}, {row['times_dense']:.2f} x as fast as "
            f"{document['formats'][row['weights']]['base']}, {percent(row['share_of_limit'])} of "
            f"the bandwidth limit of {row['bandwidth_limit']:.2f} x at "
            f"{percent(row['achieved_sparsity'])} removed"
        )
    elif methods:
        sentences.append(f"{'; '.join(row['row'] for row in methods)}: {methods[0]['disturbed']}")
    for label, file in document["reference"].items():
        if rows[label]["times_dense"]:
            native = rows[document["formats"][file["format"]]["base"]]
            ratio = f"{1 / rows[label]['times_dense']:.2f} x as fast as {label}"
            sentences.append(f"{native['row']}: {number(native['ms'])} ms per token, {ratio}")
    return sentences


def verdict(document: Row, row: Row) -> str | None:
    """A short verdict on a row of ``tune``; None if the row needs no remark."""
    if row["recommended"]:
        return "stay with it for now" if document["undecided"] else "recommended"
    if row["ms"] is None:
        return "loses too much: not timed"
    if row["disturbed"]:
        return "disturbed: repeat it"
    if row["row"] in document["undecided"]:
        return "undecided"
    return "loses too much" if row["loss"] > document["max_loss"] else None


def loss_text(row: Row) -> str:
    """A row's loss with its interval, such as "1.2 % (0.8 % to 1.6 %)"."""
    ends = row["loss_interval"]
    interval = "" if ends is None else f" ({percent(ends[0])} to {percent(ends[1])})"
    return f"{percent(row['loss'])}{interval}"


def tune_sentences(document: Row) -> list[str]:
    """A text with the recommendation and its reason, then the sentences on skipped candidates.

    With ``--quick`` the text is only a first answer, which may be "undecided".
    """
    rows = {row["row"]: row for row in document["rows"]}
    best, base = rows[document["recommended"]], rows[document["base"]]
    max_loss, noise = percent(document["max_loss"]), percent(document["noise"])
    dense = f"{base['row']} ({base['ms']:.2f} ms per token, loss {loss_text(base)})"
    if document["undecided"]:
        results = "; ".join(_result(document, rows[label]) for label in document["undecided"])
        answer = f"Undecided after these few slices and repetitions: {results}; {dense}."
    elif best is not base:
        answer = f"Recommended for a loss of up to {max_loss}: {_result(document, best)}."
        answer += f" No pruning is more than {noise} faster." if best["dense"] else ""
    elif best["loss"] > document["max_loss"]:
        answer = f"No setting loses less than {max_loss}, not even {dense}."
    else:
        answer = f"No setting within a loss of {max_loss} is more than {noise} faster than "
        answer += f"{dense}: keep the dense model."
    disturbed = [label for label, row in rows.items() if row["disturbed"]]
    if document["quick"]:
        further = count(document["further"], "further setting")
        answer = f"First answer: {answer} The same command without --quick measures {further} and "
        answer += "continues from here."
    elif disturbed:
        answer += f" The timing of {'; '.join(disturbed)} was disturbed by other work on this "
        answer += "machine and is ignored: repeat it on a quiet machine with --fresh."
    return [answer, *left_out(document["left_out"])]


def _result(document: Row, row: Row) -> str:
    """A clause with a row's label, loss and speed."""
    loss = f"{row['row']}: loses {loss_text(row)}"
    if row["disturbed"]:
        return f"{loss}; its timing was disturbed by other work on this machine"
    limit = row["bandwidth_limit"]
    at_most = "" if limit is None or limit <= 1 else f" (bandwidth limit {limit:.2f} x)"
    return (
        f"{loss}, {row['ms']:.2f} ms per token, {row['times_dense']:.2f} x as fast as "
        f"{document['base']}{at_most}"
    )


def measured(document: Row, row: Row) -> dict[str, Any]:
    """The measurements of a row, in the form that the setting file contains."""
    names = ("loss", "kl", "ms", "times_dense", "bytes_share", "achieved_sparsity")
    values = {name: None if row[name] is None else round(row[name], 5) for name in names}
    ends, machine = row["loss_interval"], document["machine"]
    return {
        "loss_interval": None if ends is None else [round(end, 5) for end in ends],
        "ms_per_token": values.pop("ms"),
        **values,
        "max_loss": document["max_loss"],
        "quick": document["quick"],
        "dense": document["base"],
        "text": f"self-generated, and {document['text']}; larger loss on {row['worse_text']}",
        "machine": f"{machine['processor']}, {machine['threads']} threads",
    }


def speed_plot(document: Row) -> Plot:
    """A plot of times per token: a bar per row, and diamonds at the bandwidth limits."""
    rows = [row for row in document["rows"] if row["ms"] is not None]
    times = {row["row"]: row["ms"] for row in rows}
    bases = {name: facts["base"] for name, facts in document["formats"].items()}
    limits = {
        index: times[bases[row["weights"]]] / row["bandwidth_limit"]
        for index, row in enumerate(rows)
        if row["bandwidth_limit"] and (row["method"] or row["bandwidth_limit"] > 1)
    }

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        colours = [palette[0] if row["method"] else GREY for row in rows]
        axes.barh(range(len(rows)), list(times.values()), color=colours, height=0.62)
        for index, row in enumerate(rows):
            note = " (disturbed)" if row["disturbed"] else ""
            end = max(row["ms"], limits.get(index, 0))
            write_beside(axes, number(row["ms"]) + note, end, index, 8)
        if limits:
            look: Look = {"color": INK, "markerfacecolor": "white", "linestyle": "none"}
            axes.plot(
                [*limits.values()], [*limits], "D", label="bandwidth limit", markersize=5, **look
            )
            legend(axes, 1)
        axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("ms per token", fontsize=8, color=SOFT)

    bars = "; ".join(f"{label} {number(ms)} ms" for label, ms in times.items())
    height = 1.3 + 0.3 * len(rows)
    alt = f"Bars: {bars}."
    return Plot("speed", "Time per generated token", alt, caption(document), height, draw)


def tune_plot(document: Row) -> Plot:
    """A plot of loss against milliseconds per token, with one point per timed candidate."""
    rows = [row for row in document["rows"] if row["loss"] > -1 and row["ms"] is not None]
    default_weights = document["rows"][0]["weights"]

    def series(row: Row) -> str:
        screened = ", screened" if row["head"] == "screened" else ""
        weights = "" if row["weights"] == default_weights else f", {row['weights']}"
        return f"{row['method']}{screened}{weights}"

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        looks = looks_of(list(dict.fromkeys(map(series, rows))), palette)
        for row in rows:
            _draw_point(axes, row, {**looks[series(row)], "label": series(row)})
        axes.grid(axis="y")
        reference_line(axes, y=100 * document["max_loss"], label="loss budget")
        axes.set_xlabel("ms per token", fontsize=8, color=SOFT)
        axes.set_ylabel("loss (%), compressed above 1", fontsize=8, color=SOFT)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        legend(axes, 3)

    points = "; ".join(f"{row['row']} {loss_text(row)} at {row['ms']:.2f} ms" for row in rows)
    alt = f"Points per setting: {points}."
    return Plot("tune", "Loss against time per token", alt, caption(document), 4.1, draw)


def _draw_point(axes: Axes, row: Row, look: Look) -> None:
    """Draw a row's point with its loss interval and sparsity; the recommended row has a ring."""
    x, y, ends = row["ms"], 100 * row["loss"], row["loss_interval"]
    if ends is not None:
        axes.plot([x, x], [100 * end for end in ends], color=look["color"], linewidth=1)
    axes.plot([x], [y], **{**look, "linestyle": "none"})
    if row["requested"]:
        write_beside(axes, percent(row["requested"]), x, y, 7, 9 if row["recommended"] else 5)
    if row["recommended"]:
        ring: Look = {"marker": "o", "markersize": 12, "fillstyle": "none", "color": INK}
        ring |= {"markeredgewidth": 1.3, "linestyle": "none", "label": "recommended"}
        axes.plot([x], [y], **ring)
