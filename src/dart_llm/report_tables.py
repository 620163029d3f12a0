"""The tables of the report page: numbers in, words and columns out; no markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm import sentences
from dart_llm.results_view import ResultsView, mapping, number
from dart_llm.sentences import percent

NOTHING = "–"
"""A cell that was not measured."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A caption, column heads (the first names the rows), and rows whose first cell is a head."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    strong: int | None = None
    """The row to point out."""


def bytes_text(value: float | None) -> str:
    """53.4 MiB, 1.2 GiB, 812 KiB."""
    if value is None:
        return NOTHING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


def _share(record: Record, key: str) -> str:
    value = number(record.get(key))
    return NOTHING if value is None else percent(value)


def _ratio(record: Record, key: str) -> str:
    value = number(record.get(key))
    return NOTHING if value is None else f"{value:.3f}"


def _integer(record: Record, key: str) -> str:
    value = number(record.get(key))
    return NOTHING if value is None else f"{value:,.0f}"


def _causes(record: Record) -> str:
    causes = mapping(record.get("remask_causes"))
    return ", ".join(f"{name} {count}" for name, count in causes.items()) or "none"


def _asked(record: Record) -> str:
    value = number(record.get("requested_sparsity"))
    return "set by the method" if value is None else percent(value)


ACCOUNTING: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("sparsity asked for", _asked),
    ("achieved sparsity (dense tokens count 0)", lambda r: _share(r, "achieved_sparsity")),
    ("sparsity while pruned", lambda r: _share(r, "sparsity_while_pruned")),
    ("decoded tokens that ran dense", lambda r: _share(r, "dense_token_share")),
    ("decoded tokens", lambda r: _integer(r, "decoded_tokens")),
    ("prompt tokens", lambda r: _integer(r, "prompt_tokens")),
    ("re-masks", lambda r: _integer(r, "remasks")),
    ("masks built, by cause", _causes),
    ("executor", lambda r: str(r.get("executor") or NOTHING)),
    ("FFN FLOPs over dense, as executed", lambda r: _ratio(r, "ffn_flops_share")),
    ("FFN FLOPs over dense, if compact", lambda r: _ratio(r, "ffn_flops_share_if_compact")),
    ("FFN bytes over dense, as executed", lambda r: _ratio(r, "ffn_bytes_share")),
    ("FFN bytes over dense, if compact", lambda r: _ratio(r, "ffn_bytes_share_if_compact")),
    ("FFN share of all weight bytes read", lambda r: _share(r, "ffn_share_of_bytes")),
    ("memory held beside the model", lambda r: bytes_text(number(r.get("extra_memory_bytes")))),
)

COPIES: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("of the FLOPs, low-bit copies that rank neurons", lambda r: _ratio(r, "proxy_flops_share")),
    ("of the bytes, low-bit copies", lambda r: _ratio(r, "proxy_bytes_share")),
    ("relative error of the copies", lambda r: _ratio(r, "proxy_error")),
    ("the same of Gaussian weights", lambda r: _ratio(r, "proxy_error_gaussian")),
)
"""Shown where tokens chose their own neurons."""


def accounting(view: ResultsView) -> Table | None:
    """One column per pruned run: the generated text, then the rows of the perplexity tables."""
    columns: list[tuple[str, Record]] = []
    if view.generated:
        columns.append(("generated text", view.generated))
    for document in view.perplexity:
        for row in document["rows"]:
            if row.get("accounting"):
                name = f"{sentences.row_name(row)} on {document.get('text', 'text')}"
                columns.append((name, mapping(row["accounting"])))
    if not columns:
        return None
    copies = any(record.get("proxy_bytes_share") for _, record in columns)
    shown = (*ACCOUNTING, *(COPIES if copies else ()))
    rows = tuple((label, *(cell(record) for _, record in columns)) for label, cell in shown)
    return Table("Accounting of the decoded tokens", ("quantity", *(n for n, _ in columns)), rows)


def perplexity(document: Record, strong: Record | None) -> Table:
    """Achieved sparsity, dense share and re-masks beside every number."""
    head = (
        "method",
        "asked",
        "achieved",
        "dense tokens",
        "re-masks",
        "perplexity",
        "x dense",
        "95 % interval",
        "mean loss (nats)",
    )
    rows = document["rows"]
    protocol = (
        f"{document.get('text', 'text')}: {document.get('slices', '?')} slices of "
        f"{document.get('prompt_tokens', '?')} prompt + {document.get('scored_tokens', '?')} "
        f"scored tokens, protocol {document.get('protocol', 'not known')}"
    )
    marked = next((index for index, row in enumerate(rows) if row == strong), None)
    return Table(protocol, head, tuple(_perplexity_row(r, rows) for r in rows), strong=marked)


