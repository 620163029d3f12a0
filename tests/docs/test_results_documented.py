"""Every results file, key and column is documented, and what is documented is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from documented import Check, Docs, paths_in, read
from shells import ROOT
from written import COMMANDS, prepare
from written_alone import FILES

PAGES = (
    *(f"docs/results{part}.md" for part in ("", "-evaluation", "-drift", "-inspect", "-bench")),
    *(f"docs/{page}.md" for page in ("drift", "chat", "engine")),
)
CONFIG = "docs/results.md#configjson"
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
STAMP = re.compile(r"\d{8}-\d{6}(?:-\d+)?")
MODELLESS = (
    "ffn-speed",
    "interrupts",
    "kills",
    "sanitized-steps",
    "serve-malformed",
    "thread-policy",
    "tracer-cost",
)
"""Files of benchmarks for which no checkpoint is loaded."""
UNFINISHED = "an unfinished run"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What every command wrote, by the name of its run."""
    found, before, root = {}, Path.cwd(), tmp_path_factory.mktemp("written")
    (root / "read").mkdir()
    prepare(root / "read")
    try:
        for name in [*COMMANDS, *FILES]:
            found[name] = shutil.copytree(root / "read", root / name.replace(" ", "-"))
            os.chdir(found[name])
            (COMMANDS[name][1] if name in COMMANDS else FILES[name][0])()
    finally:
        os.chdir(before)
    return found


@pytest.fixture(scope="module")
def docs() -> Docs:
    return read(ROOT, PAGES)


@pytest.fixture(scope="module")
def checked(folders: dict[str, Path], docs: Docs) -> tuple[Check, list[str]]:
    """Everything that was written held against the docs, and what they lack."""
    check, problems = Check(docs), []
    for name, (command, _) in COMMANDS.items():
        if command == UNFINISHED:
            (left,) = (folders[name] / "results").rglob("parts.jsonl")
            problems += check.file(command, left.name, paths_in(left))
            continue
        for file in sorted((folders[name] / "results").rglob("*")):
            if file.is_file():
                within = "/".join(file.relative_to(folders[name] / "results").parts[2:])
                problems += check.file(command, STAMP.sub("<time>", within), paths_in(file))
    for command, (_, name) in FILES.items():
        problems += check.file(command, name, paths_in(folders[command] / name))
    return check, problems


def test_what_is_written_is_documented(checked: tuple[Check, list[str]]) -> None:
    assert checked[1] == []


def test_what_is_documented_is_written(checked: tuple[Check, list[str]]) -> None:
    assert checked[0].unseen_keys() == []


def test_every_documented_key_belongs_to_a_file(checked: tuple[Check, list[str]]) -> None:
    assert set(checked[0].docs.keys) == checked[0].reached


@pytest.mark.parametrize("command", sorted({name for name, _ in COMMANDS.values()} - {UNFINISHED}))
def test_every_documented_file_is_written(checked: tuple[Check, list[str]], command: str) -> None:
    assert checked[0].unseen_files(command) == []


def test_every_setting_in_a_configuration_is_a_flag(folders: dict[str, Path], docs: Docs) -> None:
    told = {key.name.split(".")[1] for key in docs.keys[CONFIG] if key.name[:9] == "settings."}
    told -= {"<setting>"}
    pages = dict(re.findall(r"^## dart-llm (.+?)\n(.*?)(?=^## |\Z)", CLI, re.M | re.S))
    seen = 0
    for name, (command, _) in COMMANDS.items():
        page = pages["run" if command in ("demo", UNFINISHED) else command]
        flags = set(re.findall(r"--[a-z][\w-]*", page))
        for file in (folders[name] / "results").rglob("config.json"):
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            asked = {name: value for name, value in settings.items() if name not in told}
            wanted = {f"--{name.replace('_', '-')}" for name in asked}
            shared = {f"--{name.replace('_', '-')}" for name, v in asked.items() if v is None}
            lacking = wanted - flags - (shared & set(re.findall(r"--[a-z][\w-]*", pages["run"])))
            assert lacking == set(), command
            seen += len(wanted)
    assert seen > 300


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem
)
def test_files_of_benchmarks_say_where_they_come_from(path: Path) -> None:
    """What benchmarks/README.md says of each: the command, versions, machine and checkpoint."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    for one in [whole] if "command" in whole else whole["runs"]:
        assert one["command"] and one["versions"]["torch"] and one["machine"]["processor"]
        known = one.get("checkpoint") or one.get("checkpoints") or whole.get("checkpoints")
        if path.stem.startswith("evaluation-"):
            assert all(row["checkpoint"]["sha256"] for row in whole["rows"])
        else:
            assert bool(known) != path.stem.startswith(MODELLESS)
