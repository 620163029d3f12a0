"""Cells as Ray tasks: the same bytes, whoever dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import sweep_fakes
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.studies.sweep import ray_backend as engine_ray
from dart_llm.studies.sweep.cells import read_timing
from dart_llm.studies.sweep.compute import LoadedModelCache
from sweep_fakes import KILL, SLOW, cells, compute, quiet_sweep, without_model
from tiny_gpt2 import write_gpt2

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray (extra cluster) is not installed"
)
BESIDE = "results.jsonl", "masks.safetensors", "cells.csv"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = [
        str(Path(sweep_fakes.__file__).parent),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))  # for the workers
    write_gpt2(tmp_path / "model")
    sweep_fakes.write_text(tmp_path)
    return tmp_path


def listening() -> set[str]:
    """Local addresses of the TCP ports that this machine's processes listen on (Linux)."""
    found = set()
    for name in ("tcp", "tcp6"):
        table = Path("/proc/net") / name
        if table.exists():
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
            found |= {row[1] for row in rows if row[3] == "0A"}
    return found


def outside(addresses: set[str]) -> set[str]:
    """Those that are not 127.0.0.1."""
    return {a for a in addresses if a.split(":")[0][-8:] != "0100007F"}


@needs_ray
def test_a_worker_that_is_killed_changes_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    wanted = cells(base, seeds=[0, 1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = quiet_sweep(wanted, base / "alone")
    marker = base / "kill"
    marker.touch()
    monkeypatch.setenv(KILL, str(marker))
    monkeypatch.setenv(SLOW, "0.5")
    before, opened, handler = listening(), set[str](), signal.getsignal(signal.SIGTERM)
    capsys.readouterr()

    def look(document: dict[str, Any]) -> None:
        opened.update(listening() - before)
        print("seen")

    result = quiet_sweep(
        wanted, base / "ray", engine="ray", workers=2, compute=compute, on_cell=look
    )
    assert not result.failed, result.failed[0]["error"]
    assert not marker.exists(), "no worker was killed"
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().out == 6 * "seen\n"
    assert opened and not outside(opened)
    for name in BESIDE:
        assert (result.path / name).read_bytes() == (alone.path / name).read_bytes()
    times = [read_timing(result.path / "cells" / cell.key) for cell in wanted]
    processes = {time["process"] for time in times}
    assert sum(time["load_s"] > 0 for time in times) == len(processes)
    assert 2 <= len(processes) <= 3 and os.getpid() not in processes
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


@needs_ray
def test_workers_that_always_die_fail_their_cell_only(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_ray, "RETRIES", 1)
    wanted = cells(base, methods="dense", seeds=[0, 1, 2])
    result = quiet_sweep(wanted, base / "ray", engine="ray", workers=1, compute=without_model)
    errors = [row["error"] for row in result.failed]
    assert errors[0] == "failed by hand"
    assert errors[1].startswith("the worker died in each of 2 attempts")
    assert errors[2] == "ValueError: no result"


@needs_ray
def test_an_interrupt_closes_the_cluster(base: Path) -> None:
    import ray

    def stop(document: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    arguments = {"engine": "ray", "workers": 2, "compute": without_model}
    with pytest.raises(KeyboardInterrupt):
        quiet_sweep(cells(base), base / "ray", on_cell=stop, **arguments)
    assert not ray.is_initialized()
    again = quiet_sweep(cells(base), base / "ray")
    assert again.computed == 3 and not again.failed
    assert len(list((base / "ray" / "sweep").iterdir())) == 1


def test_without_ray(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dart-llm\[cluster\]'"):
        quiet_sweep(cells(base), base / "ray", engine="ray")


@needs_ray
def test_a_cluster_that_is_not_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(LoadError, match=r"127\.0\.0\.1:9 could not be reached .nothing answers"):
        quiet_sweep(cells(base), base / "ray", engine="ray")

    def refuse(**arguments: Any) -> None:
        assert arguments["address"] == "ray://there:9"
        assert "num_cpus" not in arguments
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setenv("RAY_ADDRESS", "ray://there:9")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(LoadError, match=r"ray://there:9 could not be reached .nobody answers."):
        quiet_sweep(cells(base), base / "ray", engine="ray")


def test_a_worker_holds_one_model_through_a_sweep_and_no_longer() -> None:
    seen: list[LoadedModelCache] = []

    def look(data: dict[str, Any], held: LoadedModelCache) -> dict[str, bytes]:
        seen.append(held)
        return {"name": data["name"]}

    for sweep in ("first", "first", "second", "first"):
        assert engine_ray._task(look, {"name": b"x"}, sweep) == {"name": b"x"}
    assert seen[0] is seen[1]
    assert len({id(held) for held in seen}) == 3


def test_what_a_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    found = engine_ray.worker_environment(3)
    assert found["OMP_NUM_THREADS"] == "3" and found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["HF_HUB_OFFLINE"] == "1" and "HF_DATASETS_OFFLINE" not in found
