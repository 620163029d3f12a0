"""Table, words, pictures and page of tune.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import run_facts
from dart_llm.experiments.comparison_report import stacked
from dart_llm.experiments.store import read
from dart_llm.files import write_text
from dart_llm.reporting import page
from dart_llm.reporting.figures import (
    INK,
    SOFT,
    Palette,
    Plot,
    key,
    mark,
    panels,
    reference_line,
    write_beside,
)
from dart_llm.reporting.figures import LOOKS as MARKS
from dart_llm.reporting.table import Column, Table, escaped
from dart_llm.reporting.words import count, dtype_text, figure, file_text, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ASKED = (
    "text", "slices", "prompt_tokens", "tokens", "timed_tokens", "repeats", "max_loss", "noise",
    "seed",
)  # fmt: skip
"""Settings that tune.json repeats."""

Row = Mapping[str, Any]

DEFINITIONS = {
    "loss": "perplexity over that of the dense model in its own dtype, minus 1, on the same tokens "
    "of the worse of the two texts, and no less than exp(KL) - 1, which alone counts where there "
    "are fewer than six slices; 95 % intervals by bootstrap over slices",
    "KL": "of the dense model against this one, nats per token, the worse text's mean",
    "ms": "mean time of a timed token, its choice included; median over repetitions",
    "+-": "median absolute distance of the repetitions to their median",
    "x dense": "ms of the row that base names over this row's, repetition by repetition, their "
    "median; empty where the timing was disturbed",
    "bandwidth limit": "bytes of the row that base names over this row's: no timing is faster",
    "bytes": "bytes that a token reads over those of the dense model at bfloat16, if run compactly",
    "achieved": "fraction of FFN neurons removed, mean over the scored tokens, dense ones count 0",
    "dense tokens": "share of the scored tokens that ran dense",
    "re-masks": "masks built after the first, over all slices",
    "on the front": "no other row is better in loss and time alike",
}


def verdict(document: Row, row: Row) -> str:
    """What became of a row, in a word or two."""
    if row["recommended"]:
        return "stay with it for now" if document["undecided"] else "recommended"
    if row["ms"] is None:
        return "loses too much: not timed"
    if row["disturbed"]:
        return "disturbed: repeat it"
    if row["row"] in document["undecided"]:
        return "undecided"
    if row["loss"] > document["max_loss"]:
        return "loses too much"
    return "on the front" if row["pareto"] else ""


def table(document: Row) -> Table:
    """The rows for people, and tune.csv."""

    def said(row: Row) -> str | None:
        return None if "loss" not in row else verdict(document, row) or None

    columns = (
        Column("setting", "row", wrap=False),
        Column("loss", "loss", percent, interval="loss_interval"),
        Column("KL", "kl", ".3f"),
        Column("ms", "ms", ".2f"),
        Column("+-", "ms_spread", ".2f", terminal=False),
        Column("x dense", "times_dense", ".2f"),
        Column("bandwidth limit", "bytes_limit", ".2f", terminal=False),
        Column("bytes", "bytes_share", ".2f"),
        Column("achieved", "achieved_sparsity", percent),
        Column("dense tokens", "dense_token_share", percent, terminal=False),
        Column("re-masks", "remasks", terminal=False),
        Column("worse text", "worse_text", terminal=False),
        Column("perplexity", "perplexity", figure, terminal=False),
        Column("", said, needed=True),
    )
    rows = [*document["rows"], *document["reference_rows"]]
    fields = [name for name in rows[0] if name not in ("texts", "config")]
    place = next(n for n, row in enumerate(rows) if row.get("recommended"))
    return Table("tune", caption(document), columns, rows, fields=fields, strong=place, tight=True)


def caption(document: Row) -> str:
    """What was measured, and where."""
    facts, machine = document["checkpoint"], document["machine"]
    formats = ", ".join(f"{name}: {words}" for name, words in document["formats"].items())
    return (
        f"{facts['name']} ({file_text(facts)}, {dtype_text(facts)}; {formats}): "
        f"{count(document['slices'], 'slice')} of "
        f"{document['prompt_tokens']} prompt + {document['tokens']} scored tokens of the model's "
        f"own text and of {document['text']}; {document['prompt_tokens']} prompt + "
        f"{document['timed_tokens']} timed tokens, {count(document['repeats'], 'repetition')} in "
        f"shuffled order, after the slices' prompts in turn; x dense is over {document['base']}; "
        f"{machine['processor']}, {machine['threads']} threads, device {machine['device']}, torch "
        f"{document['versions']['torch']}, kernels {document['kernels'] or 'none'}"
    )


def _row(document: Row, name: str) -> Row:
    found: Row = next(row for row in document["rows"] if row["row"] == name)
    return found


def loss_words(row: Row) -> str:
    """ "1.2 % (0.8 % to 1.6 %)"."""
    ends = row["loss_interval"]
    told = "" if ends is None else f" ({percent(ends[0])} to {percent(ends[1])})"
    return f"{percent(row['loss'])}{told}"


def sentences(document: Row) -> list[str]:
    """What is recommended and why; what could not be judged or could not run."""
    first = _quick(document) if document["quick"] else _whole(document)
    disturbed = [row["row"] for row in document["rows"] if row["disturbed"]]
    more = _left_out(document["left_out"])
    if disturbed and not document["quick"]:
        more.insert(
            0,
            f"The timing of {'; '.join(disturbed)} was disturbed by other work on this machine and "
            "decides nothing: repeat it on a quiet machine with --fresh.",
        )
    return [first, *more]


def _told(document: Row, row: Row) -> str:
    """What a row loses and how fast it is."""
    loss = f"{row['row']}: loses {loss_words(row)}"
    if row["disturbed"]:
        return f"{loss}; its timing was disturbed by other work on this machine"
    limit = row["bytes_limit"]
    at_most = "" if limit is None or limit <= 1 else f" (bandwidth limit {limit:.2f} x)"
    return (
        f"{loss}, {row['ms']:.2f} ms per token, {row['times_dense']:.2f} x as fast as "
        f"{document['base']}{at_most}"
    )


def _quick(document: Row) -> str:
    """The first answer, or that there is none yet."""
    best, base = _row(document, document["recommended"]), _row(document, document["base"])
    most, noise = percent(document["max_loss"]), percent(document["noise"])
    more = count(document["further"], "further setting")
    further = f"The same command without --quick measures {more} and continues from here."
    if document["undecided"]:
        open_rows = "; ".join(_told(document, _row(document, n)) for n in document["undecided"])
        return (
            f"Undecided after so few slices and repetitions; dense takes {base['ms']:.2f} ms per "
            f"token. {open_rows}. {further}"
        )
    if best is base:
        return (
            f"First answer: use it dense ({base['row']}, {base['ms']:.2f} ms per token). Nothing "
            f"that was tried loses {most} or less and is more than {noise} faster. {further}"
        )
    return f"First answer, for a loss of up to {most}: {_told(document, best)}. {further}"


def _whole(document: Row) -> str:
    best, base = _row(document, document["recommended"]), _row(document, document["base"])
    most, noise = percent(document["max_loss"]), percent(document["noise"])
    if best is base and best["loss"] > document["max_loss"]:
        return (
            f"Nothing loses less than {most}, not even {_told(document, best)}; give another "
            "--max-loss."
        )
    if best is base:
        return (
            f"No setting within the loss of {most} is more than {noise} faster than {base['row']} "
            f"({base['ms']:.2f} ms per token, loss {loss_words(base)}): keep the dense model."
        )
    first = f"Recommended for a loss of up to {most}: {_told(document, best)}."
    if best["dense"]:
        return f"{first} Pruning gains nothing here: no such setting is more than {noise} faster."
    return first


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """One sentence per reason, with all candidates that it holds for."""
    labels: dict[str, list[str]] = {}
    for label, why in reasons.items():
        labels.setdefault(why, []).append(label)
    return [
        f"{'; '.join(those)} {'was' if len(those) == 1 else 'were'} left out: {why}"
        for why, those in labels.items()
    ]


def measured(document: Row, row: Row) -> dict[str, Any]:
    """What the setting's file says of the measurement."""
    ends = row["loss_interval"]
    return {
        "loss": round(row["loss"], 5),
        "loss_interval": None if ends is None else [round(end, 5) for end in ends],
        "max_loss": document["max_loss"],
        "quick": document["quick"],
        "kl": round(row["kl"], 5),
        "ms_per_token": round(row["ms"], 3),
        "times_dense": row["times_dense"] and round(row["times_dense"], 3),
        "dense": document["base"],
        "bytes_share": None if row["bytes_share"] is None else round(row["bytes_share"], 4),
        "achieved_sparsity": round(row["achieved_sparsity"], 4),
        "text": f"the model's own, and {document['text']}; the worse: {row['worse_text']}",
        "machine": f"{document['machine']['processor']}, {document['machine']['threads']} threads",
    }


