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
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.trackers import numbers, tracked

CONFIG = {"model": "gpt2", "prune": {"method": "dart", "sparsity": 0.5, "masks": None}}
FLAT = {"model": "gpt2", "prune.method": "dart", "prune.sparsity": 0.5}
LINE = ResultLine(
    label="dart@0.5",
    method="dart",
    model="gpt2",
    task="arc_easy",
    metric="acc",
    value=0.5,
    achieved=0.25,
    remasks=3,
)
NUMBERS = {
    "arc_easy/dart@0.5/acc": 0.5,
    "arc_easy/dart@0.5/achieved_sparsity": 0.25,
    "arc_easy/dart@0.5/remasks": 3.0,
}


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment in which no tracker is configured."""
    words = ("WANDB", "MLFLOW", "TRACKIO")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(words)}
    monkeypatch.setattr(os, "environ", plain)
    return plain


class Recorder:
    """A backend that keeps what it gets, or fails."""

    def __init__(self, failing=False):
        self.failing, self.logged, self.closed = failing, [], 0

    def log(self, metrics, step):
        print("noise on stdout")
        self.logged.append((dict(metrics), step))
        if self.failing:
            raise OSError("disk full\nand more")

    def finish(self):
        self.closed += 1


def open_with(monkeypatch, folder, backend):
    monkeypatch.setattr(trackers, "_start", lambda *given: backend)
    return tracked("tensorboard", "run-1", CONFIG, folder, lambda text: None)


def test_numbers_are_logged_by_task_label_and_metric(monkeypatch, tmp_path, capsys):
    assert numbers(LINE) == NUMBERS
    assert numbers(LINE.model_copy(update={"value": None, "remasks": None})) == {
        "arc_easy/dart@0.5/achieved_sparsity": 0.25
    }
    backend = Recorder()
    with open_with(monkeypatch, tmp_path, backend) as log:
        log(LINE)
        log(LINE)
    assert (backend.logged, backend.closed) == ([(NUMBERS, 0), (NUMBERS, 1)], 1)
    assert capsys.readouterr().out == ""  # stdout belongs to the results


def test_a_failing_tracker_warns_once_and_the_run_continues(monkeypatch, tmp_path, caplog):
    backend = Recorder(failing=True)
    with (
        caplog.at_level(logging.WARNING, "dart_llm"),
        open_with(monkeypatch, tmp_path, backend) as log,
    ):
        log(LINE)
        log(LINE)
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker tensorboard failed (OSError: disk full): the results are not affected, and "
        "further failures are not reported"
    ]
    assert backend.closed == 1
    with pytest.raises(KeyboardInterrupt), open_with(monkeypatch, tmp_path, backend):
        raise KeyboardInterrupt
    assert backend.closed == 2


def test_what_cannot_be_opened(tmp_path, monkeypatch, environment):
    before = set(sys.modules)
    with tracked(None, "r", CONFIG, tmp_path, pytest.fail) as log:  # off by default
        log(LINE)
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & set(trackers.TRACKERS)

    def opening(name):
        return tracked(name, "r", {}, tmp_path, pytest.fail)

    with pytest.raises(DartError, match=r"unknown tracker 'mlflo'; did you mean mlflow\?"):
        opening("mlflo").__enter__()
    for name in (*trackers.TRACKERS, "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in trackers.TRACKERS:
        with pytest.raises(MissingExtra, match=rf"this needs {name}, .*'dart-llm\[{name}\]'"):
            opening(name).__enter__()


@pytest.mark.parametrize("mode", ["", "online"])
def test_wandb_is_offline_unless_its_user_decides_otherwise(
    mode, monkeypatch, tmp_path, environment
):
    environment["WANDB_MODE"] = mode
    calls, module = [], types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", metrics, step)),
        finish=lambda: calls.append(("finish",)),
    )

    def start(**given):
        calls.append((environment["WANDB_MODE"], given))
        return run

    module.init = start
    monkeypatch.setitem(sys.modules, "wandb", module)
    with tracked("wandb", "run-1", CONFIG, tmp_path, lambda text: None) as log:
        log(LINE)
    given = {"project": "dart-llm", "name": "run-1", "config": FLAT, "dir": str(tmp_path)}
    settings = {"console": "off", "quiet": True}
    assert calls == [
        (mode or "offline", {**given, "settings": settings}),
        ("log", NUMBERS, 0),
        ("finish",),
    ]
    assert environment["WANDB_MODE"] == mode  # as before


def test_mlflow_writes_a_local_database_or_to_the_users_address(monkeypatch, tmp_path, environment):
    calls, module = [], types.ModuleType("mlflow")
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = types.SimpleNamespace(validation=limits)
    module.search_experiments = lambda filter_string: []
    module.create_experiment = lambda **given: calls.append(given["artifact_location"]) or "1"
    module.start_run = lambda **given: calls.append(
        (environment["MLFLOW_TRACKING_URI"], given["run_name"])
    )
    for name in ("log_params", "log_metrics", "end_run"):
        setattr(module, name, lambda *given, **more: calls.append(*given) if given else None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    with tracked("mlflow", "run-1", CONFIG, tmp_path, lambda text: None) as log:
        log(LINE)
    data = tmp_path / "mlflow"
    assert calls == [
        f"file://{data}/artifacts",
        (f"sqlite:///{data}/mlflow.db", "run-1"),
        {name: str(value) for name, value in FLAT.items()},
        {name.replace("@", "_"): value for name, value in NUMBERS.items()},
    ]
    assert "MLFLOW_TRACKING_URI" not in environment
    environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:5000"
    with tracked("mlflow", "run-2", {}, tmp_path, lambda text: None):
        pass
    assert ("http://127.0.0.1:5000", "run-2") in calls


def test_tensorboard_files_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracked("tensorboard", "run-1", CONFIG, tmp_path, lambda text: None) as log:
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
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.trackers import tracked

for value in (0.5, 0.75):
    line = ResultLine(label="a", method="a", model="m", task="t", metric="acc", value=value)
    with tracked("trackio", "run-1", {"model": "gpt2"}, Path(sys.argv[1]), print) as log:
        log(line)
print(network)
"""


@pytest.mark.parametrize("own", [False, True])
def test_trackio_writes_a_local_file_and_opens_no_connection(tmp_path, own):
    """In a process of its own, as a user with a hub token; ``own``: with a folder of theirs."""
    pytest.importorskip("trackio")
    folder = tmp_path / "my own" if own else tmp_path / "trackio"
    environment = {key: v for key, v in os.environ.items() if not key.startswith("TRACKIO")}
    environment |= {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0"}
    environment |= {"TRACKIO_DIR": str(folder)} if own else {}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    text = f"'{folder}'" if own else str(folder)
    where = f"tracking with trackio: TRACKIO_DIR={text} trackio show --project dart-llm"
    assert done.stdout.splitlines() == [where, where, "[]"]  # nothing else, not even at exit
    with sqlite3.connect(folder / "dart-llm.db") as data:
        rows = data.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [(name, step, json.loads(metrics)) for name, step, metrics in rows] == [
        ("run-1", 0, {"t/a/acc": 0.5}),
        ("run-1", 0, {"t/a/acc": 0.75}),  # the second time continued the run of that name
    ]
