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
from dart_llm.reporting.speed_up import ADVICE
from dart_llm.reporting.table import NOTHING, Column, PageTable, Record, Table, bytes_text, grouped
from dart_llm.reporting.words import percent
from dart_llm.studies.generate import plots

ACCOUNTING = (
    Column("FFN neurons removed (asked)", lambda r: f"{_achieved(r)} ({_asked(r)})"),
    Column("decoded tokens that ran dense", "dense_token_share", percent),
    Column("re-masks", "remasks", ","),
    Column("weight bytes over dense (bandwidth limit)", lambda r: _bytes_read(r)),
    Column("extra memory", "extra_memory_bytes", bytes_text),
)
"""Lines of the tables of accounting, whose columns are runs; generation.jsonl has all numbers."""


def _achieved(report: Record) -> str:
    return percent(report.get("achieved_sparsity"))


def _asked(report: Record) -> str:
    return _asked_text(report.get("requested_sparsity"))


def _asked_text(sparsity: float | None) -> str:
    return "set by the method" if sparsity is None else percent(sparsity)


def _bytes_read(report: Record) -> str | None:
    limit = report.get("bytes_limit")
    if limit is None:
        return None
    if report.get("executor") == "masked":
        return "1.00 (masking skips no work)"
    return f"{1 / limit:.2f} ({limit:.2f} x)"


def accounting(view: ResultsView) -> PageTable | None:
    """One column per pruned text, then the rows of the perplexity tables."""
    columns = list(_named(view.accountings).items())
    for document in view.perplexity:
        for row in document["rows"]:
            if row.get("accounting"):
                name = f"{words.row_name(row)} on {document.get('text', 'text')}"
                columns.append((name, mapping(row["accounting"])))
    if not columns:
        return None
    rows = tuple((line.head, *(line.cell(record) for _, record in columns)) for line in ACCOUNTING)
    head = ("quantity", *(name for name, _ in columns))
    return PageTable("Accounting of the decoded tokens", head, rows)


def _named(accountings: Mapping[str, Record]) -> dict[str, Record]:
    """Accountings of generated texts under the heads of their columns."""
    single = len(accountings) == 1
    return {"generated text" if single else _setting(one): one for one in accountings.values()}


PERPLEXITY = (
    Column(
        "method",
        lambda row: f"{row.get('method', 'unknown')}{words.mostly_dense(row.get('accounting'))}",
    ),
    Column("asked", lambda row: _asked_text(row.get("sparsity"))),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks"),
    Column(
        "perplexity",
        "perplexity",
        lambda v: f"{v:,.2f}" if v < 1e5 else words.figure(v),
        needed=True,
    ),
    Column("x dense", "over_dense", ",.2f", needed=True),
    Column("x dense, 95 % (paired)", lambda row: _interval(row), needed=True),
    Column("mean loss (nats)", "mean_loss", ".3f", terminal=False),
)


def _interval(row: Record) -> str | None:
    """Of the ratio to dense; why there is none, where that is known."""
    if ends := row.get("interval"):
        return f"{ends[0]:,.2f} to {ends[1]:,.2f}"
    return None if row.get("method") == "dense" else row.get("no_interval")


def perplexity(document: Record, strong: Record | None) -> PageTable:
    """Achieved sparsity, dense share and re-masks beside every number."""
    marked = next((place for place, row in enumerate(document["rows"]) if row == strong), None)
    return replace(perplexity_table(document), strong=marked).html()


def perplexity_table(document: Record) -> Table:
    """The same for the terminal."""
    rows = []
    for row in document["rows"]:
        counted = mapping(row.get("accounting"))
        if row.get("method") == "dense":
            counted = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}
        over = None if row.get("perplexity") is None else words.ratio(row, document["rows"])
        rows.append({**counted, **row, "over_dense": over})
    return Table("", plots.protocol(document), PERPLEXITY, rows)


PACE = (
    Column("decoding", "name", words.label_text),
    Column("ms to the first token", "first", lambda v: f"{1000 * v:,.0f}", terminal=False),
    Column("ms per token", "seconds", lambda v: f"{1000 * v:,.1f}", needed=True),
    Column("tokens per second", "seconds", lambda v: f"{1 / v:,.1f}"),
    Column("x transformers", "over_transformers"),
    Column("x dense", "over_dense", needed=True),
    Column("bandwidth limit", "limit", lambda v: f"{v:.2f} x", terminal=False),
    Column("MB read per token", "bytes", lambda v: f"{v / 1e6:,.1f}"),
)


def pace(timing: Mapping[str, Any]) -> Table:
    """What a token takes here, dense and pruned, and elsewhere, the slowest first."""
    firsts, sizes = (
        mapping(timing.get(key)) for key in ("time_to_first_token_s", "weight_bytes_per_token")
    )
    over = mapping(timing.get("over_transformers"))
    judged = mapping(timing.get("speed_ups")) or {"pruned": timing}
    each = {n: v for n, v in mapping(timing.get("seconds_per_token")).items() if number(v)}
    rows = [
        {
            "name": name,
            "first": firsts.get(name),
            "seconds": seconds,
            "over_transformers": _ratio(mapping(over.get(name))),
            "over_dense": _ratio(mapping(judged.get(name))),
            "limit": mapping(judged.get(name)).get("bytes_limit"),
            "bytes": sizes.get(name),
        }
        for name, seconds in sorted(each.items(), key=lambda one: -one[1])
    ]
    columns = tuple(one for one in PACE if over or one.value != "over_transformers")
    turns = max((len(one) for one in mapping(timing.get("turns")).values()), default=0)
    caption = f"Time per decoded token, median of {turns} interleaved turns"
    return Table("", caption if turns else "Time per decoded token", columns, rows)


