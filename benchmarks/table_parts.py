"""Rows of those published tables that are not simply the rows of one results file.

A part is a table: ``rows``, and before it a ``caption``; ``columns`` names another set of columns
of the view.  Used by rendering.py, by name from benchmarks/tables.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Part = dict[str, Any]

CLAIMED_SPARSITY = 0.7
STATIC = ("static", "flap")
"""Methods whose neurons are the same for every prompt."""
COMPARED = ("griffin", "published", "dart", "dart-token")
FEW_ALARMS = 2.0
"""False alarms per 1,000 tokens that a best point may have."""


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row with these values."""
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)


def groups(rows: Iterable[Row], *keys: str) -> list[list[Row]]:
    """The rows with equal values of ``keys`` together, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def _done(data: Row, metric: str = "") -> list[Row]:
    rows = [row for row in data["rows"] if row["status"] == "done"]
    return [row for row in rows if metric in ("", row["metric"])]


def evaluation_parts(data: Row) -> list[Part]:
    """A table per task."""
    return [
        {"caption": f"**{rows[0]['task']}**, {rows[0]['items']} items", "rows": rows}
        for rows in groups(_done(data), "task")
    ]


def harness_parts(files: Sequence[Row]) -> list[Part]:
    """The rows of lm-eval's own model and of ours; unpruned ones are dense."""
    dense = {"achieved_sparsity": 0, "dense_token_share": 1, "remasks": 0}
    plain = {"items_differing_from_plain": None}
    rows = [
        {**dense, **plain, **row, "name": name, "data": data, "dtype": data["checkpoint"]["dtype"]}
        for data in files
        for name, row in data["rows"].items()
    ]
    return [{"rows": rows}]


def signal_parts(files: Sequence[Row]) -> list[Part]:
    """What one window of 10 tokens tells, by signal, and the best point of its curves."""
    rows = [
        {
            **(find(data["signals"], signal=signal, window=10) or {}),
            "model": data["checkpoint"]["name"],
            "best": _best_point(data["curves"], signal),
        }
        for data in files
        for signal in dict.fromkeys(curve["signal"] for curve in data["curves"])
    ]
    return [{"rows": rows}]


def _best_point(curves: Iterable[Row], signal: str) -> Row:
    """The threshold of least mean delay among those with few false alarms."""
    points = [
        {**point, "window": curve["window"], "n0": curve["n0"]}
        for curve in curves
        if curve["signal"] == signal
        for point in curve["points"]
        if point["false_alarms_per_1000"] <= FEW_ALARMS
    ]
    return min(points, key=lambda p: (p["delay_with_misses"], p["window"], p["n0"]))


def quality_parts(data: Row) -> Iterator[Part]:
    """A table per model and cell, pooled rows last; then what is pooled over all models."""
    alone = len(data["sparsities"]) == 1  # then pooled rows say again what the others say
    pooled = [] if alone else data["pooled"]
    for rows in groups(data["cells"], "model", "cell"):
        model, cell = rows[0]["model"], rows[0]["cell"]
        own = [row for row in pooled if (row["model"], row["cell"]) == (model, cell)]
        yield {"caption": _quality_caption(data, rows), "rows": [*map(_asked, rows + own)]}
    for rows in groups([row for row in pooled if row["model"] == "all models"], "cell"):
        yield {"caption": f"**all models, {rows[0]['cell']}**", "rows": [*map(_asked, rows)]}


def _asked(row: Row) -> Row:
    if "sparsity" in row:
        return {**row, "asked": f"{100 * row['sparsity']:g} %", "cell_row": True}
    shares = " + ".join(f"{100 * share:g}" for share in row["sparsities"])
    return {**row, "asked": f"pooled {shares} %", "cell_row": False}


def _quality_caption(data: Row, rows: Sequence[Row]) -> str:
    first = rows[0]
    facts = data["checkpoints"].get(first["model"], {})
    lead = f" + {data['lead_tokens']} of the first topic" if first["cell"] == "topic-shift" else ""
    return (
        f"**{first['model']} (file quantisation {facts.get('file_quantisation') or 'none'}, "
        f"{facts.get('dtype')}), {first['cell']}: {first['slices']} slices of "
        f"{', '.join(first['kinds'])}, set {data['set']}; {data['prompt_tokens']} prompt{lead} + "
        f"{data['tokens']} scored tokens; dense perplexity {first['dense_perplexity']:.1f}**"
    )


