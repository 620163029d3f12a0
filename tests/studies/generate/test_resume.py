"""Under which identity a run resumes, whether another states, and what a torn file costs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.errors import ResultsError
from dart_llm.evaluation import perplexity
from dart_llm.experiments import comparison_report as compare_files
from dart_llm.experiments import folder_lock
from dart_llm.experiments import store as results
from dart_llm.experiments import study as runner
from dart_llm.experiments.folder_lock import is_taken, take
from dart_llm.experiments.store import open_folder
from dart_llm.experiments.tensor_file import write_tensors
from dart_llm.files import append_row, whole_rows, write_json
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate import study as generate_study
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import RunStudy, run_job
from dart_llm.studies.sweep import cells as sweep_files
from tiny_gpt2 import write_gpt2

HOLD = """\
import sys
from pathlib import Path
from dart_llm.experiments.folder_lock import take
lock = take(Path(sys.argv[1]))
assert lock
print("held", flush=True)
sys.stdin.read()
"""
START = """\
import os, signal, sys, time
from pathlib import Path
from dart_llm.experiments.folder_lock import take
lock = take(Path(sys.argv[1]))
assert lock
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
os._exit(0)
"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def unfinished(root: Path, **config: Any) -> Path:
    """A folder that a run left, with one part."""
    folder = open_folder(root, "x", {})
    write_json(folder.path / "config.json", {"status": "running", "settings": {}, **config})
    folder.save_part("a", 1)
    folder.release()
    return folder.path


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of ``folder``."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


# --- torn lines ---------------------------------------------------------------------------------


def test_a_file_cut_anywhere_loses_at_most_the_torn_part(tmp_path: Path) -> None:
    rows = [{"key": "a", "value": 1}, {"key": "é\u2028", "value": [0.5, None]}, {"key": "c"}]
    path = tmp_path / "rows.jsonl"
    for row in rows:
        append_row(path, row)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = rows[: data[:cut].count(b"\n")]
        assert list(whole_rows(path)) == whole
        append_row(path, {"key": "new"})
        assert list(whole_rows(path)) == [*whole, {"key": "new"}]
        assert path.read_bytes().startswith(data[: data.rfind(b"\n", 0, cut) + 1])


def test_a_long_torn_line_is_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, 1)
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    append_row(path, 2)
    assert path.read_bytes() == b"1\n2\n"


def test_what_a_power_cut_left_in_the_middle_costs_its_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key": "a"}\n\0\0\0\n\xff\xfe\n{"key": "b"}\n{"key"')
    assert list(whole_rows(path)) == [{"key": "a"}, {"key": "b"}]


def test_a_part_kept_after_a_torn_one_survives_the_next_kill(tmp_path: Path) -> None:
    left = unfinished(tmp_path)
    with (left / "parts.jsonl").open("a") as file:
        file.write('{"key": "b", "val')
    resumed = open_folder(tmp_path, "x", {})
    assert (resumed.path, resumed.parts) == (left, {"a": 1})
    resumed.save_part("c", 3)
    resumed.release()
    assert open_folder(tmp_path, "x", {}).parts == {"a": 1, "c": 3}


# --- whether a run states ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2**22 + 1, None])
def test_a_folder_that_another_process_writes_is_left_alone(
    tmp_path: Path, number: int | None
) -> None:
    left = unfinished(tmp_path, process=number)  # as a container or another host writes it
    with held_elsewhere(left) as process:
        assert is_taken(left) and take(left) is None
        assert open_folder(tmp_path, "x", {}).path != left
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_taken(left)
        assert open_folder(tmp_path, "x", {}).path == left


