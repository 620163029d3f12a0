"""Trackers: names, offline defaults, and what is really written, read back."""

import contextlib
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
from dart_llm.experiments.trackers import Tracker, measurement_numbers, open_tracker

CONFIG = {"model": "gpt2", "prune": {"method": "dart", "sparsity": 0.5, "masks": None}}
MEASUREMENT = {
    "task": "arc_easy",
    "metrics": {"acc": 0.5, "acc_norm": None, "loss": float("nan")},
    "accounting": {"achieved_sparsity": 0.25, "remasks": 3, "layers": [1], "executor": "masked"},
}
NUMBERS = {"acc": 0.5, "achieved_sparsity": 0.25, "remasks": 3.0}
"""What is logged of it."""


class Recorder:
    """A backend that keeps what it is given, or fails."""

    def __init__(self, failing=False):
        self.failing, self.logged, self.closed = failing, [], 0

    def log(self, metrics, step):
        print("noise on stdout")
        self.logged.append((dict(metrics), step))
        if self.failing:
            raise OSError("disk full\nand more")

    def finish(self):
        self.closed += 1
        if self.failing:
            raise ValueError("cannot close")


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment in which no tracker is configured."""
    words = ("WANDB", "MLFLOW", "TRACKIO")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(words)}
    monkeypatch.setattr(os, "environ", plain)
    return plain


def test_finite_numbers_are_logged_by_task_label_and_metric(capsys):
    assert list(measurement_numbers(MEASUREMENT)) == [
        *("arc_easy/acc", "arc_easy/acc_norm", "arc_easy/loss"),
        *("arc_easy/achieved_sparsity", "arc_easy/remasks"),
    ]
    assert measurement_numbers(MEASUREMENT, "dart@0.5")["arc_easy/dart@0.5/acc"] == 0.5
    dense = {"task": "xsum", "metrics": {"rouge1": 0.2}, "accounting": None}
    untouched = {"rouge1": 0.2, "achieved_sparsity": 0, "dense_token_share": 1, "remasks": 0}
    assert measurement_numbers(dense) == {f"xsum/{name}": v for name, v in untouched.items()}
    backend = Recorder()
    with Tracker("test", backend) as tracker:
        tracker.log_measurement(MEASUREMENT)
        tracker.log({"a": 1, "flag": True, "text": "x", "inf": float("inf")}, 7)
        tracker.log({"nothing": None})
        for value, *step in ((2,), (3, 2), (4,)):
            tracker.log({"a": value}, *step)
    numbers = {f"arc_easy/{name}": value for name, value in NUMBERS.items()}
    steps = [({"a": 1.0}, 7), ({"a": 2.0}, 8), ({"a": 3.0}, 2), ({"a": 4.0}, 9)]
    assert (backend.logged, backend.closed) == ([(numbers, 0), *steps], 1)
    assert capsys.readouterr().out == ""  # stdout belongs to the results


def test_a_failing_tracker_warns_once_and_the_run_goes_on(caplog):
    backend = Recorder(failing=True)
    with caplog.at_level(logging.WARNING, "dart_llm"), Tracker("test", backend) as tracker:
        tracker.log({"a": 1.0})
        tracker.log({"a": 2.0})
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker test failed while logging (OSError: disk full): the results are not "
        "affected, and further failures are not reported"
    ]
    tracker.close()
    assert backend.closed == 1  # closed once
    with pytest.raises(KeyboardInterrupt), Tracker("test", backend):
        raise KeyboardInterrupt
    assert backend.closed == 2


def test_what_cannot_be_opened(tmp_path, monkeypatch, environment):
    before = set(sys.modules)
    with open_tracker(None, "p", "r", CONFIG, tmp_path) as tracker:  # off by default
        tracker.log_measurement(MEASUREMENT, "dart")
    assert tracker.where == ""
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & set(trackers.TRACKERS)
    with pytest.raises(DartError, match=r"unknown tracker 'mlflo'; did you mean mlflow\?"):
        open_tracker("mlflo", "p", "r", {}, tmp_path)
    for name in (*trackers.TRACKERS, "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in trackers.TRACKERS:
        with pytest.raises(MissingExtra, match=rf"this needs {name}, .*'dart-llm\[{name}\]'"):
            open_tracker(name, "p", "r", {}, tmp_path)


def _fake_wandb(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", metrics, step)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **given: calls.append(("init", given)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("mode", ["", "online"])
def test_wandb_is_offline_unless_its_user_says_otherwise(mode, monkeypatch, tmp_path, environment):
    environment["WANDB_MODE"] = mode
    calls = _fake_wandb(monkeypatch)
    folder = tmp_path / "new"
    opened = open_tracker("wandb", "proj", "run-1", CONFIG, folder)
    with contextlib.suppress(RuntimeError), opened as tracker:
        tracker.log_measurement(MEASUREMENT, "dart@0.5")
        if mode:
            raise RuntimeError
    settings = {"console": "off", "quiet": True}
    given = {"project": "proj", "name": "run-1", "config": CONFIG, "dir": str(folder)}
    assert calls == [
        ("init", {**given, "mode": mode or "offline", "settings": settings}),
        ("log", {f"arc_easy/dart@0.5/{key}": value for key, value in NUMBERS.items()}, 0),
        ("finish", int(bool(mode))),
    ]
    assert folder.is_dir()  # wandb falls back to a temporary folder when there is none
    assert environment.get("WANDB_ERROR_REPORTING") == (None if mode else "false")


def _fake_mlflow(monkeypatch):
    """The functions of mlflow that accelerate calls, writing down every call."""
    calls, module = [], types.ModuleType("mlflow")

    def written(name, answer=None):
        return lambda *given, **more: calls.append((name, *given, *more.values())) or answer

    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = types.SimpleNamespace(validation=limits)
    module.search_experiments = lambda filter_string: []
    module.create_experiment = written("create_experiment", "1")
    module.start_run = lambda **given: calls.append(
        ("start_run", given["experiment_id"], given["run_name"])
    )
    for name in ("set_tracking_uri", "log_params", "log_metrics", "end_run"):
        setattr(module, name, written(name))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_writes_a_local_database_or_to_the_users_address(monkeypatch, tmp_path, environment):
    calls = _fake_mlflow(monkeypatch)
    with open_tracker("mlflow", "proj", "run-1", CONFIG, tmp_path) as tracker:
        tracker.log_measurement(MEASUREMENT, "dart@0.5")
    data = tmp_path / "mlflow"
    assert calls == [
        ("set_tracking_uri", f"sqlite:///{data}/mlflow.db"),
        ("create_experiment", "proj", f"file://{data}/artifacts", None),
        ("start_run", "1", "run-1"),
        ("log_params", {"model": "gpt2", "prune.method": "dart", "prune.sparsity": "0.5"}),
        ("log_metrics", {f"arc_easy/dart_0.5/{key}": v for key, v in NUMBERS.items()}, 0),
        ("end_run", "FINISHED"),
    ]
    assert data.is_dir() and "MLFLOW_TRACKING_URI" not in environment
    assert environment.pop("MLFLOW_DISABLE_TELEMETRY") == "true"
    environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:5000"
    with open_tracker("mlflow", "proj", "run-2", {}, tmp_path / "n"):
        pass
    assert ("set_tracking_uri", "http://127.0.0.1:5000") in calls
    assert not (tmp_path / "n").exists() and "MLFLOW_DISABLE_TELEMETRY" not in environment


def test_tensorboard_files_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker("tensorboard", "proj", "run-1", CONFIG, tmp_path) as tracker:
        tracker.log_measurement(MEASUREMENT)
        tracker.log({"speed": 2.5})
    written = EventAccumulator(str(tmp_path / "tensorboard" / "proj" / "run-1"))
    written.Reload()
    assert written.Tags()["scalars"] == [*(f"arc_easy/{name}" for name in NUMBERS), "speed"]
    assert [(e.step, e.value) for e in written.Scalars("arc_easy/acc")] == [(0, 0.5)]
    assert [(e.step, e.value) for e in written.Scalars("speed")] == [(1, 2.5)]
    (text,) = written.Tensors("settings/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == CONFIG


PROGRAM = """
import sys
network = []
sys.addaudithook(lambda name, args: network.append(name) if name.startswith("socket.") else None)
from pathlib import Path
from dart_llm.experiments.trackers import open_tracker

