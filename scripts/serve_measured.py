"""Markdown tables of benchmarks/results/serve-*.json for docs/server.md; used by check_docs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_head import above, linked, read, table

PAGE = "docs/server.md"
OVERHEAD, LOAD, MALFORMED = "serve-overhead", "serve-load", "serve-malformed"
MEMORY = "serve-memory"


def overhead(root: Path, data: dict[str, Any]) -> str:
    """First and further tokens, by the library and through the server."""
    heads = ["request", "first token, library", "server", "more", "further tokens, library",
             "server", "more"]  # fmt: skip
    lines = [heads, ["---", *["---:"] * 6]]
    for row in data["rows"]:
        first, each = row["first_ms"], row["token_ms"]
        lines.append(
            [
                row["row"],
                *(f"{first[side]:.1f} ms" for side in ("library", "server")),
                f"{row['later_ms']:+.1f} ms",
                *(f"{each[side]:.2f} ms" for side in ("library", "server")),
                f"{row['share']:+.1%}",
            ]
        )
    note = (
        f"{data['machine']['threads']} threads of {data['machine']['processor']}, "
        f"{data['tokens']} tokens, in turns, medians of {data['repeats']} and of the differences "
        "of pairs."
    )
    return f"{above(root, OVERHEAD)}\n\n{table(lines)}\n\n{note}"


def load(root: Path, data: dict[str, Any]) -> str:
    """What came of many clients' requests."""
    note = (
        f"{data['requests']} requests of {data['clients']} clients, dense and pruned, "
        f"{data['max_waiting']} places to wait: {data['completed']} completed, "
        f"{data['cancelled']} cancelled by the client half-way, {len(data['errors'])} failed, "
        f"{len(data['wrong'])} of the completed greedy answers differ from the one computed alone; "
        f"{data['sent_away_429']} times a client was sent away with 429 and came again; memory "
        f"{data['memory_before'] / 2**20:.0f} MiB before and "
        f"{data['memory_after'] / 2**20:.0f} MiB after."
    )
    return f"{above(root, LOAD)}\n\n{note}"


def memory(root: Path, data: dict[str, Any]) -> str:
    """What lengths and bodies cost."""
    lengths, bodies = data["lengths"], data["bodies"]
    taken = ", ".join(
        f"{held / 2**20:.0f} MiB {'before' if name == 'before' else f'after {name}'}"
        for name, held in lengths["memory"].items()
    )
    others = ", ".join(
        f"`{route}` {1e3 * found['median']:.0f} ms (slowest {found['slowest']:.1f} s)"
        for route, found in bodies["other_routes_s"].items()
    )
    extra = f"{bodies['extra'] / 2**20:.0f} MiB"
    note = (
        f"{lengths['requests']} requests of {lengths['lengths']} lengths, dense and pruned: "
        f"{taken}. {bodies['bodies']} bodies of {bodies['bytes_each']:,} bytes at the same time, "
        f"all refused within {bodies['seconds']:.1f} s: at most {extra} more; "
        f"meanwhile, from another process on the same cores, {others}."
    )
    return f"{above(root, MEMORY)}\n\n{note}"


def malformed(root: Path, data: dict[str, Any]) -> str:
    """How malformed requests were answered."""
    heads = ["malformed requests", "number", "answers by status", "slowest", "5xx or no answer"]
    lines = [heads, ["---", "---:", "---", "---:", "---:"]]
    for name, key in (
        ("written by hand", "hand_written"),
        ("made from openapi.json", "from_schema"),
    ):
        part = data[key]
        statuses = ", ".join(f"{status}: {n}" for status, n in part["statuses"].items())
        slowest = f"{part['slowest_s']:.1f} s"
        lines.append([name, str(part["requests"]), statuses, slowest, str(len(part["bad"]))])
    return f"{above(root, MALFORMED)}\n\n{table(lines)}"


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """A block per file that is there; none without the page."""
    if not (root / PAGE).is_file():
        return {}
    makers = {OVERHEAD: overhead, LOAD: load, MEMORY: memory, MALFORMED: malformed}
    return linked(
        {
            name: (root / PAGE, make(root, read(root, name)))
            for name, make in makers.items()
            if (root / f"benchmarks/results/{name}.json").is_file()
        },
        root,
    )
