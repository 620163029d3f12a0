"""Run the commands of one published table in a folder of its own, and keep what they made.

The folder is laid out as the commands want it: they run in ``clone``, which links to this
project's benchmarks, and find texts and task files in ``../shared``.  Their results go to
``runs/1``, ``runs/2``, ..., the new results file to ``new``.  What is finished is not run again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from table_registry import Table

HOURS = 48
"""After so long a command is stopped; the next call goes on."""


@dataclass(frozen=True)
class Job:
    """One table to be made again below ``folder``."""

    root: Path
    table: Table
    folder: Path
    short: bool

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    @property
    def new(self) -> Path:
        """The new results file."""
        return self.folder / "new" / f"{self.table.name}.json"

    def commands(self) -> list[list[str]]:
        """What is run, as typed; ``dart-llm`` with a place for its results."""
        return [list(self._command(n, run)) for n, run in enumerate(self.table.run, 1)]

    def _command(self, number: int, run: str) -> Iterator[str]:
        words = shlex.split(run)
        if self.short and self.table.short_grid is not None:
            words[-1] = "short.yaml"
        yield from words
        if words[0] == "dart-llm":
            yield from ("--experiment-name", str(number), "--results-dir", "../runs")
        if self.short:
            yield from shlex.split(self.table.short or "")

    def keeping(self) -> list[str]:
        """What writes the new results file; empty where the commands do."""
        folders = [str(self._finished(number)) for number, _ in enumerate(self.table.run, 1)]
        words = shlex.split(self.table.keep or "")
        return [part for word in words for part in (folders if word == "FOLDERS" else [word])]

    def _finished(self, number: int) -> Path:
        """The newest results folder of a command; what it will be called where there is none."""
        own = sorted((self.folder / "runs" / str(number)).glob("*/config.json"))
        return own[-1].parent if own else Path(f"../runs/{number}/TIME")

    def is_finished(self, number: int) -> bool:
        """Whether the command of that number wrote a complete results folder."""
        config = self._finished(number) / "config.json"
        if not config.is_file():
            return False
        return bool(json.loads(config.read_text("utf-8")).get("status") == "complete")

    def lay_out(self, inputs: Mapping[str, Path]) -> None:
        """Make the folders and links that the commands want."""
        shared = self.folder / "shared" / "data"
        for folder in (self.clone, shared, self.folder / "new", self.folder / "runs"):
            folder.mkdir(parents=True, exist_ok=True)
        _link(self.clone / "benchmarks", self.root / "benchmarks")
        for name, path in inputs.items():
            model, tasks = name.endswith(".gguf"), name == "tasks"
            place = self.clone if model else shared.parent if tasks else shared
            _link(place / name, path)
        if self.short and self.table.short_grid is not None:
            self._write_short_grid()

    def _write_short_grid(self) -> None:
        """The grid of the sweep with fewer methods and items."""
        source = self.root / shlex.split(self.table.run[0])[-1]
        grid = yaml.safe_load(source.read_text(encoding="utf-8"))
        own = dict(self.table.short_grid or {})
        limit = own.pop("limit")
        options = {task: {**facts, "limit": limit} for task, facts in grid["task_options"].items()}
        text = yaml.safe_dump({**grid, **own, "task_options": options}, sort_keys=False)
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
        done = subprocess.run(
            [*program(words[0]), *words[1:]],
            cwd=self.clone,
            env={**os.environ, "DART_KEPT_RESULTS": str(self.folder.resolve() / "new")},
            timeout=HOURS * 3600,
            check=False,
        )
        if done.returncode:
            print(f"stopped with exit code {done.returncode}; the same call goes on from here")
            raise SystemExit(done.returncode)

    def publish(self) -> list[Path]:
        """Put the new files in the place of the committed ones."""
        files = sorted(self.new.parent.glob(f"{self.table.name}.json*"))
        results = self.root / "benchmarks/results"
        return [Path(shutil.copy(file, results / file.name)) for file in files]


def _link(place: Path, target: Path) -> None:
    if place.is_symlink():
        place.unlink()
    place.symlink_to(target.resolve())


def program(name: str) -> list[str]:
    """``python`` and ``dart-llm`` of the environment that runs this."""
    script = Path(sys.executable).parent / "dart-llm"
    if name == "dart-llm":
        return [str(script)] if script.is_file() else [sys.executable, "-m", "dart_llm"]
    return [sys.executable]
