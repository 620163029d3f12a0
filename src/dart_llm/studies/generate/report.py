"""Tables, texts by phase and page of one run.

The tables of the report page: numbers in, words and columns out; no markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm.evaluation.task_names import short
from dart_llm.experiments import run_facts
from dart_llm.experiments.store import ResultsView, mapping, number, read
from dart_llm.files import write_text
from dart_llm.reporting import page, words
from dart_llm.reporting import words as sentences
from dart_llm.reporting.table import NOTHING, PageTable, Record, bytes_text
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


# The evaluations of a run on its report page: one table each.


TITLES = {"mmlu": "MMLU", "general_nlp": "General NLP", "summarization": "Summaries"}

HEAD = ("task", "method", "metric", "value", "items", "achieved", "dense tokens", "re-masks")


def tables(view: ResultsView) -> list[PageTable]:
    """One table per evaluation, a line per task, method and metric."""
    found = []
    for name, rows in view.evaluations:
        lines = tuple(line for row in rows for line in _lines(row))
        protocol = mapping(rows[0]["measurement"]).get("protocol", "unknown")
        found.append(PageTable(f"{TITLES.get(name, name)}, protocol {protocol}", HEAD, lines))
    return found


def notes(view: ResultsView) -> list[str]:
    """What a reader of the numbers must know, each once."""
    every = [
        str(note)
        for _, rows in view.evaluations
        for row in rows
        for note in mapping(row["measurement"]).get("notes") or ()
    ]
    return list(dict.fromkeys(every))


def _lines(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    measured = mapping(row["measurement"])
    account = measured.get("accounting")
    own = mapping(account)
    for metric, value in mapping(measured.get("metrics")).items():
        amount = number(value)
        yield (
            short(str(measured.get("task", "unknown"))),
            str(row.get("label", "unknown")),
            str(metric),
            NOTHING if amount is None else f"{amount:.4g}",
            str(len(measured.get("items") or ())),
            _share_words(own.get("achieved_sparsity"), 0.0 if account is None else None),
            _share_words(own.get("dense_token_share"), 1.0 if account is None else None),
            str(own.get("remasks", 0)),
        )


def _share_words(value: Any, default: float | None) -> str:
    known = number(value)
    share = default if known is None else known
    return NOTHING if share is None else percent(share)


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
class Column:
    """One generated text."""

    name: str
    note: str
    spans: tuple[Span, ...]


def prompt_texts(view: ResultsView) -> list[tuple[str, list[Column]]]:
    """Each prompt with its texts: dense first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in view.generations:
        found.setdefault(str(record.get("id")), []).append(record)
    texts = []
    for records in found.values():
        records.sort(key=lambda record: record.get("variant") != "dense")
        texts.append((str(records[0].get("prompt") or ""), [_column(r) for r in records]))
    return texts


def _column(record: Mapping[str, Any]) -> Column:
    dense = record.get("variant") == "dense"
    counted = mapping(record.get("accounting"))
    note = f"{len(record.get('token_ids') or ())} tokens"
    if counted:
        note += (
            f", {sentences.percent(counted.get('achieved_sparsity'))} of the FFN neurons removed, "
            f"{sentences.count(int(counted.get('remasks') or 0), 're-mask')}"
        )
    return Column("dense" if dense else sentences.row_name(record), note, _spans(record, dense))


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


def phases(prompts: Sequence[tuple[str, Sequence[Column]]]) -> list[tuple[str, str]]:
    """The phases that occur, in order of life, with their words."""
    seen = {span.phase for _, columns in prompts for column in columns for span in column.spans}
    return [(phase, words) for phase, words in PHASES.items() if phase in seen]


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
        "evaluations": tables(view),
        "evaluation_notes": notes(view),
        "timing": timing(view),
        "timing_words": words.timing_sentence(view.timing),
        "other_times": run_facts.other_times(view.timing),
        "settings": run_facts.settings(view),
        "provenance": run_facts.provenance(view),
        "name": view.name,
    }


# The tables that end a job, each followed by one plain sentence.


