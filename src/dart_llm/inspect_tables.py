"""What was inspected as tables: raw numbers for CSV, words for terminal, Markdown and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from dart_llm.inspect_ablation import ARMS
from dart_llm.report_tables import NOTHING, Table
from dart_llm.sentences import percent

Record = Mapping[str, Any]
Format = Callable[[Any], str]
Column = tuple[str, str, Format]
"""A key of the rows, its head, and how a value is written."""


@dataclass(frozen=True)
class Sheet:
    """One table; ``name`` is that of its CSV file."""

    section: str
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Record]

    def table(self) -> Table:
        """In words; the first column names the rows."""
        body = tuple(
            tuple(
                NOTHING if row.get(key) is None else write(row[key])
                for key, _, write in self.columns
            )
            for row in self.rows
        )
        return Table(self.caption, tuple(head for _, head, _ in self.columns), body)

    def rich(self) -> RichTable:
        """For the terminal."""
        table, found = self.table(), RichTable(title=self.caption, title_justify="left")
        for place, head in enumerate(table.head):
            found.add_column(head, justify="right" if place else "left")
        for row in table.rows:
            found.add_row(*row)
        return found

    def markdown(self) -> str:
        """A pipe table under its caption."""
        table = self.table()
        lines = [table.head, ("---",) * len(table.head), *table.rows]
        cells = [[str(c).replace("|", "\\|").replace("\n", "\\n") for c in line] for line in lines]
        return "\n".join([f"### {self.caption}", "", *(f"| {' | '.join(c)} |" for c in cells)])

    @property
    def header(self) -> list[str]:
        """Columns of the CSV file: every key of the rows that holds no mapping."""
        nested = {key for row in self.rows for key, v in row.items() if isinstance(v, Mapping)}
        return [key for key in (self.rows[0] if self.rows else ()) if key not in nested]

    def csv(self) -> Iterator[list[Any]]:
        """Raw values under ``header``, a list as JSON."""
        header = self.header
        for row in self.rows:
            values = [row.get(key) for key in header]
            yield [json.dumps(v) if isinstance(v, list) else v for v in values]


def _number(digits: int = 3) -> Format:
    def write(value: float) -> str:
        small = value != 0 and abs(value) < 0.5 * 10**-digits
        large = abs(value) >= 1e5
        return f"{value:.1e}" if small or large else f"{value:,.{digits}f}"

    return write


def _columns(keys: str, heads: Sequence[str], write: Format) -> tuple[Column, ...]:
    return tuple((key, head, write) for key, head in zip(keys.split(), heads, strict=True))


LAYER: Column = ("layer", "layer", str)
FIGURE = _number()


def sheets(sections: Record) -> list[Sheet]:
    """The tables of all sections, in their order."""
    makers = {
        "layers": _layers,
        "weights": _weights,
        "neurons": _neurons,
        "overlap": _overlap,
        "ablation": _ablation,
        "space": _space,
    }
    return [sheet for name, data in sections.items() for sheet in makers[name](data)]


def _layers(data: Record) -> list[Sheet]:
    heads = (
        *("cos(x, x+r)", "median", "|r|/|x|", "median", "S residual"),
        *("cos(x, z)", "median", "|z-x|/|x|", "median", "S output"),
    )
    rows = []
    for number, layer in enumerate(data["layers"]):
        row: dict[str, Any] = {"layer": number}
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
    return [
        Sheet("layers", "layers", caption, (LAYER, *_columns(" ".join(names), heads, FIGURE)), rows)
    ]


def _weights(data: Record) -> list[Sheet]:
    keys = "min q05 median q95 max mean std skewness kurtosis"
    heads = ("min", "5 %", "median", "95 %", "max", "mean", "sd", "skewness", "excess kurtosis")
    rows = [
        {"layer": number, "matrix": matrix, **{k: v for k, v in found.items() if k != "histogram"}}
        for number, layer in enumerate(data["weights"]["layers"])
        for matrix, found in layer.items()
    ]
    matrix: Column = ("matrix", "matrix", str)
    columns = (LAYER, matrix, *_columns(keys, heads, FIGURE))
    found = [Sheet("weights", "weights", "L2 norms of the neurons' weights", columns, rows)]
    if data["activations"]:
        found.append(_activations(data))
    return found


def _activations(data: Record) -> Sheet:
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
        *_columns("median q95 max", ("median |u|", "95 %", "max"), FIGURE),
        *_columns("kurtosis", ("excess kurtosis",), _number(1)),
        *_columns("zero", ("exact zeros",), percent),
        *_columns("near_0.01 near_0.1", ("|u| < 1 % of RMS", "< 10 %"), percent),
        *_columns("holds", ("neurons with 90 % of u²",), percent),
    )
    return Sheet("weights", "activations", f"Activations u on text {data['text']}", columns, rows)


def _neurons(data: Record) -> list[Sheet]:
    rows = [
        {"layer": layer["layer"], "kind": kind, "rank": rank, **neuron}
        for layer in data["layers"]
        for kind in ("strong", "weak")
        for rank, neuron in enumerate(layer[kind], 1)
    ]
    columns = (
        LAYER,
        ("kind", "kind", str),
        ("rank", "rank", str),
        ("neuron", "neuron", str),
        ("score", "score", _number(2)),
        ("mean_activation", "mean u", FIGURE),
        ("tokens", "writes towards", lambda tokens: " ".join(map(repr, tokens))),
    )
    held = [
        {"layer": one["layer"], **{f"top_{k}": v for k, v in one["concentration"].items()}}
        for one in data["layers"]
    ]
    heads = ("strongest 1 % hold", "strongest 10 % hold")
    parts = (LAYER, *_columns("top_0.01 top_0.1", heads, percent))
    about = f"by forward proxy ({data['score']})"
    return [
        Sheet("neurons", "concentration", f"Part of all scores {about}", parts, held),
        Sheet("neurons", "neurons", f"Strongest and weakest neurons {about}", columns, rows),
    ]


def _overlap(data: Record) -> list[Sheet]:
    keys = "jaccard chance same_text across"
    heads = ("Jaccard of A and B", "by chance", "halves of one text", "halves of A and B")
    columns = (
        LAYER,
        *_columns("width kept_a kept_b", ("neurons", "kept for A", "for B"), _number(0)),
        *_columns(keys, heads, FIGURE),
    )
    rows = [*data["layers"], {"layer": "mean", **data["mean"]}]
    caption = f"Neurons that {data['method']} keeps for A and for B"
    return [Sheet("overlap", "overlap", caption, columns, rows)]


def with_ends(found: Record) -> str:
    """ "+0.123 (+0.100 to +0.150)"."""
    return f"{found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _ablation(data: Record) -> list[Sheet]:
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
        ("removes", "removed neurons", str),
        ("text", "loss on", str),
        ("achieved_sparsity", "achieved sparsity", percent),
        ("dense_token_share", "dense tokens", percent),
        ("remasks", "re-masks", str),
        ("dense_loss", "dense loss", FIGURE),
        ("loss", "loss", FIGURE),
        ("random_loss", "random neurons", FIGURE),
        ("over_dense", "over dense (95 %)", with_ends),
        ("over_random", "over random (95 %)", with_ends),
    )
    caption = "Loss (nats per token) with neurons removed, on the second half of each text"
    return [Sheet("ablation", "ablation", caption, columns, rows)]


def _space(data: Record) -> list[Sheet]:
    heads = ("cosine", "distance", "|B| / |A|", f"Jaccard of top {data['top_dims']} dimensions")
    measures = _columns("cosine distance norm_ratio jaccard", heads, FIGURE)
    half = _columns("half_width tokens_a tokens_b", ("tokens to each side", "of A", "of B"), str)
    parts: dict[str, tuple[str, tuple[Column, ...]]] = {
        "layers": ("mean vectors per layer", (LAYER,)),
        "windows": (f"windows around the middle, layer {data['layer']}", half),
        "tokens": (f"token by token, layer {data['layer']}", (("position", "position", str),)),
    }
    return [
        Sheet("space", f"space_{part}", f"A beside B: {words}", (*first, *measures), data[part])
        for part, (words, first) in parts.items()
    ]
