"""The README's first table: quality and speed of the methods side by side; used by check_docs.py.

Quality is evaluation-smollm2.json's, speed speed-smollm2-methods.json's: the block is left out
until both files are there and hold every row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from table_head import above, linked, read, renamed, span, table

Row = Mapping[str, Any]

QUALITY, SPEED = "evaluation-smollm2", "speed-smollm2-methods"
DENSE, EIGHT = "dense", "dense-8bit"
PRUNED = ("griffin", "published", "dart", "dart-token")
SPARSITIES = (0.3, 0.5, 0.7)
HEADS = (
    "method",
    "achieved",
    "dense tokens",
    "re-masks",
    "perplexity",
    "x dense",
    "arc_easy",
    "ms per token",
    "x plain",
    "x own dense",
    "bytes allow",
)
NOTE = (
    "Achieved sparsity, dense tokens and re-masks are those of the perplexity: {slices} slices of "
    "256 prompt + 256 scored tokens, evenly spread over the validation split of WikiText-2 "
    "(wikitext-2-v1, words and signs apart, `<unk>` for rare words), so not comparable with "
    "numbers on the raw test split, and half of it the half on which dart's default was "
    "chosen. *x dense*: with its 95 % interval over slices. arc_easy: accuracy "
    "over {items} questions, each within {half:.2f} (95 %); {dense} of its tokens ran dense, "
    "for contexts under 16 tokens do, so that "
    "30, 50 and 70 % achieved {arc} there.\n\n"
    "Time: {prompt} prompt + {tokens} timed tokens, median of {repeats}, {threads} threads of "
    "{processor}; *x plain* is over plain transformers, {plain:.1f} ms, *x own dense* over our own "
    "dense path, {own:.2f} ms. *Bytes allow* is what reading fewer bytes can give at most over our "
    "dense path{timed}. All read the prompt dense, and some observe it: until the first token "
    "{first}. dense-8bit has no time: its weights are rounded, not packed. dense-4bit is "
    "left out: the file was 4-bit before.\n\n"
    "dart-token finds each token's neurons by 4-bit copies on a grid of its own. That the file was "
    "4-bit does not help them: their error is {error:.3f}, that of Gaussian weights {gaussian:.3f}."
)
APART = 0.01
"""By how much the timed text must miss the sparsity asked for to be told."""
PACKED = "–"


def front(quality: Row, speed: Row, proxies: Mapping[str, float]) -> str:
    """The table and what a reader needs beside it; raises ``LookupError`` for a row that lacks."""
    perplexity, accuracy = _task(quality, "perplexity"), _task(quality, "arc_easy")
    (run, *_) = speed["runs"]
    rows = [list(HEADS), ["---", *["---:"] * (len(HEADS) - 1)]]
    keys = [(name, 0.0) for name in (DENSE, EIGHT)]
    keys += [(name, sparsity) for name in PRUNED for sparsity in SPARSITIES]
    for key in keys:
        rows.append([_label(key), *_quality(perplexity[key], accuracy[key])])
        rows[-1] += _eight(perplexity, run) if key[0] == EIGHT else _speed(run, key)
    dense = [row["dense_share"] for (name, _), row in accuracy.items() if name in PRUNED]
    plain, own = (_row(run, name)["tg_ms"] for name in ("transformers", run["own_dense"]))
    note = NOTE.format(
        slices=perplexity[DENSE, 0.0]["items"],
        items=accuracy[DENSE, 0.0]["items"],
        dense=span(dense),
        half=_half({key: accuracy[key] for key in keys}),
        prompt=run["prompt_tokens"],
        tokens=run["tokens"],
        repeats=run["repeats"],
        threads=run["machine"]["threads"],
        processor=run["machine"]["processor"],
        plain=plain,
        own=own,
        timed=_timed(run),
        first=_first(run),
        arc=" / ".join(f"{accuracy['dart', s]['achieved']:.0%}" for s in SPARSITIES),
        **proxies,
    )
    return f"{table(rows)}\n\n{note}"


def _task(quality: Row, task: str) -> dict[tuple[str, float], Row]:
    """Finished rows by method and sparsity asked for."""
    rows = [r for r in quality["rows"] if r["task"].startswith(task) and r["status"] == "done"]
    return {(row["method"], row["asked"] or 0.0): row for row in rows}


def _label(key: tuple[str, float]) -> str:
    return f"{key[0]} {key[1]:.0%}" if key[1] else key[0]


def _quality(perplexity: Row, accuracy: Row) -> list[str]:
    ratio = perplexity["to_dense"]
    times = f"{_short(ratio['estimate'])} ({_ends(ratio)})" if ratio else "1"
    return [
        f"{perplexity['achieved']:.1%}",
        f"{perplexity['dense_share']:.1%}" if perplexity["asked"] else "100%",
        str(perplexity["remasks"]),
        f"{perplexity['value']:.1f}" if perplexity["value"] < 100 else f"{perplexity['value']:.0f}",
        times,
        f"{accuracy['value']:.2f}",
    ]


def _ends(found: Row) -> str:
    return f"{_short(found['low'])} to {_short(found['high'])}"


def _short(times: float) -> str:
    return f"{times:.2f}" if times < 10 else f"{times:.1f}"


def _half(accuracy: Mapping[tuple[str, float], Row]) -> float:
    """Half the width of the widest interval of an accuracy."""
    ends = [row["interval"] for row in accuracy.values()]
    return max((end["high"] - end["low"]) / 2 for end in ends)


def _speed(run: Row, key: tuple[str, float]) -> list[str]:
    name, sparsity = key
    row = _row(run, f"{name} {100 * sparsity:g} %, slim" if sparsity else run["own_dense"])
    times = (row[name] for name in ("times_transformers", "times_own_dense", "limit"))
    return [f"{row['tg_ms']:.2f}", *(f"{value:.2f}" for value in times)]


def _proxies(root: Path) -> dict[str, float]:
    """The relative error of dart-token's copies, and that of Gaussian weights' copies."""
    path = root / f"benchmarks/results/{QUALITY}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        found = (json.loads(line)["measurement"] or {}).get("accounting") or {}
        if found.get("proxy_error"):
            return {"error": found["proxy_error"], "gaussian": found["proxy_error_gaussian"]}
    raise LookupError(f"{path.name} has no row of a method with copies")


def _timed(run: Row) -> str:
    """Which methods removed less of the timed text, whose limit is then that of less."""
    rows = [_row(run, f"{name} {100 * share:g} %, slim") for name in PRUNED for share in SPARSITIES]
    found = [
        f"{row['row'].removesuffix(', slim')} achieved {row['achieved_sparsity']:.1%} there, "
        f"{row['dense_token_share']:.0%} of its tokens dense"
        for row in rows
        if row["asked"] - row["achieved_sparsity"] > APART
    ]
    return f", at what was achieved in the timed text: {'; '.join(found)}" if found else ""


def _first(run: Row) -> str:
    """How long the first token took, by method."""
    names = {"plain transformers": ["transformers"], "our dense path": [run["own_dense"]]}
    names |= {name: [f"{name} {100 * s:g} %, slim" for s in SPARSITIES] for name in PRUNED}
    found = []
    for name, labels in names.items():
        times = [f"{_row(run, label)['first_token_ms']:.0f}" for label in labels]
        low, high = min(times, key=int), max(times, key=int)
        found.append(f"{name} {low if low == high else f'{low} to {high}'}")
    return f"{', '.join(found)} ms"


def _row(run: Row, name: str) -> Row:
    found: Row = {row["row"]: row for row in run["rows"]}[name]
    return found


def _eight(perplexity: Mapping[tuple[str, float], Row], run: Row) -> list[str]:
    """Weights of 8 bits would be read in fewer bytes, were they kept so."""
    before, after = (perplexity[name, 0.0]["weight_bytes"] for name in (DENSE, EIGHT))
    total = run["bytes_per_dense_token"]
    return [PACKED, PACKED, PACKED, f"{total / (total - before + after):.2f}"]


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """The block ``front`` of the README; none until both files hold what it shows."""
    if not all((root / f"benchmarks/results/{name}.json").is_file() for name in (QUALITY, SPEED)):
        return {}
    quality, speed = read(root, QUALITY), read(root, SPEED)
    if renamed(quality):  # of before today's methods
        return {}
    try:
        body = front(quality, speed, _proxies(root))
    except (LookupError, OSError):
        return {}
    return linked({"front": (root / "README.md", f"{above(root, QUALITY, SPEED)}\n\n{body}")}, root)
