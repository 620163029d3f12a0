"""Blocks of docs/claims.md, made from benchmarks/results; used by check_docs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_head import above, linked, read, table, today

Row = dict[str, Any]

MODELS = ("smollm2", "qwen")
TEN = {
    "boolq": 0,
    "rte": 0,
    "hellaswag": 0,
    "winogrande": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "mmlu": 5,
    "gpqa": 5,
    "medmcqa": 5,
}
"""The published scripts' default list of benchmarks, and the examples before each question."""
CLAIMED_SPARSITY = 0.7
COUNTED = ("tracer-cost-published", "tracer-cost-dart-prompt")
STATIC = ("static", "flap")
"""Methods whose neurons are the same for every prompt."""


def accuracy(root: Path) -> str:
    """Accuracy at the claim's sparsity, against GRIFFIN."""
    head = ["model", "task, items", "method", "achieved", "dense tokens", "re-masks", "accuracy"]
    lines = [[*head, "minus GRIFFIN, points"], ["---"] * 3 + ["---:"] * 5]
    verdicts: list[str] = []
    for data in _evaluations(root):
        for row in _rows(data, "acc"):
            if row["asked"] not in (0, CLAIMED_SPARSITY) or row["method"] in STATIC:
                continue
            against = row["to_griffin"]
            verdicts += [_verdict(against)] if against and row["asked"] else []
            task = f"{row['task'].removesuffix('_local')}, {row['items']}"
            shown = _points(against) if row["asked"] else "–"
            lines.append([_model(data), task, *_account(row, data), f"{row['value']:.3f}", shown])
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "worse", "open"))
    note = (
        f"{len(verdicts)} comparisons with GRIFFIN at {CLAIMED_SPARSITY:.0%}: {counts} (open: the "
        "95 % interval, paired by item, holds 0, or fewer than six items differ)."
    )
    return "\n\n".join([_sources(root), table(lines), note])


def gaps(root: Path) -> str:
    """Perplexity at the claim's sparsity: the gap to dense that is closed against GRIFFIN."""
    data = read(root, "quality-continuation")
    head = ["model", "method", "achieved", "dense tokens", "re-masks per slice", "perplexity"]
    lines = [[*head, "of GRIFFIN's gap closed, equal sparsity"], ["---"] * 2 + ["---:"] * 5]
    for row in data["cells"]:
        if row["sparsity"] != CLAIMED_SPARSITY:
            continue
        equal = row["equal_sparsity"]
        closed = "–"
        if equal:
            low, high = equal["interval"]
            closed = f"{equal['gap_closed']:.1%} ({low:.1%} to {high:.1%})"
        lines.append(
            [
                _checkpoint(data["checkpoints"][row["model"]]),
                row["variant"],
                f"{row['achieved_sparsity']:.1%}",
                f"{row['dense_token_share']:.1%}",
                f"{row['remasks_per_slice']:.1f}",
                f"{row['perplexity']:.1f} (dense {row['dense_perplexity']:.1f})",
                closed,
            ]
        )
    return f"{above(root, 'quality-continuation')}\n\n{table(lines)}"


def rouge(root: Path) -> str:
    """ROUGE-L of summaries, as multiples of the static methods' and of the dense model's."""
    head = ["model", "method", "achieved", "dense tokens", "re-masks", "ROUGE-L"]
    lines = [[*head, "x static", "x flap", "x dense"], ["---"] * 2 + ["---:"] * 7]
    notes = []
    for data in _evaluations(root):
        rows = [row for row in _rows(data, "rougeL") if row["asked"] in (0, 0.5, CLAIMED_SPARSITY)]
        value = {(row["method"], row["asked"]): row["value"] for row in rows}
        for row in rows:
            others = [value.get((name, row["asked"])) for name in STATIC] + [value["dense", 0]]
            times = [f"{row['value'] / other:.2f}" if other else "–" for other in others]
            name, *account = _account(row, data)
            asked = f"{name} at {row['asked']:.0%}" if row["asked"] else name
            lines.append([_model(data), asked, *account, f"{row['value']:.3f}", *times])
        cut = sum("cut at" in note for row in rows for note in row["notes"])
        notes.append(f"{rows[0]['items']} documents ({cut} of {len(rows)} rows note cut summaries)")
    note = f"{_model_list(root)}: {' and '.join(notes)}, file {_rouge_task(root)}."
    return "\n\n".join([_sources(root), table(lines), note])


def remasks(root: Path) -> str:
    """Free texts against the dense text: first masks kept, and masks renewed."""
    data = read(root, "drift-free-smollm2")
    head = [
        "method",
        "achieved",
        "dense tokens",
        "re-masks per prompt",
        "ROUGE-L to the dense text",
    ]
    lines = [head, ["---", *["---:"] * 4]]
    for row in data["rows"]:
        if row["method"] == "dense":
            continue
        found = row["metrics"]["rougeL"]
        lines.append(
            [
                today(data, row["method"]),
                f"{row['achieved_sparsity']:.1%}",
                f"{row['dense_token_share']:.1%}",
                f"{row['remasks_per_cell']:.2f}",
                f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})",
            ]
        )
    return f"{above(root, 'drift-free-smollm2')}\n\n{table(lines)}"


