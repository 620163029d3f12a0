"""What stands above a published table: command, checkpoint, link to the JSON, today's names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from table_registry import Table, registry

Data = Mapping[str, Any]


def read(root: Path, name: str) -> dict[str, Any]:
    """One results file."""
    path = root / "benchmarks/results" / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def table(lines: list[list[str]]) -> str:
    """A Markdown table of cells."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def span(shares: list[float]) -> str:
    """ "30% to 70%", or one of them where both ends are the same."""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def today(data: Data, label: str) -> str:
    """A label of a results file with the names that methods have today."""
    for old, new in renamed(data).items():
        label = re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", new, label)
    return label


def renamed(data: Data) -> Mapping[str, str]:
    """Names in a results file that was measured before the methods got today's -> today's."""
    found: Mapping[str, str] = data.get("renamed", {})
    return found


def above(root: Path, *names: str) -> str:
    """The lines above a table of the results files ``names``."""
    files = {name: read(root, name) for name in names}
    known = {name: entry(root, name, data) for name, data in files.items()}
    links: dict[str, list[str]] = {}
    for name, data in files.items():
        links.setdefault(checkpoints(data), []).append(link(name))
    parts = [f"{facts}: {' and '.join(own)}." for facts, own in links.items()]
    pairs = dict.fromkeys(pair for data in files.values() for pair in renamed(data).items())
    for old, new in pairs:
        own = [f"{name}.json" for name, data in files.items() if renamed(data).get(old) == new]
        where = "the file" if len(names) == 1 else " and ".join(own)
        parts.append(f"`{new}` is called `{old}` in {where}.")
    parts += dict.fromkeys(note for name in names if (note := known[name].note))
    commands = [run for name in names for run in known[name].run]
    return f"{shown(*commands)}\n\n{' '.join(parts)}"


def entry(root: Path, name: str, data: Data) -> Table:
    """The registry's entry of a results file; without one, the commands that the file names."""
    if known := registry(root).tables.get(name):
        return known
    runs = [run["command"] for run in data.get("runs", ())] or [data["command"]]
    return Table(name, tuple(dict.fromkeys(runs)))


def shown(*commands: str) -> str:
    """Commands as a block that can be copied."""
    lines = "\n".join(commands)
    return f"```sh\n{lines}\n```"


def checkpoints(data: Data) -> str:
    """Every checkpoint of a results file, or that there is none."""
    return "; ".join(map(checkpoint, _checkpoints(data))) or "no checkpoint, shapes alone"


def _checkpoints(data: Data) -> list[Data]:
    if "checkpoints" in data:
        return list(data["checkpoints"].values())
    facts = [run["checkpoint"] for run in data.get("runs", ())]
    facts += [data.get("checkpoint_of_the_cells") or data.get("checkpoint")]
    return list({found["name"]: found for found in facts if found}.values())


def checkpoint(facts: Data) -> str:
    """Name, file quantisation, dtype and checksum."""
    checksum = f", sha256 {str(facts['sha256'])[:12]}" if facts["sha256"] else ""
    quantisation = facts["file_quantisation"] or "none"
    return f"{facts['name']} (file quantisation {quantisation}, {facts['dtype']}{checksum})"


def link(name: str) -> str:
    """``@`` stands for the way from the page to the root."""
    return f"[{name}.json](@benchmarks/results/{name}.json)"


def linked(blocks: Mapping[str, tuple[Path, str]], root: Path) -> dict[str, tuple[Path, str]]:
    """The blocks with ``@`` replaced by the way from their pages to the root."""
    return {
        name: (page, text.replace("(@", "(../" if page.parent != root else "("))
        for name, (page, text) in blocks.items()
    }