def speed_parts(data: Row) -> Iterator[Part]:
    """Rows, costs and notes of every run."""
    for run in data["runs"]:
        facts, machine = run["checkpoint"], run["machine"]
        sittings = f", in {run['sittings']} sittings" if run["sittings"] > 1 else ""
        held = f", weights {facts['weights']}" if facts.get("weights") else ""
        yield {
            "caption": (
                f"**{facts['name']} (file quantisation {facts['file_quantisation'] or 'none'}, "
                f"{facts['dtype']}{held})**: {run['prompt_tokens']} prompt + {run['tokens']} timed "
                f"tokens, {run['repeats']} repetitions in shuffled order{sittings}; "
                f"{machine['processor']}, {machine['threads']} threads, device "
                f"{machine['device']}, torch {run['versions']['torch']}, kernels "
                f"{run['kernels'] or 'none'}; it reads "
                f"{run['read_bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s; "
                f"f = {run['ffn_share_of_bytes_read']:.3f} at a mean context of "
                f"{run['mean_context']:.0f} tokens."
            ),
            "rows": run["rows"],
        }
        yield {"rows": run.get("costs"), "columns": "costs"}
        yield {"caption": "\n\n".join(f"{note}." for note in run["notes"])}


def _model(data: Row) -> str:
    return str(data["checkpoint_of_the_cells"]["name"])


def accuracy_parts(files: Sequence[Row]) -> Iterator[Part]:
    """Accuracies at the claim's sparsity, and how the comparisons with GRIFFIN came out."""
    rows = [
        {**row, "model": _model(data), "short_task": row["task"].removesuffix("_local")}
        for data in files
        for row in _done(data, "acc")
        if row["asked"] in (0, CLAIMED_SPARSITY) and row["method"] not in STATIC
    ]
    compared = [row["to_griffin"] for row in rows if row["asked"] and row["to_griffin"]]
    clear = [found["estimate"] > 0 for found in compared if found["significant"]]
    yield {"rows": rows}
    yield {
        "caption": (
            f"{len(compared)} comparisons with GRIFFIN at {CLAIMED_SPARSITY:.0%}: {sum(clear)} "
            f"better, {len(clear) - sum(clear)} worse, {len(compared) - len(clear)} open."
        )
    }


def rouge_parts(files: Sequence[Row]) -> Iterator[Part]:
    """ROUGE-L of summaries, as multiples of the static methods' and of the dense model's."""
    rows, notes = [], []
    for data in files:
        own = [r for r in _done(data, "rougeL") if r["asked"] in (0, 0.5, CLAIMED_SPARSITY)]
        value = {(row["method"], row["asked"]): row["value"] for row in own}
        for row in own:
            others = {name: value.get((name, row["asked"])) for name in STATIC}
            others["dense"] = value["dense", 0]
            rows.append({**row, "model": _model(data)})
            rows[-1]["method"] += f" at {row['asked']:.0%}" if row["asked"] else ""
            for name, other in others.items():
                rows[-1][f"times_{name}"] = f"{row['value'] / other:.2f}" if other else "–"
        cut = sum("cut at" in note for row in own for note in row["notes"])
        notes.append(f"{_model(data)}: {own[0]['items']} documents ({cut} of {len(own)} rows note "
                     "cut summaries)")  # fmt: skip
    yield {"rows": rows}
    file = _done(files[0], "rougeL")[0]["task"].partition(":")[2]
    yield {"caption": f"{'; '.join(notes)}; file {file}."}


def _eight_billion(files: Sequence[Row]) -> str:
    return f"shapes of Llama-3.1-8B, prompt of {files[0]['prompt_tokens']} tokens"


def _name(facts: Row) -> str:
    return f"{facts['name']} (file {facts['file_quantisation']}, {facts['dtype']})"


def _at_half(quality: Row) -> Iterator[tuple[Row, list[Row]]]:
    for model, facts in quality["checkpoints"].items():
        own = [r for r in quality["cells"] if (r["model"], r["sparsity"]) == (model, 0.5)]
        yield facts, own


def memory_parts(files: Sequence[Row]) -> list[Part]:
    """What tracing holds, counted at the 8B model's shapes and measured on small models."""
    from dart_llm.pruning.config import PruneConfig

    *counted, quality = files
    shapes, where = counted[0]["shapes"], _eight_billion(counted)
    rows = []
    for data in counted:
        held = max(data["bytes_while_observing"], data["bytes_while_pruned"]) / 1e6
        name = data.get("renamed", {}).get(data["method"], data["method"])
        rows.append({"model": where, "method": name, "held": f"{held:.1f}", "how": "counted"})
    rank = PruneConfig.build("dart", sparsity=0.5).compensation_rank
    products = 2 * 4 * rank * shapes["width"] * shapes["layers"] / 1e6
    how = "2 x 4 bytes x rank x width x layers: its products and their prior"
    rows.append({"model": where, "method": "dart", "held": f"over {products:.0f}", "how": how})
    for facts, own in _at_half(quality):
        base = (find(own, variant="griffin") or {})["extra_memory_bytes"]
        for method in ("dart-prompt", "dart"):
            more = ((find(own, variant=method) or {})["extra_memory_bytes"] - base) / 1e6
            rows.append({"model": _name(facts), "method": method, "held": f"{more:.1f}",
                         "how": "measured, beyond GRIFFIN's"})  # fmt: skip
    return [{"rows": rows}]


