"""Tables, texts by phase and page of one run: numbers in, words and columns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments import run_facts
from dart_llm.experiments.store import ResultsView, mapping, number, read
from dart_llm.files import write_text
from dart_llm.reporting import page, words
from dart_llm.reporting.table import NOTHING, Column, PageTable, Record, Table, bytes_text, grouped
from dart_llm.reporting.words import percent
from dart_llm.studies.generate import plots

ACCOUNTING = (
    Column("sparsity asked for", lambda r: _asked_text(r.get("requested_sparsity"))),
    Column("achieved sparsity (dense tokens count 0)", "achieved_sparsity", percent),
    Column("sparsity while pruned", "sparsity_while_pruned", percent),
    Column("decoded tokens that ran dense", "dense_token_share", percent),
    Column("decoded tokens", "decoded_tokens", ","),
    Column("prompt tokens", "prompt_tokens", ","),
    Column("re-masks", "remasks", ","),
    Column(
        "masks built, by cause",
        lambda r: (
            ", ".join(f"{k} {n}" for k, n in mapping(r.get("remask_causes")).items()) or "none"
        ),
    ),
    Column("executor", "executor"),
    Column("FFN FLOPs over dense, as executed", "ffn_flops_share", ".3f"),
    Column("FFN FLOPs over dense, if compact", "ffn_flops_share_if_compact", ".3f"),
    Column("FFN bytes over dense, as executed", "ffn_bytes_share", ".3f"),
    Column("FFN bytes over dense, if compact", "ffn_bytes_share_if_compact", ".3f"),
    Column("bytes per token over dense at bfloat16", "token_bytes_share", ".3f"),
    Column("FFN share of all weight bytes read", "ffn_share_of_bytes", percent),
    Column("memory held beside the model", "extra_memory_bytes", bytes_text),
)
"""Lines of the tables of accounting, whose columns are runs."""

COPIES = (
    Column("of the FLOPs, to choose neurons", "proxy_flops_share", ".3f"),
    Column("of the bytes, to choose neurons", "proxy_bytes_share", ".3f"),
    Column("relative error of the copies", "proxy_error", ".3f"),
    Column("the same of Gaussian weights", "proxy_error_gaussian", ".3f"),
)
"""Shown where tokens chose their own neurons."""

HEAD = (
    Column("of the output head's bytes", lambda report: _of_head(report, "bytes_share", ".3f")),
    Column("best word kept, of tokens looked at", lambda report: _of_head(report, "same_share")),
    Column("KL against the whole head", lambda report: _of_head(report, "kl", ".4f")),
)
"""Shown where the output head was screened."""


def _of_head(report: Record, key: str, form: str = ".1%") -> str:
    """A number of the head's, "" where it was whole."""
    head = mapping(report.get("head"))
    return format(head[key], form) if head else ""


def _more(reports: Sequence[Record]) -> tuple[Column, ...]:
    """Lines for what only some runs do."""
    copies = any(report.get("proxy_bytes_share") for report in reports)
    screened = any(report.get("head") for report in reports)
    return (*(COPIES if copies else ()), *(HEAD if screened else ()))


def _asked_text(sparsity: float | None) -> str:
    return "set by the method" if sparsity is None else percent(sparsity)


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
    shown = (*ACCOUNTING, *_more([record for _, record in columns]))
    rows = tuple((line.head, *(line.cell(record) for _, record in columns)) for line in shown)
    head = ("quantity", *(name for name, _ in columns))
    return PageTable("Accounting of the decoded tokens", head, rows)


PERPLEXITY = (
    Column("method", lambda row: row.get("method", "unknown")),
    Column("asked", lambda row: _asked_text(row.get("sparsity"))),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks"),
    Column("perplexity", "perplexity", lambda v: f"{v:,.2f}" if v < 1e5 else words.figure(v)),
    Column("x dense", "over_dense", ",.2f"),
    Column("95 % interval", "interval", lambda ends: f"{ends[0]:,.2f} to {ends[1]:,.2f}"),
    Column("mean loss (nats)", "mean_loss", ".3f"),
)


def perplexity(document: Record, strong: Record | None) -> PageTable:
    """Achieved sparsity, dense share and re-masks beside every number."""
    rows = []
    for row in document["rows"]:
        counted = mapping(row.get("accounting"))
        if row.get("method") == "dense":
            counted = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
        over = None if row.get("perplexity") is None else words.ratio(row, document["rows"])
        rows.append({**counted, **row, "over_dense": over})
    marked = next((place for place, row in enumerate(document["rows"]) if row == strong), None)
    return Table("", plots.protocol(document), PERPLEXITY, rows, strong=marked).html()


WEIGHTS_READ = "weights read per token, as stored"


