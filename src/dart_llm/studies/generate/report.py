"""Tables, texts by phase and page of one run: numbers in, words and columns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from dart_llm.experiments import stats
from dart_llm.experiments.stats import ADVICE
from dart_llm.experiments.store import mapping, number
from dart_llm.files import write_text
from dart_llm.reporting import page, words
from dart_llm.reporting.table import Column, Record, Table, bytes_text
from dart_llm.reporting.words import percent
from dart_llm.studies.generate import plots
from dart_llm.studies.generate.pace import DENSE, PRUNED

# The accounting of a pruned text.


def _sparsity_text(sparsity: float | None) -> str:
    return "set by the method" if sparsity is None else percent(sparsity)


def _removed(accounting: Record) -> str:
    requested = _sparsity_text(accounting.get("requested_sparsity"))
    return f"{percent(accounting.get('achieved_sparsity'))} ({requested})"


def _bytes_read(accounting: Record) -> str | None:
    limit = accounting.get("bytes_limit")
    if limit is None:
        return None
    if accounting.get("executor") == "masked":
        return "1.00 (masking skips no work)"
    return f"{1 / limit:.2f} ({limit:.2f} x)"


ACCOUNTING = (
    Column("FFN neurons removed (requested)", _removed),
    Column("decoded tokens that ran dense", "dense_token_share", percent),
    Column("re-masks", "remasks", ","),
    Column("weight bytes over dense (bandwidth limit)", _bytes_read),
    Column("extra memory", "extra_memory_bytes", bytes_text),
)
"""Lines of the table; generation.jsonl has all numbers."""


def accounting_table(accountings: Mapping[str, Record], timing: Mapping[str, Any]) -> Table:
    """Accounting of a pruned text, with its time beside dense.

    ``accountings``: one, by the name under which ``timing`` has the text.
    """
    ((name, accounting),) = accountings.items()
    rows = [{"quantity": line.head, "value": line.cell(accounting)} for line in ACCOUNTING]
    each = mapping(timing.get("seconds_per_token"))
    if seconds := each.get(name):
        dense = each.get(DENSE)
        beside = f" (dense{_dense_by(timing)} {1000 * dense:.1f} ms)" if dense else ""
        value = f"{1000 * seconds:.1f} ms{stats.pace(timing)}"
        rows.append({"quantity": f"time per token{beside}", "value": value})
    caption = f"{accounting['method']}: accounting of the generated text"
    return Table("", caption, (Column("quantity", "quantity"), Column("value", "value")), rows)


def _dense_by(timing: Mapping[str, Any]) -> str:
    """What decoded the dense text: " by our kernels", " by transformers", or "" if unknown."""
    name = timing.get("dense_by")
    return f" by {name}" if name else ""


SETTINGS = (
    Column("setting", words.row_name, needed=True),
    Column("removed", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks", ","),
    Column("bytes over dense", _bytes_read),
    Column("ms per token", "seconds", lambda v: f"{1000 * v:,.1f}"),
    Column("x dense", "over_dense", needed=True),
)


def settings_table(runs: Sequence[tuple[Record | None, Mapping[str, Any]]]) -> Table:
    """Accounting and time of several settings of one prompt; ``runs``: accounting, timing."""
    rows = []
    for accounting, timing in runs:
        if accounting is not None:
            seconds = mapping(timing.get("seconds_per_token")).get(PRUNED)
            sparsity = accounting.get("requested_sparsity")
            more = {"sparsity": sparsity, "seconds": seconds, "over_dense": _ratio(timing)}
            rows.append({**accounting, **more})
    return Table("", "The same prompt with every setting", SETTINGS, rows)


# The time of a token, and perplexity.

PACE = (
    Column("decoding", "name"),
    Column("ms to the first token", "first", lambda v: f"{1000 * v:,.0f}", terminal=False),
    Column("ms per token", "seconds", lambda v: f"{1000 * v:,.1f}", needed=True),
    Column("tokens per second", "seconds", lambda v: f"{1 / v:,.1f}"),
    Column("x transformers", "over_transformers"),
    Column("x dense", "over_dense", needed=True),
    Column("bandwidth limit", "limit", lambda v: f"{v:.2f} x", terminal=False),
    Column("MB read per token", "bytes", lambda v: f"{v / 1e6:,.1f}"),
)


def pace_table(timing: Mapping[str, Any]) -> Table:
    """The time of a token here, dense and pruned, and elsewhere, the slowest first."""
    firsts, sizes, over = (
        mapping(timing.get(key))
        for key in ("time_to_first_token_s", "weight_bytes_per_token", "over_transformers")
    )
    each = {n: v for n, v in mapping(timing.get("seconds_per_token")).items() if number(v)}
    rows = [
        {
            "name": name,
            "first": firsts.get(name),
            "seconds": seconds,
            "over_transformers": _ratio(mapping(over.get(name))),
            "over_dense": _ratio(timing) if name == PRUNED else None,
            "limit": timing.get("bytes_limit") if name == PRUNED else None,
            "bytes": sizes.get(name),
        }
        for name, seconds in sorted(each.items(), key=lambda item: -item[1])
    ]
    columns = tuple(column for column in PACE if over or column.value != "over_transformers")
    repetitions = mapping(timing.get("repetitions")).values()
    most = max((len(seconds) for seconds in repetitions), default=0)
    caption = "Time per decoded token"
    return Table("", f"{caption}, median of {most} repetitions" if most else caption, columns, rows)


def _ratio(judged: Mapping[str, Any]) -> str | None:
    """A ratio as ``SpeedUp.to_dict`` has it, in words."""
    if judged.get("disturbed"):
        return "disturbed"
    ratio = number(judged.get("speed_up"))
    return None if ratio is None else f"{ratio:.2f}"


def _interval(row: Record) -> str | None:
    """Of the ratio to dense; or why there is none."""
    if ends := row.get("interval"):
        return f"{ends[0]:,.2f} to {ends[1]:,.2f}"
    return None if row.get("method") == DENSE else row.get("no_interval")


PERPLEXITY = (
    Column("method", "name"),
    Column("requested", lambda row: _sparsity_text(row.get("sparsity"))),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks"),
    Column(
        "perplexity",
        "perplexity",
        lambda v: f"{v:,.2f}" if v < 1e5 else words.figure(v),
        needed=True,
    ),
    Column("x dense", "ratio_to_dense", ",.2f", needed=True),
    Column("x dense, 95 % (paired)", _interval, needed=True),
    Column("mean loss (nats)", "mean_loss", ".3f", terminal=False),
)

UNTOUCHED = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0}


def perplexity_table(document: Record) -> Table:
    """The rows of perplexity.json: achieved sparsity, dense share and re-masks beside each."""
    rows = []
    for row in document["rows"]:
        counted = UNTOUCHED if row.get("method") == DENSE else mapping(row.get("accounting"))
        name = f"{row.get('method', 'unknown')}{words.mostly_dense(row.get('accounting'))}"
        rows.append({**counted, **row, "name": name})
    caption = (
        f"{document.get('text', 'text')}: {document.get('slices', '?')} slices of "
        f"{document.get('prompt_tokens', '?')} prompt + {document.get('scored_tokens', '?')} "
        f"scored tokens, protocol {document.get('protocol', 'not known')}"
    )
    return Table("", caption, PERPLEXITY, rows)


# The generated texts of the page: tokens joined by phase, dense first.

PHASES = {
    "prefill": "from the prompt's last forward, dense",
    "observe": "dense, observed to build a mask",
    "pruned": "masks in force",
    "released": "dense again, after the release step",
}
"""Phases of a pruned run's tokens, as the legend words them."""

