"""Trackers: names, offline defaults, and what is really written, read back."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
import types

import pytest

from dart_llm.errors import DartError, MissingExtra
from dart_llm.experiments import trackers
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.trackers import tracked

CONFIG = {"model": "gpt2", "prune": {"method": "dart", "sparsity": 0.5, "masks": None}}
FLAT = {"model": "gpt2", "prune.method": "dart", "prune.sparsity": 0.5}
NAMES = {"label": "dart@0.5", "method": "dart", "model": "gpt2", "task": "arc_easy"}
LINE = ResultLine(**NAMES, metric="acc", value=0.5, achieved=0.25)
NUMBERS = {"arc_easy/dart@0.5/acc": 0.5, "arc_easy/dart@0.5/achieved_sparsity": 0.25}


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment in which no tracker is configured."""
    words = ("WANDB", "MLFLOW", "TRACKIO")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(words)}
    monkeypatch.setattr(os, "environ", plain)
    return plain


def opening(name, folder):
    return tracked(name, "run-1", CONFIG, folder, lambda text: None)


def test_a_failing_tracker_warns_once_and_the_run_continues(monkeypatch, tmp_path, caplog, capsys):
    logged = []

    def log(metrics, step):
        print("noise on stdout")
        logged.append((dict(metrics), step))
        if step:
            raise OSError("disk full\nand more")

    backend = types.SimpleNamespace(log=log, finish=lambda: logged.append("finish"))
    monkeypatch.setattr(trackers, "_start", lambda *given: backend)

    def interrupted():
        with opening("tensorboard", tmp_path) as log_line:
            for _ in range(3):
                log_line(LINE)
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING, "dart_llm"), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert logged == [(NUMBERS, 0), (NUMBERS, 1), (NUMBERS, 2), "finish"]
    (record,) = caplog.records
    assert "the tracker tensorboard failed (OSError: disk full): " in record.getMessage()
    assert capsys.readouterr().out == ""  # stdout belongs to the results


def test_what_cannot_be_opened(tmp_path, monkeypatch, environment):
    with opening(None, tmp_path) as log:  # off by default
        log(LINE)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DartError, match=r"unknown tracker 'mlflo'; did you mean mlflow\?"):
        opening("mlflo", tmp_path).__enter__()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"this needs wandb, .*'dart-llm\[wandb\]'"):
        opening("wandb", tmp_path).__enter__()


@pytest.mark.parametrize(
    ("name", "variable", "local"),
    [
        ("wandb", "WANDB_MODE", "offline"),
        ("mlflow", "MLFLOW_TRACKING_URI", "sqlite:///{}/mlflow.db"),
        ("trackio", "TRACKIO_DIR", "{}"),
    ],
)
def test_trackers_stay_here_unless_their_user_decides_otherwise(
    name, variable, local, monkeypatch, tmp_path, environment
):
    def start(*arguments):
        assert arguments == (name, "run-1", FLAT, tmp_path)
        calls.append(environment[variable])
        return backend

    calls = []
    backend = types.SimpleNamespace(log=lambda n, step: calls.append(n), finish=list)
    monkeypatch.setattr(trackers, "_start", start)
    monkeypatch.setitem(sys.modules, name, backend)
    for value in (None, "theirs"):
        environment |= {variable: value} if value else {}
        with opening(name, tmp_path) as log:
            log(LINE)
        assert environment.get(variable) == value  # as before
    numbers = trackers.numbers(LINE, name)
    assert calls == [local.format(tmp_path / name), numbers, "theirs", numbers]
    assert (set(numbers) == set(NUMBERS)) == (name != "mlflow")  # which takes no "@"


def test_tensorboard_files_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opening("tensorboard", tmp_path) as log:
        log(LINE)
    written = EventAccumulator(str(tmp_path / "tensorboard" / "dart-llm" / "run-1"))
    written.Reload()
    assert written.Tags()["scalars"] == list(NUMBERS)
    assert [(e.step, e.value) for e in written.Scalars("arc_easy/dart@0.5/acc")] == [(0, 0.5)]
    (text,) = written.Tensors("settings/text_summary")
    assert b"prune.method: dart" in text.tensor_proto.string_val[0]


PROGRAM = """
import sys
network = []
sys.addaudithook(lambda name, args: network.append(name) if name.startswith("socket.") else None)
from pathlib import Path
from dart_llm.experiments.trackers import tracked
from test_trackers import LINE

for _ in range(2):
    with tracked("trackio", "run-1", {"model": "gpt2"}, Path(sys.argv[1]), print) as log:
        log(LINE)
print(network)
"""


def test_trackio_writes_a_local_file_and_opens_no_connection(tmp_path):
    """In a process of its own, as a user with a hub token."""
    pytest.importorskip("trackio")
    environment = {key: v for key, v in os.environ.items() if not key.startswith("TRACKIO")}
    environment |= {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    where = f"tracking with trackio: {tmp_path / 'trackio'}"
    assert done.stdout.splitlines() == [where, where, "[]"]  # nothing else, not even at exit
    with sqlite3.connect(tmp_path / "trackio" / "dart-llm.db") as data:
        rows = data.execute("select run_name, step, metrics from metrics order by id").fetchall()
    logged = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert logged == [("run-1", 0, NUMBERS)] * 2  # the second time continued the run of that name
