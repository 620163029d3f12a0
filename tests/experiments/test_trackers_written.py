"""What trackio and TensorBoard really write, read back."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dart_llm.experiments.trackers import open_tracker
from tracker_cases import CONFIG, MEASUREMENT


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
from dart_llm.trackers import open_tracker

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


def test_trackio_that_is_already_imported_keeps_its_folder_and_says_so(
    monkeypatch, tmp_path, caplog
):
    calls: list[Any] = []
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    module = types.ModuleType("trackio")
    module.TRACKIO_DIR = tmp_path / "first" / "trackio"
    module.init = lambda **given: calls.append(given)
    module.log = lambda metrics, step: calls.append((metrics, step))
    module.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", module)
    config = {"a": 1, "_b": 2}
    with open_tracker("trackio", "proj", "run-1", config, tmp_path / "second") as tracker:
        tracker.log({"x": 1.0})
    started = {"project": "proj", "name": "run-1", "config": {"a": 1}, "resume": "allow"}
    quiet = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
    assert calls == [{**started, **quiet}, ({"x": 1.0}, 0), "finish"]
    assert "trackio was imported before and goes on writing to" in caplog.text
    assert "TRACKIO_DIR" not in os.environ
