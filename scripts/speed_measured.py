"""Markdown tables of benchmarks/results/speed-*.json, llama-cpp.json, ffn-speed.json and
thread-policy.json.

Used by check_docs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_head import above, entry, link, linked, read, shown, table

FFN, POLICY, LLAMA = "ffn-speed", "thread-policy", "llama-cpp"
HEADS = {
    "row": 0,
    "pp tokens/s": 1,
    "first token ms": 2,
    "tg ms": 3,
    "+-": 4,
    "achieved": 7,
    "dense tokens": 8,
    "re-masks": 9,
    "x transformers": 10,
    "x own dense": 11,
    "limit": 12,
    "of limit": 13,
    "GB/s": 14,
    "extra MiB": 17,
    "all ms": 19,
    "all x transformers": 20,
    "all x own dense": 21,
}
"""Heads of the columns, and their places in ``speed_table.HEADS``.

Those of which a file holds nothing, for it was measured before they were there, are left out.
"""
COSTS = {"cost": 0, "row": 1, "against": 2, "ms": 3, "+-": 4, "of a token of": 5, "share of it": 6}


def speed(root: Path, name: str) -> str:
    """Rows and costs of every run."""
    from dart_llm.studies.speed.summary import caption, cells, cost_cells

    data = read(root, name)
    parts = []
    for run in data["runs"]:
        command = entry(root, name, data).command(run["command"])
        checksum = str(run["checkpoint"]["sha256"] or "none")[:12]
        parts.append(f"{shown(command)}\n\n{caption(run)}; sha256 {checksum}: {link(name)}.")
        parts.append(_grid(HEADS, [cells(row) for row in run["rows"]]))
        if run["costs"]:
            parts.append(_grid(COSTS, [cost_cells(cost) for cost in run["costs"]]))
        parts += [f"{note}." for note in run["notes"]]
    return "\n\n".join(parts)


def _grid(heads: dict[str, int], rows: list[list[str]]) -> str:
    places = {head: place for head, place in heads.items() if any(row[place] for row in rows)}
    lines = [list(places), ["---", *["---:"] * (len(places) - 1)]]
    lines += [[row[place] for place in places.values()] for row in rows]
    return table(lines)


def ffn(root: Path) -> str:
    """Time and bytes per second of one FFN, by shape, dtype and share of neurons kept."""
    data = read(root, FFN)
    heads = ["FFN", "dtype", "path", "keep", "ms", "x torch dense", "GB/s", "of native at keep 1"]
    lines = [heads, ["---"] * 3 + ["---:"] * 5]
    for row in data["rows"]:
        lines.append(
            [
                f"{row['hidden']} x {row['width']}",
                row["dtype"],
                row["path"],
                f"{row['keep']:g}",
                f"{row['ms']:.3f}",
                f"{row['times_torch']:.2f}",
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['share_of_native_dense']:.0%}",
            ]
        )
    machine: dict[str, Any] = data["machine"]
    note = (
        f"One vector, {data['repeats']} passes over all layers of a shape, interleaved, medians; "
        f"{data['threads']} threads of {machine['processor']}, kernels "
        f"{data['kernels']}, read bandwidth {data['read_bandwidth'] / 1e9:.1f} GB/s."
    )
    return f"{above(root, FFN)}\n\n{table(lines)}\n\n{note}"


def policy(root: Path) -> str:
    """Medians and means of small operations, by how threads wait."""
    data = read(root, POLICY)
    columns = list(dict.fromkeys((row["path"], row["row"]) for row in data["rows"]))
    lines = [["threads wait", *(f"{path}, {where}" for path, where in columns)]]
    lines.append(["---", *["---:"] * len(columns)])
    for case in dict.fromkeys(row["case"] for row in data["rows"]):
        own = {(row["path"], row["row"]): row for row in data["rows"] if row["case"] == case}
        times = ((1000 * own[at]["ms"], 1000 * own[at]["mean_ms"]) for at in columns)
        lines.append([case, *(f"{middle:.0f} us, mean {mean:.0f}" for middle, mean in times)])
    note = (
        f"{data['calls']} calls of a process, {data['rounds']} processes in turns, medians of "
        f"their medians and of their means; {data['threads']} threads of "
        f"{data['machine']['processor']} with {data['machine']['cores']} cores, load average "
        f"before {data['load_average_before']:.1f}."
    )
    return f"{above(root, POLICY)}\n\n{table(lines)}\n\n{note}"


def llama(root: Path) -> str:
    """Our rows and llama.cpp's, the fastest last."""
    data = read(root, LLAMA)
    heads = [
        "row",
        "achieved",
        "dense tokens",
        "re-masks",
        "ms",
        "+-",
        "x own dense",
        "bytes allow",
    ]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in sorted(data["rows"], key=lambda row: -float(row["ms"])):
        pruned = [""] * 3
        if row.get("asked"):
            pruned = [
                f"{row['achieved_sparsity']:.0%}",
                f"{row['dense_token_share']:.0%}",
                f"{row['remasks']:.1f}",
            ]
        size = f", {row['file_bytes'] / 1e6:.0f} MB" if "file_bytes" in row else ""
        limit = f"{row['limit']:.2f}" if "limit" in row and row["row"] != "transformers" else ""
        times = [f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}", f"{row['times_own_dense']:.2f}"]
        lines.append([f"{row['row']}{size}", *pruned, *times, limit])
    machine = data["machine"]
    note = (
        f"{data['prompt']} prompt + {data['tokens']} timed tokens, medians of {data['repeats']} "
        f"turns in shuffled order; {data['threads']} threads of {machine['processor']}, which "
        f"reads {data['read_bandwidth'] / 1e9:.1f} GB/s; llama.cpp {data['build']}. *Bytes "
        "allow*: over our own dense path, at what was achieved."
    )
    return f"{above(root, LLAMA)}\n\n{table(lines)}\n\n{note}"


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """A block per file whose markers docs/performance.md has, named like the file."""
    page, results = root / "docs/performance.md", root / "benchmarks/results"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    names = [path.stem for path in sorted(results.glob("speed-*.json"))]
    others = {FFN: ffn, POLICY: policy, LLAMA: llama}
    names += [name for name in others if (results / f"{name}.json").is_file()]
    own = {
        name: (page, others[name](root) if name in others else speed(root, name))
        for name in names
        if f"<!-- generated: {name} -->" in text
    }
    front = root / "README.md"
    if LLAMA in own and f"<!-- generated: {LLAMA}-front -->" in front.read_text(encoding="utf-8"):
        own[f"{LLAMA}-front"] = (front, own[LLAMA][1])
    return linked(own, root)
