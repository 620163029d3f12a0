"""Make a published table again, and say which of its numbers came again.

Usage: python benchmarks/reproduce.py [NAME ...] [--texts FOLDER|hub] [--dry-run] [--short] [--keep]

Without a name: every table with its time, inputs and commands.  docs/measurements.md explains.
Exit codes: 0 all agrees, 1 a number of quality left its interval, 2 an input is missing or is
another file, or the name is not known; a command's own code where one fails.

A table is made in a folder of its own, laid out as its commands want it: they run in ``clone``,
which links to this project's benchmarks, and find texts and task files in ``../shared``.  Their
results go to ``runs/1``, ``runs/2``, ..., the new results file to ``new``.  What is finished is not
run again.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hub_texts import fetch, from_hub
from reproduce_compare import Pair, compare
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT.parent / "shared/data"
HOURS = 48
"""After so long a command is stopped; the next call goes on."""
SAME = 1e-4
"""Values of items closer than that are the same; printed digits are fewer."""

Registry = Mapping[str, Mapping[str, Any]]


def main(words: Sequence[str] | None = None) -> int:
    """List, show or run."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("names", nargs="*", metavar="NAME", help="of a table; none: list them")
    options.add_argument("--texts", help="folder of the texts, or hub (default: ../shared/data)")
    options.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    options.add_argument("--short", action="store_true", help="a few slices: does the way work?")
    options.add_argument("--keep", action="store_true", help="replace the committed results file")
    args = options.parse_args(words)
    known: Registry = yaml.safe_load((ROOT / "benchmarks/tables.yaml").read_text("utf-8"))
    texts = TEXTS if args.texts in (None, "hub") else Path(args.texts).resolve()
    if not args.names:
        print(listing(known, texts))
        return 0
    names = sorted({*known["results"], *known["blocks"]})
    tables: list[str] = []
    for name in args.names:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            print(f"no table is named {name}: {hint}make reproduce lists all", file=sys.stderr)
            return 2
        tables += known["blocks"].get(name, [name])
    if args.texts == "hub" and not args.dry_run:
        texts = fetched(tables, known)
    return max(make(Job.of(name, known, args.short), known, texts, args) for name in set(tables))


# Inputs: files that the commands read, told by their checksums.


@dataclass(frozen=True)
class Found:
    """An input on this machine.  ``problem``: one sentence; None where all is well."""

    name: str
    path: Path | None
    problem: str | None


def look(name: str, facts: Mapping[str, Any], texts: Path, *others: Path) -> Found:
    """Find an input in the folder ``texts``, beside it, or in ``others``, and check it."""
    places = (texts, texts.parent, *others)
    path = next((place / name for place in places if (place / name).exists()), None)
    fetched = ", or TEXTS=hub fetches it" if "hub" in facts else ""
    wanted = (
        f"Expected: sha256 {facts['sha256']}. Where to get it: {facts['get'].strip()}. Put it into "
        f"a folder and give that: TEXTS=folder{fetched}"
    )
    if path is None:
        return Found(name, None, f"{name} is missing in {texts}. {wanted}")
    checksum = sha256(path, facts.get("files", ("*",)))
    if checksum == facts["sha256"]:
        return Found(name, path, None)
    return Found(name, path, f"{path} is another file: its sha256 is {checksum}. {wanted}")


