"""Run the commands behind a published table again and show both tables.

Usage: python benchmarks/reproduce.py [NAME] [--texts FOLDER|hub] [--dry-run]

Without a name: every table.  The commands stand in benchmarks/results/NAME.md.  They run in
results/reproduce/NAME/clone, which links to this project's benchmarks and recipes; texts are linked
from ``--texts`` into ../shared/data.  What is finished is not run again.  Exit codes: 2 where an
input is missing or is another file, or the name is unknown; a command's own code where one fails.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hub_texts import fetch, from_hub  # beside this file
from tables import RESULTS, ROOT, sections

INPUTS: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    (ROOT / "benchmarks/inputs.yaml").read_text("utf-8")
)


def main(words: Sequence[str] | None = None) -> int:
    """List the tables, or run the commands of one."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("name", nargs="?", help="of a table; without it: list them")
    options.add_argument("--texts", default=str(ROOT.parent / "shared/data"),
                         help="folder of the texts, or hub")  # fmt: skip
    options.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    args = options.parse_args(words)
    names = sorted(path.stem for path in RESULTS.glob("*.md"))
    if args.name is None:
        print("\n".join(names))
        return 0
    if args.name not in names:
        near = difflib.get_close_matches(args.name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"no table is named {args.name}: {hint}make reproduce lists all", file=sys.stderr)
        return 2
    commands = sections(args.name)[0].splitlines()
    folder = ROOT / "results/reproduce" / args.name
    inputs = needed(commands)
    texts = fetched(inputs, folder) if args.texts == "hub" else Path(args.texts)
    paths = {name: find(name, texts) for name in inputs}
    problems = [problem(name, path) for name, path in paths.items()]
    print("\n".join(f"$ {command}" for command in commands))
    for text in filter(None, problems):
        print(text, file=sys.stderr)
    if args.dry_run or any(problems):
        return 0 if args.dry_run else 2
    return run(args.name, commands, folder, {k: v for k, v in paths.items() if v})


def needed(commands: Sequence[str]) -> list[str]:
    """The inputs that the commands, or the grids that they name, mention."""
    text = "\n".join(commands)
    grids = (ROOT / word for word in text.split() if word.endswith(".yaml"))
    text += "".join(path.read_text("utf-8") for path in grids if path.is_file())
    return [name for name in INPUTS if name in text]


def find(name: str, texts: Path) -> Path | None:
    """An input in the folder of the texts, beside it, or in this repository."""
    places = (texts, texts.parent, ROOT, ROOT / "benchmarks")
    return next((place / name for place in places if (place / name).exists()), None)


def problem(name: str, path: Path | None) -> str | None:
    """Why an input cannot be used, in one sentence; None where it can."""
    facts = INPUTS[name]
    wanted = f"Expected: sha256 {facts['sha256']}. Where to get it: {facts['get'].strip()}."
    if path is None:
        return f"{name} is missing. {wanted} Give its folder with TEXTS=folder, or TEXTS=hub."
    checksum = sha256(path, facts.get("files", ("*",)))
    return None if checksum == facts["sha256"] else f"{path} has sha256 {checksum}. {wanted}"


def sha256(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """Checksum of a file; of a folder that of the lines "checksum  name" of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted({file for pattern in patterns for file in path.glob(pattern)})
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def fetched(inputs: Sequence[str], folder: Path) -> Path:
    """A folder with what the hub has of the inputs; files that are there stay."""
    texts = folder.parent / "texts"
    for name in inputs:
        if "hub" in INPUTS[name] and problem(name, find(name, texts)):
            print(f"fetching {name}: {INPUTS[name]['get']}", flush=True)
            fetch(name, INPUTS[name]["hub"], ROOT, texts, from_hub)
    return texts


def run(name: str, commands: Sequence[str], folder: Path, paths: Mapping[str, Path]) -> int:
    """Run the commands one after the other, then print the kept tables and the new ones."""
    clone, shared = folder / "clone", folder / "shared"
    links = {clone / place: ROOT / place for place in ("benchmarks", "recipes")}
    for one, path in paths.items():
        model, tasks = one.endswith(".gguf"), one == "tasks"
        links[(clone if model else shared if tasks else shared / "data") / one] = path
    for place, target in links.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target.resolve())
    variables = {**os.environ, "DART_KEPT_RESULTS": str((folder / "new").resolve())}
    for number, command in enumerate(commands, 1):
        program, *words = shlex.split(command)
        if program == "dart-llm":
            words = ["-m", "dart_llm", *words, "--experiment-name", str(number)]
            words += ["--results-dir", "../runs"]
        done = subprocess.run([sys.executable, *words], cwd=clone, env=variables)
        if done.returncode:
            print(f"stopped with exit code {done.returncode}; the same call resumes")
            return done.returncode
    print(f"\nkept:\n\n{sections(name)[2]}\n\nagain:\n")
    for path in sorted([*folder.glob("runs/*/*/*.md"), *folder.glob("new/*.json")]):
        print(path.read_text("utf-8") if path.suffix == ".md" else path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
