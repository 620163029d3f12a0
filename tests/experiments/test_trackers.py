"""Trackers: names, offline defaults, and what is really written, read back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import ConfigError, MissingExtra, UnknownName
from dart_llm.experiments import trackers
from dart_llm.experiments.trackers import Tracker, measurement_numbers, open_tracker

CONFIG = {"model": "gpt2", "prune": {"method": "dart", "sparsity": 0.5, "masks": None}}

MEASUREMENT = {
    "task": "arc_easy",
    "metrics": {"acc": 0.5, "acc_norm": None, "loss": float("nan")},
    "accounting": {"achieved_sparsity": 0.25, "remasks": 3, "layers": [1], "executor": "masked"},
}


class Recorder:
    """A backend that keeps what it is given, or fails."""

    def __init__(self, failing: bool = False) -> None:
        self.failing = failing
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        print("noise on stdout")
        if self.failing:
            raise OSError("disk full\nand more")
        self.logged.append((dict(metrics), step))

    def finish(self) -> None:
        self.closed += 1
        if self.failing:
            raise ValueError("cannot close")


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """A copy of the environment in which no tracker is configured."""
    words = ("WANDB", "MLFLOW", "TRACKIO")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(words)}
    monkeypatch.setattr(os, "environ", plain)
    return plain


def test_numbers_are_named_by_task_label_and_metric():
    assert list(measurement_numbers(MEASUREMENT)) == [
        *("arc_easy/acc", "arc_easy/acc_norm", "arc_easy/loss"),
        *("arc_easy/achieved_sparsity", "arc_easy/remasks"),
    ]
    assert measurement_numbers(MEASUREMENT, "dart@0.5")["arc_easy/dart@0.5/acc"] == 0.5
    dense = {"task": "xsum", "metrics": {"rouge1": 0.2}, "accounting": None}
    untouched = {"achieved_sparsity": 0.0, "dense_token_share": 1.0, "remasks": 0.0}
    assert measurement_numbers(dense) == {
        f"xsum/{name}": value for name, value in {"rouge1": 0.2, **untouched}.items()
    }


def test_only_finite_numbers_are_logged_and_steps_go_on(capsys):
    backend = Recorder()
    with Tracker("test", backend) as tracker:
        tracker.log_measurement(MEASUREMENT)
        tracker.log({"a": 1, "flag": True, "text": "x", "inf": float("inf")}, 7)
        tracker.log({"nothing": None})
        tracker.log({"a": 2})
    assert backend.logged == [
        ({"arc_easy/acc": 0.5, "arc_easy/achieved_sparsity": 0.25, "arc_easy/remasks": 3.0}, 0),
        ({"a": 1.0}, 7),
        ({"a": 2.0}, 8),
    ]
    assert backend.closed == 1
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
    assert backend.closed == 1
    tracker.close()
    assert backend.closed == 1  # closed once
    with pytest.raises(KeyboardInterrupt), Tracker("test", backend):
        raise KeyboardInterrupt
    assert backend.closed == 2


def test_off_by_default_and_a_name_that_does_not_exist(tmp_path):
    before = set(sys.modules)
    with open_tracker(None, "p", "r", CONFIG, tmp_path) as tracker:
        tracker.log_measurement(MEASUREMENT, "dart")
    assert tracker.where == ""
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & set(trackers.TRACKERS)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnknownName, match=r"unknown tracker 'mlflo'; did you mean mlflow\?"):
        open_tracker("mlflo", "p", "r", {}, tmp_path)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_package_that_is_not_installed(name, tmp_path, monkeypatch, environment):
    modules = [
        name,
        *(["torch.utils.tensorboard", "tensorboardX"] if name == "tensorboard" else []),
    ]
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"this needs {name}, .*'dart-llm\[{name}\]'"):
        open_tracker(name, "p", "r", {}, tmp_path)


NUMBERS = {"acc": 0.5, "achieved_sparsity": 0.25, "remasks": 3.0}


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
    named = {f"arc_easy/dart@0.5/{key}": value for key, value in NUMBERS.items()}
    assert calls == [
        ("init", {**given, "mode": mode or "offline", "settings": settings}),
        ("log", named, 0),
        ("finish", int(bool(mode))),
    ]
    assert folder.is_dir()  # wandb falls back to a temporary folder when there is none
    assert environment.get("WANDB_ERROR_REPORTING") == (None if mode else "false")


def test_a_tracker_that_cannot_start_says_so_before_anything_is_computed(
    monkeypatch, tmp_path, environment
):
    _fake_wandb(monkeypatch)
    refuse = lambda **_: (_ for _ in ()).throw(PermissionError("api key not valid\nmore"))  # noqa: E731
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    text = r"the tracker wandb cannot start \(PermissionError: api key not valid\): correct its"
    with pytest.raises(ConfigError, match=text):
        open_tracker("wandb", "p", "r", {}, tmp_path)


def _fake_wandb(monkeypatch) -> list[Any]:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", metrics, step)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **given: calls.append(("init", given)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def _fake_mlflow(monkeypatch, known: dict[str, str]) -> list[Any]:
    """The functions of mlflow that accelerate calls, writing down every call."""
    calls: list[Any] = []

    def written(name: str, answer: Any = None) -> Any:
        return lambda *given, **more: calls.append((name, *given, *more.values())) or answer

    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    experiments = [types.SimpleNamespace(experiment_id=number) for number in known.values()]
    module = types.ModuleType("mlflow")
    module.utils = types.SimpleNamespace(validation=limits)
    module.set_tracking_uri = written("set_tracking_uri")
    module.search_experiments = lambda filter_string: experiments
    module.create_experiment = written("create_experiment", "1")
    module.start_run = lambda **given: calls.append(
        ("start_run", given["experiment_id"], given["run_name"])
    )
    module.log_params = written("log_params")
    module.log_metrics = written("log_metrics")
    module.end_run = written("end_run")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_writes_a_local_database(monkeypatch, tmp_path, environment):
    calls = _fake_mlflow(monkeypatch, {})
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
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflow_follows_the_users_address(monkeypatch, tmp_path, environment):
    environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:5000"
    calls = _fake_mlflow(monkeypatch, {"proj": "9"})
    many = {f"key{number:03}": "x" * 600 for number in range(150)}
    with (
        pytest.raises(ValueError, match="stop"),
        open_tracker("mlflow", "proj", "r", many, tmp_path),
    ):
        raise ValueError("stop")
    assert calls[:2] == [("set_tracking_uri", "http://127.0.0.1:5000"), ("start_run", "9", "r")]
    assert [len(call[1]) for call in calls[2:4]] == [100, 50]
    assert calls[2][1]["key000"] == "x" * 500
    assert calls[4] == ("end_run", "FAILED")
    assert list(tmp_path.iterdir()) == []
    assert "MLFLOW_DISABLE_TELEMETRY" not in environment


def test_tensorboard_files_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker("tensorboard", "proj", "run-1", CONFIG, tmp_path) as tracker:
        tracker.log_measurement(MEASUREMENT)
        tracker.log({"speed": 2.5})
        tracker.log({"speed": 3.5})
    written = EventAccumulator(str(tmp_path / "tensorboard" / "proj" / "run-1"))
    written.Reload()
    assert written.Tags()["scalars"] == [
        *("arc_easy/acc", "arc_easy/achieved_sparsity", "arc_easy/remasks", "speed"),
    ]
    assert [(e.step, e.value) for e in written.Scalars("arc_easy/acc")] == [(0, 0.5)]
    assert [(e.step, e.value) for e in written.Scalars("speed")] == [(1, 2.5), (2, 3.5)]
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


def _trackio(folder: Path, **variables: str) -> list[str]:
    """Run trackio in a process of its own, as a user with a hub token; the lines on stdout."""
    environment = {key: v for key, v in os.environ.items() if not key.startswith("TRACKIO")}
    environment |= {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0", **variables}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _read_trackio(file: Path) -> list[tuple[str, int, dict[str, float]]]:
    with sqlite3.connect(file) as data:
        rows = data.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(metrics)) for name, step, metrics in rows]


def test_trackio_writes_a_local_file_and_opens_no_connection(tmp_path):
    pytest.importorskip("trackio")
    where, network = _trackio(tmp_path)  # nothing else on stdout, not even at exit
    folder = tmp_path / "trackio"
    assert where == f"tracking to {folder}; TRACKIO_DIR={folder} trackio show --project proj"
    assert network == "[]"
    assert _read_trackio(folder / "proj.db") == [
        ("run-1", 0, {"arc_easy/acc": 0.5, "arc_easy/achieved_sparsity": 0.25}),
        ("run-1", 7, {"arc_easy/acc": 0.5}),
        ("run-1", 0, {"arc_easy/acc": 0.75, "arc_easy/achieved_sparsity": 0.25}),
        ("run-1", 7, {"arc_easy/acc": 0.75}),
    ]
    with sqlite3.connect(folder / "proj.db") as data:
        settings = [json.loads(row[0]) for row in data.execute("select config from configs")]
    assert len(settings) == 1  # the second time continued the run of that name
    assert settings[0]["model"] == "gpt2" and settings[0]["sparsity"] == 0.5


def test_trackio_writes_to_the_users_folder(tmp_path):
    pytest.importorskip("trackio")
    own = tmp_path / "my own"
    where = _trackio(tmp_path / "results", TRACKIO_DIR=str(own))[0]
    assert where == f"tracking to '{own}'; TRACKIO_DIR='{own}' trackio show --project proj"
    assert (own / "proj.db").exists()
    assert not (tmp_path / "results").exists()
