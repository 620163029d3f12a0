"""Trackers: names, offline defaults, and what is really written."""

from __future__ import annotations

import logging
import os
import sys
import types
from typing import Any

import pytest

from dart_llm.errors import ConfigError, MissingExtra, UnknownName
from dart_llm.experiments import trackers
from dart_llm.experiments.trackers import Tracker, measurement_numbers, open_tracker
from tracker_cases import CONFIG, MEASUREMENT


class Recorder:
    """A backend that keeps what it is given, or fails."""

    where = "here"

    def __init__(self, failing: bool = False) -> None:
        self.failing = failing
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed: list[bool] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        print("noise on stdout")
        if self.failing:
            raise OSError("disk full\nand more")
        self.logged.append((dict(metrics), step))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
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
    numbers = measurement_numbers(MEASUREMENT)
    assert list(numbers) == [
        *("arc_easy/acc", "arc_easy/acc_norm", "arc_easy/loss"),
        *("arc_easy/achieved_sparsity", "arc_easy/remasks"),
    ]
    labelled = measurement_numbers(MEASUREMENT, "dart@0.5")
    assert labelled["arc_easy/dart@0.5/acc"] == 0.5
    assert labelled["arc_easy/dart@0.5/achieved_sparsity"] == 0.25


def test_a_dense_measurement_says_that_nothing_was_removed():
    dense = {"task": "xsum", "metrics": {"rouge1": 0.2}, "accounting": None}
    assert measurement_numbers(dense) == {
        "xsum/rouge1": 0.2,
        "xsum/achieved_sparsity": 0.0,
        "xsum/dense_token_share": 1.0,
        "xsum/remasks": 0.0,
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
    assert backend.closed == [False]
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
    assert backend.closed == [False]
    tracker.close()
    assert backend.closed == [False]  # closed once


def test_an_error_of_the_run_is_passed_on_and_told_to_the_tracker():
    backend = Recorder(failing=True)
    with pytest.raises(KeyboardInterrupt), Tracker("test", backend):
        raise KeyboardInterrupt
    assert backend.closed == [True]


def test_off_by_default(tmp_path):
    before = set(sys.modules)
    with open_tracker(None, "p", "r", CONFIG, tmp_path) as tracker:
        tracker.log({"a": 1.0})
        tracker.log_measurement(MEASUREMENT, "dart")
    assert tracker.where == ""
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & set(trackers.TRACKERS)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_does_not_exist(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown tracker 'mlflo'; did you mean mlflow\?"):
        open_tracker("mlflo", "p", "r", {}, tmp_path)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("trackio", "trackio"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("tensorboard", "torch.utils.tensorboard"),
    ],
)
def test_a_package_that_is_not_installed(name, module, tmp_path, monkeypatch, environment):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"this needs {name}, .*'dart-llm\[{name}\]'"):
        open_tracker(name, "p", "r", {}, tmp_path)


def test_wandb_is_called_offline(monkeypatch, tmp_path, environment):
    calls = _fake_wandb(monkeypatch)
    with open_tracker("wandb", "proj", "run-1", CONFIG, tmp_path / "new") as tracker:
        tracker.log_measurement(MEASUREMENT, "dart@0.5")
    folder = tmp_path / "new"
    assert calls[0] == (
        "init",
        {
            "project": "proj",
            "name": "run-1",
            "config": CONFIG,
            "dir": str(folder),
            "mode": "offline",
            "settings": {"console": "off", "quiet": True},
        },
    )
    numbers = {"acc": 0.5, "achieved_sparsity": 0.25, "remasks": 3.0}
    named = {f"arc_easy/dart@0.5/{key}": value for key, value in numbers.items()}
    assert calls[1:] == [("log", named, 0), ("finish", 0)]
    assert folder.is_dir()  # wandb falls back to a temporary folder when there is none
    assert environment["WANDB_ERROR_REPORTING"] == "false"


def test_wandb_follows_the_users_mode(monkeypatch, tmp_path, environment):
    environment["WANDB_MODE"] = "online"
    calls = _fake_wandb(monkeypatch)
    with pytest.raises(RuntimeError), open_tracker("wandb", "proj", "r", {}, tmp_path):
        raise RuntimeError
    assert calls[0][1]["mode"] == "online"
    assert calls[-1] == ("finish", 1)
    assert "WANDB_ERROR_REPORTING" not in environment


def test_a_tracker_that_cannot_start_says_so_before_anything_is_computed(
    monkeypatch, tmp_path, environment
):
    module = types.ModuleType("wandb")
    module.init = lambda **_: (_ for _ in ()).throw(PermissionError("api key not valid\nmore"))
    monkeypatch.setitem(sys.modules, "wandb", module)
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


class FakeMlflow:
    """The part of ``MlflowClient`` that is used, writing down every call."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known, self.calls = known, []

    def client(self, tracking_uri: str) -> FakeMlflow:
        self.calls.append(("client", tracking_uri))
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.known.get(name)
        return None if found is None else types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str, **more: str) -> str:
        self.calls.append(("create_experiment", name, more))
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("create_run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id"))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.calls.append(("log_batch", run_id, [(m[0], m[1], m[3]) for m in metrics], params))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls.append(("set_terminated", run_id, status))


def _fake_mlflow(monkeypatch, known: dict[str, str]) -> list[Any]:
    fake = FakeMlflow(known)
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient = fake.client
    entities.Param = entities.Metric = lambda *values: values
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return fake.calls


def test_mlflow_writes_a_local_database(monkeypatch, tmp_path, environment):
    calls = _fake_mlflow(monkeypatch, {})
    with open_tracker("mlflow", "proj", "run-1", CONFIG, tmp_path) as tracker:
        tracker.log_measurement(MEASUREMENT, "dart@0.5")
    data = tmp_path / "mlflow"
    assert calls[:3] == [
        ("client", f"sqlite:///{data}/mlflow.db"),
        ("create_experiment", "proj", {"artifact_location": f"file://{data}/artifacts"}),
        ("create_run", "1", "run-1"),
    ]
    parameters = [("model", "gpt2"), ("prune.method", "dart"), ("prune.sparsity", "0.5")]
    names = ("acc", 0.5, 0), ("achieved_sparsity", 0.25, 0), ("remasks", 3.0, 0)
    metrics = [(f"arc_easy/dart_0.5/{name}", value, step) for name, value, step in names]
    assert calls[3:] == [
        ("log_batch", "id", [], parameters),
        ("log_batch", "id", metrics, ()),
        ("set_terminated", "id", "FINISHED"),
    ]
    assert data.is_dir()
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
    assert calls[:2] == [("client", "http://127.0.0.1:5000"), ("create_run", "9", "r")]
    assert [len(call[3]) for call in calls[2:4]] == [100, 50]
    assert calls[2][3][0] == ("key000", "x" * 500)
    assert calls[4] == ("set_terminated", "id", "FAILED")
    assert list(tmp_path.iterdir()) == []
    assert "MLFLOW_DISABLE_TELEMETRY" not in environment
