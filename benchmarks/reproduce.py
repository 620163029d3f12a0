"""Run the commands behind a published table again and show both tables.

Usage: python benchmarks/reproduce.py [NAME] [--texts FOLDER|hub] [--dry-run]

Without a name it lists the tables.  The commands come from benchmarks/results/NAME.md.  They run in
results/reproduce/NAME/clone, which links to this project's benchmarks and recipes; texts are linked
from ``--texts`` into ../shared/data.  Finished work is not repeated.  Exit codes: 2 if an input is
missing or has another checksum, or if the name is unknown; the command's code if a command fails.
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
    """List the tables, or run the commands of a table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("name", nargs="?", help="name of a table (default: list all tables)")
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
    """The inputs that are named in the commands or in the grids that the commands use."""
    text = "\n".join(commands)
    grids = (ROOT / word for word in text.split() if word.endswith(".yaml"))
    text += "".join(path.read_text("utf-8") for path in grids if path.is_file())
    return [name for name in INPUTS if name in text]


def find(name: str, texts: Path) -> Path | None:
    """The path of an input: in the folder of the texts, its parent, or this repository."""
    folders = (texts, texts.parent, ROOT, ROOT / "benchmarks")
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def problem(name: str, path: Path | None) -> str | None:
    """Why an input cannot be used; None if it can."""
    facts = INPUTS[name]
    wanted = f"Expected: sha256 {facts['sha256']}. Where to get it: {facts['get'].strip()}."
    if path is None:
        return f"{name} is missing. {wanted} Give its folder with TEXTS=folder, or TEXTS=hub."
    checksum = sha256(path, facts.get("files", ("*",)))
    return None if checksum == facts["sha256"] else f"{path} has sha256 {checksum}. {wanted}"


def sha256(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """Checksum of a file, or, for a folder, of the lines "checksum  name" of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted({file for pattern in patterns for file in path.glob(pattern)})
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def fetched(inputs: Sequence[str], folder: Path) -> Path:
    """The folder of the inputs that the hub has, after fetching those that are missing."""
    texts = folder.parent / "texts"
    for name in inputs:
        if "hub" in INPUTS[name] and problem(name, find(name, texts)):
            print(f"fetching {name}: {INPUTS[name]['get']}", flush=True)
            fetch(name, INPUTS[name]["hub"], ROOT, texts, from_hub)
    return texts


def run(name: str, commands: Sequence[str], folder: Path, paths: Mapping[str, Path]) -> int:
    """Run the commands one after the other, then print the published tables and the new ones."""
    clone, shared = folder / "clone", folder / "shared"
    links = {clone / part: ROOT / part for part in ("benchmarks", "recipes")}
    for input_name, path in paths.items():
        model, tasks = input_name.endswith(".gguf"), input_name == "tasks"
        links[(clone if model else shared if tasks else shared / "data") / input_name] = path
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve())
    variables = {**os.environ, "DART_KEPT_RESULTS": str((folder / "new").resolve())}
    for number, command in enumerate(commands, 1):
        program, *words = shlex.split(command)
        if program == "dart-llm":
            words = ["-m", "dart_llm", *words, "--experiment-name", str(number)]
            words += ["--results-dir", "../runs"]
        done = subprocess.run([sys.executable, *words], cwd=clone, env=variables)
        if done.returncode:
            print(f"stopped with exit code {done.returncode}; the same command resumes")
            return done.returncode
    print(f"\npublished:\n\n{sections(name)[2]}\n\nreproduced:\n")
    for path in sorted([*folder.glob("runs/*/*/*.md"), *folder.glob("new/*.json")]):
        print(path.read_text("utf-8") if path.suffix == ".md" else path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