Text = dict[str, Any]
"""``name``, ``note`` and ``spans``: consecutive tokens with their ``phase`` and ``title``."""


def page_text(record: Record) -> Text:
    """A line of generation.jsonl as a column of the page."""
    dense = record.get("variant") == DENSE
    counted = mapping(record.get("accounting"))
    note = f"{len(record.get('token_ids') or ())} tokens"
    if counted:
        note += (
            f", {percent(counted.get('achieved_sparsity'))} of the FFN neurons removed, "
            f"{words.count(int(counted.get('remasks') or 0), 're-mask')}"
        )
    return {"name": words.row_name(record), "note": note, "spans": _spans(record, dense)}


def _spans(record: Record, dense: bool) -> list[dict[str, str]]:
    text = str(record.get("text") or "")
    tokens, phases = record.get("tokens") or [], record.get("phases") or []
    fits = len(tokens) == len(phases) and "".join(map(str, tokens)) == text
    if dense or not fits:
        return [{"phase": "", "text": text, "title": ""}]
    spans, start = [], 0
    for phase, group in groupby(zip(phases, tokens, strict=True), key=lambda pair: pair[0]):
        pieces = [str(token) for _, token in group]
        end = start + len(pieces) - 1
        numbers = f"token {start}" if start == end else f"tokens {start} to {end}"
        title = f"{numbers}: {PHASES.get(phase, phase)}"
        css = str(phase) if phase in PHASES else ""
        spans.append({"phase": css, "text": "".join(pieces), "title": title})
        start = end + 1
    return spans