config = {"model": "gpt2", "sparsity": 0.5, "_own": 1}
for value in (0.5, 0.75):
    with open_tracker("trackio", "proj", "run-1", config, Path(sys.argv[1])) as tracker:
        tracker.log({"arc_easy/acc": value, "arc_easy/achieved_sparsity": 0.25})
        tracker.log({"arc_easy/acc": value}, 7)
        where = tracker.where
print(where)
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
    where = f"tracking to {text}; TRACKIO_DIR={text} trackio show --project proj"
    assert done.stdout.splitlines() == [where, "[]"]  # nothing else, not even at exit
    assert (tmp_path / "trackio").exists() != own
    with sqlite3.connect(folder / "proj.db") as data:
        rows = data.execute("select run_name, step, metrics from metrics order by id").fetchall()
        ((settings,),) = data.execute("select config from configs")
    assert [(name, step, json.loads(metrics)) for name, step, metrics in rows] == [
        ("run-1", *logged)
        for value in (0.5, 0.75)  # the second time continued the run of that name
        for logged in (
            (0, {"arc_easy/acc": value, "arc_easy/achieved_sparsity": 0.25}),
            (7, {"arc_easy/acc": value}),
        )
    ]
    assert {"model": "gpt2", "sparsity": 0.5}.items() <= json.loads(settings).items()