def flops_parts(files: Sequence[Row]) -> list[Part]:
    """FLOPs that tracing adds."""
    *counted, quality = files
    rows = [
        {
            "model": f"{_eight_billion(counted)}, counted",
            "method": data.get("renamed", {}).get(data["method"], data["method"]),
            "share": f"{data['share_per_256_tokens_with_one_remask_of_32']:.4%}",
            "what": "a dense model's, 256 tokens, one re-mask from 32",
        }
        for data in counted
    ]
    for facts, own in _at_half(quality):
        for row in own:
            achieved = row["achieved_sparsity"]
            added = row["ffn_flops_share"] - (1 - achieved)
            what = f"the dense FFN's, {quality['tokens']} tokens, at {achieved:.1%}"
            rows.append({"model": _name(facts), "method": row["variant"], "share": f"{added:.3%}",
                         "what": what})  # fmt: skip
    return [{"rows": rows}]


def front_parts(files: Sequence[Row]) -> Iterator[Part]:
    """Dense, per-token selection and one mask per text, each over the dense row of its own run."""
    tuned, (run, *_), quality = files[0], files[1]["runs"], files[2]
    theirs = tuned["reference_rows"][0]["ms"]
    base = next(row for row in tuned["rows"] if row["row"] == tuned["base"])
    chosen = {
        base["row"]: "dense, the file's blocks",
        "dart-token 30 %, weights file": "every token selects: `dart-token`, 30 %",
    }
    rows: list[Part] = [
        {
            **row,
            "label": chosen[row["row"]],
            "llama_cpp": row["times_dense"] * theirs / base["ms"],
            "bytes": row["bytes_share"] / base["bytes_share"],
            "perplexity": 1 + row["loss"],
        }
        for row in tuned["rows"]
        if row["row"] in chosen
    ]
    timed = {row["row"]: row for row in run["rows"]}
    masked, dense = timed["griffin 50 %, slim, file"], timed["dense, slim, file"]
    scored = next(row for row in _done(quality, "perplexity") if row["label"] == "griffin@0.5")
    ratio = min(masked["times_own_dense"], masked["limit"])
    rows.append(
        {
            **masked,
            "label": "one mask for the text: `griffin`, 50 %",
            "times_dense": ratio,
            "llama_cpp": ratio * timed["llama.cpp Q4_1"]["tg_ms"] / dense["tg_ms"],
            "bytes": masked["bytes_per_token"] / dense["bytes_per_token"],
            "perplexity": scored["to_dense"]["estimate"],
        }
    )
    yield {"rows": rows}


def methods_parts(files: Sequence[Row]) -> Iterator[Part]:
    """Perplexity and time of the methods side by side, and what a reader needs beside them."""
    quality, (run, *_) = files[0], files[1]["runs"]
    scored = [row for row in _done(quality) if row["task"].startswith("perplexity")]
    timed = {row["row"]: row for row in run["rows"]}
    keys = [("dense", 0.0), ("dense-8bit", 0.0)]
    keys += [(name, sparsity) for name in COMPARED for sparsity in (0.3, 0.5, 0.7)]
    rows = []
    for name, asked in keys:
        row = next(r for r in scored if (r["method"], r["asked"] or 0.0) == (name, asked))
        label = f"{name} {asked:.0%}" if asked else name
        case = f"{name} {100 * asked:g} %, slim" if asked else run["own_dense"]
        time = None if name == "dense-8bit" else timed[case]
        rows.append({**row, "label": label, "timed": time})
    yield {"rows": rows}


def graded_parts(data: Row) -> Iterator[Part]:
    """A table for each model, on and off the grid that its file was dequantised from."""
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in data["rows"]):
        rows = [r for r in data["rows"] if (r["model"], r["form"]) == (model, form)]
        where = "off that grid (pairs of channels turned)" if form == "mixed" else "as it is"
        caption = f"**{model}**, dequantised from {data['grids'][model]}, {where}"
        yield {"caption": caption, "rows": rows}


PARTS = {
    f.__name__: f
    for f in (evaluation_parts, harness_parts, signal_parts, quality_parts, speed_parts,
              accuracy_parts, rouge_parts, memory_parts, flops_parts, front_parts,
              methods_parts, graded_parts, find, groups)
}  # fmt: skip
