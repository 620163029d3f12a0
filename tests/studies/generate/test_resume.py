"""Under which identity a run resumes, whether another one writes, and what a torn file costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import UnknownName
from dart_llm.experiments import study as runner
from dart_llm.experiments.store import is_taken, open_folder, take
from dart_llm.files import append_row, whole_rows, write_json
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study
from tiny_gpt2 import write_gpt2

WAIT = """\
import sys
from pathlib import Path
from dart_llm.experiments.store import take
lock = take(Path(sys.argv[1]))
assert lock
print("locked", flush=True)
sys.stdin.read()
"""


def unfinished(root, **config):
    """A folder that a run left, with one part."""
    folder = open_folder(root, "x", {})
    write_json(folder.path / "config.json", {"status": "running", "settings": {}, **config})
    folder.save_part("a", 1)
    folder.release()
    return folder.path


def test_a_torn_file_loses_at_most_the_torn_part(tmp_path):
    rows = [{"key": "a", "value": 1}, {"key": "é\u2028", "value": [0.5, None]}, {"key": "c"}]
    path = tmp_path / "rows.jsonl"
    for row in rows:
        append_row(path, row)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = rows[: data[:cut].count(b"\n")]
        before = list(whole_rows(path))
        assert before in (whole, rows[: len(whole) + 1])
        append_row(path, {"key": "new"})
        assert list(whole_rows(path)) == [*before, {"key": "new"}]
        assert path.read_bytes().startswith(data[: data.rfind(b"\n", 0, cut) + 1])
    path.write_bytes(b'{"key": "a"}\n\0\0\0\n\xff\xfe\n{"key": "b"}\n{"key"')  # a power cut
    assert list(whole_rows(path)) == [{"key": "a"}, {"key": "b"}]
    path.write_bytes(b"1\n" + b"x" * 200_000)
    append_row(path, 2)
    assert list(whole_rows(path)) == [1, 2]
    left = unfinished(tmp_path)
    with (left / "parts.jsonl").open("a") as file:
        file.write('{"key": "b", "val')
    resumed = open_folder(tmp_path, "x", {})
    assert (resumed.path, resumed.parts) == (left, {"a": 1})
    resumed.save_part("c", 3)
    resumed.release()
    assert open_folder(tmp_path, "x", {}).parts == {"a": 1, "c": 3}


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    left = unfinished(tmp_path, process=1)  # as a container writes it
    command, pipe = [sys.executable, "-c", WAIT, str(left)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline() == b"locked\n"
        assert is_taken(left) and take(left) is None
        assert open_folder(tmp_path, "x", {}).path != left
        process.kill()
        process.wait()
        assert not is_taken(left)
        first = open_folder(tmp_path, "x", {})
        assert first.path == left
    assert open_folder(tmp_path, "x", {}).path != left  # nor do two runs of one process share it
    first.release()
    first.release()
    assert not (left / ".lock").exists()


COMMANDS = {
    "run": ("run", "--prompt", "hi"),
    "perplexity": ("perplexity", "--data", "text.txt"),
    "eval": ("eval", "--tasks", "perplexity:text.txt"),
    "summarize": ("summarize", "--data", "documents.jsonl"),
    "compare": ("compare", "--methods", "griffin", "--tasks", "perplexity:text.txt"),
    "sweep": ("sweep", "--methods", "griffin", "--tasks", "perplexity:text.txt"),
    "drift": ("drift", "--passages", "shipped", "--limit", "1"),
    "detect": ("detect", "--limit", "1"),
    "inspect": ("inspect", "--passage", "01-bees-to-mortgages"),
    "quality": ("bench", "quality", "--text", "text.txt"),
    "speed": ("bench", "speed"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model and the texts of the commands."""
    monkeypatch.chdir(tmp_path)
    write_gpt2(tmp_path / "model")
    Path("text.txt").write_text("the birds of winter. " * 400)
    Path("documents.jsonl").write_text('{"document": "a b c", "summary": "a"}\n')


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_checkpoint_by_its_contents(name, monkeypatch):
    if name not in ("compare", "sweep"):  # there a cell that fails is recorded
        done = CliRunner().invoke(app, [*COMMANDS[name], "--model", "nosuch"])
        assert isinstance(done.exception, UnknownName)
        assert list(Path("results").iterdir()) == []

    def opened(root, experiment, identity, fresh=False):
        identities.append(json.loads(json.dumps(identity)))
        raise KeyboardInterrupt

    def ask():
        CliRunner().invoke(app, [*COMMANDS[name], "--model", "model"])
        return identities[-1]

    identities = []
    monkeypatch.setattr(runner, "open_folder", opened)
    first = ask()
    assert ask() == first
    weights, tokenizer = Path("model/model.safetensors"), Path("model/tokenizer.json")
    times = weights.stat().st_mtime_ns
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # the same name, size and times: the contents alone differ
    os.utime(weights, ns=(times, times))
    second = ask()
    tokenizer.write_text(tokenizer.read_text() + " ")
    third = ask()
    assert len(identities) == 4
    assert first.pop("inputs") != second.pop("inputs") != third.pop("inputs")
    assert first == second == third


def test_a_run_with_another_prompt_in_the_same_file_is_not_resumed(settings, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    wanted = settings(prompt=None, prompt_file=str(file), experiment_name="x")
    with monkeypatch.context() as patch:
        patch.setattr(study, "write_masks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.run_study(study.RunStudy(wanted, Ui(quiet=True)))
    for prompt, resumed in (("goodbye", False), ("hello", True)):
        file.write_text(prompt)
        job = runner.run_study(study.RunStudy(wanted, Ui(quiet=True)))
        assert job.folder.resumed == resumed
        assert [g["prompt"] for g in job.generations.values()] == [prompt, prompt]
