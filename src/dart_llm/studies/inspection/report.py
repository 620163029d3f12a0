"""Tables, sentences and page of an inspection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.experiments import run_facts
from dart_llm.experiments.store import read
from dart_llm.files import write_text
from dart_llm.reporting import page
from dart_llm.reporting.table import Column, Record, Table, number, value_columns
from dart_llm.reporting.words import percent, too_few
from dart_llm.studies.inspection import plots
from dart_llm.studies.inspection.analyses import ARMS

LAYER = Column("layer", "layer")

FIGURE = number()


def tables(sections: Record) -> list[Table]:
    """The tables of all sections, in their order."""
    return [table for name, data in sections.items() for table in TABLES[name](data)]


def _layers(data: Record) -> list[Table]:
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


def _weights(data: Record) -> list[Table]:
    keys = "min q05 median q95 max mean std skewness kurtosis"
    heads = ("min", "5 %", "median", "95 %", "max", "mean", "sd", "skewness", "excess kurtosis")
    rows = [
        {"layer": number, "matrix": matrix, **{k: v for k, v in found.items() if k != "histogram"}}
        for number, layer in enumerate(data["weights"]["layers"])
        for matrix, found in layer.items()
    ]
    columns = (LAYER, Column("matrix", "matrix"), *value_columns(keys, heads, FIGURE))
    found = [Table("weights", "L2 norms of the neurons' weights", columns, rows)]
    return found + ([_activations(data)] if data["activations"] else [])


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
    shares = ("exact zeros", "|u| < 1 % of RMS", "< 10 %", "neurons with 90 % of u²")
    columns = (
        LAYER,
        *value_columns("median q95 max", ("median |u|", "95 %", "max"), FIGURE),
        Column("excess kurtosis", "kurtosis", number(1)),
        *value_columns("zero near_0.01 near_0.1 holds", shares, percent),
    )
    return Table("activations", f"Activations u on text {data['text']}", columns, rows)


def _neurons(data: Record) -> list[Table]:
    rows = [
        {"layer": layer["layer"], "kind": kind, "rank": rank, **neuron}
        for layer in data["layers"]
        for kind in ("strong", "weak")
        for rank, neuron in enumerate(layer[kind], 1)
    ]
    columns = (
        LAYER,
        *value_columns("kind rank neuron", ("kind", "rank", "neuron"), str),
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


def _overlap(data: Record) -> list[Table]:
    keys = "jaccard chance same_text across"
    heads = ("Jaccard of A and B", "by chance", "halves of one text", "halves of A and B")
    columns = (
        LAYER,
        *value_columns("width kept_a kept_b", ("neurons", "kept for A", "for B"), number(0)),
        *value_columns(keys, heads, FIGURE),
    )
    rows = [*data["layers"], {"layer": "mean", **data["mean"]}]
    return [Table("overlap", f"Neurons that {data['method']} keeps for A and for B", columns, rows)]


def with_ends(found: Record) -> str:
    """ "+0.123 (+0.100 to +0.150)", or why there is no interval."""
    if found["low"] is None:
        return f"{found['estimate']:+.3f} {too_few(found['n'])}"
    return f"{found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _ablation(data: Record) -> list[Table]:
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
    losses = ("dense loss", "loss", "random neurons")
    columns = (
        *value_columns("removes text", ("removed neurons", "loss on"), str),
        Column("achieved sparsity", "achieved_sparsity", percent),
        Column("dense tokens", "dense_token_share", percent),
        Column("re-masks", "remasks"),
        *value_columns("dense_loss loss random_loss", losses, FIGURE),
        Column("over dense (95 %)", "over_dense", with_ends),
        Column("over random (95 %)", "over_random", with_ends),
    )
    caption = (
        "Loss (nats per token) with neurons removed, on the second half of each text; A's own: "
        "among A's strongest and not among B's"
    )
    return [Table("ablation", caption, columns, rows)]


def _space(data: Record) -> list[Table]:
    heads = ("cosine", "distance", "|B| / |A|", f"Jaccard of top {data['top_dims']} dimensions")
    measures = value_columns("cosine distance norm_ratio jaccard", heads, FIGURE)
    sizes = ("tokens to each side", "of A", "of B")
    windows = value_columns("half_width tokens_a tokens_b", sizes, str)
    layer = f"layer {data['layer']}"
    return [
        Table(f"space_{part}", f"A beside B: {words}", (*first, *measures), data[part])
        for part, words, first in (
            ("layers", "mean vectors per layer", (LAYER,)),
            ("windows", f"windows around the middle, {layer}", windows),
            ("tokens", f"token by token, {layer}", (Column("position", "position"),)),
        )
    ]


TABLES: dict[str, Callable[[Record], list[Table]]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": _neurons,
    "overlap": _overlap,
    "ablation": _ablation,
    "space": _space,
}

# One plain sentence per section, made of its numbers.


def sentences(sections: Record) -> dict[str, str]:
    """A sentence for every section that is there."""
    return {name: WORDS[name](data) for name, data in sections.items()}


def _ends(layers: Sequence[Any], *keys: str, share: bool = False) -> str:
    """ "0.10 (layer 3) to 0.90 (layer 7)", of the values under ``keys``."""
    values = []
    for found in layers:
        for key in keys:
            found = found[key]
        values.append(found)
    write: Callable[[float], str] = percent if share else "{:.2f}".format
    ends = (min(values), max(values))
    return " to ".join(f"{write(end)} (layer {values.index(end)})" for end in ends)


def _weights_words(data: Record) -> str:
    down = _ends(data["weights"]["layers"], "down", "median")
    found = f"Half of a layer's neurons have output columns longer than {down}."
    if not data["activations"]:
        return found
    holds = _ends(data["activations"], "holds", share=True)
    return f"{found} 90 % of a token's squared activations lie in {holds} of them."


def _overlap_words(data: Record) -> str:
    mean = {key: f"{value:.3f}" for key, value in data["mean"].items()}
    return (
        f"With {percent(data['removed'])} removed, the neurons kept for A and for B have a Jaccard "
        f"of {mean['jaccard']}, where chance gives {mean['chance']}; with half the evidence it is "
        f"{mean['same_text']} within one text and {mean['across']} across the two."
    )


def _ablation_words(data: Record) -> str:
    own = [row for row in data["rows"] if row["arm"] == "a_only"]
    if not own[0]["neurons"]:
        return "A and B have the same strongest neurons: there is nothing to remove."
    parts = [
        f"on {row['text']} by {with_ends(row['over_dense'])} nats per token "
        f"(as many random ones {row['random_loss'] - row['dense_loss']:+.3f})"
        for row in own
    ]
    share = percent(own[0]["achieved_sparsity"])
    return f"Without A's own neurons ({share} of all) the loss changes {' and '.join(parts)}."


WORDS: dict[str, Callable[[Record], str]] = {
    "layers": lambda data: (
        f"The FFNs change the residual stream by "
        f"{_ends(data['layers'], 'residual', 'change', 'median')} of its length, and leave a "
        f"cosine of {_ends(data['layers'], 'residual', 'cosine', 'median')} between before and "
        "after (medians over tokens)."
    ),
    "weights": _weights_words,
    "neurons": lambda data: (
        "The strongest 1 % of the neurons hold "
        f"{_ends(data['layers'], 'concentration', '0.01', share=True)} of a layer's scores."
    ),
    "overlap": _overlap_words,
    "ablation": _ablation_words,
    "space": lambda data: (
        f"The mean vectors of A and B have a cosine of {_ends(data['layers'], 'cosine')}; the "
        f"first {data['sinks']} tokens are left out."
    ),
}

# ``report.html``

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

FACTS = {"checkpoint", "file quantisation", "dtype", "device", "date", "sha256", "command"}


def write(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write the ``report.html`` of ``document`` (inspect.json) into ``folder``; returns its path.

    Without matplotlib the page has no plots and says so.
    """
    view, told = read(folder), document["sentences"]
    drawn, missing = page.pictures(plots.make(document, view.small_print))
    shown = []
    for name, data in document["sections"].items():
        own = [(table, f"{table.name}.csv") for table in TABLES[name](data)]
        short = [
            (table.html(), len(table.rows) > LONG, file)
            for table, file in own
            if len(table.rows) <= SHOWN
        ]
        left = [(table.caption, file) for table, file in own if len(table.rows) > SHOWN]
        names = (f"inspect_{name}", *(["inspect_activations"] if name == "weights" else []))
        pictures = [one for one in drawn if one.name.startswith(names)]
        shown.append((name, TITLES[name], told[name], pictures, short, left))
    texts = [
        (f"text {text['label']}", f"{text['name']}: {text['tokens_read']} tokens read", False)
        for text in document["texts"]
    ]
    content = {
        "title": f"Inside {view.name}",
        "conclusion": next((told[name] for name in TELLING if name in told), ""),
        "facts": texts + [fact for fact in run_facts.facts(view) if fact[0] in FACTS],
        "texts": document["texts"],
        "sections": shown,
        "missing": missing,
    }
    path = folder / "report.html"
    write_text(path, run_facts.render(view, "inspect.html", content))
    return path