def test_what_a_killed_run_was_starting_does_not_keep_its_folder(tmp_path: Path) -> None:
    """Until a new process begins its own program, it holds the locks of the one that starts it."""
    left = unfinished(tmp_path)
    done = subprocess.run([sys.executable, "-c", START, str(left)], check=False)
    assert done.returncode == -signal.SIGKILL
    with (left / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert open_folder(tmp_path, "x", {}).path == left


def test_a_number_that_was_given_again_does_not_keep_a_folder(tmp_path: Path) -> None:
    left = unfinished(tmp_path, process=os.getppid())
    (left / ".lock").write_text(json.dumps({**folder_lock._writer(), "process": os.getppid()}))
    resumed = open_folder(tmp_path, "x", {})
    assert (resumed.path, resumed.parts) == (left, {"a": 1})


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    first = open_folder(tmp_path, "x", {})
    write_json(first.path / "config.json", {"status": "running", "settings": {}})
    assert open_folder(tmp_path, "x", {}).path != first.path
    first.release()
    first.release()
    assert not (first.path / ".lock").exists()
    assert open_folder(tmp_path, "x", {}).path == first.path


def test_where_nothing_can_be_locked_place_number_and_start_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    me, parent = folder_lock._writer(), os.getppid()
    states = {**me, "process": parent, "started": folder_lock._started(parent)}
    for writer, taken in (
        (states, True),
        ({**states, "started": "7"}, False),  # the number was given again
        ({**states, "process": 2**22 + 1}, False),
        ({**states, "place": ["another host"]}, True),  # nobody here can know
        ({}, False),
    ):
        (tmp_path / ".lock").write_text(json.dumps(writer) if writer else '{"pla')
        assert is_taken(tmp_path) is taken
        lock = take(tmp_path)
        assert (lock is None) is taken
        if lock is not None:
            assert is_taken(tmp_path) and take(tmp_path) is None
            lock.release()
            assert not is_taken(tmp_path)


@pytest.mark.contract("resume gives the same bytes")
def test_a_run_killed_at_its_very_end_is_finished_by_the_next(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json says complete, parts.jsonl is still there, log and report are not."""
    wanted = settings(gpt2, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(results.ResultsFolder, "finish", lambda self: None)
        first = run_job(wanted, Ui(quiet=True))
    report = (first.path / "report.html").read_bytes()
    (first.path / "report.html").unlink()
    assert (first.path / "parts.jsonl").exists()
    second = run_job(wanted, Ui(quiet=True))
    assert second.path == first.path and not (first.path / "parts.jsonl").exists()
    assert second.generations == json.loads(json.dumps(first.generations))
    assert len((first.path / "report.html").read_bytes()) == pytest.approx(len(report), rel=0.01)
    assert run_job(wanted, Ui(quiet=True)).path != first.path


def test_a_folder_that_a_kill_left_empty_goes_with_the_next_run(tmp_path: Path) -> None:
    base = tmp_path / "x"
    empty, begun, held, kept = (base / f"20260101-00000{n}" for n in range(4))
    for folder in (empty, begun, held, kept, base / "notes"):
        folder.mkdir(parents=True)
    for name in (".lock", ".config.json.part"):
        (begun / name).touch()
    (kept / "notes.txt").touch()
    with held_elsewhere(held):
        new = open_folder(tmp_path, "x", {}).path
    assert set(base.iterdir()) == {held, kept, base / "notes", new}
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_a_new_folder_that_another_removes_as_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []

    def slow(folder: Path) -> Any:
        if not removed:
            removed.append(folder.rmdir())
        return take(folder)

    monkeypatch.setattr(results, "take", slow)
    folder = open_folder(tmp_path, "x", {})
    assert removed and folder.path.name.endswith("-1") and is_taken(folder.path)


def test_a_disk_that_takes_no_byte_is_said_and_nothing_stays(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(ResultsError, match="cannot write results to"):
            open_folder(tmp_path, "x", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "no space left")])
def test_a_sweep_is_finished_when_its_comparison_is_written(
    stop: Any, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at the same place leaves what config.json says then: running."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the birds of winter. " * 400)
    command = [*COMMANDS["sweep"], "--model", str(gpt2), "--sparsities", "0.5", "--limit", "1"]
    command += ["--prompt-tokens", "32", "--scored-tokens", "16"]
    seen = []

    def stops(*arguments: Any) -> None:
        (config,) = Path("results").rglob("config.json")
        seen.append(json.loads(config.read_text())["status"])
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(compare_files, "write_all", stops)
        assert CliRunner().invoke(app, command).exit_code != 0
    (left,) = Path("results/sweep").iterdir()
    assert seen == ["running"] and not (left / "compare.json").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and f"resuming {left}: 1 of 1 cells are finished" in done.stderr
    assert json.loads((left / "config.json").read_text())["status"] == "complete"
    assert len(json.loads((left / "compare.json").read_text())["rows"]) == 1
    assert ", took " in (left / "report.html").read_text()


# --- the identity -------------------------------------------------------------------------------


class Opened(Exception):
    """Raised in place of opening a folder."""


OPENING = (
    sweep_files,
    runner,
)
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_checkpoint_by_its_contents(
    name: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2, "model")
    Path("text.txt").write_text("the birds of winter. " * 400)
    Path("documents.jsonl").write_text('{"document": "a b c", "summary": "a"}\n')
    asked: list[dict[str, Any]] = []

    def opened(root: Path, experiment: str, identity: dict[str, Any], fresh: bool = False) -> None:
        asked.append(json.loads(json.dumps(identity)))
        raise Opened

    for module in OPENING:
        monkeypatch.setattr(module, "open_folder", opened)

    def ask() -> dict[str, Any]:
        done = CliRunner().invoke(app, [*COMMANDS[name], "--model", "model"])
        assert isinstance(done.exception, Opened), done.output
        return asked.pop()

    first = ask()
    assert ask() == first
    weights = Path("model/model.safetensors")
    times = weights.stat().st_mtime_ns
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # the same name, size and times: the contents alone differ
    os.utime(weights, ns=(times, times))
    second = ask()
    tokenizer = Path("model/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text() + " ")
    third = ask()
    assert first.pop("inputs") != second.pop("inputs") != third.pop("inputs")
    assert first == second == third


def settings(gpt2: Path, folder: Path, **more: Any) -> RunSettings:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    given = {"model": str(gpt2), "prompt": "hello", "generation": 6, "sparsity": 0.5}
    evaluation = {"eval_perplexity": True, "ppl_datasets": str(text), "ppl_prompt_tokens": 32}
    place = {"method": "griffin", "results_dir": str(folder / "results")}
    return RunSettings(**{**given, **evaluation, "ppl_scored_tokens": 32, **place, **more})


def test_a_run_does_not_go_on_over_another_checkpoint(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(gpt2, tmp_path / "model")
    wanted, real, done = settings(model, tmp_path), perplexity.score_window, []
    monkeypatch.setattr(RunStudy, "write_page", lambda study: None)

    def stops(*arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "score_window", stops)
        with pytest.raises(KeyboardInterrupt):
            run_job(wanted, Ui(quiet=True))
    (left,) = (tmp_path / "results" / wanted.experiment).iterdir()
    write_gpt2(model, seed=1)
    ui, anew = Ui(quiet=True), []
    monkeypatch.setattr(perplexity, "score_window", lambda *a: anew.append(1) or real(*a))
    other = run_job(wanted, ui)
    assert other.path != left
    assert ui.log[0] == f"{left} is not resumed: the model's weights changed since it began"
    assert len(anew) == 2 * other.perplexity[0]["slices"]  # none is taken over
    write_gpt2(model)
    assert run_job(wanted, Ui(quiet=True)).path == left


def test_a_sweep_says_why_it_begins_anew(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2, "model")
    Path("text.txt").write_text("the birds of winter. " * 400)
    command = [*COMMANDS["sweep"], "--model", "model", "--sparsities", "0.5", "--limit", "1"]
    command += ["--prompt-tokens", "32", "--scored-tokens", "16"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (config,) = Path("results").rglob("config.json")
    write_json(config, {**json.loads(config.read_text()), "status": "running"})
    write_gpt2(Path("model"), seed=1)
    done = CliRunner().invoke(app, command)
    said = f"{config.parent} is not resumed: the model's weights changed since it began"
    assert done.exit_code == 0 and said in done.stderr


# --- what is written ----------------------------------------------------------------------------


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    tensors = {"b": torch.arange(3), "a": torch.ones(2)}
    metadata = {"method": "griffin", "checkpoint": 'é "x"\n', "remasks": "1", "format": "f"}
    found = set()
    for _ in range(20):
        write_tensors(tmp_path / "a.safetensors", tensors, metadata)
        found.add((tmp_path / "a.safetensors").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "a": [1.0, 1.0],
            "b": [0, 1, 2],
        }


def test_masks_of_equal_runs_are_equal_bytes(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunStudy, "write_page", lambda study: None)
    wanted = settings(gpt2, tmp_path, eval_perplexity=False)
    folders = [run_job(wanted, Ui(quiet=True)).path for _ in range(3)]
    assert len({(folder / "masks.safetensors").read_bytes() for folder in folders}) == 1


def test_an_error_has_a_line_of_its_own_below_a_streamed_text(
    gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: Any) -> None:
        raise ResultsError("cannot write masks.json: No space left on device")

    wanted = settings(gpt2, tmp_path, eval_perplexity=False)
    monkeypatch.setattr(generate_study, "write_masks", full)
    with pytest.raises(ResultsError):
        run_job(wanted, Ui())
    assert capsys.readouterr().out.count("\n") == 2  # one below each text

    monkeypatch.setattr(generate_study, "generate", lambda *a, **k: streamed(k["on_step"]))
    with pytest.raises(ResultsError):
        run_job(wanted, Ui(), fresh=True)
    assert capsys.readouterr().out == "half a te\n"


def streamed(on_step: Any) -> None:
    from dart_llm.session.generation import Step

    fields = dict.fromkeys(Step.__dataclass_fields__)
    on_step(Step(**{**fields, "text": "half a te"}))
    raise ResultsError("no space left")
