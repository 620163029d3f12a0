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
    "of the worse of the two texts, and no less than exp(KL) - 1; 95 % intervals by bootstrap over "
    "slices",
    "KL": "of the dense model against this one, nats per token, the worse text's mean",
    "ms": "mean time of a timed token, its choice included; median over repetitions",
    "+-": "median absolute distance of the repetitions to their median",
    "x dense": "ms of the row that base names over this row's",
    "bytes": "bytes that a token reads over those of the dense model at bfloat16, if run compactly",
    "achieved": "fraction of FFN neurons removed, mean over the scored tokens, dense ones count 0",
    "dense tokens": "share of the scored tokens that ran dense",
    "re-masks": "masks built after the first, over all slices",
    "on the front": "no other row is better in loss and time alike",
}


def verdict(document: Row, row: Row) -> str:
    """What became of a row, in a word or two."""
    if row["recommended"]:
        return "recommended"
    if row["ms"] is None:
        return "loses too much: not timed"
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
    """What is recommended and why; what could not run."""
    best, base = _row(document, document["recommended"]), _row(document, document["base"])
    most = percent(document["max_loss"])
    told = (
        f"{best['row']}: loses {loss_words(best)}, {best['ms']:.2f} ms per token, "
        f"{best['times_dense']:.2f} x as fast as {base['row']}"
    )
    noise = percent(document["noise"])
    if best is base and best["loss"] > document["max_loss"]:
        first = f"Nothing loses less than {most}, not even {told}; give another --max-loss."
    elif best is base:
        first = (
            f"Nothing is worth it: no setting that loses up to {most} is more than {noise} faster "
            f"than {base['row']} ({base['ms']:.2f} ms per token, loss {loss_words(base)}). Stay "
            "with it."
        )
    elif best["dense"]:
        first = (
            f"Recommended for a loss of up to {most}: {told}. Leaving anything out is worth "
            f"nothing here: no such setting is more than {noise} faster."
        )
    else:
        first = f"Recommended for a loss of up to {most}: {told}."
    return [first, *_left_out(document["left_out"])]


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
        "kl": round(row["kl"], 5),
        "ms_per_token": round(row["ms"], 3),
        "times_dense": round(row["times_dense"], 3),
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