def timing(view: ResultsView) -> PageTable | None:
    """Seconds, tokens per second and bytes, dense beside pruned, and the ratio the bytes allow.

    A last column where llama.cpp was timed.
    """
    kinds = (
        ("time to the first token (ms)", "time_to_first_token_s", 1000.0, False),
        ("time per decoded token, mean (ms)", "seconds_per_token", 1000.0, False),
        ("tokens per second", "tokens_per_second", 1.0, True),
        (f"{WEIGHTS_READ} (MB)", "weight_bytes_per_token", 1e-6, False),
    )
    own = ("dense", "pruned")
    others = [n for n in mapping(view.timing.get("seconds_per_token")) if n not in own]
    rows = []
    for label, key, scale, inverse in kinds:
        each = mapping(view.timing.get(key))
        dense, pruned, *more = (number(each.get(name)) for name in (*own, *others))
        if dense is None and pruned is None:
            continue
        gain = (pruned / dense if inverse else dense / pruned) if dense and pruned else None
        cells = [NOTHING if v is None else f"{scale * v:,.1f}" for v in (dense, pruned, *more)]
        cells.insert(len(own), NOTHING if gain is None else f"{gain:.2f} x")
        rows.append((label, *cells))
    limit = number(view.timing.get("bytes_limit"))
    if rows and limit is not None:
        cells = [NOTHING, NOTHING, f"{limit:.2f} x", *(NOTHING for _ in others)]
        rows.append(("most that the bytes read allow", *cells))
    if not rows:
        return None
    return PageTable("Times of one run", ("quantity", *own, "gain", *others), tuple(rows))


REMASKS = (
    Column("mask", "mask"),
    Column(
        "sequence",
        lambda mask: (
            f"{mask.get('sequence', NOTHING)}"
            + ("" if mask.get("row") is None else f", row {mask['row']}")
        ),
    ),
    Column("from decode step", "step", ","),
    Column("cause", "cause"),
    Column("evidence (tokens)", "evidence_tokens", ",.0f"),
    Column("neurons kept", lambda mask: sum(mask.get("kept") or ()), ","),
    Column("shared with the mask before", "overlap", percent),
)


def remasks(view: ResultsView) -> PageTable | None:
    """Every mask that was built for the generated text, with its cause."""
    rows = [{"mask": place, **mask} for place, mask in enumerate(view.remasks)]
    return Table("", "Masks of the generated text", REMASKS, rows).html() if rows else None


LAYERS = (
    Column("layer", "layer"),
    Column("neurons", "width", ","),
    Column("kept by the first mask", "first", ","),
    Column("by the last", "last", ","),
    Column("share kept at the end", "kept_share", percent),
    Column("removed, mean over decoded tokens", "sparsity_decoded", percent),
)


def layers(view: ResultsView) -> PageTable | None:
    """One row per layer: what the first and the last mask keep, and what was removed."""
    masks = [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(view.layers)]
    rows = []
    for place, layer in enumerate(view.layers):
        first, last = (masks[end]["kept"][place] if masks else None for end in (0, -1))
        rows.append({"layer": place, **layer, "first": first, "last": last})
    return Table("", "Kept neurons per layer", LAYERS, rows).html() if rows else None


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


Text = dict[str, Any]
"""``name``, ``note`` and ``spans``: consecutive tokens with their ``phase`` and ``title``."""


def prompt_texts(view: ResultsView) -> list[tuple[str, list[Text]]]:
    """Each prompt with its texts: dense first."""
    texts = []
    for records in grouped(view.generations, lambda record: str(record.get("id"))).values():
        records.sort(key=lambda record: record.get("variant") != "dense")
        texts.append((str(records[0].get("prompt") or ""), [_column(r) for r in records]))
    return texts


def _column(record: Mapping[str, Any]) -> Text:
    dense = record.get("variant") == "dense"
    counted = mapping(record.get("accounting"))
    note = f"{len(record.get('token_ids') or ())} tokens"
    if counted:
        note += (
            f", {words.percent(counted.get('achieved_sparsity'))} of the FFN neurons removed, "
            f"{words.count(int(counted.get('remasks') or 0), 're-mask')}"
        )
    name = "dense" if dense else words.row_name(record)
    return {"name": name, "note": note, "spans": _spans(record, dense)}


def _spans(record: Mapping[str, Any], dense: bool) -> list[dict[str, str]]:
    text = str(record.get("text") or "")
    tokens, phases = record.get("tokens") or [], record.get("phases") or []
    fits = len(tokens) == len(phases) and "".join(map(str, tokens)) == text
    if dense or not fits:
        return [{"phase": "", "text": text, "title": ""}]
    spans, start = [], 0
    for phase, group in groupby(zip(phases, tokens, strict=True), key=lambda pair: pair[0]):
        pieces = [str(token) for _, token in group]
        end = start + len(pieces) - 1
        place = f"token {start}" if start == end else f"tokens {start} to {end}"
        title = f"{place}: {PHASES.get(phase, phase)}"
        known = str(phase) if phase in PHASES else ""
        spans.append({"phase": known, "text": "".join(pieces), "title": title})
        start = end + 1
    return spans


