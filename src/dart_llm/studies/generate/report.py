"""Tables, page and verdict of a run; ``experiments.line_plots`` draws similarity over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.experiments import line_plots
from dart_llm.experiments.store import mapping, number
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import page, words
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Column, Record, Table, bytes_text
from dart_llm.reporting.words import percent

DENSE, PRUNED = "dense", "pruned"
"""The keys of a run's two texts, and of the texts' times."""


@dataclass(frozen=True)
class RunView:
    """The data of a run for plots and page.

    ``config``: config.json.  ``generations``: lines of generation.jsonl.  ``timing``: timing.json.
    ``checks``: windows of the drift detector.  ``perplexity``: a demo's perplexity.json.
    """

    config: Mapping[str, Any]
    generations: Sequence[Record]
    timing: Mapping[str, Any]
    checks: Sequence[DriftCheck] = ()
    perplexity: Mapping[str, Any] | None = None

    @property
    def accounting(self) -> Mapping[str, Any]:
        """Accounting of the pruned text; empty without a pruned text."""
        return next((text["accounting"] for text in self.generations if text["accounting"]), {})


def pictures(view: RunView) -> list[Plot]:
    """The plot of similarity over time, if the method has a drift detector."""
    sequences = view.accounting.get("sequences", ())
    masks = [remask for sequence in sequences for remask in sequence["remasks"]]
    small_print = page.small_print(view.config)
    similarity = line_plots.plot_similarity(view.checks, masks, small_print)
    return [] if similarity is None else [similarity]


# Tables: the time and accounting of every decoding, and a demo's perplexities.


def _sparsity_text(sparsity: float | None) -> str:
    return "set by the method" if sparsity is None else percent(sparsity)


RESULTS = (
    Column("decoding", "name"),
    Column("ms to the first token", "first", lambda v: f"{1000 * v:,.0f}", terminal=False),
    Column("ms per token", "seconds", lambda v: f"{1000 * v:,.1f}", needed=True),
    Column("tokens per second", "seconds", lambda v: f"{1 / v:,.1f}", terminal=False),
    Column("x transformers", "over_transformers"),
    Column("x dense", "over_dense", needed=True),
    Column("bandwidth limit", "limit", lambda v: f"{v:.2f} x"),
    Column("MB read per token", "bytes", lambda v: f"{v / 1e6:,.1f}"),
    Column("requested", "requested", terminal=False),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks", ","),
    Column("extra memory", "extra_memory_bytes", bytes_text, terminal=False),
)


def results_table(timing: Mapping[str, Any], accounting: Record | None) -> Table:
    """A row per timing, slowest first: the dense text, the pruned text, and other programs.

    Columns without values are left out; generation.jsonl has all numbers.
    """
    first_times, sizes, speed_ups = (
        mapping(timing.get(key))
        for key in ("time_to_first_token_s", "weight_bytes_per_token", "over_transformers")
    )
    times = {n: v for n, v in mapping(timing.get("seconds_per_token")).items() if number(v)}
    if not times and accounting:  # a single token cannot be timed
        times = {PRUNED: None}
    rows = []
    for name, seconds in sorted(times.items(), key=lambda item: -(item[1] or 0)):
        row = {"name": name, "first": first_times.get(name), "seconds": seconds}
        row |= {"over_transformers": _ratio(mapping(speed_ups.get(name))), "bytes": sizes.get(name)}
        if name == PRUNED and accounting:
            requested = _sparsity_text(accounting["requested_sparsity"])
            row |= {**accounting, "name": f"{accounting['method']} {name}", "requested": requested}
            row |= {"over_dense": _ratio(timing), "limit": timing.get("bytes_limit")}
        rows.append(row)
    columns = [column for column in RESULTS if any(column.raw(row) is not None for row in rows)]
    repetitions = mapping(timing.get("repetitions")).values()
    number_of_repetitions = max((len(seconds) for seconds in repetitions), default=0)
    caption = "Decoding"
    if number_of_repetitions:
        caption += f", median of {number_of_repetitions} repetitions"
    if kernels := timing.get("dense_by"):
        caption += f", dense with {kernels}"
    return Table("", caption, tuple(columns), rows)


def _ratio(judged: Mapping[str, Any]) -> str | None:
    """The speed-up in a ``SpeedUp.to_dict()``, as text; None if there is none."""
    if judged.get("disturbed"):
        return "disturbed"
    ratio = number(judged.get("speed_up"))
    return None if ratio is None else f"{ratio:.2f}"


PERPLEXITY = (
    Column("method", lambda row: f"{row['method']}{words.mostly_dense(row['accounting'])}"),
    Column("requested", lambda row: _sparsity_text(row["sparsity"])),
    Column("achieved", "achieved_sparsity", percent),
    Column("dense tokens", "dense_token_share", percent),
    Column("re-masks", "remasks"),
    Column("perplexity", "perplexity", words.figure, needed=True),
    Column("x dense [95 %, paired]", "ratio_to_dense", ",.2f", interval="interval", needed=True),
)


def perplexity_table(document: Record) -> Table:
    """A table of perplexity.json, with achieved sparsity, dense share and re-masks."""
    rows = [{**mapping(row["accounting"]), **row} for row in document["rows"]]
    caption = (
        f"{document['text']}: {document['slices']} slices of {document['prompt_tokens']} prompt + "
        f"{document['scored_tokens']} scored tokens, protocol {document['protocol']}"
    )
    return Table("", caption, PERPLEXITY, rows)


# ``report.html``: a self-contained page on a run.


def render(view: RunView) -> str:
    """The page of a run."""
    drawn, missing = page.pictures(pictures(view))
    counted, document = view.accounting, view.perplexity
    method = str(counted.get("method") or view.config["prune"]["method"])
    sparsity = counted.get("requested_sparsity", view.config["prune"]["sparsity"])
    name = words.row_name({"method": method, "sparsity": sparsity})
    results = results_table(view.timing, counted)
    memory = f"peak memory {bytes_text(view.timing.get('peak_memory_bytes'))}"
    content = {
        "title": f"{name} on {page.model_name(view.config)}",
        "conclusion": words.bytes_sentence(counted) if counted else "Nothing was pruned.",
        "facts": [("method", method, False), *page.facts(view.config)],
        "prompt": view.generations[0]["prompt"] if view.generations else "",
        "texts": [_page_text(record) for record in view.generations],
        "pictures": {picture.name: picture for picture in drawn},
        "missing": missing,
        "perplexity": perplexity_table(document).html() if document else None,
        "timing": results.html() if results.rows else None,
        "other_times": f"The whole run took {view.timing['total_s']:,.1f} s, {memory}.",
    }
    return page.render(view.config, "report.html", content)


def _page_text(record: Record) -> dict[str, Any]:
    """A line of generation.jsonl as a column of the page."""
    note = f"{len(record.get('token_ids') or ())} tokens"
    return {"name": words.row_name(record), "note": note, "text": str(record.get("text") or "")}


# The end of a demo's terminal output.

MARK = "»"
"""Precedes the first word that differs."""


def side_by_side(generations: Mapping[str, Record], width: int) -> list[Table]:
    """The dense and the pruned text side by side, with a mark at their first difference.

    The list is empty without a pruned text, or if ``width`` characters are too few for two columns.
    """
    if PRUNED not in generations or width < 48:
        return []
    dense, pruned = (str(generations[name]["text"]).split() for name in (DENSE, PRUNED))
    pairs = enumerate(zip(dense, pruned, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(dense), len(pruned)))
    caption = f"Both texts are equal ({words.count(same, 'word')})"
    marked = " ".join(pruned)
    if dense != pruned:
        caption = f"Both texts are equal for {words.count(same, 'word')}, then differ (from {MARK})"
        marked = " ".join([*pruned[:same], MARK + " ".join(pruned[same:])])
    row = {DENSE: " ".join(dense), PRUNED: marked}
    columns = [Column(words.row_name(generations[name]), name) for name in row]
    return [Table("", caption, tuple(columns), [row], left=2)]


def verdict(
    timing: Mapping[str, Any], over_dense: float | None, accounting: Record, is_default: bool
) -> str:
    """A sentence on whether to prune this model in this way, and how to test other settings.

    ``over_dense``: perplexity divided by dense perplexity; None if not measured.
    """
    speed_up = number(timing.get("speed_up"))
    at_most = "at most " if speed_up is None else ""
    gain = (float(accounting["bytes_limit"]) if speed_up is None else speed_up) - 1
    subject = "your model" if is_default else "other settings"
    effect = f"makes decoding {at_most}{percent(gain, 0)} faster"
    if gain < words.WORTH:
        effect = effect if gain >= 0.005 else "does not make decoding faster"
        result = f"On this model pruning {effect}: use it dense"
    else:
        name = words.row_name({**accounting, "sparsity": accounting["requested_sparsity"]})
        result = f"On this model {name} {effect}"
        result += f" and multiplies perplexity by {words.times(over_dense)}" if over_dense else ""
    return f"{result}; to test {subject}, run dart-llm tune --quick."