def phases(texts: Sequence[Text]) -> list[tuple[str, str]]:
    """The phases that occur, in order of life, with their words."""
    seen = {span["phase"] for text in texts for span in text["spans"]}
    return [(phase, text) for phase, text in PHASES.items() if phase in seen]


# ``report.html``: one self-contained page about a run.


def write(folder: Path, view: plots.RunView) -> Path:
    """Write ``report.html`` into ``folder``; without matplotlib it has no plots and says so."""
    path = folder / "report.html"
    write_text(path, render(view))
    return path


def render(view: plots.RunView) -> str:
    """The page of one run."""
    pictures, missing = page.pictures(plots.available(view))
    texts = [page_text(record) for record in view.generations]
    times, counted, document = pace_table(view.timing), view.accounting, view.perplexity
    shown = [one for one in times.columns if any(one.raw(row) is not None for row in times.rows)]
    content = {
        "title": title(view),
        "conclusion": words.bytes_sentence(counted) if counted else "Nothing was pruned.",
        "facts": facts(view),
        "cards": cards(view),
        "prompt": view.generations[0]["prompt"] if texts else "",
        "texts": texts,
        "phases": phases(texts),
        "pictures": {picture.name: picture for picture in pictures},
        "missing": missing,
        "accounting": accounting_table({PRUNED: counted}, {}).html() if counted else None,
        "perplexity": perplexity_table(document).html() if document else None,
        "timing": replace(times, columns=tuple(shown)).html() if times.rows else None,
        "other_times": other_times(view.timing),
    }
    return page.render(view.config, "report.html", content)


def _rows(view: plots.RunView) -> Sequence[Record]:
    """The rows of perplexity.json."""
    return view.perplexity["rows"] if view.perplexity else []


def title(view: plots.RunView) -> str:
    """Method, requested sparsity and model."""
    name = page.model_name(view.config)
    if view.method == DENSE:
        return f"Dense on {name}"
    amount = "" if view.requested is None else f" at {percent(view.requested)}"
    return f"{view.method}{amount} on {name}"


def facts(view: plots.RunView) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""
    found = [("method", view.method, False)]
    if view.requested is not None:
        found.append(("requested sparsity", percent(view.requested), False))
    if view.accounting:
        found.append(("achieved sparsity", percent(view.accounting["achieved_sparsity"]), False))
    return [*found, *page.facts(view.config)]


