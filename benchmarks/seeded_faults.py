"""Which tests notice a fault: small faults are put into the program, one at a time.

    python benchmarks/seeded_faults.py --only causality     # faults whose name holds the word
    python benchmarks/seeded_faults.py --out benchmarks/faults/tally.json
    python benchmarks/seeded_faults.py --before REVISION    # the suite of an earlier revision

``benchmarks/faults/*.yaml`` lists the faults: in which file of the package which text (it stands
there once) becomes which other one, and which tests are asked.  A fault is *caught* where one of
those tests fails with it, and the same test passes without it.  Where the program or the tests of
the earlier revision look different, an entry says so under ``before``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "benchmarks" / "faults"
SECONDS = 1500
Row = dict[str, Any]
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", re.MULTILINE)
"""A line of pytest's summary; log lines begin with ERROR too."""


@dataclass(frozen=True)
class Fault:
    """One change of one file that makes the program wrong."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def put_into(self, tree: Path) -> str:
        """Change the file; its text before.

        Raises:
            SystemExit: the text does not stand there exactly once.
        """
        path = tree / "src" / "dart_llm" / self.file
        text = path.read_text("utf-8") if path.is_file() else ""
        if (times := text.count(self.old)) != 1:
            raise SystemExit(f"{self.name}: {self.file} holds its text {times} times, not once")
        path.write_text(text.replace(self.old, self.new), "utf-8")
        return text


def read(only: str, *, before: bool) -> list[Fault]:
    """The listed faults whose name holds ``only``; for the earlier revision where ``before``."""
    faults = []
    for path in sorted(FAULTS.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text("utf-8")):
            changed = entry.pop("before", {})
            row = entry | changed if before else entry
            if only in row["name"]:
                faults.append(Fault(**{**row, "tests": tuple(row["tests"])}))
    return faults


def copy_tree(place: Path, revision: str) -> None:
    """The files of a revision, or of the working tree where none is named."""
    place.mkdir(parents=True)
    if revision:
        archive = subprocess.run(
            ["git", "archive", revision], cwd=ROOT, capture_output=True, check=True
        ).stdout
    else:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        there = [
            name for name in names.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists()
        ]
        archive = subprocess.run(
            ["tar", "-c", "--null", "-T", "-"],
            cwd=ROOT,
            input=b"\0".join(there),
            capture_output=True,
            check=True,
        ).stdout
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive, check=True)
    # Some tests ask git for the files of the project.
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=place, check=True, capture_output=True)


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str, float]:
    """pytest's exit code, the first test that failed, seconds; it stops at the first failure."""
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    started = time.monotonic()
    files = [
        str(one.relative_to(tree))
        for name in tests
        for one in ([tree / name] if "::" in name else sorted(tree.glob(name)))
    ]
    if not files:
        raise SystemExit(f"no such tests: {', '.join(tests)}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, "", time.monotonic() - started
    failed = FAILED.search(done.stdout)
    return done.returncode, failed[1] if failed else "", time.monotonic() - started


def try_fault(fault: Fault, tree: Path) -> Row:
    """What the tests say of one fault."""
    text = fault.put_into(tree)
    try:
        code, test, seconds = run_tests(tree, fault.tests)
    finally:
        (tree / "src" / "dart_llm" / fault.file).write_text(text, "utf-8")
    if code == -1:
        found = "caught: the tests hang"
    elif code == 0:
        found = "not caught"
    elif code in (1, 2) and test:
        clean, _, _ = run_tests(tree, [test])
        found = "caught" if clean == 0 else "unclear: the test fails without the fault too"
    else:
        found = f"unclear: pytest ended with {code}"
    row = {**asdict(fault), "found": found, "by": test, "seconds": round(seconds, 1)}
    print(f"{fault.name}: {found}{' by ' + test if test else ''}, {seconds:.0f} s", flush=True)
    return row


def try_all(faults: list[Fault], revision: str, jobs: int, keep: Callable[[Row], None]) -> None:
    """Every fault, ``jobs`` at a time, each in a tree of its own; ``keep`` takes each row."""
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy_tree(Path(folder) / str(number), revision)
            trees.put(Path(folder) / str(number))

        def one(fault: Fault) -> Row:
            tree = trees.get()
            try:
                return try_fault(fault, tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            for row in pool.map(one, faults):
                keep(row)


def document(rows: list[Row], revision: str) -> dict[str, object]:
    """The tally, with the command that made it."""
    return {
        "command": " ".join(["python", "benchmarks/seeded_faults.py", *sys.argv[1:]]),
        "revision": revision or "the working tree",
        "faults": len(rows),
        "caught": sum(row["found"].startswith("caught") for row in rows),
        "rows": rows,
    }


def known_rows(path: Path | None, faults: list[Fault]) -> list[Row]:
    """Rows of an earlier run that was cut short, of faults that are still the same."""
    if path is None or not path.is_file():
        return []
    same = {fault.name: json.loads(json.dumps(asdict(fault))) for fault in faults}
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return [row for row in rows if {**row, **same.get(row["name"], {"name": ""})} == row]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument(
        "--before", default="", metavar="REVISION", help="the program and the tests of a revision"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="a file for the table, as JSON; what it holds already is kept"
    )
    options = parser.parse_args()
    faults = read(options.only, before=bool(options.before))
    if not faults:
        parser.error(f"no fault's name holds {options.only!r}; benchmarks/faults lists them")
    rows = known_rows(options.out, faults)

    def keep(row: Row) -> None:
        rows.append(row)
        if options.out:
            table = document(rows, options.before)
            options.out.write_text(json.dumps(table, indent=1) + "\n", "utf-8")

    left = [fault for fault in faults if fault.name not in {row["name"] for row in rows}]
    try_all(left, options.before, options.jobs, keep)
    print(f"{document(rows, options.before)['caught']} of {len(rows)} caught")


if __name__ == "__main__":
    main()
