"""Cells as Ray tasks: the same bytes, whoever dies."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

import sweep_fakes
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.studies.sweep import ray_backend as engine_ray
from dart_llm.studies.sweep.cells import read_timing
from sweep_fakes import KILL, SLOW, cells, compute, quiet_sweep, without_model

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray (extra cluster) is not installed"
)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = [str(Path(sweep_fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))  # for the workers
    return sweep_fakes.place(tmp_path)


def listening():
    """Local addresses of the TCP ports that this machine's processes listen on (Linux)."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.exists():
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
            found |= {row[1] for row in rows if row[3] == "0A"}
    return found


@needs_ray
@pytest.mark.contract("resume gives the same bytes")
def test_a_worker_that_is_killed_changes_nothing(base, monkeypatch, capsys):
    import ray

    wanted = cells(base, seeds=[0, 1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = quiet_sweep(wanted, base / "alone")
    (base / "kill").touch()
    monkeypatch.setenv(KILL, str(base / "kill"))
    monkeypatch.setenv(SLOW, "0.5")
    before, opened, handler = listening(), set(), signal.getsignal(signal.SIGTERM)
    capsys.readouterr()

    def look(document):
        opened.update(listening() - before)
        print("seen")

    result = quiet_sweep(
        wanted, base / "ray", engine="ray", workers=2, compute=compute, on_cell=look
    )
    assert not result.failed, result.failed[0]["error"]
    assert not (base / "kill").exists(), "no worker was killed"
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().out == 6 * "seen\n"
    assert opened and {a.split(":")[0][-8:] for a in opened} == {"0100007F"}  # 127.0.0.1 alone
    for name in ("results.jsonl", "masks.safetensors", "cells.csv"):
        assert (result.path / name).read_bytes() == (alone.path / name).read_bytes()
    times = [read_timing(result.path / "cells" / cell.key) for cell in wanted]
    processes = {time["process"] for time in times}
    assert sum(time["load_s"] > 0 for time in times) == len(processes)
    assert 2 <= len(processes) <= 3 and os.getpid() not in processes


@needs_ray
def test_what_a_worker_cannot_do_fails_its_cell_only(base, monkeypatch):
    monkeypatch.setattr(engine_ray, "RETRIES", 0)
    wanted = cells(base, methods="dense", seeds=[0, 1, 2])
    result = quiet_sweep(wanted, base / "ray", engine="ray", workers=1, compute=without_model)
    by_hand, died, raised = (row["error"] for row in result.failed)
    assert (by_hand, raised) == ("failed by hand", "ValueError: no result")
    assert died.startswith("the worker died in each of 1 attempts")


@needs_ray
def test_an_interrupt_closes_the_cluster(base):
    import ray

    def stop(document):
        raise KeyboardInterrupt

    arguments = {"engine": "ray", "workers": 2, "compute": without_model}
    with pytest.raises(KeyboardInterrupt):
        quiet_sweep(cells(base), base / "ray", on_cell=stop, **arguments)
    assert not ray.is_initialized()
    again = quiet_sweep(cells(base), base / "ray")
    assert again.computed == 3 and not again.failed
    assert len(list((base / "ray" / "sweep").iterdir())) == 1


@needs_ray
def test_a_cluster_that_is_not_there(base, monkeypatch):

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(LoadError, match=r"127\.0\.0\.1:9 could not be reached .nothing answers"):
        quiet_sweep(cells(base), base / "ray", engine="ray")

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dart-llm\[cluster\]'"):
        quiet_sweep(cells(base), base / "ray", engine="ray")


def test_a_worker_holds_one_model_through_a_sweep_and_no_longer():
    seen = []
    for sweep in ("first", "first", "second", "first"):
        engine_ray._task(lambda data, held: seen.append(held) or {}, {}, sweep)
    assert seen[0] is seen[1] and len({id(held) for held in seen}) == 3