def memory(root: Path) -> str:
    """What tracing holds, counted at the 8B model's shapes and measured on small models."""
    from dart_llm.pruning.config import PruneConfig

    files = [read(root, name) for name in COUNTED]
    shapes = files[0]["shapes"]
    where = f"shapes of Llama-3.1-8B, prompt of {files[0]['prompt_tokens']} tokens"
    lines = [["model", "method", "held by tracing, MB", "how"], ["---", "---", "---:", "---"]]
    for data in files:
        held = max(data["bytes_while_observing"], data["bytes_while_pruned"]) / 1e6
        lines.append([where, today(data, data["method"]), f"{held:.1f}", "counted"])
    rank = PruneConfig.build("dart", sparsity=0.5).compensation_rank
    products = 2 * 4 * rank * shapes["width"] * shapes["layers"] / 1e6
    formula = "2 x 4 bytes x rank x width x layers: its products and their prior"
    lines.append([where, "dart", f"over {products:.0f}", formula])
    quality = read(root, "quality-continuation")
    for model, facts in quality["checkpoints"].items():
        rows = {
            r["variant"]: r for r in quality["cells"] if (r["model"], r["sparsity"]) == (model, 0.5)
        }
        base = rows["griffin"]["extra_memory_bytes"]
        for method in ("dart-prompt", "dart"):
            more = (rows[method]["extra_memory_bytes"] - base) / 1e6
            lines.append([_checkpoint(facts), method, f"{more:.1f}", "measured, beyond GRIFFIN's"])
    return f"{above(root, *COUNTED, 'quality-continuation')}\n\n{table(lines)}"


def flops(root: Path) -> str:
    """FLOPs that tracing adds."""
    files = [read(root, name) for name in COUNTED]
    lines = [["model", "method", "added FLOPs", "of what"], ["---", "---", "---:", "---"]]
    where = "shapes of Llama-3.1-8B, counted"
    what = "a dense model's, 256 tokens, one re-mask from 32"
    for data in files:
        share = data["share_per_256_tokens_with_one_remask_of_32"]
        lines.append([where, today(data, data["method"]), f"{share:.4%}", what])
    quality = read(root, "quality-continuation")
    for model, facts in quality["checkpoints"].items():
        for row in quality["cells"]:
            if (row["model"], row["sparsity"]) == (model, 0.5):
                achieved = row["achieved_sparsity"]
                added = row["ffn_flops_share"] - (1 - achieved)
                what = f"the dense FFN's, {quality['tokens']} tokens, at {achieved:.1%}"
                lines.append([_checkpoint(facts), row["variant"], f"{added:.3%}", what])
    return f"{above(root, *COUNTED, 'quality-continuation')}\n\n{table(lines)}"


def benchmarks(root: Path) -> str:
    """Which of the ten were measured, on how many items."""
    lines = [["benchmark", "published examples", "measured here"], ["---", "---:", "---"]]
    found: dict[str, list[str]] = {}
    for data in _evaluations(root):
        items = {r["task"].removesuffix("_local"): r["items"] for r in _rows(data, "acc")}
        for task, count in items.items():
            found.setdefault(task, []).append(f"{count} items with {_model(data)}")
    for name, shots in TEN.items():
        lines.append([f"`{name}`", str(shots), ", ".join(found.get(name, ["no"]))])
    return f"{_sources(root)}\n\n{table(lines)}"


def _evaluations(root: Path) -> list[Row]:
    return [read(root, f"evaluation-{name}") for name in MODELS]


def _rows(data: Row, metric: str) -> list[Row]:
    return [r for r in data["rows"] if r["status"] == "done" and r["metric"] == metric]


def _account(row: Row, data: Row) -> list[str]:
    """Method, achieved sparsity, dense share, re-masks."""
    name = today(data, row["method"])
    return [name, f"{row['achieved']:.1%}", f"{row['dense_share']:.1%}", f"{row['remasks']:,}"]


def _points(found: Row | None) -> str:
    if found is None:
        return "–"
    middle, low, high = (100 * found[key] for key in ("estimate", "low", "high"))
    verdict = _verdict(found)
    word = "" if verdict == "open" else f" {verdict}"
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f}){word}"


def _verdict(found: Row) -> str:
    if not found["significant"]:
        return "open"
    return "better" if found["estimate"] > 0 else "worse"


def _model(data: Row) -> str:
    return str(data["checkpoint_of_the_cells"]["name"])


def _model_list(root: Path) -> str:
    return " and ".join(_model(data) for data in _evaluations(root))


def _rouge_task(root: Path) -> str:
    return str(_rows(_evaluations(root)[0], "rougeL")[0]["task"].partition(":")[2])


def _checkpoint(facts: Row) -> str:
    return f"{facts['name']} (file {facts['file_quantisation']}, {facts['dtype']})"


def _sources(root: Path) -> str:
    return f"{above(root, *(f'evaluation-{name}' for name in MODELS))} Protocol decode."


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> docs/claims.md and its content; none where there is no such page."""
    page = root / "docs/claims.md"
    if not page.is_file():
        return {}
    makers = (accuracy, gaps, rouge, remasks, memory, flops, benchmarks)
    return linked({f"claims-{make.__name__}": (page, make(root)) for make in makers}, root)
