"""benchmarks/tables.yaml: the commands, inputs and blocks behind the published tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REGISTRY = "benchmarks/tables.yaml"
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Input:
    """A file or folder that commands read: its checksum, and where it comes from."""

    name: str
    sha256: str
    get: str
    files: tuple[str, ...] = ()
    hub: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Table:
    """What makes one results file; tables.yaml says what the fields mean."""

    name: str
    run: tuple[str, ...]
    keep: str | None = None
    inputs: tuple[str, ...] = ()
    short: str | None = None
    short_grid: Mapping[str, Any] | None = None
    speed: bool = False
    note: str | None = None
    items: str | None = None

    def file(self, root: Path) -> Path:
        """The committed results file."""
        return root / RESULTS / f"{self.name}.json"

    def command(self, recorded: str) -> str:
        """The command as it can be typed, of one whose paths a results file cut to file names."""
        return next((run for run in self.run if cut(run) == recorded), recorded)


@dataclass(frozen=True)
class Registry:
    """The whole file.  ``blocks``: block of the docs -> results files that it is made of."""

    inputs: Mapping[str, Input]
    tables: Mapping[str, Table]
    blocks: Mapping[str, tuple[str, ...]]

    def of_block(self, block: str) -> tuple[Table, ...]:
        """The tables behind a block or of a results file; raises ``KeyError`` for neither."""
        return tuple(self.tables[name] for name in self.blocks.get(block, (block,)))

    def names(self) -> list[str]:
        """Every name that ``of_block`` knows."""
        return sorted({*self.tables, *self.blocks})


@cache
def registry(root: Path) -> Registry:
    """Read the file below ``root``; without one nothing is known."""
    if not (root / REGISTRY).is_file():
        return Registry({}, {}, {})
    data = yaml.safe_load((root / REGISTRY).read_text(encoding="utf-8"))
    inputs = {name: Input(name, **_lists(facts)) for name, facts in data["inputs"].items()}
    tables = {name: Table(name, **_lists(facts)) for name, facts in data["results"].items()}
    blocks = {name: tuple(files) for name, files in data["blocks"].items()}
    return Registry(inputs, tables, blocks)


def _lists(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}


def cut(command: str) -> str:
    """The command as results files record it: paths cut to file names."""
    words = shlex.split(command)
    script = words[0] == "python"  # benchmarks/common.py keeps the folder of the script itself
    cut_words = [Path(word).name if "/" in word else word for word in words]
    return shlex.join([*words[:2], *cut_words[2:]] if script else cut_words)
