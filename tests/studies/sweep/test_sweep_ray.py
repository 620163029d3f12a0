"""Cells as Ray tasks: the same bytes, whoever dies."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

import sweep_fakes
from dart_llm.errors import LoadError, MissingExtra
from dart_llm.studies.sweep import ray_backend
from dart_llm.studies.sweep.study import MeasureStudy
from sweep_fakes import KILL, SLOW, compute, failures, sweep, without_model

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray (extra cluster) is not installed"
)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return sweep_fakes.place(tmp_path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two cores on 127.0.0.1, whose workers find this folder's helpers.

    Its second part is the file that has a worker killed.  All tasks have the same environment,
    so that a worker, which takes seconds to start, serves the next test too.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Ray's switch to a single machine: without it every port is open to the network
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        path = [str(Path(sweep_fakes.__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        import ray

        kill = tmp_path_factory.mktemp("ray") / "kill"
        variables = {**ray_backend.worker_environment(1), KILL: str(kill), SLOW: "0.2"}
        patch.setattr(ray_backend, "worker_environment", lambda threads: variables)
        handler, memory = signal.getsignal(signal.SIGTERM), 128 * 2**20
        here = {"address": "local", "_node_ip_address": "127.0.0.1", "num_cpus": 2}
        ray.init(**here, include_dashboard=False, object_store_memory=memory, log_to_driver=False)
        signal.signal(signal.SIGTERM, handler)
        yield ray, kill
        ray.shutdown()


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
def test_a_worker_that_is_killed_changes_nothing(base, cluster, monkeypatch, capsys):
    ray, kill = cluster
    alone = sweep(base, base / "alone")
    kill.touch()
    monkeypatch.setattr(Mortal, "look", staticmethod(lambda: print("seen")))
    capsys.readouterr()
    study = sweep(base, base / "ray", study=Mortal, engine="ray", workers=2)
    assert not study.failed and not kill.exists(), "no worker was killed"
    assert ray.is_initialized(), "a connection that was open before stays open"
    assert capsys.readouterr().out == 3 * "seen\n"
    for name in ("results.jsonl", "samples.jsonl", "compare.csv"):
        assert (study.path / name).read_bytes() == (alone.path / name).read_bytes()


@needs_ray
def test_after_an_interrupt_the_others_are_computed(base, cluster, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(Empty, "look", staticmethod(stop))
    with pytest.raises(KeyboardInterrupt):
        sweep(base, base / "ray", study=Empty, engine="ray", workers=2)
    again = sweep(base, base / "ray")
    assert again.computed == 3 and not again.failed
    assert len(list((base / "ray" / "sweep").glob("2*"))) == 1


@needs_ray
def test_what_a_worker_cannot_do_fails_its_cell_only(base, cluster, monkeypatch):
    monkeypatch.setattr(ray_backend, "RETRIES", 0)
    ray = {"engine": "ray", "workers": 1, "study": Empty}
    study = sweep(base, base / "ray", methods="dense", seeds=[0, 1], **ray)
    raised, died = (row["error"] for row in failures(study))
    assert raised == "ValueError: no result"
    assert died.startswith("the worker died in each of 1 attempts")


@needs_ray
def test_a_cluster_that_is_not_there(base, monkeypatch):
    import ray

    def init(address, **more):
        raise ConnectionError(f"nothing at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(LoadError, match=r"cluster at auto could not be reached .*nothing at auto"):
        sweep(base, base / "ray", engine="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dart-llm\[cluster\]'"):
        sweep(base, base / "ray", engine="ray")


def test_a_worker_holds_one_model_through_a_sweep_and_no_longer(base):
    caches, cell = [], MeasureStudy(sweep_fakes.settings(base, base), None).cells[0].to_dict()
    for sweep_id in ("first", "first", "second", "first"):
        ray_backend._task(lambda data, cache: caches.append(cache) or {}, cell, sweep_id)
    assert caches[0] is caches[1] and len({id(cache) for cache in caches}) == 3