def phases(prompts: Sequence[tuple[str, Sequence[Text]]]) -> list[tuple[str, str]]:
    """The phases that occur, in order of life, with their words."""
    spans = [span for _, columns in prompts for column in columns for span in column["spans"]]
    seen = {span["phase"] for span in spans}
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
    pictures, missing = page.pictures(plots.available(view))
    prompts = prompt_texts(view)
    content = {
        "title": run_facts.title(view),
        "conclusion": run_facts.conclusion(view),
        "facts": run_facts.facts(view),
        "cards": run_facts.cards(view),
        "prompts": prompts,
        "phases": phases(prompts),
        "pictures": {picture.name: picture for picture in pictures},
        "missing": missing,
        "remasks": remasks(view),
        "layers": None if plots.uniform(view) else layers(view),
        "accounting": accounting(view),
        "perplexity": [
            (
                perplexity(document, words.headline(document["rows"], view.method)),
                words.perplexity_sentence(document, view.method),
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
        "name": view.name,
    }
    return run_facts.render(view, "report.html", content)


# What ends a run on the terminal.


def accounting_table(report: Record, timing: Mapping[str, Any]) -> Table:
    """Accounting of the pruned text, with its speed beside dense."""
    rows = [(line.head, line.cell(report)) for line in (*ACCOUNTING, *_more([report]))]
    for variant, seconds in mapping(timing.get("seconds_per_token")).items():
        if seconds:
            rows.append((f"mean time per token, {variant}", f"{1000 * seconds:.1f} ms"))
    for variant, size in mapping(timing.get("weight_bytes_per_token")).items():
        rows.append((f"{WEIGHTS_READ}, {variant}", f"{size / 1e6:.1f} MB"))
    if "speed_up" in timing:
        speed = f"{timing['speed_up']:.2f} x ({words.allowed(timing)})"
        rows.append((f"speed-up over dense{words.dense_by(timing)} (bytes allow)", speed))
    columns = (Column("quantity", "quantity"), Column("value", "value"))
    records = [{"quantity": label, "value": text} for label, text in rows]
    return Table("", f"{report['method']}: accounting of the generated text", columns, records)


PACE = (
    Column("", "name"),
    Column("ms per token", "seconds", lambda v: f"{1000 * v:.1f}"),
    Column("tokens per second", "seconds", lambda v: f"{1 / v:.0f}"),
    Column("x transformers", "gain", ".2f"),
    Column("weights read per token (MB)", "bytes", lambda v: f"{v / 1e6:.1f}"),
)


def pace(timing: Mapping[str, Any]) -> Table:
    """What a token takes here, dense and pruned, and elsewhere, the slowest first."""
    sizes, each = timing["weight_bytes_per_token"], timing["seconds_per_token"]
    known = sorted(((n, v) for n, v in each.items() if v), key=lambda one: -one[1])
    plain = next((v for name, v in known if name.startswith("transformers")), None)
    rows = [
        {"name": n, "seconds": v, "gain": plain and plain / v, "bytes": sizes.get(n)}
        for n, v in known
    ]
    return Table("", "Mean time per decoded token, one run", PACE, rows)


MARK = "»"
"""Stands before the first word that differs."""


def side_by_side(generations: Mapping[str, Record]) -> Table:
    """The dense and the pruned text, and the first word in which they differ."""
    dense, pruned = generations["dense"], generations["pruned"]
    texts = [str(one["text"]).split() for one in (dense, pruned)]
    same = _shared(*texts)
    if texts[0] == texts[1]:
        told = f"The same text, all {words.count(same, 'word')}"
    else:
        told = f"The same for {words.count(same, 'word')}, then they part ({MARK})"
        texts = [[*one[:same], MARK + " ".join(one[same:])] for one in texts]
    row = {"dense": " ".join(texts[0]), "pruned": " ".join(texts[1])}
    columns = (Column("dense", "dense"), Column(words.row_name(pruned), "pruned"))
    return Table("", told, columns, [row], left=2)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Words at the beginning that both have."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def conclusion(accounting: Record | None, documents: Sequence[Record]) -> list[str]:
    """One plain sentence per table, of the run's own method where it was measured."""
    told = [words.bytes_sentence(accounting)] if accounting else []
    method = accounting["method"] if accounting else None
    return [*told, *(words.perplexity_sentence(document, method) for document in documents)]