def _perplexity_row(row: Record, rows: Sequence[Record]) -> tuple[str, ...]:
    dense = row.get("method") == "dense"
    counted = mapping(row.get("accounting"))
    if dense:
        counted = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
    value, loss = number(row.get("perplexity")), number(row.get("mean_loss"))
    ratio = None if value is None else sentences.ratio(row, rows)
    interval = row.get("interval")
    asked = number(row.get("sparsity"))
    return (
        str(row.get("method", "unknown")),
        "set by the method" if asked is None else percent(asked),
        _share(counted, "achieved_sparsity"),
        _share(counted, "dense_token_share"),
        _integer(counted, "remasks"),
        NOTHING if value is None else f"{value:,.2f}" if value < 1e5 else sentences.figure(value),
        NOTHING if ratio is None else f"{ratio:,.2f}",
        f"{interval[0]:,.2f} to {interval[1]:,.2f}" if interval else NOTHING,
        NOTHING if loss is None else f"{loss:.3f}",
    )


def timing(view: ResultsView) -> Table | None:
    """Seconds and tokens per second, dense beside pruned, and the ratio the bytes allow."""
    kinds = (
        ("time to the first token (ms)", "time_to_first_token_s", 1000.0, False),
        ("time per decoded token, mean (ms)", "seconds_per_token", 1000.0, False),
        ("tokens per second", "tokens_per_second", 1.0, True),
    )
    rows = []
    for label, key, scale, inverse in kinds:
        each = mapping(view.timing.get(key))
        dense, pruned = number(each.get("dense")), number(each.get("pruned"))
        if dense is None and pruned is None:
            continue
        gain = (pruned / dense if inverse else dense / pruned) if dense and pruned else None
        cells = [NOTHING if v is None else f"{scale * v:,.1f}" for v in (dense, pruned)]
        rows.append((label, *cells, NOTHING if gain is None else f"{gain:.2f} x"))
    limit = number(view.timing.get("bytes_limit"))
    if rows and limit is not None:
        rows.append(("most that the bytes read allow", NOTHING, NOTHING, f"{limit:.2f} x"))
    if not rows:
        return None
    return Table("Times of one run", ("quantity", "dense", "pruned", "gain"), tuple(rows))


def remasks(view: ResultsView) -> Table | None:
    """Every mask that was built for the generated text, with its cause."""
    if not view.remasks:
        return None
    rows = []
    for index, mask in enumerate(view.remasks):
        kept = mask.get("kept") or ()
        place = f"{_integer(mask, 'sequence')}" + (
            "" if mask.get("row") is None else f", row {mask['row']}"
        )
        cells = (_integer(mask, "step"), str(mask.get("cause", NOTHING)))
        evidence, overlap = _integer(mask, "evidence_tokens"), _share(mask, "overlap")
        rows.append((str(index), place, *cells, evidence, f"{sum(kept):,}", overlap))
    head = (
        "mask",
        "sequence",
        "from decode step",
        "cause",
        "evidence (tokens)",
        "neurons kept",
        "shared with the mask before",
    )
    return Table("Masks of the generated text", head, tuple(rows))


def layers(view: ResultsView) -> Table | None:
    """One row per layer: what the first and the last mask keep, and what was removed."""
    masks = [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(view.layers)]
    if not view.layers:
        return None
    rows = []
    for index, layer in enumerate(view.layers):
        ends = [f"{masks[end]['kept'][index]:,}" if masks else NOTHING for end in (0, -1)]
        share, removed = _share(layer, "kept_share"), _share(layer, "sparsity_decoded")
        name = str(layer.get("layer", index))
        rows.append((name, _integer(layer, "width"), *ends, share, removed))
    head = (
        "layer",
        "neurons",
        "kept by the first mask",
        "by the last",
        "share kept at the end",
        "removed, mean over decoded tokens",
    )
    return Table("Kept neurons per layer", head, tuple(rows))


def settings(view: ResultsView) -> list[Table]:
    """The run's settings and the configuration of its masks; what was not given is left out."""
    found = []
    for caption, key in (
        ("Settings of the run", "settings"),
        ("Configuration of the masks", "prune"),
    ):
        flat = _flat(mapping(view.config.get(key)))
        if flat:
            found.append(Table(caption, ("setting", "value"), flat, numeric=False))
    return found


def provenance(view: ResultsView) -> list[Table]:
    """Versions, machine, git state and the checkpoint's facts."""
    sources = (
        ("Versions", "versions"),
        ("Machine", "machine"),
        ("Source code", "git"),
        ("Checkpoint", "checkpoint"),
    )
    found = []
    for caption, key in sources:
        flat = _flat(mapping(view.config.get(key)))
        if flat:
            found.append(Table(caption, ("what", "value"), flat, numeric=False))
    return found


def _flat(data: Record, prefix: str = "") -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", _plain(value)))
    return tuple(rows)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
