"""Tables, texts by phase and page of one run: numbers in, words and columns out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments import run_facts
from dart_llm.experiments.store import ResultsView, mapping, number, read
from dart_llm.files import write_text
from dart_llm.reporting import page, words
from dart_llm.reporting.table import NOTHING, Column, PageTable, Record, Table, bytes_text
from dart_llm.reporting.words import percent
from dart_llm.studies.generate import plots


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


def accounting(view: ResultsView) -> PageTable | None:
    """One column per pruned run: the generated text, then the rows of the perplexity tables."""
    columns: list[tuple[str, Record]] = []
    if view.generated:
        columns.append(("generated text", view.generated))
    for document in view.perplexity:
        for row in document["rows"]:
            if row.get("accounting"):
                name = f"{words.row_name(row)} on {document.get('text', 'text')}"
                columns.append((name, mapping(row["accounting"])))
    if not columns:
        return None
    copies = any(record.get("proxy_bytes_share") for _, record in columns)
    shown = (*ACCOUNTING, *(COPIES if copies else ()))
    rows = tuple((label, *(cell(record) for _, record in columns)) for label, cell in shown)
    return PageTable(
        "Accounting of the decoded tokens", ("quantity", *(n for n, _ in columns)), rows
    )


def perplexity(document: Record, strong: Record | None) -> PageTable:
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
    return PageTable(protocol, head, tuple(_perplexity_row(r, rows) for r in rows), strong=marked)


def _perplexity_row(row: Record, rows: Sequence[Record]) -> tuple[str, ...]:
    dense = row.get("method") == "dense"
    counted = mapping(row.get("accounting"))
    if dense:
        counted = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
    value, loss = number(row.get("perplexity")), number(row.get("mean_loss"))
    ratio = None if value is None else words.ratio(row, rows)
    interval = row.get("interval")
    asked = number(row.get("sparsity"))
    return (
        str(row.get("method", "unknown")),
        "set by the method" if asked is None else percent(asked),
        _share(counted, "achieved_sparsity"),
        _share(counted, "dense_token_share"),
        _integer(counted, "remasks"),
        NOTHING if value is None else f"{value:,.2f}" if value < 1e5 else words.figure(value),
        NOTHING if ratio is None else f"{ratio:,.2f}",
        f"{interval[0]:,.2f} to {interval[1]:,.2f}" if interval else NOTHING,
        NOTHING if loss is None else f"{loss:.3f}",
    )


def timing(view: ResultsView) -> PageTable | None:
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
    return PageTable("Times of one run", ("quantity", "dense", "pruned", "gain"), tuple(rows))


def remasks(view: ResultsView) -> PageTable | None:
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
    return PageTable("Masks of the generated text", head, tuple(rows))


def layers(view: ResultsView) -> PageTable | None:
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
    return PageTable("Kept neurons per layer", head, tuple(rows))


TITLES = {"mmlu": "MMLU", "general_nlp": "General NLP", "summarization": "Summaries"}


def evaluations(view: ResultsView) -> list[PageTable]:
    """One table per evaluation, a line per task, method and metric."""
    found = []
    for name, rows in view.evaluations:
        table = measure_rows.table(rows)
        found.append(replace(table.html(), caption=f"{TITLES.get(name, name)}: {table.caption}"))
    return found


# The generated texts of the report page: tokens joined by phase, dense first.


PHASES = {
    "prefill": "from the prompt's last forward, dense",
    "observe": "dense, observed to build a mask",
    "pruned": "masks in force",
    "released": "dense again, after the release step",
}
"""Phases of a pruned run's tokens, as the legend words them."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one phase; ``title`` says which."""

    phase: str
    text: str
    title: str


@dataclass(frozen=True)
class TextColumn:
    """One generated text."""

    name: str
    note: str
    spans: tuple[Span, ...]


