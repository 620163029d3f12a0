"""The commands of tests/doc_commands.yaml run, on a small model in the place of the default one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from dart_llm.cache import cache_folder
from dart_llm.cli.app import app
from dart_llm.data import texts
from shells import ROOT
from stand_in import configuration, stand_in, write_model
from window_cases import records, write

LIST: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    (ROOT / "tests/doc_commands.yaml").read_text(encoding="utf-8")
)
CASES = [(command, how) for commands in LIST.values() for command, how in commands.items()]
SERVING = [(command, how) for command, how in CASES if how.get("serves")]
RUNNING = [(command, how) for command, how in CASES if not how.get("serves")]
NAMES = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B-Instruct")
LINK = re.compile(r"http://127\.0\.0\.1:\d+/")
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: my_questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GRID = "{models: [smollm2-135m], methods: [dense, griffin], tasks: ['perplexity:embedded']}"


def shell_lines(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_of_the_readme_is_run() -> None:
    assert [line for line in shell_lines("README.md") if line not in LIST["README.md"]] == []


@pytest.mark.parametrize("page", LIST)
def test_listed_commands_stand_on_their_page(page: str) -> None:
    assert [command for command in LIST[page] if command not in shell_lines(page)] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, native: None) -> Iterator[Path]:
    """A folder with what the commands name, and a cache that holds the small model."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "recipes"):
        (root / name).symlink_to(ROOT / name)
    model, cache = write_model(root / "model"), root / "cache"
    stand_in(cache, model)
    for name in NAMES:
        shutil.copytree(model, root / name)
    (cache / "dart-llm/native").symlink_to(cache_folder() / "native")
    (root / "my_text.txt").write_text("\n\n".join(map(texts.read, texts.subjects())))
    (root / "my_tasks").mkdir()
    (root / "my_tasks/my_task.yaml").write_text(TASK)
    question = {"question": "What flies?", "choices": ["a bird", "a stone"], "answer": 0}
    (root / "my_questions.jsonl").write_text(3 * (json.dumps(question) + "\n"))
    (root / "my_grid.yaml").write_text(GRID)
    (root / "never.yaml").write_text("never: {drift: never}\n")
    (root / "qwen2.5-1.5b").mkdir()
    (root / "qwen2.5-1.5b/config.json").write_text(configuration().to_json_string())
    write(root / "records.jsonl", records())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DART_CACHE", str(cache))
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        yield root


def words(command: str, how: dict[str, Any]) -> list[str]:
    text = how.get("run", command)
    for old, new in how.get("replace", {}).items():
        assert old in text, "the list swaps a text that the command lacks"
        text = text.replace(old, str(new))
    program, *arguments = shlex.split(f"{text} {how.get('add', '')}")
    assert program == "dart-llm"
    return arguments


@pytest.mark.parametrize(("command", "how"), RUNNING, ids=[c[:60] for c, _ in RUNNING])
def test_runs(place: Path, command: str, how: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, words(command, how), input=how.get("stdin"))
    assert done.exit_code == 0, (done.output, done.exception)
    assert how.get("prints", "") in done.output


@pytest.mark.parametrize(("command", "how"), SERVING, ids=[c for c, _ in SERVING])
def test_serves(place: Path, tmp_path: Path, command: str, how: dict[str, Any]) -> None:
    log = tmp_path / "log"
    arguments = [sys.executable, "-m", "dart_llm", *words(command, how), "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env={**os.environ})
    try:
        deadline = time.monotonic() + 120
        while not (link := LINK.search(log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        page = httpx.get(link[0], trust_env=False, timeout=30)
        assert page.status_code == 200 and "<title>DART for LLMs" in page.text
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, log.read_text()