def sha256(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """Checksum of a file; of a folder that of the lines "checksum  name" of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted({file for pattern in patterns for file in path.glob(pattern)})
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def fetched(tables: Sequence[str], known: Registry) -> Path:
    """A folder with what the hub has of the tables' inputs; what is there already stays."""
    folder = ROOT / "results/reproduce/texts"
    inputs = [name for table in tables for name in known["results"][table].get("inputs", ())]
    for name in dict.fromkeys(inputs):
        facts = known["inputs"][name]
        if "hub" in facts and look(name, facts, folder).problem:
            print(f"fetching {name}: {facts['get']}", flush=True)
            fetch(name, facts["hub"], ROOT, folder, from_hub)
    return folder


# One table.


@dataclass(frozen=True)
class Job:
    """One table to be made again below ``folder``; ``facts`` is its entry in tables.yaml."""

    name: str
    facts: Mapping[str, Any]
    folder: Path
    short: bool
    root: Path = ROOT

    @classmethod
    def of(cls, name: str, known: Registry, short: bool) -> Job:
        folder = ROOT / "results/reproduce" / (name + ("-short" if short else ""))
        return cls(name, known["results"][name], folder, short)

    @property
    def published(self) -> Path:
        return self.root / f"benchmarks/results/{self.name}.json"

    @property
    def new(self) -> Path:
        return self.folder / f"new/{self.name}.json"

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    def commands(self) -> list[list[str]]:
        """What is run, as typed; ``dart-llm`` with a place for its results."""
        return [[*self._command(n, run)] for n, run in enumerate(self.facts["run"], 1)]

    def _command(self, number: int, run: str) -> Iterator[str]:
        words = shlex.split(run)
        if self.short and "short_grid" in self.facts:
            words[-1] = "short.yaml"
        yield from words
        if words[0] == "dart-llm":
            yield from ("--experiment-name", str(number), "--results-dir", "../runs")
        if self.short:
            yield from shlex.split(self.facts.get("short", ""))

    def keeping(self) -> list[str]:
        """What writes the new results file; empty where the commands do."""
        folders = [str(self._newest(number)) for number, _ in enumerate(self.facts["run"], 1)]
        words = shlex.split(self.facts.get("keep", ""))
        return [part for word in words for part in (folders if word == "FOLDERS" else [word])]

    def _newest(self, number: int) -> Path:
        """The newest results folder of a command; what it will be called where there is none."""
        made = sorted((self.folder / f"runs/{number}").glob("*/config.json"))
        return made[-1].parent if made else Path(f"../runs/{number}/TIME")

    def is_finished(self, number: int) -> bool:
        """Whether the command of that number wrote a complete results folder."""
        config = self._newest(number) / "config.json"
        return config.is_file() and json.loads(config.read_text())["status"] == "complete"

    def lay_out(self, inputs: Mapping[str, Path]) -> None:
        """Make the folders and links that the commands want."""
        shared = self.folder / "shared/data"
        for folder in (self.clone, shared, self.folder / "new", self.folder / "runs"):
            folder.mkdir(parents=True, exist_ok=True)
        links = {self.clone / "benchmarks": self.root / "benchmarks"}
        for name, path in inputs.items():
            model, tasks = name.endswith(".gguf"), name == "tasks"
            links[(self.clone if model else shared.parent if tasks else shared) / name] = path
        for place, target in links.items():
            place.unlink(missing_ok=True)
            place.symlink_to(target.resolve())
        if self.short and "short_grid" in self.facts:
            self._write_short_grid()

    def _write_short_grid(self) -> None:
        """The grid of the sweep with fewer methods and items."""
        grid = yaml.safe_load((self.root / self.facts["run"][0].split()[-1]).read_text("utf-8"))
        fewer = dict(self.facts["short_grid"])
        limit = fewer.pop("limit")
        options = {task: {**facts, "limit": limit} for task, facts in grid["task_options"].items()}
        text = yaml.safe_dump({**grid, **fewer, "task_options": options}, sort_keys=False)
        (self.clone / "short.yaml").write_text(text, encoding="utf-8")

    def run(self) -> None:
        """Run what is not finished, then keep; raises ``SystemExit`` with a command's exit code."""
        for number, words in enumerate(self.commands(), 1):
            if words[0] == "dart-llm" and self.is_finished(number):
                print(f"finished before: {shlex.join(words)}")
            else:
                self._call(words)
        if keeping := self.keeping():
            self._call(keeping)

    def _call(self, words: list[str]) -> None:
        print(f"$ {shlex.join(words)}", flush=True)
        variables = {**os.environ, "DART_KEPT_RESULTS": str(self.folder.resolve() / "new")}
        command = [*program(words[0]), *words[1:]]
        done = subprocess.run(command, cwd=self.clone, env=variables, timeout=HOURS * 3600)
        if done.returncode:
            print(f"stopped with exit code {done.returncode}; the same call goes on from here")
            raise SystemExit(done.returncode)

    def publish(self) -> list[Path]:
        """Put the new files in the place of the committed ones."""
        files = sorted(self.new.parent.glob(f"{self.name}.json*"))
        return [Path(shutil.copy(file, self.published.with_name(file.name))) for file in files]


def program(name: str) -> list[str]:
    """``python`` and ``dart-llm`` of the environment that runs this."""
    module = ["-m", "dart_llm"] if name == "dart-llm" else []
    return [sys.executable, *module]


def make(job: Job, known: Registry, texts: Path, args: argparse.Namespace) -> int:
    """Make one results file again; the exit code."""
    inputs = job.facts.get("inputs", ())
    others = (ROOT, ROOT / "benchmarks")
    found = [look(name, known["inputs"][name], texts, *others) for name in inputs]
    print(f"{job.name}: {minutes(job.published)} as published; folder {job.folder}")
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
    code = report(job)
    if args.keep and not args.short:
        print("kept:", *(path.relative_to(ROOT) for path in job.publish()))
    return code


# What came again.


def report(job: Job) -> int:
    """Print which numbers came again; 1 where one of quality did not."""
    speed = job.facts.get("speed", False)
    if not job.published.is_file():
        print(f"nothing is published yet under {job.name}; new: {job.new}")
        return 0
    published, again = (json.loads(path.read_text("utf-8")) for path in (job.published, job.new))
    pairs = compare(published, again)
    made = [pair for pair in pairs if pair.again is not None or not job.short]
    other = [pair for pair in made if not pair.agrees]
    if other:
        Console(width=140).print(grid(other))
    fewer = f", {len(pairs) - len(made)} not made by the short form" if job.short else ""
    if pairs:
        agreeing = len(made) - len(other)
        print(f"{agreeing} of {len(made)} numbers agree with {job.name}.json{fewer}")
    if not speed:
        print(items_again(*(path.with_suffix(".jsonl") for path in (job.published, job.new))))
    print(f"new: {job.new}")
    if speed:
        print("times depend on the machine: shown, not judged")
    if job.short:
        print("the short form reads fewer texts: its numbers are shown, not judged")
    return 1 if other and not (speed or job.short) else 0


def grid(pairs: Sequence[Pair]) -> Table:
    """The numbers that differ."""
    table = Table("number", "published", "interval", "again")
    for pair in pairs:
        number = pair.published
        again = "missing" if pair.again is None else f"{pair.again:.4g}"
        ends = f"{number.low:.4g} to {number.high:.4g}"
        table.add_row(pair.name, f"{number.value:.4g}", ends, again)
    return table


def items_again(published: Path, again: Path) -> str:
    """How many losses and scores of single items came again, of those that both files hold."""
    old, new = item_values(published), item_values(again)
    off = [abs(old[key] - new[key]) for key in old.keys() & new.keys()]
    if not off:
        return "items: none that both files hold"
    return (
        f"items: {sum(distance <= SAME for distance in off)} of {len(off)} values that both files "
        f"hold are the same, the largest difference is {max(off):.2g}"
    )


def item_values(path: Path) -> dict[tuple[str, ...], float]:
    """Every loss and score of an item, by where it stands; none of a file that is not there."""
    if not path.is_file():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {key: value for row in rows for key, value in _row_values(row)}


def _row_values(row: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    if "measurement" in row:  # evaluation-*
        measured = row["measurement"]
        place = (row["label"], measured["task"], measured["protocol"])
        for item in measured["items"]:
            for name, value in item.items():
                counted = name in ("id", "tokens", "pruned_tokens")
                if not counted and isinstance(value, int | float):
                    yield (*place, str(item["id"]), name), float(value)
        return
    values: dict[str, Any] = {}
    if row.get("loss"):  # drift-*, passages
        values = {str(topic["topic"]): topic["mean_loss"] for topic in row["loss"]["topics"]}
    elif row.get("metrics"):  # drift-*, prompts
        values = row["metrics"]
    for name, value in values.items():
        if value is not None:
            yield (row["label"], row["source"], str(row["seed"]), name), value


# All tables.


def listing(known: Registry, texts: Path) -> str:
    """A paragraph per results file: its tables, its time, its inputs and its commands."""
    others = (ROOT, ROOT / "benchmarks")
    states = {}
    for name, facts in known["inputs"].items():
        found = look(name, facts, texts, *others)
        states[name] = "here" if not found.problem else "OTHER" if found.path else "MISSING"
    parts = []
    for name, facts in known["results"].items():
        inputs = ", ".join(f"{one} ({states[one]})" for one in facts.get("inputs", ())) or "none"
        blocks = [block for block, files in known["blocks"].items() if name in files]
        also = f"  also: {', '.join(blocks)}\n" if blocks else ""
        took = minutes(ROOT / f"benchmarks/results/{name}.json")
        commands = "".join(f"  $ {command}\n" for command in facts["run"])
        parts.append(f"{name}\n{also}  took: {took}; inputs: {inputs}\n{commands}")
    parts.append(
        "make reproduce TABLE=name runs one; DRY=1 shows what would run, SHORT=1 a short form."
    )
    return "\n".join(parts)


def minutes(path: Path) -> str:
    """How long it took, and on what, as the results file says."""
    if not path.is_file():
        return "not measured yet"
    data = json.loads(path.read_text(encoding="utf-8"))
    runs = data.get("runs") or [data]
    seconds = sum(run.get("times", {}).get("total_s", 0) for run in runs)
    noted = data.get("seconds")
    seconds += sum(filter(None, noted.values())) if isinstance(noted, dict) else noted or 0
    rows = data["rows"].values() if isinstance(data.get("rows"), dict) else ()
    seconds += sum(sum(row["all_seconds"]) for row in rows)
    machine = data.get("machine") or runs[0].get("machine") or {}
    where = f"on {machine.get('cores', '?')} cores of {machine.get('processor', '?')}"
    return f"{max(1, round(seconds / 60))} min {where}" if seconds else f"not noted, {where}"


if __name__ == "__main__":
    raise SystemExit(main())
