"""The published tables for people: page, time, inputs and commands of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from measured_blocks import measured
from reproduce_inputs import Found
from table_registry import Registry, Table


def listing(root: Path, known: Registry, inputs: Callable[[Table], Sequence[Found]]) -> str:
    """A paragraph per results file."""
    pages = pages_of(root, known)
    seen: dict[str, str] = {}
    parts = []
    for name, table in known.tables.items():
        for one in inputs(table):
            seen[one.name] = (
                "here" if one.problem is None else "MISSING" if one.path is None else "OTHER"
            )
        texts = ", ".join(f"{text} ({seen[text]})" for text in table.inputs) or "none"
        blocks = [block for block, files in known.blocks.items() if name in files]
        also = f"  also: {', '.join(blocks)}\n" if blocks else ""
        parts.append(
            f"{name}\n{also}  pages: {', '.join(pages.get(name, ['none yet']))}\n"
            f"  took: {minutes(table.file(root))}; inputs: {texts}\n"
            + "".join(f"  $ {command}\n" for command in table.run)
        )
    parts.append(
        "make reproduce TABLE=name runs one; DRY=1 shows what would run, SHORT=1 a short form."
    )
    return "\n".join(parts)


def pages_of(root: Path, known: Registry) -> dict[str, list[str]]:
    """Results file -> the pages with tables of it."""
    found: dict[str, list[str]] = {}
    for block, (page, _) in measured(root).items():
        for name in known.blocks.get(block, (block,)):
            pages = found.setdefault(name, [])
            where = page.relative_to(root).as_posix()
            if where not in pages:
                pages.append(where)
    return found


def minutes(path: Path) -> str:
    """How long it took, and on what, as the results file says."""
    if not path.is_file():
        return "not measured yet"
    data = json.loads(path.read_text(encoding="utf-8"))
    runs = data.get("runs") or [data]
    seconds = sum(run.get("times", {}).get("total_s", 0) for run in runs)
    own = data.get("seconds")
    seconds += sum(filter(None, own.values())) if isinstance(own, dict) else own or 0
    rows = data["rows"].values() if isinstance(data.get("rows"), dict) else ()
    seconds += sum(sum(row["all_seconds"]) for row in rows)
    machine = data.get("machine") or runs[0].get("machine") or {}
    where = f"on {machine.get('cores', '?')} cores of {machine.get('processor', '?')}"
    return f"{max(1, round(seconds / 60))} min {where}" if seconds else f"not noted, {where}"
