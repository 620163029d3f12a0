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
from dart_llm.studies.sweep.study import MeasureStudy
from sweep_fakes import KILL, SLOW, compute, failures, sweep, without_model

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray (extra cluster) is not installed"
)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = [str(Path(sweep_fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))  # for the workers
    return sweep_fakes.place(tmp_path)


#: As /proc/net/tcp and tcp6 write them: 127.0.0.1, ::1, and 127.0.0.1 as an IPv6 address.
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}


def listening():
    """Local addresses of the TCP ports that this machine's processes listen on (Linux)."""
    addresses = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.exists():
            rows = [line.split() for line in table.read_text().splitlines()[1:]]
            addresses |= {row[1] for row in rows if row[3] == "0A"}
    return addresses


class Mortal(MeasureStudy):
    """Cells that die; ``look`` is called after every one."""

    look = staticmethod(lambda: None)
    remote = staticmethod(compute)

    def take(self, unit, value):
        super().take(unit, value)
        type(self).look()


class Empty(Mortal):
    remote = staticmethod(without_model)


@needs_ray
@pytest.mark.contract("resume gives the same bytes")
def test_a_worker_that_is_killed_changes_nothing(base, monkeypatch, capsys):
    import ray

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = sweep(base, base / "alone", seeds=[0, 1])
    (base / "kill").touch()
    monkeypatch.setenv(KILL, str(base / "kill"))
    monkeypatch.setenv(SLOW, "0.5")
    before, opened, handler = listening(), set(), signal.getsignal(signal.SIGTERM)
    capsys.readouterr()

    def look():
        opened.update(listening() - before)
        print("seen")

    monkeypatch.setattr(Mortal, "look", staticmethod(look))
    study = sweep(base, base / "ray", study=Mortal, engine="ray", workers=2, seeds=[0, 1])
    assert not study.failed
    assert not (base / "kill").exists(), "no worker was killed"
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().out == 6 * "seen\n"
    assert opened and {address.split(":")[0] for address in opened} <= LOOPBACK
    for name in ("results.jsonl", "samples.jsonl", "masks.safetensors", "cells.csv"):
        assert (study.path / name).read_bytes() == (alone.path / name).read_bytes()
    times = [value["times"] for value in study.values.values()]
    processes = {time["process"] for time in times}
    assert sum(time["load_s"] > 0 for time in times) == len(processes)
    assert 2 <= len(processes) <= 3 and os.getpid() not in processes


@needs_ray
def test_what_a_worker_cannot_do_fails_its_cell_only(base, monkeypatch):
    monkeypatch.setattr(engine_ray, "RETRIES", 0)
    ray = {"engine": "ray", "workers": 1, "study": Empty}
    study = sweep(base, base / "ray", methods="dense", seeds=[0, 1, 2], **ray)
    by_hand, died, raised = (row["error"] for row in failures(study))
    assert (by_hand, raised) == ("failed by hand", "ValueError: no result")
    assert died.startswith("the worker died in each of 1 attempts")


@needs_ray
def test_an_interrupt_closes_the_cluster(base, monkeypatch):
    import ray

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(Empty, "look", staticmethod(stop))
    with pytest.raises(KeyboardInterrupt):
        sweep(base, base / "ray", study=Empty, engine="ray", workers=2)
    assert not ray.is_initialized()
    again = sweep(base, base / "ray")
    assert again.computed == 3 and not again.failed
    assert len(list((base / "ray" / "sweep").iterdir())) == 1


@needs_ray
def test_a_cluster_that_is_not_there(base, monkeypatch):

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(LoadError, match=r"127\.0\.0\.1:9 could not be reached .nothing answers"):
        sweep(base, base / "ray", engine="ray")

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dart-llm\[cluster\]'"):
        sweep(base, base / "ray", engine="ray")


def test_a_worker_holds_one_model_through_a_sweep_and_no_longer():
    seen = []
    for sweep_id in ("first", "first", "second", "first"):
        engine_ray._task(lambda data, cache: seen.append(cache) or {}, {}, sweep_id)
    assert seen[0] is seen[1] and len({id(held) for held in seen}) == 3
