"""Make a published table again, and say which of its numbers came again.

Usage: python scripts/reproduce.py [NAME ...] [--texts FOLDER|hub] [--dry-run] [--short] [--keep]

Without a name: every table with its page, time, inputs and commands.  docs/reproduce.md explains.
Exit codes: 0 all agrees, 1 a number of quality left its interval, 2 an input is missing or is
another file, or the name is not known; a command's own code where one fails.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hub_texts import fetch, from_hub
from reproduce_compare import Pair, compare
from reproduce_inputs import Found, look
from reproduce_items import shared
from reproduce_list import listing, minutes
from reproduce_run import Job
from rich.console import Console
from rich.table import Table as Grid
from table_registry import Table, registry

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT.parent / "shared/data"
HUB = "hub"
"""In place of a folder: fetch the texts."""


def main(words: Sequence[str] | None = None) -> int:
    """List, show or run."""
    args = options().parse_args(words)
    known = registry(ROOT)
    texts = TEXTS if args.texts in (None, HUB) else Path(args.texts).resolve()
    if not args.names:
        print(listing(ROOT, known, lambda table: inputs(table, texts)))
        return 0
    tables: dict[str, Table] = {}
    for name in args.names:
        if name not in known.names():
            print(unknown(name, known.names()), file=sys.stderr)
            return 2
        tables.update({table.name: table for table in known.of_block(name)})
    if args.texts == HUB and not args.dry_run:
        texts = fetched(tables.values())
    codes = [one(table, texts, args) for table in tables.values()]
    return max(codes)


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("names", nargs="*", metavar="NAME", help="of a table; none: list them")
    made.add_argument("--texts", help="folder of the texts, or hub (default: ../shared/data)")
    made.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    made.add_argument("--short", action="store_true", help="a few slices: does the way work?")
    made.add_argument("--keep", action="store_true", help="replace the committed results file")
    return made


def unknown(name: str, names: Sequence[str]) -> str:
    """One sentence with the near name."""
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no table is named {name}: {hint}make reproduce lists all"


def inputs(table: Table, texts: Path) -> list[Found]:
    """Every input of the table, looked for."""
    known = registry(ROOT).inputs
    return [look(known[name], texts, (ROOT, ROOT / "benchmarks")) for name in table.inputs]


def fetched(tables: Iterable[Table]) -> Path:
    """A folder with what the hub has of the tables' inputs; what is there already stays."""
    folder = ROOT / "results/reproduce/texts"
    for name in dict.fromkeys(name for table in tables for name in table.inputs):
        known = registry(ROOT).inputs[name]
        if known.hub is not None and look(known, folder).problem:
            print(f"fetching {name}: {known.get}", flush=True)
            fetch(name, known.hub, ROOT, folder, from_hub)
    return folder


def one(table: Table, texts: Path, args: argparse.Namespace) -> int:
    """Make one results file again; the exit code."""
    found = inputs(table, texts)
    folder = ROOT / "results/reproduce" / (table.name + ("-short" if args.short else ""))
    job = Job(ROOT, table, folder, args.short)
    print(f"{table.name}: {minutes(table.file(ROOT))} as published; folder {folder}")
    problems = [one.problem for one in found if one.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.dry_run:
        for command in filter(None, [*job.commands(), job.keeping()]):
            print(f"$ {shlex.join(command)}")
        return 0
    if problems:
        return 2
    job.lay_out({one.name: one.path for one in found if one.path})
    job.run()
    code = report(table, job)
    if args.keep and not args.short:
        print("kept:", *(path.relative_to(ROOT) for path in job.publish()))
    return code


def report(table: Table, job: Job) -> int:
    """Print which numbers came again; 1 where one of quality did not."""
    if not table.file(ROOT).is_file():
        print(f"nothing is published yet under {table.name}; new: {job.new}")
        return 0
    new = json.loads(job.new.read_text(encoding="utf-8"))
    pairs = compare(json.loads(table.file(ROOT).read_text(encoding="utf-8")), new)
    made = [pair for pair in pairs if pair.again is not None or not job.short]
    other = [pair for pair in made if not pair.agrees]
    if other:
        Console(width=140).print(grid(other))
    if not pairs:
        print("its tables are of times and counts of this machine: see the new file")
        print(f"new: {job.new}")
        return 0
    fewer = f", {len(pairs) - len(made)} not made by the short form" if job.short else ""
    print(f"{len(made) - len(other)} of {len(made)} numbers agree with {table.name}.json{fewer}")
    lines = (file.with_suffix(".jsonl") for file in (table.file(ROOT), job.new))
    if not table.speed:
        print(shared(*lines))
    print(f"new: {job.new}")
    if table.speed:
        print("times depend on the machine: shown, not judged")
    if job.short:
        print("the short form reads fewer texts: its numbers are shown, not judged")
    return 1 if other and not (table.speed or job.short) else 0


def grid(pairs: Sequence[Pair]) -> Grid:
    """The numbers that differ."""
    made = Grid("number", "published", "interval", "again")
    for pair in pairs:
        own = pair.published
        again = "missing" if pair.again is None else f"{pair.again:.4g}"
        made.add_row(pair.name, f"{own.value:.4g}", f"{own.low:.4g} to {own.high:.4g}", again)
    return made


if __name__ == "__main__":
    raise SystemExit(main())