def cards(view: plots.RunView) -> list[tuple[str, str, str]]:
    """The figures that head the page: value, what it is, and a note."""
    found, counted, rows = [], view.accounting, _rows(view)
    if counted:
        note = "in the generated text"
        note += "" if view.requested is None else f"; {percent(view.requested)} requested"
        removed = percent(counted["achieved_sparsity"])
        found.append((removed, "of the FFN neurons removed", note))
    row = next((row for row in rows if row["method"] == view.method), None)
    over = None if row is None else row["ratio_to_dense"]
    if view.perplexity and row is not None and over is not None:
        note = f"{words.row_name(row)}, text {view.perplexity['text']}"
        found.append((f"x {words.times(over)}", "perplexity over dense", note))
    found += _speed_card(view.timing)
    if counted:
        remasks = words.count(counted["remasks"], "re-mask")
        share = percent(counted["dense_token_share"])
        found.append((share, "of the decoded tokens ran dense", remasks))
    return found


def _speed_card(timing: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    what = f"speed of decoding over dense{_dense_by(timing)}"
    if timing.get("disturbed"):
        return [("disturbed", what, ADVICE)]
    speed, limit = timing.get("speed_up"), timing.get("bytes_limit")
    if speed is None:
        return []
    return [(f"{speed:.2f} x", what, "" if limit is None else f"bandwidth limit {limit:.2f} x")]


def other_times(timing: Mapping[str, Any]) -> str:
    """What loading and the whole run took, and the memory, as one sentence."""
    parts = [f"loading took {timing['load_s']:,.1f} s, the whole run {timing['total_s']:,.1f} s"]
    if peak := timing.get("peak_memory_bytes"):
        parts.append(f"peak memory {bytes_text(peak)}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


# What ends a demo on the terminal.

MARK = "»"
"""Stands before the first word that differs."""

NARROWEST = 24
"""Characters of a column of text, at least."""


def side_by_side(generations: Mapping[str, Record], width: int) -> list[Table]:
    """The dense and the pruned text, and the first word in which they differ.

    Nothing without a pruned text, and where ``width`` characters are too few for two columns.
    """
    if PRUNED not in generations or width < 2 * NARROWEST:
        return []
    dense, pruned = (str(generations[name]["text"]).split() for name in (DENSE, PRUNED))
    pairs = enumerate(zip(dense, pruned, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(dense), len(pruned)))
    caption = f"The same text, all {words.count(same, 'word')}"
    shown = " ".join(pruned)
    if dense != pruned:
        caption = f"The same for {words.count(same, 'word')}, then different ({MARK})"
        shown = " ".join([*pruned[:same], MARK + " ".join(pruned[same:])])
    row = {DENSE: " ".join(dense), PRUNED: shown}
    columns = [Column(words.row_name(generations[name]), name) for name in row]
    return [Table("", caption, tuple(columns), [row], left=2)]


def verdict(
    timing: Mapping[str, Any], over_dense: float | None, accounting: Record, is_default: bool
) -> str:
    """Whether to prune this model so, and how to find out for others: one sentence.

    ``over_dense``: perplexity over dense, if it was measured.
    """
    limit = float(accounting["bytes_limit"])
    speed_up = number(timing.get("speed_up"))
    gain = (limit if speed_up is None else speed_up) - 1
    most = " at most" if speed_up is None else ""
    elsewhere = "on yours run" if is_default else "other settings are measured by"
    if gain < words.WORTH:
        gained = f"gains {percent(gain, 0)}{most}" if gain >= 0.005 else "is not faster"
        result = f"On this model pruning {gained}: use it dense"
    else:
        setting = {
            "method": accounting["method"],
            "sparsity": accounting["requested_sparsity"],
        }
        result = f"On this model {words.row_name(setting)} gains {percent(gain, 0)}{most}"
        result += f" and multiplies perplexity by {words.times(over_dense)}" if over_dense else ""
    return f"{result}; {elsewhere} dart-llm tune --quick."