def _ratio(judged: Mapping[str, Any]) -> str | None:
    """A ratio as ``SpeedUp.to_dict`` has it, in words."""
    if judged.get("disturbed"):
        return "disturbed"
    ratio = number(judged.get("speed_up"))
    return None if ratio is None else f"{ratio:.2f}"


def timing(view: ResultsView) -> PageTable | None:
    """The same for the page."""
    table = pace(view.timing)
    shown = [one for one in table.columns if any(one.raw(row) is not None for row in table.rows)]
    return replace(table, columns=tuple(shown)).html() if table.rows else None


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


def accounting_table(accountings: Mapping[str, Record], timing: Mapping[str, Any]) -> Table:
    """Accounting of pruned texts, a column each, with their speed beside dense.

    ``accountings``: by the name under which ``timing`` has the text.
    """
    each, judged = (mapping(timing.get(key)) for key in ("seconds_per_token", "speed_ups"))
    several = len(accountings) > 1
    rows = [
        {"quantity": line.head, **{name: line.cell(one) for name, one in accountings.items()}}
        for line in ACCOUNTING
    ]
    if any(each.get(name) for name in accountings):
        dense = each.get("dense")
        beside = f" (dense{words.dense_by(timing)} {1000 * dense:.1f} ms)" if dense else ""
        took = {
            name: f"{1000 * each[name]:.1f} ms{words.pace(mapping(judged.get(name)), several)}"
            for name in accountings
            if each.get(name)
        }
        rows.append({"quantity": f"time per token{beside}", **took})
    heads = {name: _setting(one) if several else "value" for name, one in accountings.items()}
    columns = [Column(head, name) for name, head in heads.items()]
    method = "" if several else f"{next(iter(accountings.values()))['method']}: "
    caption = f"{method}accounting of the generated text{'s' if several else ''}"
    return Table("", caption, (Column("quantity", "quantity"), *columns), rows)


def _setting(accounting: Record) -> str:
    """Method and sparsity of an accounting."""
    row = {"method": accounting["method"], "sparsity": accounting["requested_sparsity"]}
    return words.row_name(row)


MARK = "»"
"""Stands before the first word that differs."""


NARROWEST = 24
"""Characters of a column of text, at least."""


def side_by_side(generations: Mapping[str, Record], room: int) -> list[Table]:
    """The dense and the pruned texts, and the first word in which a pruned one differs.

    Nothing where ``room`` characters are too few for a column each.
    """
    if room < NARROWEST * len(generations):
        return []
    texts = {name: str(one["text"]).split() for name, one in generations.items()}
    dense, row, told = texts["dense"], dict[str, str](), list[str]()
    for name, text in texts.items():
        same = _shared(dense, text)
        whole = name == "dense" or text == dense
        row[name] = " ".join(text if whole else [*text[:same], MARK + " ".join(text[same:])])
        if name != "dense":
            told.append(
                f"the same text, all {words.count(same, 'word')}"
                if whole
                else f"the same for {words.count(same, 'word')}, then different ({MARK})"
            )
    heads = {name: words.row_name(one) for name, one in generations.items()}
    if len(told) > 1:
        names = list(heads.values())[1:]
        told = [f"{name}: {text}" for name, text in zip(names, told, strict=True)]
    columns = tuple(Column(head, name) for name, head in heads.items())
    caption = "; ".join(told) if len(told) > 1 else told[0][0].upper() + told[0][1:]
    return [Table("", caption, columns, [row], left=len(columns))]


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Words at the beginning that both have."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def conclusion(
    accountings: Mapping[str, Record], documents: Sequence[Record], timing: Mapping[str, Any]
) -> list[str]:
    """One plain sentence per table, of the run's own method where it was measured."""
    told, method = list[str](), None
    if len(accountings) == 1:
        (accounting,) = accountings.values()
        told, method = [words.bytes_sentence(accounting)], accounting["method"]
    elif any(mapping(one).get("disturbed") for one in mapping(timing.get("speed_ups")).values()):
        told = [f"Disturbed: something else used the machine; {ADVICE}."]
    return [*told, *(words.perplexity_sentence(document, method) for document in documents)]


def verdict(
    timing: Mapping[str, Any], documents: Sequence[Record], accounting: Record, is_default: bool
) -> str:
    """Whether to prune this model so, and what answers for others: one sentence."""
    limit = float(accounting["bytes_limit"])
    speed_up = number(timing.get("speed_up"))
    gain = (limit if speed_up is None else speed_up) - 1
    most = " at most" if speed_up is None else ""
    rows = documents[0]["rows"] if documents else []
    row = words.headline(rows, accounting["method"])
    cost = None if row is None else words.ratio(row, rows)
    elsewhere = "on yours run" if is_default else "other settings are measured by"
    if gain < words.WORTH:
        gained = f"gains {percent(gain, 0)}{most}" if gain >= 0.005 else "is not faster"
        told = f"On this model pruning {gained}: use it dense"
    else:
        told = f"On this model {_setting(accounting)} gains {percent(gain, 0)}{most}"
        told += f" and multiplies perplexity by {words.times(cost)}" if cost else ""
    return f"{told}; {elsewhere} dart-llm tune --quick."
