"""What the docs say of results files: tables of files and of keys, parsed from the Markdown.

A table ``| file | of | ... |`` lists files, the commands that write them, and by its links the
section that holds their keys.  A table whose first column is ``key``, ``column`` or ``tensor``
lists what is in a file: paths with dots, ``<name>`` for a part that is not fixed.  A key that is a
link has the keys of the section that it leads to below it.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts_of import script

EVERY = "every command"
ANYTHING = "<anything>"
"""A last part that stands for keys of any depth."""
KINDS = ("key", "column", "tensor")
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """A documented key; ``section``: where it stands, ``below``: the section of its own keys."""

    section: str
    name: str
    below: str | None = None


@dataclass(frozen=True)
class File:
    """A documented file; ``of``: commands, ``section``: of its keys, None where it has none."""

    name: str
    of: frozenset[str]
    section: str | None


@dataclass
class Docs:
    """Sections by ``page#anchor``, and the files of all pages."""

    keys: dict[str, list[Key]] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)

    def of(self, command: str) -> list[File]:
        return [one for one in self.files if command in one.of or EVERY in one.of]

    def entries(self, section: str, seen: tuple[str, ...] = ()) -> Iterator[tuple[Path_, Key]]:
        """Every path of a section, those of linked sections below their key."""
        for key in self.keys[section]:
            path = tuple(key.name.split("."))
            yield path, key
            if key.below is not None and key.below not in seen:
                for rest, origin in self.entries(key.below, (*seen, section)):
                    yield (*path, *rest), origin


def read(root: Path, pages: Iterable[str]) -> Docs:
    found = Docs()
    for page in pages:
        text = (root / page).read_text(encoding="utf-8")
        for anchor, body in sections(text):
            for header, rows in tables(body):
                if header[:2] == ["file", "of"]:
                    found.files += [one for row in rows for one in _files(page, row)]
                elif header[0] in KINDS:
                    section = f"{page}#{anchor}"
                    keys = found.keys.setdefault(section, [])
                    keys += [key for row in rows for key in _keys(page, section, row)]
    return found


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Every heading's anchor, and what stands below it before the next heading."""
    links, seen = script("doc_links"), dict[str, int]()
    parts = re.split(r"^(#{1,6} .+)$", links.without_code(text), flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        slug = links.slug(heading.lstrip("#").strip())
        number = seen.get(slug, 0)
        seen[slug] = number + 1
        yield (f"{slug}-{number}" if number else slug), body


def tables(body: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of every pipe table."""
    for block in re.findall(r"(?:^\|.*\n?)+", body, flags=re.MULTILINE):
        lines = [_cells(line) for line in block.splitlines()]
        if len(lines) > 2:
            yield lines[0], lines[2:]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _spans(page: str, cell: str) -> Iterator[tuple[str, str | None]]:
    """Code spans of a cell, with the section that they link to."""
    for linked, target, plain in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)|`([^`]+)`", cell):
        file, _, anchor = target.partition("#")
        own = f"{Path(page).parent.as_posix()}/{file}" if file else page
        yield linked or plain, f"{own}#{anchor}" if linked else None


def _keys(page: str, section: str, row: list[str]) -> Iterator[Key]:
    for name, below in _spans(page, row[0]):
        yield Key(section, name, below)


def _files(page: str, row: list[str]) -> Iterator[File]:
    commands = re.findall(r"`([^`]+)`", row[1]) or [row[1]]
    for name, section in _spans(page, row[0]):
        yield File(name, frozenset(commands), section)


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(<[^>]+>)", name)
    return re.compile("".join(".+" if part.startswith("<") else re.escape(part) for part in parts))


def fits(name: str, given: str) -> bool:
    """Whether a documented name, perhaps with ``<...>`` in it, stands for the given one."""
    return _pattern(name).fullmatch(given) is not None


def _match(path: Path_, entries: list[tuple[Path_, Key]]) -> Key | bool | None:
    """The key that documents ``path``; True where it only holds documented ones; else None."""
    whole = ".".join(path)
    for wanted, key in entries:
        if whole == ".".join(wanted):
            return key
    for wanted, key in entries:
        deep = wanted[-1] == ANYTHING and len(path) >= len(wanted)
        if (len(wanted) == len(path) or deep) and all(map(fits, wanted, path)):
            return key
    for wanted, _ in entries:
        if len(wanted) > len(path) and all(map(fits, wanted, path)):
            return True
    return None


@dataclass
class Check:
    """What was written, held against what is documented.  ``hits``: keys that were seen."""

    docs: Docs
    hits: set[Key] = field(default_factory=set)
    files: set[tuple[str, str]] = field(default_factory=set)
    """Command and documented name of every file that was seen."""
    reached: set[str] = field(default_factory=set)

    def file(self, command: str, name: str, paths: Iterable[Path_]) -> list[str]:
        """One sentence per thing in a file of ``command`` that the docs lack.

        Where a file is documented several times, the section that fits best is taken.
        """
        fitting = [one for one in self.docs.of(command) if fits(one.name, name)]
        exact = [one for one in fitting if one.name == name]
        if not fitting:
            return [f"{command}: the file {name} is not documented"]
        given = list(paths)
        tried = [(one, *self._keys(one, given)) for one in exact or fitting]
        found, hits, lacking = min(tried, key=lambda one: len(one[2]))
        self.files.add((command, found.name))
        self.hits |= hits
        where = found.section or "the docs"
        return [f"{command}: {name} has {path}, which {where} lacks" for path in lacking]

    def _keys(self, file: File, paths: list[Path_]) -> tuple[set[Key], list[str]]:
        """The documented keys that ``paths`` are, and the paths that are none."""
        entries = [] if file.section is None else list(self.docs.entries(file.section))
        self.reached |= {file.section or "", *(key.section for _, key in entries)} - {""}
        found = {path: _match(path, entries) for path in paths}
        hits = {key for key in found.values() if isinstance(key, Key)}
        return hits, [".".join(path) for path, key in found.items() if key is None]

    def unseen_files(self, command: str) -> list[str]:
        """Documented files that ``command`` did not write."""
        names = {one.name for one in self.docs.of(command)}
        return sorted(names - {name for found, name in self.files if found == command})

    def unseen_keys(self) -> list[str]:
        """Documented keys of the sections that were reached which no file has."""
        known = [key for section in self.reached for key in self.docs.keys[section]]
        return sorted(f"{key.section}: {key.name}" for key in known if key not in self.hits)


def paths_in(file: Path) -> list[Path_]:
    """Every path of keys in a JSON, JSONL, CSV or safetensors file; nothing for other files."""
    found: dict[Path_, None] = {}
    if file.suffix == ".json":
        found.update(dict.fromkeys(_walk(json.loads(file.read_text(encoding="utf-8")))))
    elif file.suffix == ".jsonl":
        for line in file.read_text(encoding="utf-8").splitlines():
            found.update(dict.fromkeys(_walk(json.loads(line))))
    elif file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as rows:
            found.update(dict.fromkeys(tuple(name.split(".")) for name in next(csv.reader(rows))))
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            names = [tuple(name.rsplit(".", 2)[-3:]) for name in tensors.keys()]  # noqa: SIM118
            found.update(dict.fromkeys(names))
            found.update(dict.fromkeys(("metadata", name) for name in tensors.metadata() or ()))
    return list(found)


def _walk(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield (*at, name)
            yield from _walk(item, (*at, name))
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, at)