def prompt_texts(view: ResultsView) -> list[tuple[str, list[TextColumn]]]:
    """Each prompt with its texts: dense first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in view.generations:
        found.setdefault(str(record.get("id")), []).append(record)
    texts = []
    for records in found.values():
        records.sort(key=lambda record: record.get("variant") != "dense")
        texts.append((str(records[0].get("prompt") or ""), [_column(r) for r in records]))
    return texts


def _column(record: Mapping[str, Any]) -> TextColumn:
    dense = record.get("variant") == "dense"
    counted = mapping(record.get("accounting"))
    note = f"{len(record.get('token_ids') or ())} tokens"
    if counted:
        note += (
            f", {words.percent(counted.get('achieved_sparsity'))} of the FFN neurons removed, "
            f"{words.count(int(counted.get('remasks') or 0), 're-mask')}"
        )
    return TextColumn("dense" if dense else words.row_name(record), note, _spans(record, dense))


def _spans(record: Mapping[str, Any], dense: bool) -> tuple[Span, ...]:
    text = str(record.get("text") or "")
    tokens, phases = record.get("tokens") or [], record.get("phases") or []
    fits = len(tokens) == len(phases) and "".join(map(str, tokens)) == text
    if dense or not fits:
        return (Span("", text, ""),)
    spans, start = [], 0
    for phase, group in groupby(zip(phases, tokens, strict=True), key=lambda pair: pair[0]):
        pieces = [str(token) for _, token in group]
        end = start + len(pieces) - 1
        place = f"token {start}" if start == end else f"tokens {start} to {end}"
        known = str(phase) if phase in PHASES else ""
        spans.append(Span(known, "".join(pieces), f"{place}: {PHASES.get(phase, phase)}"))
        start = end + 1
    return tuple(spans)


def phases(prompts: Sequence[tuple[str, Sequence[TextColumn]]]) -> list[tuple[str, str]]:
    """The phases that occur, in order of life, with their words."""
    seen = {span.phase for _, columns in prompts for column in columns for span in column.spans}
    return [(phase, text) for phase, text in PHASES.items() if phase in seen]


# ``report.html``: one self-contained page about a run, built from its results folder.


def write(folder: Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Files that are missing leave their section out; without matplotlib the page has no plots and
    says so.  Raises ``ResultsError`` when the folder does not exist or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder)))
    return path


def render(view: ResultsView) -> str:
    """The page of one folder."""
    return page.render("report.html", _content(view))


def _content(view: ResultsView) -> dict[str, Any]:
    pictures, missing = page.pictures(plots.available(view))
    prompts = prompt_texts(view)
    return {
        "title": run_facts.title(view),
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": run_facts.conclusion(view),
        "facts": run_facts.facts(view),
        "cards": run_facts.cards(view),
        "prompts": prompts,
        "phases": phases(prompts),
        "pictures": {picture.name: picture for picture in pictures},
        "missing": missing,
        "remasks": remasks(view),
        "layers": layers(view),
        "accounting": accounting(view),
        "perplexity": [
            (
                perplexity(document, words.headline(document["rows"], view.method)),
                words.perplexity_sentence(document),
            )
            for document in view.perplexity
        ],
        "evaluations": evaluations(view),
        "evaluation_notes": measure_rows.notes(
            [row for _, rows in view.evaluations for row in rows]
        ),
        "timing": timing(view),
        "timing_words": words.timing_sentence(view.timing),
        "other_times": run_facts.other_times(view.timing),
        "settings": run_facts.settings(view),
        "provenance": run_facts.provenance(view),
        "name": view.name,
    }


# What ends a run on the terminal.


def accounting_table(report: Record, timing: Mapping[str, Any]) -> Table:
    """Accounting of the pruned text, with its speed beside dense."""
    copies = COPIES if report.get("proxy_bytes_share") else ()
    rows = [(label, cell(report)) for label, cell in (*ACCOUNTING, *copies)]
    for variant, seconds in mapping(timing.get("seconds_per_token")).items():
        if seconds:
            rows.append((f"mean time per token, {variant}", f"{1000 * seconds:.1f} ms"))
    if "speed_up" in timing:
        speed = f"{timing['speed_up']:.2f} x ({timing['bytes_limit']:.2f} x)"
        rows.append(("speed-up (one run; bytes allow)", speed))
    columns = (Column("quantity", "quantity"), Column("value", "value"))
    records = [{"quantity": label, "value": text} for label, text in rows]
    return Table("", f"{report['method']}: accounting of the generated text", columns, records)


def report_table(report: Record, timing: Mapping[str, Any]) -> RichTable:
    """The same for the terminal."""
    return accounting_table(report, timing).rich()


def conclusion(accounting: Record | None, documents: Sequence[Record]) -> list[str]:
    """One plain sentence per table."""
    told = [words.bytes_sentence(accounting)] if accounting else []
    return [*told, *(words.perplexity_sentence(document) for document in documents)]
