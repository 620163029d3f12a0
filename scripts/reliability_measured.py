"""Blocks of docs/reliability.md from benchmarks/results; used by check_docs.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from table_head import Data, above, linked, read, table

PAGE = "docs/reliability.md"
AGREEMENT = ("agreement-smollm2", "agreement-gemma3-270m", "agreement-qwen2.5-coder-0.5b")
KINDS = {
    "compared": "compared with plain loops",
    "float32": "in float32",
    "bfloat16": "in bfloat16",
    "two_threads": "by two threads, and bit for bit the same by one",
    "token_choice": "in which tokens choose their neurons",
    "low_rank": "with low-rank compensation",
    "one_neuron": "with a layer of one kept neuron",
    "no_neuron": "with a layer of none",
    "odd_values": "with infinities, NaN or denormal numbers among the weights",
}
"""Counts of a run of random steps -> in words."""


def agreement(root: Path, names: tuple[str, ...]) -> str:
    """A row per model, case and executor."""
    heads = ["model", "method", "prompt, then tokens", "executor", "masks at decoded token",
             "kept neurons", "of them other ones", "largest difference of a logit",
             "deviation of the logits"]  # fmt: skip
    lines = [heads, ["---", "---", "---", "---", "---", *["---:"] * 4]]
    for name in names:
        data = read(root, name)
        for row in data["rows"]:
            lines.append(
                [
                    data["checkpoint"]["name"],
                    f"{row['method']}, {row['sparsity']:.0%}",
                    f"{row['prompt']}, {row['tokens']}",
                    row["executor"],
                    ", ".join(map(str, row["steps"])),
                    f"{row['kept']:,}",
                    str(row["differ"]),
                    f"{row['logits']:.1e}",
                    f"{row['spread']:.1f}",
                ]
            )
    return f"{above(root, *names)}\n\n{table(lines)}"


def sanitized(root: Path, name: str, data: Data) -> str:
    """What random steps there were."""
    counts = data["counts"]
    parts = [f"{counts[kind]:,} {words}" for kind, words in KINDS.items()]
    note = (
        f"{counts['steps']:,} steps of {counts['sequences']:,} random decoders "
        f"({data['compiler']}), no report: {'; '.join(parts)}."
    )
    return f"{above(root, name)}\n\n{note}"


def interrupts(root: Path, name: str, data: Data) -> str:
    """What interrupts left behind."""
    heads = ["executor", "interrupted", "SIGINTs", "values out of order", "otherwise changed"]
    lines = [heads, ["---", "---", *["---:"] * 3]]
    for row in data["rows"]:
        numbers = [row["interrupted"], row["out_of_order"], row["not_as_before"]]
        lines.append([row["executor"], row["act"], *map(str, numbers)])
    return f"{above(root, name)}\n\n{table(lines)}"


def kills(root: Path, name: str, data: Data) -> str:
    """What kills and full disks cost."""
    heads = ["command", "SIGKILLs", "full disks", "finished parts lost", "files that differ"]
    lines = [heads, ["---", *["---:"] * 4]]
    for command, tally in data["commands"].items():
        numbers = [tally["kills"], tally["full_disks"], len(tally["lost"]), len(tally["differ"])]
        lines.append([f"`{command}`", *map(str, numbers)])
    return f"{above(root, name)}\n\n{table(lines)}"


MAKERS: Mapping[str, Any] = {
    "sanitized-steps": sanitized,
    "interrupts": interrupts,
    "kills": kills,
}


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """A block per file that is there, one for all of ``AGREEMENT``; none without the page."""

    def there(name: str) -> bool:
        return (root / f"benchmarks/results/{name}.json").is_file()

    if not (root / PAGE).is_file():
        return {}
    made = {
        name: make(root, name, read(root, name)) for name, make in MAKERS.items() if there(name)
    }
    if names := tuple(filter(there, AGREEMENT)):
        made["agreement"] = agreement(root, names)
    return linked({name: (root / PAGE, text) for name, text in made.items()}, root)