def report_table(report: dict[str, Any], timing: dict[str, Any]) -> Table:
    """Accounting of the pruned generation, with its speed beside dense."""
    table = Table(
        title=f"{report['method']}: accounting of the generated text", title_justify="left"
    )
    table.add_column("quantity")
    table.add_column("value", justify="right")
    asked = report["requested_sparsity"]
    causes = ", ".join(f"{cause} {count}" for cause, count in report["remask_causes"].items())
    rows = [
        ("sparsity asked for", "set by the table" if asked is None else f"{asked:.1%}"),
        ("achieved sparsity (dense tokens count 0)", f"{report['achieved_sparsity']:.1%}"),
        ("sparsity while pruned", f"{report['sparsity_while_pruned']:.1%}"),
        ("decoded tokens", str(report["decoded_tokens"])),
        ("of them dense", f"{report['dense_token_share']:.1%}"),
        ("masks built", causes or "none"),
        ("executor", str(report["executor"])),
        ("FFN bytes per token over dense", f"{report['ffn_bytes_share']:.3f}"),
        ("FFN FLOPs per token over dense", f"{report['ffn_flops_share']:.3f}"),
        ("memory held beside the model", f"{report['extra_memory_bytes'] / 2**20:.1f} MiB"),
    ]
    if report.get("proxy_bytes_share"):
        rows[-1:-1] = [
            ("of the bytes, low-bit copies", f"{report['proxy_bytes_share']:.3f}"),
            ("of the FLOPs, low-bit copies", f"{report['proxy_flops_share']:.3f}"),
        ]
    each = timing.get("seconds_per_token", {})
    for variant in ("dense", "pruned"):
        if each.get(variant):
            rows.append((f"mean time per token, {variant}", f"{1000 * each[variant]:.1f} ms"))
    if "speed_up" in timing:
        rows.append(("speed-up (one run; bytes allow)", _speed(timing)))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _speed(timing: dict[str, Any]) -> str:
    return f"{timing['speed_up']:.2f} x ({timing['bytes_limit']:.2f} x)"


def perplexity_table(document: dict[str, Any]) -> Table:
    """Perplexity of every method on the same slices or windows."""
    title = (
        f"perplexity on {document['text']}: {windows(document)}, protocol {document['protocol']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    partly = any(0 < row.get("pruned_tokens", 0) < row["tokens"] for row in document["rows"])
    heads = ["asked", "achieved", "dense tokens", "re-masks", "perplexity", "x dense", "95 %"]
    for name in (*heads, *(("pruned tokens only", "x dense there") if partly else ())):
        table.add_column(name, justify="right")
    for row in document["rows"]:
        report = row["accounting"]
        interval = row["interval"]
        asked = row["sparsity"]
        table.add_row(
            row["method"],
            "table" if asked is None else f"{asked:.0%}",
            f"{report['achieved_sparsity']:.1%}" if report else "0.0%",
            f"{report['dense_token_share']:.1%}" if report else "100.0%",
            str(report["remasks"]) if report else "0",
            f"{row['perplexity']:.2f}",
            f"{row['ratio_to_dense']:.2f}",
            f"{interval[0]:.2f}-{interval[1]:.2f}" if interval else "",
            *(_where_pruned(row) if partly else ()),
        )
    return table


def windows(document: dict[str, Any]) -> str:
    """Which tokens of the text a perplexity document speaks of."""
    if "window" in document:
        stride = document["stride"]
        return f"{document['slices']} windows of {document['window']} tokens, stride {stride}"
    return (
        f"{document['slices']} slices of {document['prompt_tokens']} prompt + "
        f"{document['scored_tokens']} scored tokens"
    )


def _where_pruned(row: dict[str, Any]) -> tuple[str, str]:
    """Perplexity over the tokens that ran pruned, and over dense on the same tokens."""
    own, dense = row["perplexity_pruned_tokens"], row["dense_perplexity_pruned_tokens"]
    return ("", "") if own is None else (f"{own:.2f}", f"{own / dense:.2f}")


def conclusion(accounting: dict[str, Any] | None, documents: Sequence[dict[str, Any]]) -> list[str]:
    """One plain sentence per table."""
    from dart_llm.reporting import words

    found = []
    if accounting:
        found.append(words.bytes_sentence(accounting))
    for document in documents:
        found.append(words.perplexity_sentence(document))
    return found