def markdown(document: Row) -> str:
    """The words, the table, and what the columns mean."""
    lines = ["# Which setting for this model?", ""]
    lines += [f"- {escaped(line)}" for line in sentences(document)]
    lines += ["", escaped(caption(document)), "", *table(document).lines(), ""]
    if document["notes"]:
        lines += ["## Notes", "", *(f"- {escaped(line)}" for line in document["notes"]), ""]
    lines += ["## What the columns mean", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    return "\n".join(lines) + "\n"


def make(document: Row) -> list[Plot]:
    """Loss over time and over bytes, a panel each."""
    rows = [row for row in document["rows"] if row["loss"] > -1]
    usual = document["rows"][0]["weights"]
    kinds = list(dict.fromkeys(_kind(row, usual) for row in rows))

    def draw(image: Figure, palette: Palette, narrow: bool) -> None:
        above, *both = panels(image, 2, narrow, 2)
        looks = {
            kind: {**mark(MARKS[n % len(MARKS)], palette), "linestyle": "none", "label": kind}
            for n, kind in enumerate(kinds)
        }
        for axes, name, words in zip(
            both,
            ("ms", "bytes_share"),
            ("ms per token", "bytes per token over bfloat16"),
            strict=True,
        ):
            _draw(axes, rows, name, [looks[_kind(row, usual)] for row in rows])
            reference_line(axes, y=100 * document["max_loss"], label="loss that was allowed")
            axes.set_xlabel(words, fontsize=8, color=SOFT)
            axes.set_ylabel("loss (%), compressed above 1", fontsize=8, color=SOFT)
            axes.set_yscale("symlog", linthresh=1)
            low, high = axes.get_ylim()
            ticks = [tick for tick in LOSSES if low <= tick <= high]
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks([], minor=True)
        for row in document["reference_rows"]:
            both[0].axvline(row["ms"], color=SOFT, linewidth=1.2, linestyle=":", label=row["row"])
        key(above, both, 2 if narrow else 3)

    told = "; ".join(
        f"{row['row']} {loss_words(row)}" + ("" if row["ms"] is None else f" at {row['ms']:.2f} ms")
        for row in rows
    )
    title = "Loss over time, and over the bytes of a token"
    return [Plot("tune", title, f"Points per setting: {told}.", caption(document), 4.1, draw, 6.6)]


LOSSES = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Per cent that the axis names: nearly even steps of its scale."""


def _kind(row: Row, usual: str) -> str:
    """What a mark stands for: the method, its head and weights where they are not the usual."""
    screened = ", screened" if row["head"] == "screened" else ""
    held = {usual: "", "dense": ", unpacked"}.get(row["weights"], f", {row['weights'].upper()}")
    return f"{row['method']}{screened}{held}"


def _draw(axes: Axes, rows: Sequence[Row], name: str, looks: Sequence[Mapping[str, Any]]) -> None:
    """Points with their intervals and sparsities; the recommended one has a ring."""
    for row, look in zip(rows, looks, strict=True):
        if row[name] is None:
            continue
        x, y = row[name], 100 * row["loss"]
        ends = row["loss_interval"]
        if ends is not None:
            axes.plot([x, x], [100 * end for end in ends], color=look["color"], linewidth=1)
        axes.plot([x], [y], **look)
        if row["asked"]:
            write_beside(axes, percent(row["asked"]), x, y, 7, 9 if row["recommended"] else 5)
        if row["recommended"]:
            axes.plot(
                [x],
                [y],
                marker="o",
                markersize=12,
                fillstyle="none",
                color=INK,
                markeredgewidth=1.3,
                linestyle="none",
                label="recommended",
            )
    axes.grid(axis="y")


def write(folder: Path, document: Row) -> Path:
    """``report.html``, from the finished files."""
    view = read(folder)
    first, *further = sentences(document)
    pictures, missing = page.pictures(make(document))
    content = {
        "title": f"Which setting for {document['model']}?",
        "conclusion": first,
        "further": further,
        "many": False,
        "facts": run_facts.facts(view),
        "leak": "",
        "leaks": [],
        "pictures": pictures,
        "missing": missing,
        "tables": [(table(document).html(), False)],
        "failures": [],
        "notes": [*document["notes"], *(f"{n}: {t}" for n, t in document["definitions"].items())],
        "checkpoints": None,
    }
    path = folder / "report.html"
    write_text(path, run_facts.render(view, "compare.html", content, stacked=stacked))
    return path
