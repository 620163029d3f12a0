"""Tables, sentences and page of an inspection.

What was inspected as tables: raw numbers for CSV, words for terminal, Markdown and report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.experiments import run_facts
from dart_llm.experiments.store import ResultsView, mapping, read
from dart_llm.files import write_text
from dart_llm.reporting import page
from dart_llm.reporting.table import Column, Record, Table, number, value_columns
from dart_llm.reporting.words import percent
from dart_llm.studies.inspection import plots
from dart_llm.studies.inspection.analyses import ARMS

LAYER = Column("layer", "layer")

FIGURE = number()


def tables(sections: Record) -> list[Table]:
    """The tables of all sections, in their order."""
    return [table for name, data in sections.items() for table in TABLES[name](data)]


def _layers_tables(data: Record) -> list[Table]:
    heads = (
        *("cos(x, x+r)", "median", "|r|/|x|", "median", "S residual"),
        *("cos(x, z)", "median", "|z-x|/|x|", "median", "S output"),
    )
    rows = []
    for place, layer in enumerate(data["layers"]):
        row: dict[str, Any] = {"layer": place}
        for variant, measured in layer.items():
            for what in ("cosine", "change"):
                found = measured[what]
                row |= {f"{variant}_{what}": found["mean"]}
                row |= {f"{variant}_{what}_{n}": found[n] for n in ("median", "q05", "q95")}
            row[f"{variant}_s"] = measured["s"]
        rows.append(row)
    names = [
        f"{variant}_{name}"
        for variant in ("residual", "output")
        for name in ("cosine", "cosine_median", "change", "change_median", "s")
    ]
    caption = f"What each FFN does to the residual stream, text {data['text']}: means over tokens"
    return [Table("layers", caption, (LAYER, *value_columns(" ".join(names), heads, FIGURE)), rows)]


def _weights_tables(data: Record) -> list[Table]:
    keys = "min q05 median q95 max mean std skewness kurtosis"
    heads = ("min", "5 %", "median", "95 %", "max", "mean", "sd", "skewness", "excess kurtosis")
    rows = [
        {"layer": number, "matrix": matrix, **{k: v for k, v in found.items() if k != "histogram"}}
        for number, layer in enumerate(data["weights"]["layers"])
        for matrix, found in layer.items()
    ]
    matrix = Column("matrix", "matrix")
    columns = (LAYER, matrix, *value_columns(keys, heads, FIGURE))
    found = [Table("weights", "L2 norms of the neurons' weights", columns, rows)]
    if data["activations"]:
        found.append(_activations(data))
    return found


def _activations(data: Record) -> Table:
    rows = [
        {
            "layer": number,
            **one["absolute"],
            **one["moments"],
            **{f"near_{level}": share for level, share in one["near"].items()},
            **{key: one[key] for key in ("zero", "holds")},
        }
        for number, one in enumerate(data["activations"])
    ]
    columns = (
        LAYER,
        *value_columns("median q95 max", ("median |u|", "95 %", "max"), FIGURE),
        *value_columns("kurtosis", ("excess kurtosis",), number(1)),
        *value_columns("zero", ("exact zeros",), percent),
        *value_columns("near_0.01 near_0.1", ("|u| < 1 % of RMS", "< 10 %"), percent),
        *value_columns("holds", ("neurons with 90 % of u²",), percent),
    )
    return Table("activations", f"Activations u on text {data['text']}", columns, rows)


def _neurons_tables(data: Record) -> list[Table]:
    rows = [
        {"layer": layer["layer"], "kind": kind, "rank": rank, **neuron}
        for layer in data["layers"]
        for kind in ("strong", "weak")
        for rank, neuron in enumerate(layer[kind], 1)
    ]
    columns = (
        LAYER,
        Column("kind", "kind"),
        Column("rank", "rank"),
        Column("neuron", "neuron"),
        Column("score", "score", number(2)),
        Column("mean u", "mean_activation", FIGURE),
        Column("writes towards", "tokens", lambda tokens: " ".join(map(repr, tokens))),
    )
    held = [
        {"layer": one["layer"], **{f"top_{k}": v for k, v in one["concentration"].items()}}
        for one in data["layers"]
    ]
    heads = ("strongest 1 % hold", "strongest 10 % hold")
    parts = (LAYER, *value_columns("top_0.01 top_0.1", heads, percent))
    about = f"by forward proxy ({data['score']})"
    return [
        Table("concentration", f"Part of all scores {about}", parts, held),
        Table("neurons", f"Strongest and weakest neurons {about}", columns, rows),
    ]


def _overlap_tables(data: Record) -> list[Table]:
    keys = "jaccard chance same_text across"
    heads = ("Jaccard of A and B", "by chance", "halves of one text", "halves of A and B")
    columns = (
        LAYER,
        *value_columns("width kept_a kept_b", ("neurons", "kept for A", "for B"), number(0)),
        *value_columns(keys, heads, FIGURE),
    )
    rows = [*data["layers"], {"layer": "mean", **data["mean"]}]
    caption = f"Neurons that {data['method']} keeps for A and for B"
    return [Table("overlap", caption, columns, rows)]


def with_ends(found: Record) -> str:
    """ "+0.123 (+0.100 to +0.150)"."""
    return f"{found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _ablation_tables(data: Record) -> list[Table]:
    rows = [
        {
            **row,
            "removes": ARMS[row["arm"]],
            **{
                f"{key}_{end}": (row[key] or {}).get(end)
                for key in ("loss_interval", "over_dense", "over_random")
                for end in ("estimate", "low", "high")
            },
        }
        for row in data["rows"]
    ]
    columns = (
        Column("removed neurons", "removes"),
        Column("loss on", "text"),
        Column("achieved sparsity", "achieved_sparsity", percent),
        Column("dense tokens", "dense_token_share", percent),
        Column("re-masks", "remasks"),
        Column("dense loss", "dense_loss", FIGURE),
        Column("loss", "loss", FIGURE),
        Column("random neurons", "random_loss", FIGURE),
        Column("over dense (95 %)", "over_dense", with_ends),
        Column("over random (95 %)", "over_random", with_ends),
    )
    caption = "Loss (nats per token) with neurons removed, on the second half of each text"
    return [Table("ablation", caption, columns, rows)]


def _space_tables(data: Record) -> list[Table]:
    heads = ("cosine", "distance", "|B| / |A|", f"Jaccard of top {data['top_dims']} dimensions")
    measures = value_columns("cosine distance norm_ratio jaccard", heads, FIGURE)
    half = value_columns(
        "half_width tokens_a tokens_b", ("tokens to each side", "of A", "of B"), str
    )
    parts: dict[str, tuple[str, tuple[Column, ...]]] = {
        "layers": ("mean vectors per layer", (LAYER,)),
        "windows": (f"windows around the middle, layer {data['layer']}", half),
        "tokens": (f"token by token, layer {data['layer']}", (Column("position", "position"),)),
    }
    return [
        Table(f"space_{part}", f"A beside B: {words}", (*first, *measures), data[part])
        for part, (words, first) in parts.items()
    ]


TABLES: dict[str, Callable[[Record], list[Table]]] = {
    "layers": _layers_tables,
    "weights": _weights_tables,
    "neurons": _neurons_tables,
    "overlap": _overlap_tables,
    "ablation": _ablation_tables,
    "space": _space_tables,
}


# One plain sentence per section of an inspection, made of its numbers.


Reading = Mapping[str, Any]


def sentences(sections: Reading) -> dict[str, str]:
    """A sentence for every section that is there."""
    return {name: WORDS[name](data) for name, data in sections.items()}


def _ends(values: Sequence[float], write: Callable[[float], str]) -> str:
    """ "0.1 (layer 3) to 0.9 (layer 7)"."""
    low, high = values.index(min(values)), values.index(max(values))
    return f"{write(values[low])} (layer {low}) to {write(values[high])} (layer {high})"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _layers_words(data: Reading) -> str:
    change = [layer["residual"]["change"]["median"] for layer in data["layers"]]
    cosine = [layer["residual"]["cosine"]["median"] for layer in data["layers"]]
    return (
        f"The FFNs change the residual stream by {_ends(change, _two)} of its length, and leave a "
        f"cosine of {_ends(cosine, _two)} between before and after (medians over tokens)."
    )


def _weights_words(data: Reading) -> str:
    down = [layer["down"]["median"] for layer in data["weights"]["layers"]]
    found = f"Half of a layer's neurons have output columns longer than {_ends(down, _two)}."
    if not data["activations"]:
        return found
    holds = [layer["holds"] for layer in data["activations"]]
    return f"{found} 90 % of a token's squared activations lie in {_ends(holds, percent)} of them."


def _neurons_words(data: Reading) -> str:
    held = [layer["concentration"]["0.01"] for layer in data["layers"]]
    return f"The strongest 1 % of the neurons hold {_ends(held, percent)} of a layer's scores."


def _overlap_words(data: Reading) -> str:
    mean = {key: f"{value:.3f}" for key, value in data["mean"].items()}
    return (
        f"With {percent(data['removed'])} removed, the neurons kept for A and for B have a Jaccard "
        f"of {mean['jaccard']}, where chance gives {mean['chance']}; with half the evidence it is "
        f"{mean['same_text']} within one text and {mean['across']} across the two."
    )


def _ablation_words(data: Reading) -> str:
    own = {row["text"]: row for row in data["rows"] if row["arm"] == "a_only"}
    if not own["A"]["neurons"]:
        return "A and B have the same strongest neurons: there is nothing to remove."
    parts = []
    for label, row in own.items():
        rise, random = row["loss"] - row["dense_loss"], row["random_loss"] - row["dense_loss"]
        parts.append(
            f"on {label} by {rise:+.3f} nats per token (as many random ones {random:+.3f})"
        )
    a, b = (own[label]["over_dense"] for label in "AB")
    clear = "; the intervals overlap"
    if not a or not b:
        clear = "; no intervals: the texts are too short"
    elif a["low"] > b["high"] or a["high"] < b["low"]:
        clear = "; the intervals do not overlap"
    share = percent(own["A"]["achieved_sparsity"])
    return (
        f"Without A's own neurons ({share} of all) the loss changes {' and '.join(parts)}{clear}."
    )


def _space_words(data: Reading) -> str:
    cosine = [layer["cosine"] for layer in data["layers"]]
    return (
        f"The mean vectors of A and B have a cosine of {_ends(cosine, _two)}; the first "
        f"{data['sinks']} tokens are left out."
    )


WORDS: dict[str, Callable[[Reading], str]] = {
    "layers": _layers_words,
    "weights": _weights_words,
    "neurons": _neurons_words,
    "overlap": _overlap_words,
    "ablation": _ablation_words,
    "space": _space_words,
}


# ``report.html`` of an inspection, built from its ``inspect.json``.


DOCUMENT = "inspect.json"

LONG = 12
"""A table with more rows is folded."""

SHOWN = 300
"""Rows of a table on the page, at most; the rest is in the CSV file."""

TELLING = ("ablation", "overlap", "space", "layers", "weights", "neurons")
"""The first of these whose sentence is there heads the page."""

TITLES = {
    "layers": "Layers",
    "weights": "Weights and activations",
    "neurons": "Strong and weak neurons",
    "overlap": "Overlap of the neurons of two texts",
    "ablation": "Ablation",
    "space": "Embedding space",
}


def write(folder: Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Without matplotlib the page has no plots and says so.  Raises ``ResultsError`` when the folder
    does not exist or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder), _document(folder)))
    return path


def _document(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return {"texts": [], "sentences": {}, "sections": {}, **mapping(found)}


def render(view: ResultsView, document: Mapping[str, Any]) -> str:
    """The page of one inspection."""
    return page.render("inspect.html", _content(view, document))


def _content(view: ResultsView, document: Mapping[str, Any]) -> dict[str, Any]:
    sections, told = document["sections"], document["sentences"]
    drawn, missing = page.pictures(plots.make(document, view.small_print))
    shown = []
    for name, data in sections.items():
        own = TABLES[name](data)
        short = [
            (table.html(), len(table.rows) > LONG, f"{table.name}.csv")
            for table in own
            if len(table.rows) <= SHOWN
        ]
        left = [(table.caption, f"{table.name}.csv") for table in own if len(table.rows) > SHOWN]
        pictures = [picture for picture in drawn if picture.name in _names(name)]
        shown.append((name, TITLES[name], told.get(name, ""), pictures, short, left))
    return {
        "title": f"Inside {view.name}",
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": next((told[name] for name in TELLING if name in told), ""),
        "facts": _facts(view, document),
        "texts": document["texts"],
        "sections": shown,
        "missing": missing,
        "settings": run_facts.settings(view),
        "provenance": run_facts.provenance(view),
    }


def _names(section: str) -> tuple[str, ...]:
    """Plots of a section."""
    parts = {"space": ("space_layers", "space_windows", "space_tokens")}
    more = ("activations",) if section == "weights" else ()
    return tuple(f"inspect_{name}" for name in (*parts.get(section, (section,)), *more))


def _facts(view: ResultsView, document: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    known = {"checkpoint", "file quantisation", "dtype", "device", "date", "sha256", "command"}
    texts = [
        (f"text {text['label']}", f"{text['name']}: {text['tokens_read']} tokens read", False)
        for text in document["texts"]
    ]
    return texts + [fact for fact in run_facts.facts(view) if fact[0] in known]
